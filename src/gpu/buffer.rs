use super::{DriverResult, Pinned, Stream};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::{CudaSlice, DevicePtr, sys};
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

/// Device memory for elements of type `T`, aligned to 256 bytes.
///
/// A buffer belongs to the stream that allocated it ([`Stream::alloc`]): copies, fills and the final free are enqueued on that
/// stream, after the work enqueued before. Dropping a buffer does not block; the driver frees the memory in stream order.
///
/// Copies and allocations cannot be captured: they return [`Error::Unavailable`] while the stream is being captured.
pub struct Buffer<T> {
    bytes: CudaSlice<u8>,
    /// Number of elements. The allocation has at least 16 bytes.
    len: usize,
    stream: Stream,
    elements: PhantomData<T>,
}

impl Stream {
    /// Allocates memory for `len` elements, without initialising it. Does not block.
    ///
    /// # Errors
    /// [`Error::Unavailable`] during a capture; [`Error::Argument`] when the size overflows; the driver's, for example when
    /// memory is short.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::alloc(self, len)
    }

    /// Allocates memory for `len` elements and enqueues a fill with zeros.
    ///
    /// # Errors
    /// As [`Stream::alloc`].
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(len)?;
        buffer.fill_zero()?;
        Ok(buffer)
    }

    /// Allocates memory and copies `data` to it. `data` may be reused when this returns.
    ///
    /// # Errors
    /// As [`Stream::alloc`].
    pub fn upload<T: Pod>(&self, data: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(data.len())?;
        buffer.write(data)?;
        Ok(buffer)
    }
}

impl<T: Pod> Buffer<T> {
    pub(super) fn alloc(stream: &Stream, len: usize) -> Result<Buffer<T>> {
        stream.not_capturing("alloc")?;
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::argument("buffer", "a size that an address can hold", format!("{len} x {} bytes", size_of::<T>()))
        })?;
        // The driver allocates no empty memory, and ops require an address.
        // SAFETY: bytes have no invalid values, and T is plain data: any contents are valid.
        let allocated = unsafe { stream.cudarc().alloc::<u8>(bytes.max(16)) }.in_call("cuMemAllocAsync");
        let bytes = allocated.map_err(|error| match error {
            Error::Driver { call, name, message } => {
                Error::Driver { call, name, message: format!("{message} (requested {bytes} bytes)") }
            }
            other => other,
        })?;
        Ok(Buffer { bytes, len, stream: stream.clone(), elements: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements. [`Buffer::address`] is valid even then.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The stream that the buffer belongs to.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Device address of the first element, for parameter structs. It stays the same as long as the buffer lives.
    pub fn address(&self) -> u64 {
        self.bytes.device_ptr(self.stream.cudarc()).0
    }

    /// Enqueues a fill with zeros. Does not block; may be captured.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill_zero(&mut self) -> Result<()> {
        self.stream.cudarc().memset_zeros(&mut self.bytes).in_call("cuMemsetD8Async")
    }

    /// Copies `data` to the first elements, after the work enqueued before. `data` may be reused when this returns.
    ///
    /// # Errors
    /// [`Error::Argument`] when `data` has more elements than the buffer; [`Error::Unavailable`] during a capture; the
    /// driver's.
    pub fn write(&mut self, data: &[T]) -> Result<()> {
        if data.len() > self.len() {
            return Err(Error::argument("data", format!("at most {} elements", self.len()), data.len()));
        }
        self.stream.not_capturing("write")?;
        if data.is_empty() {
            return Ok(());
        }
        self.stream
            .cudarc()
            .memcpy_htod(bytemuck::cast_slice::<T, u8>(data), &mut self.bytes)
            .in_call("cuMemcpyHtoDAsync")
    }

    /// Enqueues a copy of `from[first..first + count]` to the elements from `at` on. Does not block.
    ///
    /// # Errors
    /// [`Error::Argument`] when a range ends past its memory; [`Error::Unavailable`] during a capture; the driver's.
    ///
    /// # Safety
    /// 1. `from` is not dropped before the copy is done.
    /// 2. These elements of `from` are not written before the copy is done.
    pub unsafe fn write_pinned(&mut self, at: usize, from: &Pinned<T>, first: usize, count: usize) -> Result<()> {
        for (name, len, first) in [("buffer", self.len, at), ("pinned", from.len(), first)] {
            if first.checked_add(count).is_none_or(|end| end > len) {
                return Err(Error::argument(name, format!("room for {count} elements at {first}"), len));
            }
        }
        self.stream.not_capturing("write")?;
        if count == 0 {
            return Ok(());
        }
        self.stream.device().bind()?;
        let bytes = |elements: usize| (elements * size_of::<T>()) as u64;
        let (to, from) = (self.address() + bytes(at), from.address() + bytes(first));
        // SAFETY: both ranges were checked; the rest as promised by the caller.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes(count) as usize, self.stream.raw().cast()) }
            .result()
            .in_call("cuMemcpyHtoDAsync")
    }

    /// Synchronises with the stream and returns a copy of all elements.
    ///
    /// # Errors
    /// [`Error::Unavailable`] during a capture; the driver's, also of work that was enqueued before.
    pub fn read(&self) -> Result<Vec<T>> {
        self.read_first(self.len)
    }

    /// Synchronises with the stream and returns a copy of the first `count` elements, or of all when there are fewer.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub fn read_first(&self, count: usize) -> Result<Vec<T>> {
        self.stream.not_capturing("read")?;
        let count = count.min(self.len);
        let mut data = vec![T::zeroed(); count];
        if let Some(bytes) = self.bytes.try_slice(0..count * size_of::<T>()).filter(|_| count > 0) {
            let to = bytemuck::cast_slice_mut::<T, u8>(&mut data);
            self.stream.cudarc().memcpy_dtoh(&bytes, to).in_call("cuMemcpyDtoHAsync")?;
        }
        self.stream.synchronize()?;
        Ok(data)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // The free that follows needs the context on this thread. If this fails, so does the free, which cudarc records.
        let _ = self.stream.device().bind();
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Buffer").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}
