use super::{Buffer, Device, DriverResult};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream, sys};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A queue of work on a device: what is put in runs in order, while the host goes on.
///
/// Clones are the same queue. Errors of kernels that run later are told by a later call.
#[derive(Clone)]
pub struct Stream {
    device: Device,
    stream: Arc<CudaStream>,
    /// Whether a graph is being captured.
    capturing: Arc<AtomicBool>,
}

impl Stream {
    pub(super) fn new(device: Device, stream: Arc<CudaStream>) -> Stream {
        Stream { device, stream, capturing: Arc::default() }
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The driver's `CUstream`, valid as long as this stream or a clone is there.
    pub fn raw(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    pub(super) fn cudarc(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Copies and allocations have no place in a graph: it would replay them with memory that is gone.
    pub(super) fn not_capturing(&self, what: &'static str) -> Result<()> {
        match self.capturing.load(Ordering::Relaxed) {
            true => Err(Error::Unavailable(format!("{what}: the stream is being captured"))),
            false => Ok(()),
        }
    }

    /// Memory for `len` elements, with any contents.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::alloc(self, len)
    }

    /// Memory for `len` elements, zeroed.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(len)?;
        buffer.fill_zero()?;
        Ok(buffer)
    }

    /// A copy of `data` on the device.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(data.len())?;
        buffer.write(data)?;
        Ok(buffer)
    }

    /// Waits until all work put in so far is done, and tells whether it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().of("cuStreamSynchronize")
    }

    /// Whether all work put in so far is done; tells whether it failed. Does not wait.
    pub fn is_done(&self) -> Result<bool> {
        self.device.bind()?;
        // SAFETY: the stream is there.
        match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            done => done.result().of("cuStreamQuery").map(|()| true),
        }
    }

    /// A value that waits for the stream when it goes: the driver's pool gives freed memory back, and counts it as free, when
    /// somebody has waited. It goes after the buffers, where it was made before them or is the last field.
    pub(crate) fn sync_on_drop(&self) -> SyncOnDrop {
        SyncOnDrop(self.clone())
    }

    /// A mark in the stream: it has come to pass when all work put in so far is done.
    pub(crate) fn record(&self) -> Result<Event> {
        let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)).of("cuEventRecord")?;
        Ok(Event { event, stream: self.clone() })
    }

    /// Milliseconds that the device takes for what `work` puts into this stream, by its own clock; waits for it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where not [`Device::tells_times`]; that of `work`; the driver's.
    pub fn time_ms(&self, work: impl FnOnce() -> Result<()>) -> Result<f32> {
        if !Device::tells_times()? {
            let message =
                "times need a driver of 570 or later, or a build with the feature cuda-12 in place of cuda-13";
            return Err(Error::Unavailable(message.into()));
        }
        let record = || self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).of("cuEventRecord");
        let before = record()?;
        work()?;
        let after = record()?;
        self.synchronize()?;
        before.elapsed_ms(&after).of("cuEventElapsedTime")
    }

    /// Records what `work` puts into this stream, without running it. Kernels must be loaded before ([`Device::preload`]);
    /// memory can neither be allocated, written nor read meanwhile.
    ///
    /// # Errors
    /// That of `work`, or the driver's when the work cannot be recorded.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        use sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as MODE;
        self.not_capturing("capture")?;
        self.device.bind()?;
        self.stream.begin_capture(MODE).of("cuStreamBeginCapture")?;
        self.capturing.store(true, Ordering::Relaxed);
        let mut capture = Capture { stream: self, ended: false };
        let done = work();
        let graph = capture.end();
        done?;
        Ok(Graph { graph: graph?, stream: self.clone() })
    }
}

/// A capture under way, which is ended whatever happens, a panic included.
struct Capture<'a> {
    stream: &'a Stream,
    ended: bool,
}

impl Capture<'_> {
    fn end(&mut self) -> Result<Option<CudaGraph>> {
        self.ended = true;
        self.stream.capturing.store(false, Ordering::Relaxed);
        self.stream.stream.end_capture(sys::CUgraphInstantiate_flags(0)).of("cuStreamEndCapture")
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end(); // the panic goes on; what was recorded is of no use
        }
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Stream) -> bool {
        Arc::ptr_eq(&self.stream, &other.stream)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Stream").field("device", &self.device).finish_non_exhaustive()
    }
}

/// See [`Stream::sync_on_drop`].
pub(crate) struct SyncOnDrop(Stream);

impl Drop for SyncOnDrop {
    fn drop(&mut self) {
        let _ = self.0.synchronize(); // an error here is of work that nobody has waited for
    }
}

/// A mark in a stream.
pub(crate) struct Event {
    event: CudaEvent,
    stream: Stream,
}

impl Event {
    /// Waits until it has come to pass, if it has not yet.
    pub fn wait(&self) -> Result<()> {
        self.stream.device.bind()?;
        // SAFETY: the event is there.
        match unsafe { sys::cuEventQuery(self.event.cu_event()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => self.event.synchronize().of("cuEventSynchronize"),
            done => done.result().of("cuEventQuery"),
        }
    }
}

/// Work recorded by [`Stream::capture`].
pub struct Graph {
    /// None when nothing was recorded.
    graph: Option<CudaGraph>,
    stream: Stream,
}

// SAFETY: a graph is bound to no thread; the driver asks only that no two threads use it at once, and it is not Sync.
unsafe impl Send for Graph {}

impl Graph {
    /// How many pieces of work were recorded: kernels, copies and fills.
    pub fn nodes(&self) -> Result<usize> {
        let Some(graph) = &self.graph else { return Ok(0) };
        let mut count = 0;
        // SAFETY: the graph is there; without an array only the count is written.
        unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }
            .result()
            .of("cuGraphGetNodes")?;
        Ok(count)
    }

    /// Puts the recorded work into the stream that it was recorded from.
    ///
    /// # Safety
    /// Every buffer that the work uses is still there, and no other stream uses it meanwhile.
    pub unsafe fn launch(&self) -> Result<()> {
        self.stream.device.bind()?;
        self.graph.as_ref().map_or(Ok(()), |graph| graph.launch().of("cuGraphLaunch"))
    }
}
