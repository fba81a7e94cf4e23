use super::{Device, DriverResult};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::result;
use std::fmt;
use std::ptr::NonNull;

/// Pinned host memory, mapped on the device: copies from it do not block the host, and kernels can write it.
///
/// Memory is zeroed when it is allocated. [`Pinned::get`] reads an element with one volatile load. An element of up to 8 bytes
/// that the device stores at once is therefore never read half-written.
pub struct Pinned<T> {
    memory: NonNull<T>,
    len: usize,
    device: Device,
}

// SAFETY: plain data behind an address that is not bound to a thread.
unsafe impl<T: Pod + Send> Send for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Allocates `len` elements, at least one.
    ///
    /// # Errors
    /// [`Error::Argument`] when `len` is 0 or the size overflows; the driver's, for example when memory is short.
    pub fn new(device: &Device, len: usize) -> Result<Pinned<T>> {
        const MAPPED: u32 = 2; // CU_MEMHOSTALLOC_DEVICEMAP
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes > 0).ok_or_else(|| {
            Error::argument("pinned", "a size that an address can hold", format!("{len} x {} bytes", size_of::<T>()))
        })?;
        device.bind()?;
        // SAFETY: a new allocation.
        let memory = unsafe { result::malloc_host(bytes, MAPPED) }.in_call("cuMemHostAlloc")?;
        let memory = NonNull::new(memory.cast::<T>()).ok_or_else(|| Error::Driver {
            call: "cuMemHostAlloc",
            name: "CUDA_SUCCESS".into(),
            message: "returned a null address".into(),
        })?;
        // SAFETY: as many bytes were allocated; zeros are a value of plain data.
        unsafe { memory.as_ptr().cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { memory, len, device: device.clone() })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: there is at least one element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first element, the same on the host and on the device (unified addressing, which devices of compute
    /// capability 8.0 and later have).
    pub fn address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Returns the present value of element `index`, with an acquire fence after the load: device writes that were made
    /// visible to the system before this value are seen by later loads. Does not call the driver.
    ///
    /// # Panics
    /// When `index` is not below [`Pinned::len`].
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.len, "element {index} of {}", self.len);
        // SAFETY: within the allocation; volatile, because the device may write at the same time.
        let value = unsafe { self.memory.as_ptr().add(index).read_volatile() };
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        value
    }

    /// Writes `data` to the elements from `at` on. Device copies from these elements must be done; otherwise they copy a
    /// mixture of old and new elements.
    ///
    /// # Panics
    /// When `data` ends past the memory.
    pub fn write(&mut self, at: usize, data: &[T]) {
        assert!(at <= self.len && data.len() <= self.len - at, "{} elements at {at} of {}", data.len(), self.len);
        // SAFETY: within the allocation; `data` is outside of it, as a slice of it exists only while `self` is borrowed.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.memory.as_ptr().add(at), data.len()) };
    }

    /// All elements, for a caller that fills them in parallel. Device copies from them must be done, as for
    /// [`Pinned::write`].
    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the whole allocation, borrowed exclusively; the caller ensures that the device does not use it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: from cuMemHostAlloc. A failure leaves the memory to the driver.
            let _ = unsafe { result::free_host(self.memory.as_ptr().cast()) };
        }
    }
}

impl<T> fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Pinned").field("len", &self.len).finish_non_exhaustive()
    }
}
