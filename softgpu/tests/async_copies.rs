//! cp.async: when copies land, and each kind of mistake.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{Gpu, assert_reported, entry, gpu, noise, shape, shape_with_shared};
use softgpu::Opt;

const THREADS: usize = 64;

/// Returns the output of `copy_two_groups`, or `None` if the launch failed.
fn copy_two_groups(gpu: &Gpu, mistake: i32, x: &[f32]) -> Option<Vec<f32>> {
    let function = gpu.function(entry("copy_two_groups", &[4, 8, 8]));
    let x = gpu.stream.clone_htod(x).unwrap();
    let out = gpu.stream.alloc_zeros::<f32>(8 * THREADS).unwrap();
    let shape = shape_with_shared(1, THREADS as u32, 32 * THREADS as u32);
    launch!(gpu, function, shape, &mistake, &x, &out).ok()?;
    Some(gpu.stream.clone_dtoh(&out).unwrap())
}

#[test]
fn copies_land_when_they_are_waited_for() {
    let gpu = gpu();
    let x = noise(8 * THREADS, 5);
    let expected: Vec<f32> = (0..2 * THREADS)
        .flat_map(|i| {
            let neighbour = i / THREADS * THREADS + (i + 37) % THREADS;
            x[4 * neighbour..4 * neighbour + 4].to_vec()
        })
        .collect();
    for seed in 0..10 {
        softgpu::set(Opt::Seed, seed);
        assert_eq!(copy_two_groups(&gpu, 0, &x).unwrap(), expected);
        let (no_wait, no_commit) = (copy_two_groups(&gpu, 1, &x).unwrap(), copy_two_groups(&gpu, 2, &x).unwrap());
        assert!(no_wait.iter().all(|v| v.is_nan()), "no copy was waited for");
        for half_landed in [no_commit, copy_two_groups(&gpu, 3, &x).unwrap()] {
            assert_eq!(half_landed[..4 * THREADS], expected[..4 * THREADS]);
            assert!(half_landed[4 * THREADS..].iter().all(|v| v.is_nan()), "the second group was not waited for");
        }
        assert_ne!(copy_two_groups(&gpu, 4, &x).unwrap(), expected, "without a barrier, others' copies are missing");
    }
    assert!(copy_two_groups(&gpu, 5, &x).is_none());
    assert_reported("which is not shared memory");
    assert!(copy_two_groups(&gpu, 6, &x).is_none());
    assert_reported("misaligned");
}

#[test]
fn buffer_that_is_filled_again_too_early() {
    let gpu = gpu();
    let function = gpu.function(entry("reuse_buffer", &[4, 8, 8]));
    let host = noise(8 * THREADS, 6);
    let expected: Vec<f32> = (0..2 * THREADS).map(|i| host[4 * (i / THREADS * THREADS + (i + 37) % THREADS)]).collect();
    let x = gpu.stream.clone_htod(&host).unwrap();
    let out = gpu.stream.alloc_zeros::<f32>(2 * THREADS).unwrap();
    for seed in 0..10 {
        softgpu::set(Opt::Seed, seed);
        for with_barrier in [1i32, 0] {
            launch!(gpu, function, shape(1, THREADS as u32), &with_barrier, &x, &out).unwrap();
            assert_eq!(gpu.stream.clone_dtoh(&out).unwrap() == expected, with_barrier == 1, "seed {seed}");
        }
    }
}

#[test]
fn zero_fill() {
    let gpu = gpu();
    let function = gpu.function(entry("copy_with_zeros", &[4, 8, 8]));
    let x = gpu.stream.clone_htod(&[u32::MAX; 4]).unwrap();
    for source_bytes in 0..=16u32 {
        let out = gpu.stream.alloc_zeros::<u32>(8).unwrap();
        launch!(gpu, function, shape(1, 32), &(source_bytes as i32), &x, &out).unwrap();
        let word = |index: u32, size: u32| {
            let bytes = source_bytes.min(size).saturating_sub(4 * index).min(4);
            if bytes == 4 { u32::MAX } else { (1 << (8 * bytes)) - 1 }
        };
        let expected = [word(0, 4), 0, word(0, 8), word(1, 8), word(0, 16), word(1, 16), word(2, 16), word(3, 16)];
        assert_eq!(gpu.stream.clone_dtoh(&out).unwrap(), expected);
    }
    let out = gpu.stream.alloc_zeros::<u32>(8).unwrap();
    assert!(launch!(gpu, function, shape(1, 32), &17i32, &x, &out).is_err());
    assert_reported("cp.async of 16 bytes with a source of 17 bytes");
}

#[test]
fn source_that_changes_in_flight() {
    let gpu = gpu();
    let function = gpu.function(entry("change_source", &[8, 8]));
    let seen = |seed: i64| {
        softgpu::set(Opt::Seed, seed);
        let x = gpu.stream.clone_htod(&[1f32; 32]).unwrap();
        let out = gpu.stream.alloc_zeros::<f32>(32).unwrap();
        launch!(gpu, function, shape(1, 32), &x, &out).unwrap();
        gpu.stream.clone_dtoh(&out).unwrap()
    };
    assert_eq!(seen(0), [2f32; 32], "without a seed the source is read late");
    let mixed = seen(1);
    assert!(mixed.contains(&1.0) && mixed.contains(&2.0), "with a seed, the source is read late or at once");
}
