//! Whole decodes: the loops of the host, compared with advance.

use super::case::{Batch, ENDS, MASK, Output, new_state, output_of, saturating_i32};
use crate::common::{Random, on_device};
use dllm_kernels::abi::{DLLM_NONE_FAILED, dllm_advance_sequence};
use dllm_kernels::decode::{Algorithm, decode};
use dllm_kernels::engine::{DecodeEngine, Pass};
use dllm_kernels::reference::advance::Sequence;
use dllm_kernels::sampling::{CommitRule, DreamSchedule, Prediction, QuotaSchedule, llada_quota};
use dllm_kernels::{CacheMode, Config, Family, Options, Policy, Result};
use std::ops::Range;

on_device! {
    follows_the_loops,
}

fn masks(tokens: &[u32]) -> usize {
    tokens.iter().filter(|token| **token == MASK as u32).count()
}

/// An engine that commits at random, and compares each pass that the loop requests with the results of advance.
struct Follower<'a> {
    options: &'a Options,
    algorithm: Algorithm,
    prompt_lens: Vec<usize>,
    random: Random,
    batch: Batch,
    /// Results of the last launch, or the state at the start of a block.
    output: Output,
    block: usize,
    next_block: usize,
    steps: usize,
}

impl Follower<'_> {
    fn new<'a>(options: &'a Options, algorithm: Algorithm, prompts: &[Vec<u32>], seed: u64) -> Follower<'a> {
        let steps = options.steps() / (options.gen_length / options.block_length());
        let schedule = DreamSchedule::new(steps.max(1), options.eps);
        let ratios = schedule.ratios();
        let fixed = options.policy == Policy::Fixed;
        let schedule = match algorithm {
            Algorithm::Llada | Algorithm::FastLlada if fixed => QuotaSchedule::Llada { steps },
            Algorithm::Dream | Algorithm::DreamBlock if fixed => QuotaSchedule::Dream(ratios.clone()),
            Algorithm::DreamThreshold => QuotaSchedule::CarryOver,
            _ => QuotaSchedule::Unlimited,
        };
        let mut end = 0;
        let sequences = prompts.iter().map(|prompt| {
            let start = end;
            end += prompt.len() + options.gen_length;
            Sequence { generated: prompt.len(), quota: None, ..Sequence::new(start..end) }
        });
        let output = output_of(&new_state(schedule, sequences.collect()), &vec![i32::MAX; prompts.len()]);
        let end_tokens = if options.early_stop { &ENDS[..] } else { &[] };
        let batch = Batch::new(&vec![0; end], &output, &ratios, end_tokens);
        let prompt_lens = prompts.iter().map(Vec::len).collect();
        Follower {
            options,
            algorithm,
            prompt_lens,
            random: Random(seed),
            batch,
            output,
            block: 0,
            next_block: 0,
            steps,
        }
    }

    fn active_range(&self, s: usize, block: usize) -> Range<usize> {
        let (prompt, size) = (self.prompt_lens[s], self.options.block_length());
        match self.algorithm {
            Algorithm::Dream | Algorithm::DreamThreshold => 0..prompt + self.options.gen_length,
            _ => prompt + block * size..prompt + (block + 1) * size,
        }
    }

    fn is_active(&self, tokens: &[Vec<u32>], s: usize, block: usize) -> bool {
        self.output.sequences[s].ended == 0 && masks(&tokens[s][self.active_range(s, block)]) > 0
    }

    /// Writes the state at the start of the next block that has a mask.
    fn begin(&mut self, tokens: &[Vec<u32>]) {
        let blocks = self.options.gen_length / self.options.block_length();
        let has_mask = |block: &usize| (0..tokens.len()).any(|s| self.is_active(tokens, s, *block));
        self.block = (self.next_block..blocks).find(has_mask).expect("a block with a mask");
        self.next_block = self.block + 1;
        for s in 0..tokens.len() {
            self.begin_sequence(tokens, s);
        }
        self.output.control.pass = 0;
        self.batch.begin(&self.output);
    }

    /// Writes the state of one sequence at the start of a block.
    fn begin_sequence(&mut self, tokens: &[Vec<u32>], s: usize) {
        let active_range = self.active_range(s, self.block);
        let initial_masks = masks(&tokens[s][active_range.clone()]);
        let max_passes = match self.algorithm {
            Algorithm::Llada | Algorithm::Dream => self.steps,
            Algorithm::DreamThreshold => self.options.steps.unwrap_or(initial_masks),
            Algorithm::FastLlada | Algorithm::DreamBlock => usize::MAX,
        };
        let quota = match (self.algorithm, self.options.policy) {
            (Algorithm::DreamBlock, _) => 1,
            (Algorithm::Llada | Algorithm::FastLlada, Policy::Fixed) => llada_quota(initial_masks, self.steps, 0),
            (Algorithm::Dream, _) => DreamSchedule::new(self.steps.max(1), self.options.eps).quota(0, initial_masks),
            (Algorithm::DreamThreshold, _) => initial_masks / max_passes,
            _ => usize::MAX,
        };
        let commit_before = if self.algorithm == Algorithm::DreamBlock { active_range.start + 1 } else { usize::MAX };
        let per_step = if self.algorithm == Algorithm::DreamThreshold { initial_masks / max_passes } else { 0 };
        let active = self.is_active(tokens, s, self.block);
        let old = self.output.sequences[s];
        self.output.sequences[s] = dllm_advance_sequence {
            active_start: saturating_i32(active_range.start),
            active_end: saturating_i32(active_range.end),
            quota_start: saturating_i32(active_range.start),
            quota_end: saturating_i32(active_range.end),
            initial_masks: saturating_i32(initial_masks),
            per_step: saturating_i32(per_step),
            deficit: 0,
            max_passes: saturating_i32(max_passes),
            active: active.into(),
            ..old
        };
        self.output.quota[s] = if active { saturating_i32(quota) } else { 0 };
        self.output.commit_before[s] = if active { saturating_i32(commit_before) } else { i32::MIN };
        self.output.steps[s] = old.forwards;
    }
}

