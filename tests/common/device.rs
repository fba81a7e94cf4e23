//! The device of a test, the orders in which the CUDA emulator runs threads, and the comparison of results.

pub use dllm_kernels::selftest::{Float, Random, narrowed, widened};

use bytemuck::Pod;
use dllm_kernels::gpu::{Device, Stream};
use std::fmt::Debug;
use std::sync::OnceLock;

/// The device that `DLLM_TEST_DEVICE` names: `soft` (the CUDA emulator, default) or `gpu`. A machine without it fails the test; it
/// is never skipped.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        match std::env::var("DLLM_TEST_DEVICE").as_deref() {
            Ok("gpu") => {}
            Err(_) | Ok("soft") => softgpu::install(),
            Ok(other) => panic!("DLLM_TEST_DEVICE: expected soft or gpu, found {other}"),
        }
        Device::open(0).unwrap()
    };
    DEVICE.get_or_init(open).clone()
}

/// Creates a stream on the device.
pub fn stream() -> Stream {
    device().stream().unwrap()
}

/// Makes tests of these functions, which need a device. The CUDA emulator runs each one with the threads of kernels in several
/// orders; anything that it reports fails the test.
///
/// Functions after `in_parts` take a [`Part`](crate::common::Part) and become two tests: one in the module `few`, which runs a few of
/// their cases; and one in the module `whole`, which runs all of them and is ignored unless requested.
macro_rules! on_device {
    ($($test:ident),* $(,)? $(; in_parts: $($long:ident),+ $(,)?)?) => {
        crate::common::device_tests!(on_device, in_every_order; $($test),*; $($($long),+)?);
    };
}

/// Like [`on_device`], for functions that take too long to run in several orders.
macro_rules! once_on_device {
    ($($test:ident),* $(,)? $(; in_parts: $($long:ident),+ $(,)?)?) => {
        crate::common::device_tests!(once_on_device, once; $($test),*; $($($long),+)?);
    };
}

macro_rules! device_tests {
    ($module:ident, $run:ident; $($test:ident),*; $($long:ident),*) => {
        mod $module {
            crate::common::device_tests!(@ $run $($test(),)*);
        }
        crate::common::device_tests!(@parts $run; $($long),*);
    };
    (@ $run:ident $($test:ident($($part:expr)?),)*) => {
        $(
            #[test]
            #[cfg_attr(
                not(all(target_os = "linux", target_arch = "x86_64")),
                ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
            )]
            fn $test() {
                crate::common::$run(|| super::$test($($part)?));
            }
        )*
    };
    (@parts $run:ident;) => {};
    (@parts $run:ident; $($long:ident),+) => {
        mod few {
            crate::common::device_tests!(@ $run $($long(crate::common::Part::Few),)+);
        }
        mod whole {
            $(
                #[test]
                #[ignore = "long: all cases of a test that runs a few of them by default"]
                fn $long() {
                    crate::common::$run(|| super::$long(crate::common::Part::All));
                }
            )+
        }
    };
}
pub(crate) use {device_tests, on_device, once_on_device};

/// Runs `work` with the threads of kernels in two orders, in four with `--include-ignored`, or twice on a GPU. Panics when a result
/// differs.
pub fn in_every_order<R: PartialEq + Debug>(mut work: impl FnMut() -> R) -> R {
    device();
    if !softgpu::active() {
        let result = work();
        assert_eq!(work(), result, "the second run differs");
        return result;
    }
    let seed = softgpu::get(softgpu::Opt::Seed);
    let result = work();
    assert_eq!(softgpu::report(), "");
    let long = std::env::args().any(|arg| arg == "--include-ignored");
    for other in (0..if long { 4 } else { 2 }).filter(|other| *other != seed) {
        softgpu::set(softgpu::Opt::Seed, other);
        assert_eq!(work(), result, "with the threads in order {other}");
        assert_eq!(softgpu::report(), "");
    }
    softgpu::set(softgpu::Opt::Seed, seed);
    result
}

/// Runs `work` on the device. Panics when the CUDA emulator reports an error.
pub fn once<R>(work: impl FnOnce() -> R) {
    device();
    work();
    assert_nothing_reported();
}

/// Runs [`in_every_order`] for work that checks its own results.
pub fn in_several_orders(mut work: impl FnMut()) {
    in_every_order(&mut work);
}

/// Panics when the CUDA emulator has reported an error in this thread's calls.
pub fn assert_nothing_reported() {
    if softgpu::active() {
        assert_eq!(softgpu::report(), "");
    }
}

/// Marker for memory that must not be read or written: all bits are ones, which is NaN for floats.
pub fn poison<T: Pod>() -> T {
    bytemuck::pod_read_unaligned(&[0xff; 16][..size_of::<T>()])
}

/// Places rows of `width` elements `stride` apart, with poison after each.
pub fn spread<T: Pod>(packed: &[T], width: usize, stride: usize) -> Vec<T> {
    let gap = vec![poison(); stride - width];
    packed.chunks_exact(width).flat_map(|row| row.iter().chain(&gap)).copied().collect()
}

/// Panics when bits differ. All NaNs are equal, except poison, which only equals itself.
#[track_caller]
pub fn same_bits<T: Float>(what: &str, got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "{} {what}", T::NAME);
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let any_nan = want.f32().is_nan() && !is_poison(want);
        let same = if any_nan { got.f32().is_nan() } else { bytemuck::bytes_of(got) == bytemuck::bytes_of(want) };
        assert!(same, "{} {what}: element {i}: {got:?}, expected {want:?}", T::NAME);
    }
}

fn is_poison<T: Pod>(x: &T) -> bool {
    bytemuck::bytes_of(x) == bytemuck::bytes_of(&poison::<T>())
}

/// Panics when an element is not between the two elements of `ends`, which may be in either order. It must be NaN where one of them
/// is NaN, and poison where the first is poison.
#[track_caller]
pub fn within<T: Float>(what: &str, got: &[T], ends: [&[T]; 2]) {
    let [one, other] = ends;
    assert!(got.len() == one.len() && got.len() == other.len(), "{} {what}", T::NAME);
    for (i, ((got, one), other)) in got.iter().zip(one).zip(other).enumerate() {
        let [x, a, b] = [got, one, other].map(|x| x.f32());
        let fits = match (is_poison(one), a.is_nan() || b.is_nan()) {
            (true, _) => is_poison(got),
            (false, true) => x.is_nan(),
            (false, false) => a.min(b) <= x && x <= a.max(b),
        };
        assert!(fits, "{} {what}: element {i}: {got:?}, expected {one:?} to {other:?}", T::NAME);
    }
}
