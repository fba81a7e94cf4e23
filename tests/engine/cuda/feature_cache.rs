//! Decodes with a feature cache: the adaptive cache, and hybrid caches, in which PrefixCache or DualCache refreshes by its rules.

use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::Tally;
use super::observed::same_when_observed;
use super::{FAMILIES, made_up};
use crate::common::checkpoint::{Checkpoint, MASK, prompts};
use crate::common::recorded::{golden_dir, is_shipped, json, names, not_run, numbers, options};
use crate::common::{Part, Random};
use dllm_kernels::decode::{Algorithm, Observer, Step};
use dllm_kernels::{CacheMode, Family, Generator, Model, Options, Policy};

fn adaptive(prompt_interval: usize, response_interval: usize, refresh_ratio: f64) -> Options {
    let cache = CacheMode::Adaptive;
    Options { cache, prompt_interval, response_interval, refresh_ratio: Some(refresh_ratio), ..Options::default() }
}

/// Cache settings: each kind of forward at several points of its interval, and each option of the hybrid caches.
fn cache_settings() -> Vec<Options> {
    let hybrid = Options { cache: CacheMode::Dual, ..Options::default() };
    vec![
        adaptive(3, 2, 0.25),
        adaptive(2, 3, 0.5),
        adaptive(3, 4, 0.0),
        adaptive(100, 100, 1.0),
        // A ratio below one row.
        adaptive(5, 3, 0.05),
        Options { refresh_prompt_every: 2, ..hybrid.clone() },
        Options { refresh_ratio: Some(0.3), ..hybrid.clone() },
        Options { refresh_ratio: Some(0.0), refresh_prompt_every: 3, cache: CacheMode::Prefix, ..hybrid.clone() },
        Options { vicinity: 2, refresh_ratio: Some(0.5), ..hybrid.clone() },
        Options { vicinity: 1, suffix_window: Some(2), cache: CacheMode::Prefix, ..hybrid.clone() },
        Options { suffix_window: Some(1), refresh_prompt_every: 2, ..hybrid.clone() },
        Options { suffix_window: Some(3), cache: CacheMode::None, ..hybrid },
    ]
}

/// Returns [`cache_settings`] with every policy, in blocks and without.
fn loops() -> Vec<Options> {
    let mut list = Vec::new();
    for base in cache_settings() {
        for (policy, block_length) in [
            (Policy::Fixed, 4),
            (Policy::Fixed, 12),
            (Policy::Threshold(0.5), 3),
            (Policy::Threshold(0.9), 12),
            (Policy::Factor(1.0), 4),
        ] {
            list.push(Options { gen_length: 12, block_length: Some(block_length), policy, ..base.clone() });
        }
    }
    list
}

/// Compares decodes that the device runs by itself with decodes that the host runs step by step, for graphs of every kind of
/// forward. Sequences of a batch are at different points of their intervals.
fn observed_or_not(family: Family, part: Part) {
    let model = made_up(family);
    let (all, masked) = (prompts(), [vec![3, MASK, 15, MASK], vec![7, 8, 9], vec![MASK], vec![1; 4]]);
    let choices = [&all[..1], &all[..], &all[1..], &masked[..], &masked[..1]];
    for (i, base) in part.of(loops().into_iter().enumerate(), 5) {
        let prompts = choices[i % 5];
        // One step: the only number that divides the masks of every prompt.
        let steps = (i % 5 > 2 && base.algorithm(family) == Algorithm::DreamThreshold).then_some(1);
        let steps = if i % 7 == 0 && base.policy == Policy::Fixed { Some(24) } else { steps };
        let sampled = Options { steps, temperature: 0.7, ..base };
        let ends = Options { early_stop: true, end_tokens: (0..20).collect(), ..sampled.clone() };
        let guided = Options { cfg_scale: 0.8, ..sampled.clone() };
        same_when_observed(&model, [&sampled, &ends, &guided][i % 3], prompts);
    }
}

pub fn feature_cache_observed_or_not_llada(part: Part) {
    observed_or_not(Family::Llada, part);
}

pub fn feature_cache_observed_or_not_dream(part: Part) {
    observed_or_not(Family::Dream, part);
}

