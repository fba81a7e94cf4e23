use super::{Device, DriverResult};
use crate::error::Result;
use cudarc::driver::{result, sys};
use std::sync::OnceLock;

/// Properties of a device, queried without a context on it, whether or not the kernels run there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Number of the device, for [`Device::open`].
    pub ordinal: usize,
    /// Name that the driver reports.
    pub name: String,
    /// Compute capability: major, minor. The kernels need 8.0.
    pub capability: (i32, i32),
    /// Number of multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of device memory in total.
    pub memory_bytes: usize,
}

impl DeviceInfo {
    /// Returns the properties of all devices, in the order of their numbers.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn all() -> Result<Vec<DeviceInfo>> {
        (0..Device::count()?).map(DeviceInfo::query).collect()
    }

    fn query(ordinal: usize) -> Result<DeviceInfo> {
        use sys::CUdevice_attribute_enum as Attribute;
        let device = result::device::get(ordinal as i32).in_call("cuDeviceGet")?;
        // SAFETY: the driver returned this device.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.in_call("cuDeviceGetAttribute");
        Ok(DeviceInfo {
            ordinal,
            name: result::device::get_name(device).in_call("cuDeviceGetName")?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(0) as usize,
            // SAFETY: as above.
            memory_bytes: unsafe { result::device::total_mem(device) }.in_call("cuDeviceTotalMem")?,
        })
    }

    /// Whether this is the CUDA emulator of the tests, whose times mean nothing.
    pub fn is_software(&self) -> bool {
        self.name.starts_with("software device") // words: allow
    }
}

impl Device {
    /// Returns the newest CUDA version that the driver supports: major, minor. This is not the driver's own version number.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn driver_version() -> Result<(i32, i32)> {
        Device::count()?;
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().in_call("cuDriverGetVersion")?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Whether [`Stream::time_ms`](super::Stream::time_ms) works: it needs a driver for CUDA 12.8 or later,
    /// which is 570. The kernels do not.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn supports_timing() -> Result<bool> {
        static SUPPORTED: OnceLock<bool> = OnceLock::new();
        if let Some(supported) = SUPPORTED.get() {
            return Ok(*supported);
        }
        // cudarc panics when the driver lacks a function that the bindings of CUDA 13 use.
        let supported = Device::driver_version()? >= (12, 8);
        Ok(*SUPPORTED.get_or_init(|| supported))
    }
}
