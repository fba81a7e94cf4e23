//! The CUDA backend: whole decodes on the device, against the CPU backend and against what the originals computed.
#![cfg(feature = "cuda")]

mod common;

use common::{device, golden_dir};
use dllm_kernels::{CacheMode, Generator, Model, Policy};

fn open(name: &str) -> Model {
    Model::open(golden_dir().join(name)).unwrap()
}

#[test]
fn smoke() {
    let cpu = open("tiny-llada");
    let gpu = open("tiny-llada").to_device(&device(), |_, _| ()).unwrap();
    for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
        for policy in [Policy::Fixed, Policy::Threshold(0.9), Policy::Factor(1.0)] {
            let generate = |model| {
                let g = Generator::new(model).gen_length(32).block_length(8).cache(cache).policy(policy);
                g.generate(&[vec![3, 14, 15, 9, 26]]).unwrap()
            };
            let (a, b) = (generate(&cpu), generate(&gpu));
            println!("{cache:?} {policy:?} nfe {} {} {}", a.nfe, b.nfe, a.tokens == b.tokens);
            println!("{:?}\n{:?}", a.tokens[0], b.tokens[0]);
        }
    }
    assert_eq!(softgpu::report(), "");
}
