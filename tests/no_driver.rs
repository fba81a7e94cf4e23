//! Without a driver a device is an error, not a panic. A process of its own, which loads no software device.
#![cfg(feature = "cuda")]

use dllm_kernels::Error;
use dllm_kernels::gpu::Device;

#[test]
fn no_driver_is_an_error() {
    match Device::count() {
        // A machine with a driver, and perhaps without a device.
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
