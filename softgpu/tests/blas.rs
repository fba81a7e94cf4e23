//! cuBLASLt through cudarc, compared with plain products.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{Gpu, assert_reported, gpu, noise};
use cudarc::cublaslt::{Activation, CudaBlasLT, Matmul, MatmulConfig};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::{bf16, f16};
use std::time::Instant;

/// y = x * w^T as the columns of a column-major product: x is [m, k], w is [n, k], y is [m, n], all row-major.
fn config(m: usize, n: usize, k: usize, batches: Option<usize>) -> MatmulConfig {
    MatmulConfig {
        transa: true,
        transb: false,
        transc: false,
        m: n as u64,
        n: m as u64,
        k: k as u64,
        alpha: 0.5,
        lda: k as i64,
        ldb: k as i64,
        beta: 0.0,
        ldc: n as i64,
        stride_a: batches.map(|_| (n * k) as i64),
        stride_b: batches.map(|_| (m * k) as i64),
        stride_c: batches.map(|_| (m * n) as i64),
        stride_bias: None,
        batch_size: batches.map(|count| count as i32),
    }
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    batches: usize,
}

/// With bias and ReLU, compared in f64.
fn check<T>(gpu: &Gpu, from: fn(f32) -> T, to: fn(T) -> f64, tolerance: f64)
where
    T: Copy + cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits,
    CudaBlasLT: Matmul<T>,
{
    let blas = CudaBlasLT::new(gpu.stream.clone()).unwrap();
    let Case { m, n, k, batches } = Case { m: 5, n: 48, k: 37, batches: 3 };
    let values = |count, seed| noise(count, seed).into_iter().map(from).collect::<Vec<T>>();
    let (x, w, bias) = (values(batches * m * k, 1), values(batches * n * k, 2), values(n, 3));
    let device = |host: &[T]| gpu.stream.clone_htod(host).unwrap();
    let (x_device, w_device, bias_device) = (device(&x), device(&w), device(&bias));
    let mut y = gpu.stream.alloc_zeros::<T>(batches * m * n).unwrap();
    let config = config(m, n, k, Some(batches));
    // SAFETY: the shapes are those of the buffers.
    unsafe { blas.matmul(config, &w_device, &x_device, &mut y, Some(&bias_device), Some(&Activation::Relu)) }.unwrap();
    let got = gpu.stream.clone_dtoh(&y).unwrap();
    for (index, value) in got.iter().enumerate() {
        let (batch, row, column) = (index / (m * n), index / n % m, index % n);
        let product: f64 = (0..k).map(|i| to(x[(batch * m + row) * k + i]) * to(w[(batch * n + column) * k + i])).sum();
        let expected = (0.5 * product + to(bias[column])).max(0.0);
        assert!(
            (to(*value) - expected).abs() <= tolerance * expected.max(1.0),
            "{index}: {} for {expected}",
            to(*value)
        );
    }
}

#[test]
fn products_with_bias_and_activation() {
    let gpu = gpu();
    check::<f32>(&gpu, |x| x, f64::from, 1e-5);
    check::<f16>(&gpu, f16::from_f32, |x| x.to_f64(), 1e-3);
    check::<bf16>(&gpu, bf16::from_f32, |x| x.to_f64(), 8e-3);
}

#[test]
fn every_transpose_and_beta() {
    let gpu = gpu();
    let blas = CudaBlasLT::new(gpu.stream.clone()).unwrap();
    let (m, n, k) = (7, 5, 9);
    let (a, b, c) = (noise(m * k, 1), noise(k * n, 2), noise(m * n, 3));
    let (a_device, b_device) = (gpu.stream.clone_htod(&a).unwrap(), gpu.stream.clone_htod(&b).unwrap());
    for (transa, transb) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut d = gpu.stream.clone_htod(&c).unwrap();
        let config = MatmulConfig {
            transa,
            transb,
            m: m as u64,
            n: n as u64,
            lda: if transa { k } else { m } as i64,
            ldb: if transb { n } else { k } as i64,
            beta: 2.0,
            ldc: m as i64,
            ..config(n, m, k, None)
        };
        // SAFETY: the shapes are those of the buffers.
        unsafe { blas.matmul(config, &a_device, &b_device, &mut d, None, None) }.unwrap();
        let got = gpu.stream.clone_dtoh(&d).unwrap();
        for row in 0..m {
            for column in 0..n {
                let product: f32 = (0..k)
                    .map(|i| {
                        let x = if transa { a[row * k + i] } else { a[i * m + row] };
                        x * if transb { b[i * n + column] } else { b[column * k + i] }
                    })
                    .sum();
                let expected = 0.5 * product + 2.0 * c[column * m + row];
                assert!((got[column * m + row] - expected).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn buffers_that_are_too_small() {
    let gpu = gpu();
    let blas = CudaBlasLT::new(gpu.stream.clone()).unwrap();
    let (m, n, k) = (4, 8, 16);
    let (x, w) = (gpu.stream.alloc_zeros::<bf16>(m * k).unwrap(), gpu.stream.alloc_zeros::<bf16>(n * k).unwrap());
    let mut y = gpu.stream.alloc_zeros::<bf16>(m * n).unwrap();
    // SAFETY: the emulator checks all accesses.
    let mut run = |config: MatmulConfig| unsafe { blas.matmul(config, &w, &x, &mut y, None, None) };
    run(config(m, n, k, None)).unwrap();
    assert_eq!(softgpu::report(), "");
    assert!(run(config(m + 1, n, k, None)).is_err());
    assert_reported("matmul B: 160 bytes from offset 0");
    assert!(run(config(m, n + 1, k, None)).is_err());
    assert_reported("matmul A: 288 bytes");
    assert!(run(MatmulConfig { ldc: n as i64 + 1, ..config(m, n, k, None) }).is_err());
    assert_reported("matmul D");
    assert!(run(MatmulConfig { lda: k as i64 - 1, ..config(m, n, k, None) }).is_err());
}

#[test]
fn product_in_a_graph() {
    let gpu = gpu();
    let blas = CudaBlasLT::new(gpu.stream.clone()).unwrap();
    let x = gpu.stream.clone_htod(&[1f32; 16]).unwrap();
    let mut y = gpu.stream.alloc_zeros::<f32>(16).unwrap();
    gpu.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: the shapes are those of the buffers.
    unsafe { blas.matmul(config(4, 4, 4, None), &x, &x, &mut y, None, None) }.unwrap();
    let graph = gpu.stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&y).unwrap(), [0f32; 16]);
    graph.launch().unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&y).unwrap(), [2f32; 16]);
    drop(x);
    assert!(graph.launch().is_err());
    assert_reported("was freed");
}

#[test]
fn speed() {
    let gpu = gpu();
    let blas = CudaBlasLT::new(gpu.stream.clone()).unwrap();
    let (m, n, k) = (256, 1024, 1024);
    let (x, w) = (gpu.stream.alloc_zeros::<bf16>(m * k).unwrap(), gpu.stream.alloc_zeros::<bf16>(n * k).unwrap());
    let mut y = gpu.stream.alloc_zeros::<bf16>(m * n).unwrap();
    let start = Instant::now();
    // SAFETY: the shapes are those of the buffers.
    unsafe { blas.matmul(config(m, n, k, None), &w, &x, &mut y, None, None) }.unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{m} x {n} x {k}: {:.1} ms, {:.1} GFLOP/s", 1e3 * seconds, 2e-9 * (m * n * k) as f64 / seconds);
}