impl Follower<'_> {
    /// Compares the candidates of a pass with the quotas, limits and steps that advance wrote.
    fn compare(&self, num_sequences: usize, pass: &Pass) {
        for s in 0..num_sequences {
            let requested = pass.candidates.iter().find(|candidates| candidates.sequence == s).map(|candidates| {
                let quota = match candidates.commit_rule {
                    CommitRule::Quota(quota) => saturating_i32(quota),
                    CommitRule::ThresholdTopN { top_n, .. } => saturating_i32(top_n),
                    CommitRule::Threshold(_) | CommitRule::Factor(_) => i32::MAX,
                };
                let last = candidates.positions.last().expect("a mask");
                assert!(self.active_range(s, self.block).contains(last), "a pass of another block");
                (quota, saturating_i32(candidates.commit_before), saturating_i32(candidates.step))
            });
            let expected = (self.output.quota[s], self.output.commit_before[s], self.output.steps[s]);
            let Output { control, sequences, .. } = &self.output;
            match requested {
                Some(requested) => {
                    assert_eq!((requested, 1), (expected, sequences[s].active), "{control:?} {:?}", sequences[s])
                }
                None => assert_eq!((expected.0, expected.1, sequences[s].active), (0, i32::MIN, 0), "{control:?}"),
            }
        }
    }
}

