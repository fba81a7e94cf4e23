//! What a decode allocates on a CUDA device is what `dllm inspect` prints. Has its process to itself: the software device counts
//! for all threads together.
#![cfg(feature = "cuda")]

mod common;

use common::{device, golden_dir};
use dllm_kernels::model::Sizes;
use dllm_kernels::{CacheMode, Config, Generator, Model, Options, Policy};
use softgpu::Opt;

/// Bytes in use on the device.
fn used() -> usize {
    softgpu::get(Opt::UsedMemory) as usize
}

fn sizes(options: &Options, config: &Config, lens: &[usize]) -> Sizes {
    let prompts: Vec<Vec<u32>> = lens.iter().map(|len| vec![1; *len]).collect();
    options.validate(config, &prompts).unwrap();
    options.sizes(config, &prompts)
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target, and a GPU's driver does not tell what one program uses"
)]
fn the_arithmetic_is_what_is_allocated() {
    let device = device();
    if !softgpu::active() {
        eprintln!("not run: only the software device tells what is in use");
        return;
    }
    softgpu::set(Opt::Poison, 0); // takes time, and what memory holds is not the question
    softgpu::set(Opt::Multiprocessors, 4); // attention is cut into fewer parts, which takes less time here
    for name in ["tiny-llada", "tiny-dream", "tiny-llada-b"] {
        let before = used();
        let model = Model::open(golden_dir().join(name)).unwrap().to_device(&device, |_, _| ()).unwrap();
        let weights: usize =
            model.config().tensors().iter().map(|(_, shape)| 2 * shape.iter().product::<usize>()).sum();
        assert_eq!(used() - before, weights, "{name}: weights");
        for (cache, policy, cfg_scale, early_stop) in [
            (CacheMode::None, Policy::Fixed, 0.0, true),
            (CacheMode::Prefix, Policy::Threshold(0.9), 1.5, false),
            (CacheMode::Dual, Policy::Factor(1.0), 0.0, false),
        ] {
            for (lens, block_length) in [(&[7][..], 8), (&[40, 3, 12][..], 16)] {
                let options = Options {
                    gen_length: 32,
                    block_length: Some(block_length),
                    cache,
                    policy,
                    cfg_scale,
                    early_stop,
                    ..Options::default()
                };
                let sizes = sizes(&options, model.config(), lens);
                let expected = sizes.device_memory(model.config(), device.multiprocessors().unwrap()).unwrap().total();
                let before = used();
                let network = model.network(sizes).unwrap();
                let got = used() - before;
                // A buffer without elements has 16 bytes all the same.
                assert!(got.abs_diff(expected) <= 64, "{name} {cache:?} {lens:?}: {got} bytes, expected {expected}");
                drop(network);
                assert_eq!(used(), before, "{name} {cache:?} {lens:?}: left behind");

                // And nothing more later: what a decode needs has been there before its first pass.
                let prompts: Vec<Vec<u32>> = lens.iter().map(|len| vec![1; *len]).collect();
                softgpu::set(Opt::TotalMemory, (used() + got) as i64);
                Generator::new(&model).options(options).generate(&prompts).unwrap();
                softgpu::set(Opt::TotalMemory, 8 << 30);
            }
        }
    }
    assert_eq!(softgpu::report(), "");
}
