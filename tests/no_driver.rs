//! Opening a device without a driver is an error, not a panic. This file has its own process, which does not load the CUDA emulator.
#![cfg(feature = "cuda")]

use dllm_kernels::Error;
use dllm_kernels::gpu::Device;

#[test]
fn no_driver_is_an_error() {
    match Device::count() {
        // The machine has a driver, and perhaps no device.
        Ok(count) => {
            let error = Device::open(count).unwrap_err();
            assert!(matches!(error, Error::NoDevice(_)), "{error}");
        }
        Err(error) => {
            assert_eq!(error.to_string(), "no CUDA driver: libcuda was not found");
            assert!(matches!(Device::open(0), Err(Error::NoDevice(_))));
        }
    }
}
