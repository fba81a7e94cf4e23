//! Decodes that keep features from forward to forward: the adaptive cache, and PrefixCache and DualCache joined with it.

use crate::checkpoint::{Checkpoint, MASK, prompts};
use crate::common::Random;
use crate::lockstep::{Both, decode_both};
use crate::margin::Tally;
use crate::recorded::{json, names, numbers, options};
use crate::watched::same_watched;
use crate::{FAMILIES, made_up};
use dllm_kernels::decode::{Algorithm, Observer, Step};
use dllm_kernels::{CacheMode, Family, Generator, Model, Options, Policy};
use std::collections::BTreeMap;

fn adaptive(prompt_interval: usize, response_interval: usize, refresh_ratio: f64) -> Options {
    let cache = CacheMode::Adaptive;
    Options { cache, prompt_interval, response_interval, refresh_ratio: Some(refresh_ratio), ..Options::default() }
}

/// Each kind of forward at several places of its period, and each way of joining.
fn kept() -> Vec<Options> {
    let joined = Options { cache: CacheMode::Dual, ..Options::default() };
    vec![
        adaptive(3, 2, 0.25),
        adaptive(2, 3, 0.5),
        adaptive(3, 4, 0.0),
        adaptive(100, 100, 1.0),
        // Less than a row.
        adaptive(5, 3, 0.05),
        Options { refresh_prompt_every: 2, ..joined.clone() },
        Options { refresh_ratio: Some(0.3), ..joined.clone() },
        Options { refresh_ratio: Some(0.0), refresh_prompt_every: 3, cache: CacheMode::Prefix, ..joined.clone() },
        Options { vicinity: 2, refresh_ratio: Some(0.5), ..joined.clone() },
        Options { vicinity: 1, suffix_window: Some(2), cache: CacheMode::Prefix, ..joined.clone() },
        Options { suffix_window: Some(1), refresh_prompt_every: 2, ..joined.clone() },
        Options { suffix_window: Some(3), cache: CacheMode::None, ..joined },
    ]
}

/// The same around every loop.
fn loops() -> Vec<Options> {
    let mut list = Vec::new();
    for base in kept() {
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

/// Graphs for every kind of forward, led by the device or by the host; sequences of a batch at different places.
fn watched(family: Family) {
    let model = made_up(family);
    let (all, masked) = (prompts(), [vec![3, MASK, 15, MASK], vec![7, 8, 9], vec![MASK], vec![1; 4]]);
    let choices = [&all[..1], &all[..], &all[1..], &masked[..], &masked[..1]];
    for (i, base) in loops().into_iter().enumerate() {
        let prompts = choices[i % 5];
        // The one number of steps that divides the masks of every prompt.
        let steps = (i % 5 > 2 && base.algorithm(family) == Algorithm::DreamThreshold).then_some(1);
        let steps = if i % 7 == 0 && base.policy == Policy::Fixed { Some(24) } else { steps };
        let sampled = Options { steps, temperature: 0.7, ..base };
        let ends = Options { early_stop: true, end_tokens: (0..20).collect(), ..sampled.clone() };
        let guided = Options { cfg_scale: 0.8, ..sampled.clone() };
        same_watched(&model, [&sampled, &ends, &guided][i % 3], prompts);
    }
}

pub fn kept_watched_or_not_llada() {
    watched(Family::Llada);
}

pub fn kept_watched_or_not_dream() {
    watched(Family::Dream);
}

/// Masks in the prompts: kinds of forwards that come late, and sequences that catch up with others in the middle of a block.
pub fn kept_masks_in_the_prompt() {
    let model = made_up(Family::Llada);
    let late = Options {
        gen_length: 4,
        block_length: Some(4),
        steps: Some(1),
        policy: Policy::Threshold(1.0),
        ..adaptive(8, 3, 0.25)
    };
    same_watched(&model, &late, &[vec![3, MASK, MASK, MASK, 5, MASK, MASK, MASK]]);
    // Found by search: a sequence ends its course of a block where another one's begins.
    for (seed, prompts) in [
        (40, [&[19, MASK, MASK, MASK][..], &[8, MASK, 10], &[MASK]]),
        (54, [&[13, 6, 22], &[MASK, MASK, MASK, 18], &[20, 15, MASK]]),
        (112, [&[13, MASK], &[MASK, MASK, 8], &[MASK, 22]]),
    ] {
        let (gen_length, block_length, steps) = (3, Some(1), Some(6));
        let policy = Policy::Fixed;
        let base = Options { gen_length, block_length, steps, policy, seed, temperature: 1.0, ..adaptive(5, 3, 0.25) };
        same_watched(&model, &base, &prompts.map(<[u32]>::to_vec));
    }
}

/// What is counted on a device is what the CPU counts, and the logits that fill up its launches; also where a graph is replayed
/// for more keys than it was recorded for.
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
    let scored = config.d_model * (config.vocab_size + config.q_width() + 3 * config.mlp_hidden_size);
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
        let room = 4 * prompts().len();
        let filled: usize = candidates.0.iter().map(|count| (room - count) * scored).sum();
        assert_eq!(work(&device, &mut Candidates::default()), on_cpu + filled as u64, "{cache:?} {suffix_window:?}");
    }
}

