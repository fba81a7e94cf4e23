//! Matrix products with cuBLASLt, and pinned memory.

use crate::common::{Float, Random, on_device, stream};
use dllm_kernels::gpu::Pinned;
use dllm_kernels::gpu::blas::{Blas, Shape};
use half::bf16;

on_device!(blas_multiplies, pinned_memory_goes_to_the_device);

/// Compares `y = x w^T + bias` with sums in f64, for both result types.
fn blas_multiplies() {
    let stream = stream();
    let mut blas = Blas::new(&stream).unwrap();
    let mut random = Random(7);
    for (rows, out, inner) in [(1, 8, 16), (5, 24, 40), (33, 16, 64)] {
        let (x, w, bias) =
            (random.floats::<bf16>(rows * inner), random.floats::<bf16>(out * inner), random.floats::<bf16>(out));
        let device = (stream.upload(&x).unwrap(), stream.upload(&w).unwrap(), stream.upload(&bias).unwrap());
        let (y32, y16) = (stream.alloc::<f32>(rows * out).unwrap(), stream.alloc::<bf16>(rows * out).unwrap());
        let shape = Shape { rows, out, inner, f32_out: true, biased: false };
        for _ in 0..2 {
            // SAFETY: the buffers have these sizes.
            unsafe {
                let (x, w) = (device.0.address(), device.1.address());
                blas.launch(shape, x, w, 0, y32.address()).unwrap();
                let shape = Shape { f32_out: false, biased: true, ..shape };
                blas.launch(shape, x, w, device.2.address(), y16.address()).unwrap();
            }
        }
        let (y32, y16) = (y32.read().unwrap(), y16.read().unwrap());
        for (i, (got32, got16)) in y32.iter().zip(&y16).enumerate() {
            let (row, column) = (i / out, i % out);
            let dot = |k: usize| x[row * inner + k].f64() * w[column * inner + k].f64();
            let want: f64 = (0..inner).map(dot).sum();
            let size: f64 = (0..inner).map(|k| dot(k).abs()).sum();
            assert!((f64::from(*got32) - want).abs() <= 1e-5 * size, "{rows} {out} {inner}: {got32}, expected {want}");
            let biased = want + bias[column].f64();
            assert!((got16.f64() - biased).abs() <= 1e-5 * size + biased.abs() / 128.0, "{got16}, expected {biased}");
        }
    }
    // SAFETY: the call fails before a launch.
    let error =
        unsafe { blas.launch(Shape { rows: 0, out: 8, inner: 8, f32_out: true, biased: false }, 16, 16, 0, 16) };
    assert!(error.unwrap_err().to_string().contains("rows: expected 1 to 2147483647, found 0"));
}

fn pinned_memory_goes_to_the_device() {
    let stream = stream();
    let mut pinned = Pinned::<i32>::new(stream.device(), 6).unwrap();
    assert_eq!((0..6).map(|i| pinned.get(i)).collect::<Vec<_>>(), [0; 6]);
    pinned.write(2, &[5, 6, 7]);
    let mut buffer = stream.zeros::<i32>(4).unwrap();
    // SAFETY: the read below synchronises before the buffers are dropped.
    unsafe { buffer.write_pinned(1, &pinned, 2, 3) }.unwrap();
    assert_eq!(buffer.read().unwrap(), [0, 5, 6, 7]);
    assert!(stream.is_done().unwrap());
    // SAFETY: the call fails before a copy.
    for (at, first, count) in [(2, 0, 3), (0, 4, 3), (usize::MAX, 0, 1), (0, 0, usize::MAX)] {
        assert!(unsafe { buffer.write_pinned(at, &pinned, first, count) }.is_err());
    }
    assert!(Pinned::<i32>::new(stream.device(), 0).is_err());
}
