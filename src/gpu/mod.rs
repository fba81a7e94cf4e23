//! CUDA devices, their streams and memory, and the kernel modules; thin, over cudarc.
//!
//! Nothing here needs a driver to compile or to start: it is looked for when a [`Device`] is asked for. Event tracking
//! of cudarc is off, so that streams can be captured; a [`Buffer`] belongs to the stream that made it.

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

/// Names the call that failed.
pub(crate) trait DriverResult<T> {
    fn of(self, call: &'static str) -> Result<T>;
}

impl<T> DriverResult<T> for Result<T, DriverError> {
    fn of(self, call: &'static str) -> Result<T> {
        self.map_err(|error| {
            let word = |text: Result<&std::ffi::CStr, DriverError>| match text {
                Ok(text) => text.to_string_lossy().into_owned(),
                Err(_) => format!("error {}", error.0 as u32),
            };
            Error::Driver { call, name: word(error.error_name()), message: word(error.error_string()) }
        })
    }
}