/// Masks in the prompts: kinds of forwards that first occur late in a block, and sequences that catch up with others inside a block.
pub fn feature_cache_masks_in_the_prompt() {
    let model = made_up(Family::Llada);
    let late = Options {
        gen_length: 4,
        block_length: Some(4),
        steps: Some(1),
        policy: Policy::Threshold(1.0),
        ..adaptive(8, 3, 0.25)
    };
    same_when_observed(&model, &late, &[vec![3, MASK, MASK, MASK, 5, MASK, MASK, MASK]]);
    // Found by search: a sequence ends its part of a block in the pass in which another one starts its own.
    for (seed, prompts) in [
        (40, [&[19, MASK, MASK, MASK][..], &[8, MASK, 10], &[MASK]]),
        (54, [&[13, 6, 22], &[MASK, MASK, MASK, 18], &[20, 15, MASK]]),
        (112, [&[13, MASK], &[MASK, MASK, 8], &[MASK, 22]]),
    ] {
        let (gen_length, block_length, steps) = (3, Some(1), Some(6));
        let policy = Policy::Fixed;
        let base = Options { gen_length, block_length, steps, policy, seed, temperature: 1.0, ..adaptive(5, 3, 0.25) };
        same_when_observed(&model, &base, &prompts.map(<[u32]>::to_vec));
    }
}

/// The device reports the CPU's MACs plus those of the padded logit rows of its launches, also where a graph is replayed for more
/// keys than it was captured for.
pub fn work_is_counted_for_each_pass() {
    #[derive(Default)]
    struct Candidates(Vec<usize>);
    impl Observer for Candidates {
        fn wants_steps(&self) -> bool {
            true
        }
        fn step(&mut self, step: &Step) {
            self.0.push(step.sequences.iter().map(|sequence| sequence.candidates.len()).sum());
        }
    }
    let dir = Checkpoint::new(Family::Llada).write();
    let (cpu, device) = (Model::open(dir.path()).unwrap(), made_up(Family::Llada));
    let config = cpu.config();
    let macs_per_logit_row = config.d_model * (config.vocab_size + config.q_width() + 3 * config.mlp_hidden_size);
    for (cache, suffix_window) in [(CacheMode::Dual, Some(0)), (CacheMode::Dual, None), (CacheMode::Prefix, Some(4))] {
        let options = Options {
            gen_length: 16,
            block_length: Some(4),
            policy: Policy::Fixed,
            cache,
            suffix_window,
            ..Options::default()
        };
        let work = |model, observer: &mut Candidates| {
            let generator = Generator::new(model).options(options.clone());
            generator.generate_observed(&prompts(), observer).unwrap().macs
        };
        let mut candidates = Candidates::default();
        let on_cpu = work(&cpu, &mut candidates);
        let bucket = 4 * prompts().len();
        let padded: usize = candidates.0.iter().map(|count| (bucket - count) * macs_per_logit_row).sum();
        assert_eq!(work(&device, &mut Candidates::default()), on_cpu + padded as u64, "{cache:?} {suffix_window:?}");
    }
}

fn tokens(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let generator = Generator::new(model).options(options.clone());
    generator.generate(prompts).unwrap_or_else(|e| panic!("{options:?}: {e}")).tokens
}

/// Tokens do not depend on the batch, also where other sequences end earlier and their features must not be updated further. With
/// every forward a full refresh they equal those without a cache. Not on a GPU, where products depend on the number of rows.
pub fn feature_cache_alone_and_in_a_batch(part: Part) {
    if !softgpu::active() {
        println!("not run: needs the CUDA emulator, whose products do not depend on the number of rows");
        return;
    }
    for family in FAMILIES {
        let model = made_up(family);
        for (i, base) in part.of(loops().into_iter().enumerate().filter(|(i, _)| i % 2 == 0), 2) {
            let options = Options { temperature: if i % 4 == 0 { 0.8 } else { 0.0 }, ..base };
            let batch = tokens(&model, &options, &prompts());
            for (prompt, batch) in prompts().iter().zip(&batch) {
                assert_eq!(tokens(&model, &options, std::slice::from_ref(prompt))[0], *batch, "{family} {options:?}");
            }
        }
        let equivalent = [(adaptive(1, 1, 0.25), 4), (adaptive(1, 100, 1.0), 12), (adaptive(1, 1, 0.0), 12)];
        for (base, block_length) in part.of(equivalent, 1) {
            for policy in [Policy::Fixed, Policy::Threshold(0.5)] {
                let options = Options { gen_length: 12, block_length: Some(block_length), policy, ..base.clone() };
                let plain = Options { cache: CacheMode::None, ..options.clone() };
                assert_eq!(tokens(&model, &options, &prompts()), tokens(&model, &plain, &prompts()), "{options:?}");
            }
        }
    }
}

