use super::{Device, DriverResult};
use crate::error::{Error, Result};
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream, sys};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A CUDA stream: work that is enqueued on it runs in order, asynchronously to the host.
///
/// Clones refer to the same stream, and may be used from several threads. An error of a kernel is reported by a later call,
/// at the latest by [`Stream::synchronize`].
#[derive(Clone)]
pub struct Stream {
    device: Device,
    stream: Arc<CudaStream>,
    /// Whether the stream is being captured.
    capturing: Arc<AtomicBool>,
}

impl Device {
    /// Creates a stream, on which work runs independently of other streams.
    pub fn stream(&self) -> Result<Stream> {
        Ok(Stream::new(self.clone(), self.context().new_stream().in_call("cuStreamCreate")?))
    }
}

impl Stream {
    fn new(device: Device, stream: Arc<CudaStream>) -> Stream {
        Stream { device, stream, capturing: Arc::default() }
    }

    /// The stream's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The driver's `CUstream`, for `launch_raw` and other libraries. It is valid as long as this stream or a clone lives.
    pub fn raw(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    pub(super) fn cudarc(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Returns an error during a capture. A graph must not hold copies and allocations: a replay would use memory that was
    /// freed.
    pub(super) fn not_capturing(&self, what: &'static str) -> Result<()> {
        if self.capturing.load(Ordering::Relaxed) {
            return Err(Error::Unavailable(format!("{what}: the stream is being captured")));
        }
        Ok(())
    }

    /// Blocks until all enqueued work is done.
    ///
    /// # Errors
    /// The driver's, also of work that was enqueued before.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().in_call("cuStreamSynchronize")
    }

    /// Whether all enqueued work is done. Does not block.
    ///
    /// # Errors
    /// As [`Stream::synchronize`].
    pub fn is_done(&self) -> Result<bool> {
        self.device.bind()?;
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            done => done.result().in_call("cuStreamQuery").map(|()| true),
        }
    }

    /// Returns a guard that synchronises with the stream when it is dropped. The driver's memory pool reports freed memory as
    /// free only after a synchronisation. The guard must be dropped after the buffers: create it before them, or make it the
    /// last field.
    pub(crate) fn sync_on_drop(&self) -> SyncOnDrop {
        SyncOnDrop(self.clone())
    }

    /// Records an event, which completes when all work enqueued before is done.
    pub(crate) fn record(&self) -> Result<Event> {
        let event =
            self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)).in_call("cuEventRecord")?;
        Ok(Event { event, stream: self.clone() })
    }

    /// Returns the milliseconds that the device takes for the work that `work` enqueues on this stream, measured with events.
    /// Synchronises with the stream.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless [`Device::supports_timing`]; the error of `work`; the driver's.
    pub fn time_ms(&self, work: impl FnOnce() -> Result<()>) -> Result<f32> {
        if !Device::supports_timing()? {
            let (major, minor) = Device::driver_version()?;
            return Err(Error::Unsupported {
                what: "times".into(),
                expected: "a driver of 570 or later".into(),
                found: format!("a driver for CUDA {major}.{minor}"),
            });
        }
        let record = || self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).in_call("cuEventRecord");
        let before = record()?;
        work()?;
        let after = record()?;
        self.synchronize()?;
        before.elapsed_ms(&after).in_call("cuEventElapsedTime")
    }

    /// Captures the work that `work` enqueues on this stream in a graph, without running it.
    ///
    /// Kernels must be loaded before ([`Device::preload`]). During the capture, buffers can be neither allocated, written nor
    /// read: these calls return [`Error::Unavailable`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the stream is being captured already; the error of `work`; the driver's when the work
    /// cannot be captured.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        use sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as MODE;
        self.not_capturing("capture")?;
        self.device.bind()?;
        self.stream.begin_capture(MODE).in_call("cuStreamBeginCapture")?;
        self.capturing.store(true, Ordering::Relaxed);
        let mut capture = Capture { stream: self, ended: false };
        let done = work();
        let graph = capture.end();
        done?;
        Ok(Graph { graph: graph?, stream: self.clone() })
    }
}

/// A capture in progress. Dropping it ends the capture, also during a panic.
struct Capture<'a> {
    stream: &'a Stream,
    ended: bool,
}

impl Capture<'_> {
    fn end(&mut self) -> Result<Option<CudaGraph>> {
        self.ended = true;
        self.stream.capturing.store(false, Ordering::Relaxed);
        self.stream.stream.end_capture(sys::CUgraphInstantiate_flags(0)).in_call("cuStreamEndCapture")
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end(); // a panic: the graph is discarded
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

/// Guard of [`Stream::sync_on_drop`].
pub(crate) struct SyncOnDrop(Stream);

impl Drop for SyncOnDrop {
    fn drop(&mut self) {
        let _ = self.0.synchronize(); // an error here belongs to work whose result was never requested
    }
}

/// An event recorded on a stream.
pub(crate) struct Event {
    event: CudaEvent,
    stream: Stream,
}

impl Event {
    /// Blocks until the event has completed.
    pub fn wait(&self) -> Result<()> {
        self.stream.device.bind()?;
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.event.cu_event()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => self.event.synchronize().in_call("cuEventSynchronize"),
            done => done.result().in_call("cuEventQuery"),
        }
    }
}

/// CUDA graph captured by [`Stream::capture`], for replays on the same stream.
pub struct Graph {
    /// `None` when nothing was captured.
    graph: Option<CudaGraph>,
    stream: Stream,
}

// SAFETY: a graph is not bound to a thread. The driver requires that no two threads use it at once: it is not Sync.
unsafe impl Send for Graph {}

impl Graph {
    /// Returns the number of captured nodes: kernels, copies and fills.
    pub fn nodes(&self) -> Result<usize> {
        let Some(graph) = &self.graph else { return Ok(0) };
        let mut count = 0;
        // SAFETY: the graph is alive; without an array only the count is written.
        unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }
            .result()
            .in_call("cuGraphGetNodes")?;
        Ok(count)
    }

    /// Enqueues the captured work on the stream that it was captured from. Does not block.
    ///
    /// # Safety
    /// 1. Every buffer that the captured work uses is alive until the work is done.
    /// 2. No other stream uses these buffers at the same time.
    pub unsafe fn launch(&self) -> Result<()> {
        self.stream.device.bind()?;
        self.graph.as_ref().map_or(Ok(()), |graph| graph.launch().in_call("cuGraphLaunch"))
    }
}
