use super::{Device, DriverResult};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::result;
use std::fmt;
use std::ptr::NonNull;

/// Host memory that the device can reach: copies from it need no wait of the host, and kernels can write it. Zeroed at
/// first. Elements are read and written one by one, so that neither side sees a torn one of up to 8 bytes.
pub struct Pinned<T> {
    memory: NonNull<T>,
    len: usize,
    device: Device,
}

// SAFETY: plain data behind an address that is bound to no thread.
unsafe impl<T: Pod + Send> Send for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Room for `len` elements, at least one.
    pub fn new(device: &Device, len: usize) -> Result<Pinned<T>> {
        const MAPPED: u32 = 2; // CU_MEMHOSTALLOC_DEVICEMAP
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes > 0).ok_or_else(|| {
            Error::argument("pinned", "a size that an address can hold", format!("{len} x {} bytes", size_of::<T>()))
        })?;
        device.bind()?;
        // SAFETY: a new allocation.
        let memory = unsafe { result::malloc_host(bytes, MAPPED) }.of("cuMemHostAlloc")?;
        let memory = NonNull::new(memory.cast::<T>())
            .ok_or_else(|| Error::Unavailable("cuMemHostAlloc gave no memory".into()))?;
        // SAFETY: as many bytes were allocated; zeros are a value of plain data.
        unsafe { memory.as_ptr().cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { memory, len, device: device.clone() })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none, which cannot be.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address, the same on the host and on the device (unified addressing, which 8.0 and later have).
    pub fn address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Element `index` as it is now, whoever wrote it. What the device wrote before is seen after it.
    ///
    /// # Panics
    /// When there is no such element.
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.len, "element {index} of {}", self.len);
        // SAFETY: within the allocation; volatile, because the device may write meanwhile.
        let value = unsafe { self.memory.as_ptr().add(index).read_volatile() };
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        value
    }

    /// Writes `data` from element `at` on. Copies that the device makes of these elements must be done, or they get a
    /// mixture of old and new ones.
    ///
    /// # Panics
    /// When there is not room for them.
    pub fn write(&mut self, at: usize, data: &[T]) {
        assert!(at <= self.len && data.len() <= self.len - at, "{} elements at {at} of {}", data.len(), self.len);
        // SAFETY: within the allocation; `data` is not in it, since nobody gets a slice of it.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.memory.as_ptr().add(at), data.len()) };
    }

    /// All of it, for a writer that fills it in parallel. The same holds as for [`Pinned::write`].
    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the whole allocation, borrowed alone; the caller has seen to it that the device is not using it.
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
