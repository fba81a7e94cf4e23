//! Warp operations and barriers, correct and with mistakes.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{Gpu, assert_reported, code, entry, gpu, shape};
use cudarc::driver::sys::CUresult;
use softgpu::Opt;

fn run(gpu: &Gpu, name: &str, count: usize) -> Vec<i32> {
    let out = gpu.stream.alloc_zeros::<i32>(count).unwrap();
    let function = gpu.function(entry(name, &[8]));
    launch!(gpu, function, shape(1, 32), &out).unwrap();
    gpu.stream.clone_dtoh(&out).unwrap()
}

#[test]
fn results_of_every_operation() {
    let gpu = gpu();
    let line = |f: fn(i32) -> i32| (0..32).map(f).collect::<Vec<_>>();
    let expected = [
        line(|_| 50),
        line(|lane| (lane / 8 * 8 + 5) * 10),
        line(|lane| if lane >= 3 { lane - 3 } else { lane }),
        line(|lane| if lane % 16 >= 3 { lane - 3 } else { lane }),
        line(|lane| if lane < 29 { lane + 3 } else { lane }),
        line(|lane| if lane % 16 < 13 { lane + 3 } else { lane }),
        line(|lane| lane ^ 9),
        line(|_| 0b0100_1001_0010_0100_1001_0010_0100_1001),
        line(|_| 2),
        line(|_| 2),
        line(|_| 496),
        line(|_| -7),
        line(|_| -1),
    ];
    for seed in 0..5 {
        softgpu::set(Opt::Seed, seed);
        let got = run(&gpu, "warp_operations", 32 * expected.len());
        for (i, line) in expected.iter().enumerate() {
            assert_eq!(&got[32 * i..32 * (i + 1)], line, "operation {i}, seed {seed}");
        }
    }
}

#[test]
fn halves_of_a_warp_on_their_own() {
    let gpu = gpu();
    for seed in 0..5 {
        softgpu::set(Opt::Seed, seed);
        let got = run(&gpu, "half_warps", 32);
        let lower: i32 = (0..16).sum();
        let upper: i32 = (16..32).sum::<i32>() * 16 * 16 * 16 * 16;
        assert_eq!(got, [[lower; 16], [upper; 16]].concat());
    }
}

#[test]
fn threads_that_exit_early() {
    let gpu = gpu();
    let function = gpu.function(entry("early_exit", &[8, 8, 4]));
    let host: Vec<i32> = (0..128).collect();
    let x = gpu.stream.clone_htod(&host).unwrap();
    for (live, seed) in [(128, 0), (100, 1), (64, 2), (33, 3), (1, 4)] {
        softgpu::set(Opt::Seed, seed);
        let out = gpu.stream.alloc_zeros::<i32>(128).unwrap();
        launch!(gpu, function, shape(1, 128), &x, &out, &live).unwrap();
        let expected: Vec<i32> = (0..live).rev().collect();
        assert_eq!(gpu.stream.clone_dtoh(&out).unwrap()[..live as usize], expected);
    }
    assert_eq!(run(&gpu, "shuffle_among_live", 20), (0..20).map(|lane| lane ^ 1).collect::<Vec<_>>());

    let out = gpu.stream.alloc_zeros::<i32>(32).unwrap();
    let function = gpu.function(entry("shuffle_after_exit", &[8]));
    assert!(launch!(gpu, function, shape(1, 32), &out).is_err());
    assert_reported("the mask 0xffffffff of a shuffle names lanes that have exited: 0xfff00000");
}

/// The last warp of a block may be short. Operations do not wait for its missing lanes, which have no values.
#[test]
fn short_warps() {
    let gpu = gpu();
    let out = gpu.stream.alloc_zeros::<i32>(32).unwrap();
    let exchange = gpu.function(entry("warp_exchange", &[4, 8]));
    launch!(gpu, exchange, shape(1, 24), &1i32, &out).unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&out).unwrap()[..24], (0..24).map(|lane| lane ^ 1).collect::<Vec<_>>());
    let shuffles = gpu.function(entry("warp_operations", &[8]));
    let out = gpu.stream.alloc_zeros::<i32>(32 * 13).unwrap();
    assert!(launch!(gpu, shuffles, shape(1, 24), &out).is_err());
    assert_reported("which the block does not have");
}

#[test]
fn wrong_masks() {
    let gpu = gpu();
    let out = gpu.stream.alloc_zeros::<i32>(32).unwrap();
    let function = gpu.function(entry("wrong_mask", &[4, 8]));
    let texts = ["is not in the mask 0xffff", "with another mask", "which is not in the mask", "is at a shuffle while"];
    for seed in [0, 1, 2] {
        softgpu::set(Opt::Seed, seed);
        for (kind, text) in texts.iter().enumerate() {
            let result = launch!(gpu, function, shape(1, 32), &(kind as i32), &out);
            assert_eq!(code(result), CUresult::CUDA_ERROR_LAUNCH_FAILED, "kind {kind}");
            let report = softgpu::report();
            assert!(report.contains(text) || (kind == 3 && report.contains("is at a vote while")), "{kind}: {report}");
        }
    }
}

#[test]
fn missing_syncwarp() {
    let gpu = gpu();
    let mut kernel = entry("warp_exchange", &[4, 8]);
    kernel.shared_bytes = 128;
    let function = gpu.function(kernel);
    let out = gpu.stream.alloc_zeros::<i32>(32).unwrap();
    let expected: Vec<i32> = (0..32).map(|lane| lane ^ 1).collect();
    let run = |seed: i64, with_sync: i32| {
        softgpu::set(Opt::Seed, seed);
        launch!(gpu, function, shape(1, 32), &with_sync, &out).unwrap();
        gpu.stream.clone_dtoh(&out).unwrap() == expected
    };
    assert!((0..10).all(|seed| run(seed, 1)));
    assert!((0..10).all(|seed| !run(seed, 0)));
}
