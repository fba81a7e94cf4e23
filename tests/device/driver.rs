//! Devices, modules, memory and captures, and their errors. Tests that set options of the CUDA emulator run one at a time and share
//! their process with no other file.

use crate::common::device;
use dllm_kernels::Error;
use dllm_kernels::gpu::{Device, Module};
use dllm_kernels::ops::gather_scatter::{self, Copy, GatherScatter};

/// Runs `work` with an option of the CUDA emulator set; prints a note and does nothing on a GPU.
fn with(option: softgpu::Opt, value: i64, work: impl FnOnce()) {
    device();
    if !softgpu::active() {
        eprintln!("not run: only the CUDA emulator has {option:?}");
        return;
    }
    let _turn = crate::alone();
    let before = softgpu::get(option);
    softgpu::set(softgpu::Opt::Quiet, 1);
    softgpu::set(option, value);
    work();
    softgpu::set(option, before);
    softgpu::report();
}

fn gather(device: &Device) -> dllm_kernels::Result<Vec<f32>> {
    let stream = device.stream()?;
    let source = stream.upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])?;
    let index = stream.upload(&[1, 0])?;
    let mut target = stream.zeros(8)?;
    let rows =
        GatherScatter { index: &index, count: None, width: 4, source: &source, target: &mut target, failed: None };
    gather_scatter::launch(&stream, rows, Copy::Gather)?;
    target.read()
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn device_properties() {
    let device = device();
    assert!(Device::count().unwrap() >= 1);
    assert!(device.capability() >= (8, 0));
    assert!(!device.name().unwrap().is_empty());
    let (free, total) = device.memory_bytes().unwrap();
    assert!(0 < free && free <= total);
    assert!(format!("{device:?}").contains("ordinal: 0"));
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn missing_device() {
    device();
    let error = Device::open(1000).unwrap_err();
    assert!(matches!(error, Error::NoDevice(_)) && error.to_string().contains("no CUDA device 1000"), "{error}");
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn every_module_has_its_kernels() {
    device().preload().unwrap();
    for module in Module::all() {
        assert!(module.ptx.starts_with(".version 8.0\n"), "{}", module.name);
        assert!(
            module.ptx.contains(&format!(".target {}\n", module.target.replace("compute", "sm"))),
            "{}",
            module.name
        );
        assert!(module.ptx.contains(".visible .entry"), "{}", module.name);
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn the_most_specific_module_is_selected() {
    assert_eq!(Module::choose("unmask", (8, 0)).unwrap().target, "compute_80");
    assert_eq!(Module::choose("unmask", (12, 0)).unwrap().target, "compute_80");
    assert!(Module::choose("unmask", (7, 5)).is_none());
    assert!(Module::choose("nothing", (9, 0)).is_none());
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn an_old_device_is_refused() {
    with(softgpu::Opt::ComputeCapability, 75, || {
        let error = Device::open(0).unwrap_err().to_string();
        assert!(error.contains("compute capability 7.5; the kernels need 8.0"), "{error}");
    });
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn an_ampere_device_runs_the_kernels() {
    with(softgpu::Opt::ComputeCapability, 80, || {
        let device = Device::open(0).unwrap();
        assert_eq!(device.capability(), (8, 0));
        assert_eq!(gather(&device).unwrap(), [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]);
    });
}

/// With a driver older than the modules, the error names the module and the call, and contains the driver's log.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn an_old_driver_is_refused() {
    with(softgpu::Opt::MaxPtx, 74, || {
        let device = Device::open(0).unwrap();
        let error = gather(&device).unwrap_err();
        assert!(matches!(error, Error::Module { .. }), "{error}");
        let error = error.to_string();
        for part in ["gather_scatter (compute_80)", "cuModuleLoadDataEx", "UNSUPPORTED_PTX", "8.0"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!error.contains("no log"), "{error}");
        // The failure is not cached.
        softgpu::set(softgpu::Opt::MaxPtx, 90);
        assert!(gather(&device).is_ok());
    });
}

/// When an allocation fails, the error names the requested bytes, nothing leaks, and the device stays usable.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn out_of_memory_is_an_error() {
    for nth in 0..3 {
        with(softgpu::Opt::FailAlloc, nth, || {
            let before = softgpu::get(softgpu::Opt::LiveAllocations);
            let error = gather(&device()).unwrap_err().to_string();
            assert!(error.contains("CUDA_ERROR_OUT_OF_MEMORY") && error.contains("bytes)"), "{error}");
            softgpu::set(softgpu::Opt::FailAlloc, -1);
            assert!(gather(&device()).is_ok());
            assert_eq!(softgpu::get(softgpu::Opt::LiveAllocations), before);
        });
    }
    let error = device().stream().unwrap().alloc::<u64>(usize::MAX / 4).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error}");
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn buffers() {
    let stream = device().stream().unwrap();
    let mut buffer = stream.upload(&[1u32, 2, 3]).unwrap();
    assert_eq!((buffer.len(), buffer.is_empty(), buffer.address() % 16), (3, false, 0));
    buffer.write(&[7]).unwrap();
    assert_eq!(buffer.read().unwrap(), [7, 2, 3]);
    buffer.fill_zero().unwrap();
    assert_eq!(buffer.read().unwrap(), [0, 0, 0]);
    let error = buffer.write(&[0; 4]).unwrap_err().to_string();
    assert!(error.contains("data: expected at most 3 elements, found 4"), "{error}");
    let mut empty = stream.alloc::<f32>(0).unwrap();
    empty.write(&[]).unwrap();
    assert!(empty.is_empty() && empty.read().unwrap().is_empty());
}

/// Copies, allocations and nested captures are errors during a capture: the graph would outlive their memory. The stream stays usable.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn captures_refuse_copies() {
    let stream = device().stream().unwrap();
    let mut buffer = stream.zeros::<u32>(4).unwrap();
    let refused = |work: &mut dyn FnMut() -> dllm_kernels::Result<()>| {
        let error = stream.capture(work).err().unwrap().to_string();
        assert!(error.contains("the stream is being captured"), "{error}");
    };
    refused(&mut || stream.alloc::<u8>(4).map(|_| ()));
    refused(&mut || buffer.write(&[1]));
    refused(&mut || buffer.read().map(|_| ()));
    refused(&mut || stream.capture(|| Ok(())).map(|_| ()));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stream.capture(|| panic!("expected"))));
    assert!(panicked.is_err());
    buffer.write(&[7]).unwrap();
    assert_eq!(buffer.read().unwrap(), [7, 0, 0, 0]);
}

/// A graph may be replayed by another thread.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn graphs_move_between_threads() {
    let stream = device().stream().unwrap();
    let mut buffer = stream.upload(&[1u32, 2]).unwrap();
    let graph = stream.capture(|| buffer.fill_zero()).unwrap();
    // SAFETY: the buffer outlives the thread, and no other code uses it meanwhile.
    std::thread::spawn(move || unsafe { graph.launch() }).join().unwrap().unwrap();
    assert_eq!(buffer.read().unwrap(), [0, 0]);
}

/// A capture that fails leaves the stream usable; an empty capture gives an empty graph.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn captures() {
    let stream = device().stream().unwrap();
    let graph = stream.capture(|| Ok(())).unwrap();
    // SAFETY: the graph uses no buffers.
    unsafe { graph.launch() }.unwrap();
    let error = stream.capture(|| Err(Error::Unavailable("no".into()))).err().unwrap();
    assert_eq!(error.to_string(), "no");
    if softgpu::active() {
        softgpu::set(softgpu::Opt::Quiet, 1);
    }
    assert!(stream.capture(|| stream.synchronize()).is_err());
    assert!(stream.zeros::<u8>(64).unwrap().read().unwrap().iter().all(|b| *b == 0));
    if softgpu::active() {
        softgpu::report();
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn each_thread_has_its_own_stream() {
    let device = device();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..20).for_each(|_| assert_eq!(gather(&device).unwrap()[0], 5.0)));
        }
    });
}