fn tokens(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let generator = Generator::new(model).options(options.clone());
    generator.generate(prompts).unwrap_or_else(|e| panic!("{options:?}: {e}")).tokens
}

/// A sequence is what it is alone, also where others are done before it and their features must not go on; and what it is
/// without a cache where every forward renews everything. On a GPU products follow the number of rows, and so do last bits.
pub fn kept_alone_and_in_a_batch() {
    if !softgpu::active() {
        println!("not run: needs the software device, whose products do not follow the number of rows");
        return;
    }
    for family in FAMILIES {
        let model = made_up(family);
        for (i, base) in loops().into_iter().enumerate().filter(|(i, _)| i % 2 == 0) {
            let options = Options { temperature: if i % 4 == 0 { 0.8 } else { 0.0 }, ..base };
            let batch = tokens(&model, &options, &prompts());
            for (prompt, batch) in prompts().iter().zip(&batch) {
                assert_eq!(tokens(&model, &options, std::slice::from_ref(prompt))[0], *batch, "{family} {options:?}");
            }
        }
        for (base, block_length) in [(adaptive(1, 1, 0.25), 4), (adaptive(1, 100, 1.0), 12), (adaptive(1, 1, 0.0), 12)]
        {
            for policy in [Policy::Fixed, Policy::Threshold(0.5)] {
                let options = Options { gen_length: 12, block_length: Some(block_length), policy, ..base.clone() };
                let plain = Options { cache: CacheMode::None, ..options.clone() };
                assert_eq!(tokens(&model, &options, &prompts()), tokens(&model, &plain, &prompts()), "{options:?}");
            }
        }
    }
}

/// Twins that run now and then: the host leads and remembers. Twins in each forward are those that run beside, but for the
/// rounding of differences; and a sequence is what it is alone.
pub fn guidance_at_intervals() {
    for family in FAMILIES {
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
        // The first five forwards are all that there are.
        assert_eq!(run(&at(1, 5)), run(&at(100, 5)), "{family}");
        let apart = run(&at(3, 12));
        assert_ne!(run(&at(1, 12)), apart, "{family}");
        same_watched(&model, &at(3, 12), &prompts());
        if softgpu::active() {
            for (prompt, batch) in prompts().iter().zip(&apart) {
                assert_eq!(tokens(&model, &at(3, 12), std::slice::from_ref(prompt))[0], *batch, "{family}");
            }
        }
    }
}

/// In lockstep with the CPU, which is told what V-verify chose on the device: the choice is measured, everything else has to
/// be within the margin. Twins' choices nobody tells, so guidance goes without.
pub fn kept_in_lockstep() {
    let mut all = Tally::default();
    for family in FAMILIES {
        let both = Both::made_up(family);
        let mut random = Random(77 + family as u64);
        for (i, base) in loops().into_iter().enumerate() {
            let ratio = base.effective_refresh_ratio();
            let chooses = if base.cache == CacheMode::Adaptive { ratio > 0.0 } else { ratio < 1.0 };
            let guided = !chooses && i % 3 == 0;
            let temperature = if i % 2 == 0 { 0.7 } else { 0.0 };
            let options = Options { cfg_scale: if guided { 0.8 } else { 0.0 }, temperature, ..base };
            let prompts: Vec<Vec<u32>> = (0..1 + random.below(3))
                .map(|_| (0..1 + random.below(20)).map(|_| random.below(38) as u32).collect())
                .collect();
            let what = format!("{family} {options:?} {prompts:?}");
            all.add(decode_both(&both, &options, &prompts, &what, &mut ()).1);
        }
    }
    println!("{all}");
    all.assert_few([0.05, 0.05], [0.6, 0.9]);
    assert_choices(&all);
}

/// dLLM-Cache's recorded decodes likewise.
pub fn recorded_kept_decodes() {
    let models: BTreeMap<_, Both> =
        ["tiny-llada", "tiny-llada-b", "tiny-dream"].into_iter().map(|name| (name, Both::recorded(name))).collect();
    let (mut all, mut decodes, mut same) = (Tally::default(), 0, 0);
    for name in names("trajectory_") {
        let case = json(&format!("{name}.json"));
        if !case["algorithm"].as_str().unwrap().starts_with("dllm_cache.") {
            continue;
        }
        let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
        let both = &models[case["model"].as_str().unwrap()];
        let (decoded, tally) = decode_both(both, &options(&case), &prompts, &name, &mut ());
        let want: Vec<Vec<u32>> = numbers(&case["final"]);
        same += usize::from(decoded.tokens == want);
        decodes += 1;
        all.add(tally);
    }
    println!("{decodes} decodes, {same} with the tokens of the original; {all}");
    all.assert_few([0.055, 0.032], [0.6, 0.9]);
    assert_choices(&all);
}

/// Few rows are others than the CPU that rounds would choose, and those had turned about as much: twice what was seen.
fn assert_choices(all: &Tally) {
    assert!(all.selected > 500, "{all}");
    assert!(all.chosen_differs as f64 <= 0.035 * all.selected as f64 && all.worst_angle < 0.01, "{all}");
}