/// Unconditional sequences that run at intervals, driven by the host, which stores the guidance differences. With interval 1 they
/// equal those that run in the same batch, up to the rounding of differences. Tokens do not depend on the batch.
pub fn guidance_at_intervals(part: Part) {
    for family in part.of(FAMILIES, 1) {
        let model = made_up(family);
        let at = |cfg_interval, steps| Options {
            gen_length: 12,
            block_length: Some(12),
            policy: Policy::Fixed,
            cfg_scale: 1.5,
            cfg_interval,
            steps: Some(steps),
            ..adaptive(5, 3, 0.25)
        };
        let run = |options: &Options| tokens(&model, options, &prompts());
        // A decode of five forwards: test_model intervals run the unconditional sequence in the first only.
        assert_eq!(run(&at(1, 5)), run(&at(100, 5)), "{family}");
        let separate = run(&at(3, 12));
        assert_ne!(run(&at(1, 12)), separate, "{family}");
        same_when_observed(&model, &at(3, 12), &prompts());
        if softgpu::active() {
            for (prompt, batch) in prompts().iter().zip(&separate) {
                assert_eq!(tokens(&model, &at(3, 12), std::slice::from_ref(prompt))[0], *batch, "{family}");
            }
        }
    }
}

/// Runs in lockstep with the CPU, which uses the rows that V-verify selected on the device. The selections are compared by
/// angle, everything else by the margin rule. Selections of unconditional sequences are not reported, so guided decodes do not
/// select.
pub fn feature_cache_in_lockstep(part: Part) {
    let mut all = Tally::default();
    for family in FAMILIES {
        let test_model = TestModel::made_up(family);
        let mut random = Random(77 + family as u64);
        for (i, base) in part.of(loops().into_iter().enumerate(), 8) {
            let ratio = base.effective_refresh_ratio();
            let chooses = if base.cache == CacheMode::Adaptive { ratio > 0.0 } else { ratio < 1.0 };
            let guided = !chooses && i % 3 == 0;
            let temperature = if i % 2 == 0 { 0.7 } else { 0.0 };
            let options = Options { cfg_scale: if guided { 0.8 } else { 0.0 }, temperature, ..base };
            let prompts: Vec<Vec<u32>> = (0..1 + random.below(3))
                .map(|_| (0..1 + random.below(20)).map(|_| random.below(38) as u32).collect())
                .collect();
            let what = format!("{family} {options:?} {prompts:?}");
            all.add(decode_in_lockstep(&test_model, &options, &prompts, &what, &mut ()).1);
        }
    }
    println!("{all}");
    all.assert_few([0.05, 0.05], [0.4, 0.6]);
    assert_selections(&all, part);
}

/// Runs the recorded decodes of dLLM-Cache in the same way.
pub fn recorded_feature_cache_decodes(part: Part) {
    let models = TestModel::recorded();
    let (mut all, mut decodes, mut same) = (Tally::default(), 0, 0);
    let cases = names("trajectory").into_iter().map(|name| (json(&name), name));
    let cases = cases.filter(|(case, _)| case["algorithm"].as_str().unwrap().starts_with("dllm_cache."));
    for (case, name) in part.of(cases, 3) {
        let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
        let test_model = &models[case["model"].as_str().unwrap()];
        let (decoded, tally) = decode_in_lockstep(test_model, &options(&case), &prompts, &name, &mut ());
        let want: Vec<Vec<u32>> = numbers(&case["final"]);
        same += usize::from(decoded.tokens == want);
        decodes += 1;
        all.add(tally);
    }
    println!("{decodes} decodes, {same} with the recorded tokens; {all}");
    if decodes == 0 {
        not_run("trajectory of dLLM-Cache");
    }
    if is_shipped(&golden_dir()) {
        all.assert_few([0.055, 0.032], [0.4, 0.6]);
        assert_selections(&all, part);
    }
}

/// Few selected rows differ from those of the bf16 reference, and their angles are close. The bounds are twice the observed values.
fn assert_selections(all: &Tally, part: Part) {
    assert!(all.selected > part.count(500, 50), "{all}");
    assert!(all.selected_differs as f64 <= 0.035 * all.selected as f64 && all.worst_angle < 0.01, "{all}");
}
