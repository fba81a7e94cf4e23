//! Matrix product of the CPU backend, `cargo bench --bench linear`: this crate's kernels on bf16 weights in place, and the `gemm`
//! crate on weights that were widened to f32 before (not timed; twice the memory). One thread.
//! `DLLM_CPU=avx512` (or `avx2`, `plain`) measures the kernels below AMX.
//!
//! Criterion's "elem/s" are floating-point operations per second in f32. The first line is the peak rate of MACs on registers, which
//! bounds all kernels but AMX.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dllm_kernels::Config;
use dllm_kernels::backend::cpu::linear::{Matrix, linear, packed_len};
use dllm_kernels::backend::cpu::{Isa, fma_roof};
use dllm_kernels::model::Weights;
use std::hint::black_box;

fn bench(c: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let mut group = c.benchmark_group("roof");
    let chains = 1_000_000;
    group.throughput(Throughput::Elements(fma_roof(1)));
    group.bench_function(format!("{:?}", Isa::detect()), |b| {
        b.iter_custom(|iters| {
            let start = std::time::Instant::now();
            black_box(fma_roof(iters * chains));
            start.elapsed() / chains as u32
        })
    });
    group.finish();
    let config = Config::shape("mid").expect("a known shape");
    let weights = Weights::random(&config, 0).expect("memory");
    let (k, n) = (config.d_model, config.mlp_hidden_size);
    let tensor = weights.get("model.transformer.blocks.0.ff_proj.weight", &[n, k]).expect("in the shape");
    let wide = tensor.to_f32();
    let matrix = Matrix::new(vec![tensor], vec![]);
    let mut group = c.benchmark_group(format!("linear {k} -> {n}"));
    for rows in [1, 16, 32, 64, 128, 256] {
        let x: Vec<f32> = (0..rows * k).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
        let mut out = vec![0.0f32; rows * n];
        let mut packed = vec![0.0; packed_len(rows, k)];
        group.throughput(Throughput::Elements((2 * rows * k * n) as u64));
        group.bench_function(BenchmarkId::new("ours bf16", rows), |b| {
            pool.install(|| b.iter(|| linear(&x, &matrix, black_box(&mut out), rows, &mut packed)))
        });
        group.bench_function(BenchmarkId::new("gemm f32", rows), |b| {
            b.iter(|| gemm_f32(&x, &wide, black_box(&mut out), [rows, n, k]))
        });
    }
}

/// `out [m, n] = x [m, k] w [n, k]^T`
fn gemm_f32(x: &[f32], w: &[f32], out: &mut [f32], [m, n, k]: [usize; 3]) {
    let (rows, width) = (k as isize, n as isize);
    // SAFETY: the strides describe the three slices, whose lengths are m k, n k and m n.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            width,
            false,
            x.as_ptr(),
            1,
            rows,
            w.as_ptr(),
            rows,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(2));
    targets = bench
}
criterion_main!(benches);
