//! ldmatrix and mma compared with plain products.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{Gpu, assert_reported, entry, gpu, noise, shape};
use half::{bf16, f16};
use softgpu::Opt;
use std::time::Instant;

const K: usize = 64;

fn tile(gpu: &Gpu, name: &str, a: &[u16], b: &[u16]) -> Vec<f32> {
    let function = gpu.function(entry(name, &[4, 8, 8, 8]));
    let (a, b) = (gpu.stream.clone_htod(a).unwrap(), gpu.stream.clone_htod(b).unwrap());
    let d = gpu.stream.alloc_zeros::<f32>(16 * 8).unwrap();
    launch!(gpu, function, shape(1, 32), &(K as i32), &a, &b, &d).unwrap();
    gpu.stream.clone_dtoh(&d).unwrap()
}

/// Compares a 16 x 8 tile with the product of `a`, which is [16, K], and `b`, whose element (k, n) is at `b_index(k, n)`.
fn check(got: &[f32], a: &[f64], b: &[f64], b_index: fn(usize, usize) -> usize) {
    for row in 0..16 {
        for column in 0..8 {
            let expected: f64 = (0..K).map(|k| a[row * K + k] * b[b_index(k, column)]).sum();
            let value = f64::from(got[row * 8 + column]);
            assert!((value - expected).abs() < 1e-4, "({row}, {column}): {value} for {expected}");
        }
    }
}

#[test]
fn products() {
    let gpu = gpu();
    let (a, b) = (noise(16 * K, 1), noise(8 * K, 2));
    let brain = |x: &[f32]| x.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
    let halves = |x: &[f32]| x.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();
    let (a16, b16) = (brain(&a), brain(&b));
    let wide = |x: &[bf16]| x.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
    let bits = |x: &[bf16]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for seed in 0..4 {
        softgpu::set(Opt::Seed, seed);
        check(&tile(&gpu, "tile_bf16", &bits(&a16), &bits(&b16)), &wide(&a16), &wide(&b16), |k, n| n * K + k);
        check(&tile(&gpu, "tile_bf16_trans", &bits(&a16), &bits(&b16)), &wide(&a16), &wide(&b16), |k, n| k * 8 + n);
        let (a16, b16) = (halves(&a), halves(&b));
        let wide = |x: &[f16]| x.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
        let bits = |x: &[f16]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        check(&tile(&gpu, "tile_f16", &bits(&a16), &bits(&b16)), &wide(&a16), &wide(&b16), |k, n| n * K + k);
    }
}

#[test]
fn wrong_participation_and_addresses() {
    let gpu = gpu();
    let function = gpu.function(entry("mma_participation", &[4, 8, 8]));
    let x = gpu.stream.alloc_zeros::<u16>(256).unwrap();
    let out = gpu.stream.alloc_zeros::<f32>(32).unwrap();
    for (kind, text) in [
        (0, "lane 0 is at mma while lane 16 is at __syncwarp"),
        (1, "misaligned row"),
        (2, "which is not shared memory"),
    ] {
        assert!(launch!(gpu, function, shape(1, 32), &kind, &x, &out).is_err());
        assert_reported(text);
    }
    assert!(launch!(gpu, function, shape(1, 16), &3i32, &x, &out).is_err());
    assert_reported("mma in a warp of fewer than 32 threads");
    let start = Instant::now();
    launch!(gpu, function, shape(1, 32), &3i32, &x, &out).unwrap();
    println!("1001 mma: {:?}", start.elapsed());
}

#[test]
fn forms_of_loads() {
    let gpu = gpu();
    let function = gpu.function(entry("load_forms", &[8, 8, 8]));
    let host: Vec<u16> = (0..256).collect();
    let x = gpu.stream.clone_htod(&host).unwrap();
    let out = gpu.stream.alloc_zeros::<u32>(32 * 6).unwrap();
    let powers = gpu.stream.alloc_zeros::<f32>(32).unwrap();
    launch!(gpu, function, shape(1, 32), &x, &out, &powers).unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&powers).unwrap(), (0..32).map(|i| (i as f32 - 16.0).exp2()).collect::<Vec<_>>());

    let pair = |low: usize, high: usize| low as u32 | (high as u32) << 16;
    let at = |matrix: usize, row: usize, column: usize| 64 * matrix + 8 * row + column;
    let got = gpu.stream.clone_dtoh(&out).unwrap();
    for lane in 0..32 {
        let (major, minor) = (lane / 4, lane % 4 * 2);
        assert_eq!(got[lane], pair(at(0, major, minor), at(0, major, minor + 1)));
        assert_eq!(got[32 + lane], pair(at(0, minor, major), at(0, minor + 1, major)));
        for m in 0..4 {
            assert_eq!(got[64 + 32 * m + lane], pair(at(m, minor, major), at(m, minor + 1, major)));
        }
    }
}
