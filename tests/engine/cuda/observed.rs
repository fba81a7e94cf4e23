//! Decodes that the device runs by itself, block by block, equal those that the host drives pass by pass. This compares the kernel
//! `advance`, the captured graphs and their launch buckets with the loop in Rust.

use super::{FAMILIES, made_up};
use crate::common::checkpoint::{MASK, prompts, samplings};
use crate::common::{Part, assert_nothing_reported};
use dllm_kernels::decode::Algorithm;
use dllm_kernels::{CacheMode, Confidence, Family, Generator, Model, Observer, Options, Policy};

/// Requests every step and ignores it, which makes the host drive each pass.
struct StepObserver;
impl Observer for StepObserver {
    fn wants_steps(&self) -> bool {
        true
    }
}

/// Every cache and policy, in blocks and without; together they use every decoding algorithm.
pub fn loops() -> Vec<Options> {
    let mut list = Vec::new();
    for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
        for block_length in [4, 8] {
            for policy in [Policy::Fixed, Policy::Threshold(0.9), Policy::Threshold(0.4), Policy::Factor(1.0)] {
                let block_length = Some(block_length);
                list.push(Options { gen_length: 8, block_length, cache, policy, ..Options::default() });
            }
        }
    }
    list
}

/// Checks that tokens and number of forwards are the same with an observer of steps and without.
pub fn same_when_observed(model: &Model, options: &Options, prompts: &[Vec<u32>]) {
    // On a GPU the number of rows may change the last bits of a product; on the CUDA emulator it does not.
    if prompts.len() > 1 && !softgpu::active() {
        return;
    }
    let generator = || Generator::new(model).options(options.clone());
    let what = || format!("{} {options:?} {prompts:?}", model.config().family);
    let observed =
        generator().generate_observed(prompts, &mut StepObserver).unwrap_or_else(|e| panic!("{}: {e}", what()));
    let unobserved = generator().generate(prompts).unwrap_or_else(|e| panic!("{}: {e}", what()));
    assert_eq!(unobserved.tokens, observed.tokens, "{}", what());
    assert_eq!(unobserved.nfe, observed.nfe, "{}: forwards", what());
    assert_nothing_reported();
}

fn observed_or_not(family: Family, part: Part) {
    let model = made_up(family);
    let all = prompts();
    // Each setting with a different subset of the prompts.
    let choices = [&all[..1], &all[..], &all[1..], &all[2..]];
    let mut settings = Vec::new();
    for (i, base) in loops().into_iter().enumerate() {
        for (k, options) in samplings(&base).into_iter().enumerate().filter(|(k, _)| k % 2 == i % 2) {
            settings.push((options, choices[(k / 2 + i) % 4]));
        }
        // End tokens that occur, at different steps.
        for (k, end_tokens) in [vec![3, 7, 11, 30], (0..20).collect()].into_iter().enumerate() {
            let options = Options { early_stop: true, end_tokens, temperature: 0.8, ..base.clone() };
            settings.push((options, choices[1 + (i + k) % 3]));
        }
    }
    let settings = part.of(settings, 6);
    for (options, prompts) in &settings {
        same_when_observed(&model, options, prompts);
    }
    println!("{family}: {} settings", settings.len());
    if !softgpu::active() {
        println!("not run: batches, in which a GPU may round products differently");
    }
}

pub fn observed_or_not_llada(part: Part) {
    observed_or_not(Family::Llada, part);
}

pub fn observed_or_not_dream(part: Part) {
    observed_or_not(Family::Dream, part);
}

/// Prompts of some masks or of masks only, alone and together with prompts without.
pub fn masks_in_the_prompt(part: Part) {
    let prompts = [vec![3, MASK, 15, MASK], vec![MASK; 5], vec![7, 8, 9], vec![MASK], vec![1; 4]];
    for family in FAMILIES {
        let model = made_up(family);
        for (i, base) in part.of(loops().into_iter().enumerate(), 2) {
            // One step: the only number that divides the masks of every prompt.
            let steps = (base.algorithm(family) == Algorithm::DreamThreshold).then_some(1);
            let list = [
                Options { steps, ..base.clone() },
                Options { steps, temperature: 0.8, cfg_scale: 1.5, ..base.clone() },
                Options { steps, confidence: Some(Confidence::Margin), top_p: Some(0.7), ..base.clone() },
                Options { steps, confidence: Some(Confidence::Random), ..base.clone() },
            ];
            for (k, options) in list.iter().enumerate().filter(|(k, _)| k % 2 == i % 2) {
                same_when_observed(&model, options, [&prompts[..], &prompts[..2], &prompts[1..3]][(i / 2 + k) % 3]);
            }
        }
    }
}

/// Many blocks, so that the windows of PrefixCache shrink through several launch buckets, and prompts of several lengths.
pub fn many_blocks(part: Part) {
    for family in FAMILIES {
        let model = made_up(family);
        let prompts = [(0..31).collect(), vec![4; 2], (0..9).map(|i| i * 3).collect()];
        let mut settings = Vec::new();
        for cache in [CacheMode::Prefix, CacheMode::None, CacheMode::Dual] {
            for (policy, cfg_scale) in [(Policy::Threshold(0.7), 0.0), (Policy::Fixed, 0.5)] {
                let steps = Some(if policy == Policy::Fixed { 16 } else { 32 });
                let (gen_length, block_length) = (32, Some(4));
                let base = Options { gen_length, block_length, cache, policy, steps, cfg_scale, ..Options::default() };
                settings.push((base.clone(), &prompts[..]));
                settings.push((Options { block_length: Some(2), ..base }, &prompts[2..]));
            }
        }
        for (options, prompts) in part.of(settings, 2) {
            same_when_observed(&model, &options, prompts);
        }
    }
}
