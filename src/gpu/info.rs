use super::{Device, DriverResult};
use crate::error::Result;
use cudarc::driver::{result, sys};
use std::sync::OnceLock;

/// What the driver tells of a device without making a context on it, whether or not the kernels run there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, for [`Device::open`].
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability: major, minor. The kernels need 8.0.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
}

impl DeviceInfo {
    /// Every device, in order.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn all() -> Result<Vec<DeviceInfo>> {
        (0..Device::count()?).map(DeviceInfo::of).collect()
    }

    fn of(ordinal: usize) -> Result<DeviceInfo> {
        use sys::CUdevice_attribute_enum as Attribute;
        let device = result::device::get(ordinal as i32).of("cuDeviceGet")?;
        // SAFETY: the driver gave the device.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.of("cuDeviceGetAttribute");
        Ok(DeviceInfo {
            ordinal,
            name: result::device::get_name(device).of("cuDeviceGetName")?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(0) as usize,
            // SAFETY: as above.
            memory_bytes: unsafe { result::device::total_mem(device) }.of("cuDeviceTotalMem")?,
        })
    }

    /// Whether it is the software device of the tests, whose times mean nothing.
    pub fn is_software(&self) -> bool {
        self.name.starts_with("software device")
    }
}

impl Device {
    /// The newest CUDA version that the driver knows: major, minor. Not the driver's own number.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn driver_version() -> Result<(i32, i32)> {
        Device::count()?;
        let mut version = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().of("cuDriverGetVersion")?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Whether [`Stream::time_ms`](super::Stream::time_ms) works: it needs a driver for CUDA 12.8 or later,
    /// which is 570. The kernels do not.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn tells_times() -> Result<bool> {
        static KNOWN: OnceLock<bool> = OnceLock::new();
        if let Some(known) = KNOWN.get() {
            return Ok(*known);
        }
        // cudarc panics when the driver lacks a function that the bindings of CUDA 13 use.
        let tells = Device::driver_version()? >= (12, 8);
        Ok(*KNOWN.get_or_init(|| tells))
    }
}
