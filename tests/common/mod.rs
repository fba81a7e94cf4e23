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

/// Runs `work` under several orders of blocks and threads where the device lets us choose, and as often where not.
#[allow(dead_code)]
pub fn in_several_orders(mut work: impl FnMut()) {
    for seed in 0..4 {
        if softgpu::active() {
            softgpu::set(softgpu::Opt::Seed, seed);
        }
        work();
    }
    if softgpu::active() {
        softgpu::set(softgpu::Opt::Seed, 0);
    }
}

/// The software device has seen nothing wrong in this thread's calls.
#[allow(dead_code)]
pub fn assert_nothing_reported() {
    if softgpu::active() {
        assert_eq!(softgpu::report(), "");
    }
}

/// Numbers from a seed.
#[allow(dead_code)]
pub struct Random(pub u64);

#[allow(dead_code)]
impl Random {
    /// SplitMix64.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From -1 to 1.
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
