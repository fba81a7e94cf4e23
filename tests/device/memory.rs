//! A decode allocates on a CUDA device exactly the memory that `dllm inspect` prints. This file has its own process, because the CUDA
//! emulator counts memory for all threads together.

use crate::common::recorded::{checkpoints, golden_dir};
use crate::common::{Part, device, once_on_device};
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

once_on_device!(; in_parts: estimates_equal_allocations);

fn estimates_equal_allocations(part: Part) {
    let _turn = crate::alone();
    let device = device();
    if !softgpu::active() {
        println!("not run: only the CUDA emulator reports the memory in use");
        return;
    }
    softgpu::set(Opt::Poison, 0); // saves time; this test does not depend on the contents of memory
    softgpu::set(Opt::Multiprocessors, 4); // fewer KV splits, which saves time on the emulator
    for name in checkpoints() {
        let before = used();
        let model = Model::open(golden_dir().join(&name)).unwrap().to_device(&device, |_, _| ()).unwrap();
        let weights: usize =
            model.config().tensors().iter().map(|(_, shape)| 2 * shape.iter().product::<usize>()).sum();
        assert_eq!(used() - before, weights, "{name}: weights");
        let base = Options { gen_length: 32, ..Options::default() };
        let cached = |cache, policy, cfg_scale| Options { cache, policy, cfg_scale, ..base.clone() };
        let (decoded, mut case) = (part.of(0..12, 1), 0);
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
                let engine = model.engine(sizes).unwrap();
                let got = used() - before;
                // An empty buffer takes 16 bytes.
                assert!(got.abs_diff(expected) <= 64, "{what}: {got} bytes, expected {expected}");
                drop(engine);
                assert_eq!(used(), before, "{what}: memory was not freed");

                // A decode allocates nothing more after its first pass has started.
                case += 1;
                if !decoded.contains(&(case - 1)) {
                    continue;
                }
                let prompts: Vec<Vec<u32>> = lens.iter().map(|len| vec![1; *len]).collect();
                softgpu::set(Opt::TotalMemory, (used() + got) as i64);
                Generator::new(&model).options(options).generate(&prompts).unwrap();
                softgpu::set(Opt::TotalMemory, 8 << 30);
            }
        }
    }
    one_layer(&device, part);
    assert_eq!(softgpu::report(), "");
}

/// A model of one layer has no feature cache, because the first layer always runs in full. Refresh intervals and ratios then do not
/// change tokens.
fn one_layer(device: &Device, part: Part) {
    for family in part.of([Family::Llada, Family::Dream], 1) {
        let config = crate::common::one_layer(family);
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
            let _engine = gpu.engine(sizes).unwrap();
            let got = used() - before;
            // Two more empty buffers.
            assert!(got.abs_diff(expected) <= 96, "{family} {options:?}: {got} bytes, expected {expected}");
        }
    }
}
