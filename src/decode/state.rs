//! State of a decode: tokens, masks, and the progress of each sequence.

use super::observer::{SequenceStep, Step};
use super::options::{Options, Policy};
use crate::cache::{CacheConfig, PassKind, PassPlan, SequenceLayout};
use crate::model::{Config, QueryRows};
use crate::sampling::{Candidates, CommitRule, Prediction, SamplingParams};
use std::ops::Range;

/// Progress of one sequence of the batch.
pub(super) struct SequenceProgress {
    pub layout: SequenceLayout,
    /// Forwards in which the sequence was active. Random numbers are keyed by it, so it does not depend on the batch.
    pub step: usize,
    /// Number of final tokens of the generated region, once an end-of-text token has ended the sequence early.
    pub ended: Option<usize>,
}

/// Share of one sequence in a forward pass.
pub(super) struct SequencePass {
    pub sequence: usize,
    pub block: Range<usize>,
    /// Masked positions of this range are candidates.
    pub candidates: Range<usize>,
    /// Candidates from this position on are scored but not committed.
    pub commit_before: usize,
    pub commit_rule: CommitRule,
}

/// Inputs of a forward pass; element i of each list belongs to the i-th active sequence.
pub(super) struct PassInputs {
    pub plans: Vec<PassPlan>,
    pub query_rows: Vec<QueryRows>,
    pub candidates: Vec<Candidates>,
}

/// Results of a forward pass, in the order of [`PassInputs`].
pub(super) struct PassResults {
    /// One prediction per candidate.
    pub predictions: Vec<Vec<Prediction>>,
    /// Rows that V-verify selected, by layer.
    pub selected_rows: Vec<Vec<(usize, Vec<usize>)>>,
}

/// State of a decode.
pub(super) struct DecodeState<'a> {
    pub options: &'a Options,
    pub cache: CacheConfig,
    pub sampling: SamplingParams,
    pub mask_token: u32,
    pub end_tokens: Vec<u32>,
    /// Prompt and generated region of each sequence.
    pub tokens: Vec<Vec<u32>>,
    pub sequences: Vec<SequenceProgress>,
    pub nfe: usize,
}

