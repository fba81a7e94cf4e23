//! What a decode allocates on a CUDA device is what `dllm inspect` prints. Has its process to itself: the software device counts
//! for all threads together.
#![cfg(feature = "cuda")]

mod common;

use common::{device, golden_dir};
use dllm_kernels::engine::MemoryEstimate;
use dllm_kernels::gpu::Device;
use dllm_kernels::model::SessionConfig;
use dllm_kernels::{CacheMode, Config, Family, Generator, Model, Options, Policy};
use softgpu::Opt;

/// Bytes in use on the device.
fn used() -> usize {
    softgpu::get(Opt::UsedMemory) as usize
}

fn sizes(options: &Options, config: &Config, lens: &[usize]) -> SessionConfig {
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
        let base = Options { gen_length: 32, ..Options::default() };
        let cached = |cache, policy, cfg_scale| Options { cache, policy, cfg_scale, ..base.clone() };
        for options in [
            Options { early_stop: true, ..cached(CacheMode::None, Policy::Fixed, 0.0) },
            cached(CacheMode::Prefix, Policy::Threshold(0.9), 1.5),
            cached(CacheMode::Dual, Policy::Factor(1.0), 0.0),
            cached(CacheMode::Adaptive, Policy::Threshold(0.9), 0.0),
            Options { prompt_interval: 3, ..cached(CacheMode::Adaptive, Policy::Factor(1.0), 1.5) },
            Options { refresh_ratio: Some(0.5), vicinity: 2, ..cached(CacheMode::Dual, Policy::Factor(1.0), 0.0) },
        ] {
            for (lens, block_length) in [(&[7][..], 8), (&[40, 3, 12][..], 16)] {
                let options = Options { block_length: Some(block_length), ..options.clone() };
                let what = format!("{name} {:?} {lens:?}", options.cache);
                let sizes = sizes(&options, model.config(), lens);
                let expected =
                    MemoryEstimate::cuda(&sizes, model.config(), device.multiprocessors().unwrap()).unwrap().total();
                let before = used();
                let network = model.engine(sizes).unwrap();
                let got = used() - before;
                // A buffer without elements has 16 bytes all the same.
                assert!(got.abs_diff(expected) <= 64, "{what}: {got} bytes, expected {expected}");
                drop(network);
                assert_eq!(used(), before, "{what}: left behind");

                // And nothing more later: what a decode needs has been there before its first pass.
                let prompts: Vec<Vec<u32>> = lens.iter().map(|len| vec![1; *len]).collect();
                softgpu::set(Opt::TotalMemory, (used() + got) as i64);
                Generator::new(&model).options(options).generate(&prompts).unwrap();
                softgpu::set(Opt::TotalMemory, 8 << 30);
            }
        }
    }
    one_layer(&device);
    assert_eq!(softgpu::report(), "");
}

/// Of one layer nothing is kept, which always runs whole: what is renewed when makes no difference, but that cached values are
/// what they were.
fn one_layer(device: &Device) {
    for family in [Family::Llada, Family::Dream] {
        let config = common::one_layer(family);
        let cpu = Model::random(config.clone(), 1).unwrap();
        let gpu = Model::random(config.clone(), 1).unwrap().to_device(device, |_, _| ()).unwrap();
        let prompts = [vec![3, 14, 15], vec![9, 26, 5, 35, 8]];
        let base = Options { gen_length: 12, block_length: Some(4), ..Options::default() };
        let options = |cache| Options { cache, prompt_interval: 3, response_interval: 2, ..base.clone() };
        for (options, plain) in [
            (options(CacheMode::Adaptive), CacheMode::None),
            (Options { refresh_ratio: Some(0.5), ..options(CacheMode::Dual) }, CacheMode::Dual),
            (Options { refresh_ratio: Some(0.0), cfg_scale: 0.5, ..options(CacheMode::Prefix) }, CacheMode::Prefix),
        ] {
            let plain = Options { cache: plain, refresh_ratio: None, ..options.clone() };
            for model in [&cpu, &gpu] {
                let tokens = |options: &Options| {
                    Generator::new(model).options(options.clone()).generate(&prompts).unwrap().tokens
                };
                let got = tokens(&options);
                assert!(got.iter().all(|sequence| sequence.len() == 12 && !sequence.contains(&63)), "{got:?}");
                assert_eq!(got, tokens(&plain), "{family} {options:?} on {:?}", model.device().is_some());
            }
            let sizes = sizes(&options, &config, &[3, 5]);
            let expected = MemoryEstimate::cuda(&sizes, &config, device.multiprocessors().unwrap()).unwrap().total();
            let before = used();
            let _network = gpu.engine(sizes).unwrap();
            let got = used() - before;
            // Two buffers without elements more.
            assert!(got.abs_diff(expected) <= 96, "{family} {options:?}: {got} bytes, expected {expected}");
        }
    }
}
