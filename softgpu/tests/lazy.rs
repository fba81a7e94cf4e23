//! Lazy mode: work is deferred until the host waits for it. In a file of its own, because the mode holds for the whole process.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{code, entry, gpu, shape};
use cudarc::driver::sys::{CUevent_flags, CUresult};
use softgpu::Opt;

#[test]
fn missing_waits_show() {
    let gpu = gpu();
    softgpu::set(Opt::Lazy, 1);
    let upload = gpu.context.new_stream().unwrap();
    let saxpy = gpu.function(entry("saxpy", &[4, 4, 8, 8]));
    // SAFETY: filled before it is read.
    let mut pinned = unsafe { gpu.context.alloc_pinned::<f32>(64) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(1.0);
    // SAFETY: written before it is read, except where the test is about that.
    let mut x = unsafe { upload.alloc::<f32>(64) }.unwrap();
    let mut y = gpu.stream.alloc_zeros::<f32>(64).unwrap();

    // Upload on one stream, kernel on another, without a wait between them: the kernel reads poison.
    upload.memcpy_htod(&pinned, &mut x).unwrap();
    launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
    assert!(gpu.stream.clone_dtoh(&y).unwrap()[0].is_nan());

    // The same with the wait.
    gpu.stream.memset_zeros(&mut y).unwrap();
    gpu.stream.join(&upload).unwrap();
    launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&y).unwrap()[0], 1.0);

    // A pinned buffer that is overwritten before its upload has run.
    let buffer = pinned.as_mut_ptr().unwrap();
    upload.memcpy_htod(&pinned, &mut x).unwrap();
    // SAFETY: 64 floats that this test owns.
    unsafe { std::slice::from_raw_parts_mut(buffer, 64).fill(5.0) };
    assert_eq!(upload.clone_dtoh(&x).unwrap()[0], 5.0);

    // A download that is read before any wait.
    // SAFETY: as above.
    unsafe { *buffer = -1.0 };
    gpu.stream.memcpy_dtoh(&y, &mut pinned).unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { *buffer }, -1.0);
    gpu.stream.synchronize().unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { *buffer }, 1.0);

    // Polling terminates.
    launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
    let event = gpu.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let polls = (0..).take_while(|_| !event.is_complete()).count();
    assert_eq!(polls, 2);

    // The next wait returns an error of deferred work, once.
    let freed = gpu.address(&x);
    launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &freed, &y).unwrap();
    drop(x);
    upload.synchronize().unwrap();
    assert_eq!(code(gpu.stream.synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    common::assert_reported("points into freed memory");
    gpu.stream.synchronize().unwrap();
}