impl<'a> DecodeState<'a> {
    pub fn new(config: &Config, prompts: &[Vec<u32>], options: &'a Options) -> DecodeState<'a> {
        let (mask_token, gen_length) = (config.mask_token_id, options.gen_length);
        let progress = |(index, prompt): (usize, &Vec<u32>)| SequenceProgress {
            layout: SequenceLayout::new(index, config.family, prompt, gen_length, mask_token),
            step: 0,
            ended: None,
        };
        DecodeState {
            options,
            cache: options.cache_config(),
            sampling: options.sampling(options.algorithm(config.family), mask_token),
            mask_token,
            end_tokens: end_tokens(config, options),
            tokens: prompts.iter().map(|p| [p.clone(), vec![mask_token; gen_length]].concat()).collect(),
            sequences: prompts.iter().enumerate().map(progress).collect(),
            nfe: 0,
        }
    }

    pub fn num_blocks(&self) -> usize {
        self.options.gen_length / self.options.block_length()
    }

    /// Calls `f` with the index of each sequence.
    pub fn map_sequences<T>(&self, f: impl Fn(usize) -> T) -> Vec<T> {
        (0..self.sequences.len()).map(f).collect()
    }

    /// Returns the positions of block `block`.
    pub fn block(&self, sequence: usize, block: usize) -> Range<usize> {
        let length = self.options.block_length();
        let start = self.sequences[sequence].layout.prompt_len + block * length;
        start..start + length
    }

    /// Returns cache use and query rows of a sequence in a pass that is its forward `step`.
    pub fn plan(&self, kind: PassKind, pass: &SequencePass, step: usize) -> (PassPlan, QueryRows) {
        let layout = &self.sequences[pass.sequence].layout;
        let plan = self.cache.plan(kind, layout, &pass.block, step);
        let rows = self.cache.query_rows(&plan, layout, &pass.block);
        (plan, rows)
    }

    /// Returns the inputs of the next pass of these sequences.
    pub fn inputs(&self, kind: PassKind, passes: &[SequencePass]) -> PassInputs {
        let step = |pass: &SequencePass| self.sequences[pass.sequence].step;
        let (plans, query_rows) = passes.iter().map(|pass| self.plan(kind, pass, step(pass))).unzip();
        let candidates = |pass: &SequencePass| Candidates {
            sequence: pass.sequence,
            step: step(pass),
            positions: self.masks(pass.sequence, pass.candidates.clone()),
            commit_before: pass.commit_before,
            commit_rule: pass.commit_rule,
        };
        PassInputs { plans, query_rows, candidates: passes.iter().map(candidates).collect() }
    }

    /// Returns the masked positions of `range`, ascending.
    pub fn masks(&self, sequence: usize, range: Range<usize>) -> Vec<usize> {
        range.filter(|p| self.tokens[sequence][*p] == self.mask_token).collect()
    }

    /// Returns the number of masked positions in `range`.
    pub fn num_masks(&self, sequence: usize, range: &Range<usize>) -> usize {
        self.tokens[sequence][range.clone()].iter().filter(|token| **token == self.mask_token).count()
    }

    /// Returns the policy's commit rule for a pass with this quota.
    pub fn commit_rule(&self, quota: usize) -> CommitRule {
        match self.options.policy {
            Policy::Fixed => CommitRule::Quota(quota),
            Policy::Threshold(t) => {
                // With f32 confidences the reference implementations compare in f32.
                let threshold = if self.sampling.f32_confidence { f64::from(t as f32) } else { t };
                match quota {
                    usize::MAX => CommitRule::Threshold(threshold),
                    top_n => CommitRule::ThresholdTopN { threshold, top_n },
                }
            }
            Policy::Factor(f) => CommitRule::Factor(f),
        }
    }

    /// Writes the tokens that a pass commits, and counts the pass.
    pub fn commit(&mut self, candidates: &[Candidates], predictions: &[Vec<Prediction>]) {
        self.nfe += 1;
        for (candidates, predictions) in candidates.iter().zip(predictions) {
            let sequence = candidates.sequence;
            for (position, prediction) in candidates.positions.iter().zip(predictions) {
                if prediction.commit {
                    self.tokens[sequence][*position] = prediction.token;
                }
            }
            self.sequences[sequence].step += 1;
            self.check_end(sequence);
        }
    }

    /// With `early_stop`, ends a sequence at its first end-of-text token that has no mask before it.
    pub fn check_end(&mut self, sequence: usize) {
        if !self.options.early_stop {
            return;
        }
        let generated = &self.tokens[sequence][self.sequences[sequence].layout.prompt_len..];
        let unmasked = generated.iter().take_while(|t| **t != self.mask_token);
        let end = unmasked.enumerate().find(|(_, t)| self.end_tokens.contains(t));
        self.sequences[sequence].ended = end.map(|(i, _)| i + 1);
    }

    /// Describes the last pass to observers.
    pub fn describe(&self, kind: PassKind, block: usize, inputs: &PassInputs, results: PassResults) -> Step<'_> {
        let mut sequences = self.map_sequences(|s| {
            let block = self.block(s, block);
            SequenceStep {
                active: false,
                window: self.cache.observed_rows(kind, &self.sequences[s].layout, &block),
                block,
                candidates: vec![],
                confidence: vec![],
                transferred: vec![],
                refreshed: None,
                selected_rows: vec![],
                tokens: self.generated(s),
            }
        });
        let inputs = inputs.plans.iter().zip(&inputs.candidates);
        let results = results.predictions.iter().zip(results.selected_rows);
        for ((plan, candidates), (predictions, selected_rows)) in inputs.zip(results) {
            let committed = candidates.positions.iter().zip(predictions).filter(|(_, p)| p.commit);
            let step = &mut sequences[candidates.sequence];
            step.active = true;
            step.refreshed = plan.adaptive();
            step.selected_rows = selected_rows;
            step.transferred = committed.map(|(position, _)| *position).collect();
            step.confidence = predictions.iter().map(|p| p.confidence).collect();
            step.candidates = candidates.positions.clone();
        }
        Step { index: self.nfe - 1, kind, sequences }
    }

    /// Returns the generated region, up to the end of a sequence that ended early.
    pub fn generated(&self, sequence: usize) -> &[u32] {
        let SequenceProgress { layout, ended, .. } = &self.sequences[sequence];
        let generated = &self.tokens[sequence][layout.prompt_len..];
        &generated[..ended.unwrap_or(generated.len())]
    }
}

/// Returns the tokens that end a text: the model's and those of the options.
pub(super) fn end_tokens(config: &Config, options: &Options) -> Vec<u32> {
    [&config.eos_token_ids[..], &options.end_tokens[..]].concat()
}
