//! Atomics, conversions and intrinsics.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{entry, gpu, noise, shape};
use half::{bf16, f16};
use softgpu::Opt;

#[test]
fn atomics() {
    let gpu = gpu();
    let function = gpu.function(entry("atomics", &[8]));
    for seed in [0, 1] {
        softgpu::set(Opt::Seed, seed);
        let counters = gpu.stream.alloc_zeros::<u32>(14).unwrap();
        launch!(gpu, function, shape(4, 64), &counters).unwrap();
        let c = gpu.stream.clone_dtoh(&counters).unwrap();
        let sum: u32 = (0..256).sum();
        assert_eq!(c[..5], [sum, 255, 0, u32::MAX, 7]);
        assert!(seed != 0 || c[5] == 1);
        assert_eq!((c[6] as i32, c[7] as i32), (-(sum as i32), -255));
        assert_eq!((c[8], c[9]), (0, sum));
        assert_eq!(f32::from_bits(c[10]), 128.0);
    }
}

#[test]
fn conversions() {
    let gpu = gpu();
    let (from_bf16, from_half) =
        (gpu.stream.alloc_zeros::<f32>(65536).unwrap(), gpu.stream.alloc_zeros::<f32>(65536).unwrap());
    let widen = gpu.function(entry("widen", &[8, 8]));
    launch!(gpu, widen, shape(256, 256), &from_bf16, &from_half).unwrap();
    let (from_bf16, from_half) =
        (gpu.stream.clone_dtoh(&from_bf16).unwrap(), gpu.stream.clone_dtoh(&from_half).unwrap());
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    for bits in 0..=u16::MAX {
        assert!(same(from_bf16[usize::from(bits)], bf16::from_bits(bits).to_f32()), "{bits:#x}");
        assert!(same(from_half[usize::from(bits)], f16::from_bits(bits).to_f32()), "{bits:#x}");
    }

    // Every finite half and the points halfway to the next, their neighbours, and all magnitudes
    let mut x: Vec<f32> = Vec::new();
    for bits in 0..0x7c00u16 {
        let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        let middle = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
        x.extend([low, middle, middle.next_down(), middle.next_up(), -middle]);
    }
    x.extend((0..1 << 16).map(|i: u32| f32::from_bits(i << 15 | i & 0x7fff)).filter(|v| !v.is_nan()));
    x.extend(noise(1000, 3));
    x.extend([f32::INFINITY, -f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, -0.0]);
    let count = x.len();
    let device_x = gpu.stream.clone_htod(&x).unwrap();
    let (to_bf16, to_half) =
        (gpu.stream.alloc_zeros::<u16>(count).unwrap(), gpu.stream.alloc_zeros::<u16>(count).unwrap());
    let narrow = gpu.function(entry("narrow", &[4, 8, 8, 8]));
    let blocks = count.div_ceil(256) as u32;
    launch!(gpu, narrow, shape(blocks, 256), &(count as i32), &device_x, &to_bf16, &to_half).unwrap();
    let (to_bf16, to_half) = (gpu.stream.clone_dtoh(&to_bf16).unwrap(), gpu.stream.clone_dtoh(&to_half).unwrap());
    for (i, x) in x.iter().enumerate() {
        assert_eq!(to_bf16[i], bf16::from_f32(*x).to_bits(), "{x} to bf16");
        assert_eq!(to_half[i], f16::from_f32(*x).to_bits(), "{x} to half");
    }

    let nan = gpu.stream.clone_htod(&[f32::NAN, -f32::NAN, f32::from_bits(0x7f800001)]).unwrap();
    launch!(gpu, narrow, shape(1, 32), &3i32, &nan, &device_x, &device_x).unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&device_x).unwrap()[0].to_bits(), 0x7fff7fff);
}

#[test]
fn intrinsics() {
    let gpu = gpu();
    let function = gpu.function(entry("intrinsics", &[8]));
    let out = gpu.stream.alloc_zeros::<u64>(13).unwrap();
    launch!(gpu, function, shape(1, 1), &out).unwrap();
    // (1 + 2^-12)^2 - 1, rounded once
    let fused = (2f64.powi(-11) + 2f64.powi(-24)) as f32;
    let expected = [
        0xffff_fffe,
        0xffff_ffff_ffff_fffe,
        8,
        9,
        31,
        63,
        32,
        0x8000_0000,
        u64::from(1.5f32.to_bits()),
        u64::from(fused.to_bits()),
        u64::from(1f32.to_bits()),
        u64::MAX,
        1000 + 100 + 10 + 32,
    ];
    assert_eq!(gpu.stream.clone_dtoh(&out).unwrap(), expected);
}
