//! cudarc's event tracking, which the other tests disable, and its effect on a capture.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{Gpu, code, entry, shape};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use softgpu::Opt;

#[test]
fn event_tracking_breaks_a_capture() {
    softgpu::install();
    softgpu::set(Opt::Quiet, 1);
    let context = CudaContext::new(0).unwrap();
    let gpu = Gpu { stream: context.new_stream().unwrap(), context };
    let saxpy = gpu.function(entry("saxpy", &[4, 4, 8, 8]));
    let x = gpu.stream.clone_htod(&[1f32; 64]).unwrap();
    let mut y = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &mut y).unwrap();
    gpu.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // The launch waits for the events that were recorded with x and y, outside the capture.
    let launched = launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &mut y);
    assert_eq!(code(launched), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    let ended = gpu.stream.end_capture(CUgraphInstantiate_flags(0));
    assert_eq!(code(ended), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    softgpu::report();
}
