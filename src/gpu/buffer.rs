use super::{DriverResult, Pinned, Stream};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::{CudaSlice, DevicePtr, sys};
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

/// Memory on a device for elements of one type, aligned to 256 bytes. It belongs to the stream that made it: everything
/// that is done with it is put into that stream, so nothing overtakes anything.
pub struct Buffer<T> {
    bytes: CudaSlice<u8>,
    /// Elements; there are at least so many bytes.
    len: usize,
    stream: Stream,
    elements: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    pub(super) fn alloc(stream: &Stream, len: usize) -> Result<Buffer<T>> {
        stream.not_capturing("alloc")?;
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::argument("buffer", "a size that an address can hold", format!("{len} x {} bytes", size_of::<T>()))
        })?;
        // The driver allocates no empty memory, and ops want an address.
        // SAFETY: bytes have no invalid values, and T is plain data: whatever the memory holds is a value.
        let allocated = unsafe { stream.cudarc().alloc::<u8>(bytes.max(16)) }.of("cuMemAllocAsync");
        let bytes = allocated.map_err(|error| match error {
            Error::Driver { call, name, message } => {
                Error::Driver { call, name, message: format!("{message} (asked for {bytes} bytes)") }
            }
            other => other,
        })?;
        Ok(Buffer { bytes, len, stream: stream.clone(), elements: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The stream it belongs to.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.bytes.device_ptr(self.stream.cudarc()).0
    }

    /// Zeroes all of it.
    pub fn fill_zero(&mut self) -> Result<()> {
        self.stream.cudarc().memset_zeros(&mut self.bytes).of("cuMemsetD8Async")
    }

    /// Copies `data` to its first elements.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is not room for them.
    pub fn write(&mut self, data: &[T]) -> Result<()> {
        if data.len() > self.len() {
            return Err(Error::argument("data", format!("at most {} elements", self.len()), data.len()));
        }
        self.stream.not_capturing("write")?;
        if data.is_empty() {
            return Ok(());
        }
        self.stream.cudarc().memcpy_htod(bytemuck::cast_slice::<T, u8>(data), &mut self.bytes).of("cuMemcpyHtoDAsync")
    }

    /// Copies `from[first..first + count]` to element `at` and after, without a wait of the host.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is not room for them, or not as many there.
    ///
    /// # Safety
    /// `from` is there, and nobody writes to these elements, until the copy is done.
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
        // SAFETY: both ranges were checked; the rest by the caller's word.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes(count) as usize, self.stream.raw().cast()) }
            .result()
            .of("cuMemcpyHtoDAsync")
    }

    /// Waits for the stream, and copies the contents to the host.
    pub fn read(&self) -> Result<Vec<T>> {
        self.read_first(self.len)
    }

    /// The same of its first elements, at most so many.
    pub fn read_first(&self, count: usize) -> Result<Vec<T>> {
        self.stream.not_capturing("read")?;
        let count = count.min(self.len);
        let mut data = vec![T::zeroed(); count];
        if let Some(bytes) = self.bytes.try_slice(0..count * size_of::<T>()).filter(|_| count > 0) {
            let to = bytemuck::cast_slice_mut::<T, u8>(&mut data);
            self.stream.cudarc().memcpy_dtoh(&bytes, to).of("cuMemcpyDtoHAsync")?;
        }
        self.stream.synchronize()?;
        Ok(data)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // Freed next, on whichever thread this is. A failure shows in the free, which the context remembers.
        let _ = self.stream.device().bind();
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Buffer").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}
