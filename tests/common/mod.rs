//! The only way in which a test gets a device.

use dllm_kernels::gpu::Device;
use std::sync::OnceLock;

/// The device that `DLLM_TEST_DEVICE` names: `soft`, the default, or `gpu`. On a machine without it that is a failure,
/// never a skip.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        match std::env::var("DLLM_TEST_DEVICE").as_deref() {
            Ok("gpu") => {}
            Err(_) | Ok("soft") => softgpu::install(),
            Ok(other) => panic!("DLLM_TEST_DEVICE={other}: soft or gpu"),
        }
        Device::open(0).unwrap()
    };
    DEVICE.get_or_init(open).clone()
}