impl DecodeEngine for Follower<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        if self.output.sequences.iter().all(|sequence| sequence.active == 0) {
            self.begin(tokens);
        }
        self.compare(tokens.len(), pass);
        let mut concat_tokens: Vec<i32> = tokens.iter().flatten().map(|token| *token as i32).collect();
        let (mut committed, mut predictions) = (vec![0; tokens.len()], vec![]);
        for candidates in pass.candidates {
            let s = candidates.sequence;
            let eligible = candidates.positions.partition_point(|position| *position < candidates.commit_before);
            let limit = eligible.min(self.output.quota[s] as usize);
            // A fixed quota is used up; the other rules commit at least one.
            let count = match candidates.commit_rule {
                CommitRule::Quota(_) => limit,
                _ => (1 + self.random.below(limit.max(1))).min(limit),
            };
            let committed_indices = self.random.distinct(count, eligible);
            for (i, position) in candidates.positions.iter().enumerate() {
                let token = [1, 1, 2, 2, 4, 4, 6, ENDS[0]][self.random.below(8)];
                let commit = committed_indices.contains(&(i as i32));
                if commit {
                    concat_tokens[self.output.sequences[s].first_token as usize + position] = token;
                    committed[s] += 1;
                }
                predictions.push(Prediction { token: token as u32, confidence: 0.5, commit });
            }
        }
        let passes = self.output.control.passes;
        self.output = self.batch.advance(&concat_tokens, &committed, &vec![DLLM_NONE_FAILED; tokens.len()]);
        let progress = self.output.progress;
        let active: i32 = self.output.sequences.iter().map(|sequence| sequence.active).sum();
        assert_eq!((progress.passes, progress.nfe, progress.active), (passes + 1, passes + 1, active));
        Ok(predictions)
    }
}

/// Returns a model configuration with the mask and end-of-text tokens of these tests.
pub fn config(family: Family) -> Config {
    let eos_token_ids = ENDS.iter().map(|token| *token as u32).collect();
    Config { family, mask_token_id: MASK as u32, eos_token_ids, vocab_size: 16, ..Config::shape("mid").unwrap() }
}

/// Returns options for every decoding algorithm, with several blocks and with one.
fn every_algorithm() -> Vec<(Family, Options)> {
    let mut all = vec![];
    let mut add = |family, block_length: usize, steps: Option<usize>, cache, policy| {
        for early_stop in [false, true] {
            let block_length = Some(block_length);
            all.push((
                family,
                Options { gen_length: 12, block_length, steps, cache, policy, early_stop, ..Options::default() },
            ));
        }
    };
    for steps in [3, 6, 15, 24] {
        for cache in [CacheMode::None, CacheMode::Dual] {
            add(Family::Llada, 4, Some(steps), cache, Policy::Fixed);
            add(Family::Dream, 4, Some(steps), cache, Policy::Fixed);
        }
        add(Family::Dream, 12, Some(steps), CacheMode::None, Policy::Fixed);
    }
    for policy in [Policy::Threshold(0.9), Policy::Factor(1.0)] {
        for family in [Family::Llada, Family::Dream] {
            add(family, 6, None, CacheMode::Prefix, policy);
        }
    }
    for steps in [None, Some(1), Some(3), Some(4), Some(12)] {
        add(Family::Dream, 12, steps, CacheMode::None, Policy::Threshold(0.9));
    }
    all
}

/// Whole decodes: every pass that the loop of the host requests is the one that advance has prepared.
fn follows_the_loops() {
    let random = &mut Random(7);
    let mut passes = 0;
    for (family, options) in every_algorithm() {
        let config = config(family);
        let algorithm = options.algorithm(family);
        for seed in 1..6 {
            let prompts: Vec<Vec<u32>> = (0..1 + random.below(4))
                .map(|_| (0..1 + random.below(6)).map(|_| [1, 2, 1, 2, MASK as u32, 5][random.below(6)]).collect())
                .collect();
            // Dream's threshold needs a number of masks that its steps divide: no masks in the prompts.
            let without_masks =
                |prompt: &Vec<u32>| prompt.iter().map(|t| if *t == MASK as u32 { 1 } else { *t }).collect();
            let prompts = match options.validate(&config, &prompts) {
                Ok(()) => prompts,
                Err(_) => prompts.iter().map(without_masks).collect(),
            };
            options.validate(&config, &prompts).unwrap();
            let mut follower = Follower::new(&options, algorithm, &prompts, seed);
            let decoded = decode(&mut follower, &config, &prompts, &options, None, &mut ()).unwrap();
            let progress = follower.output.progress;
            assert_eq!((progress.nfe, progress.active), (saturating_i32(decoded.nfe), 0), "{algorithm:?} {options:?}");
            passes += decoded.nfe;
        }
    }
    assert!(passes > 1000, "{passes} passes");
}
