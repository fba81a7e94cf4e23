//! CUDA devices, their streams and memory, graphs, kernel modules and cuBLASLt: a thin layer over cudarc.
//!
//! No driver is needed to compile or to start a program: the first call to [`Device`] loads it. Event tracking of cudarc is
//! off, so that streams can be captured; a [`Buffer`] belongs to the stream that allocated it.
//!
//! Every method that calls the driver returns [`Error::Driver`] when the driver refuses the call or reports that earlier work
//! failed. All public types are `Send`, and may be dropped on any thread. Each call makes the device's primary context current
//! on its thread.

pub mod blas;
mod buffer;
mod device;
mod info;
mod modules;
pub(crate) mod nvtx;
mod pinned;
mod stream;

pub use buffer::Buffer;
pub use device::Device;
pub(crate) use device::Launch;
pub use info::DeviceInfo;
pub use modules::Module;
pub use pinned::Pinned;
pub(crate) use stream::{Event, SyncOnDrop};
pub use stream::{Graph, Stream};

use crate::error::{Error, Result};
use cudarc::driver::DriverError;

/// Conversion of driver errors to [`Error::Driver`] with the name of the called function.
pub(crate) trait DriverResult<T> {
    fn in_call(self, call: &'static str) -> Result<T>;
}

impl<T> DriverResult<T> for Result<T, DriverError> {
    fn in_call(self, call: &'static str) -> Result<T> {
        self.map_err(|error| {
            let or_code = |text: Result<&std::ffi::CStr, DriverError>| match text {
                Ok(text) => text.to_string_lossy().into_owned(),
                Err(_) => format!("error {}", error.0 as u32),
            };
            Error::Driver { call, name: or_code(error.error_name()), message: or_code(error.error_string()) }
        })
    }
}
