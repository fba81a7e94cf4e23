//! Where a decode stands: tokens, masks, blocks, and whose turn it is.

use super::observer::{SequenceStep, Step};
use super::options::{Options, Policy};
use crate::backend::Ratio;
use crate::cache::adaptive::{AdaptivePlan, CfgPlan, first_active_row};
use crate::cache::{BlockPlan, PassKind, Refresh};
use crate::model::{CachePlan, Family, LayerPlan, QueryRows};
use crate::sampling::{Candidates, CommitRule, Prediction, SamplingParams};
use std::ops::Range;

/// One sequence of the batch.
pub(super) struct Sequence {
    pub prompt_len: usize,
    /// Where rows begin that no cache can leave out for good.
    pub first_active_row: usize,
    /// How far before a position the row stands whose logits decide about it.
    pub source: usize,
    /// Forwards it has taken part in: the same alone or in a batch, so that random numbers are too.
    pub step: usize,
    /// Tokens of the generated region that stand, once an end-of-text token has ended it early.
    pub ended: Option<usize>,
}

/// What a pass runs of a sequence, and which caches it uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Plan {
    Block(BlockPlan),
    Adaptive(AdaptivePlan, CfgPlan),
}

impl CachePlan for Plan {
    fn layer(&self, layer: usize) -> LayerPlan {
        match self {
            Plan::Block(plan) => plan.layer(layer),
            Plan::Adaptive(plan, _) => plan.layer(layer),
        }
    }
}

/// Places of [`Plan::slot`], and one before them.
pub(super) const SLOTS: usize = 5;

impl Plan {
    /// The place of passes of this kind among those of a decode, from 1 on.
    pub fn slot(&self) -> usize {
        match self {
            Plan::Block(_) => 1,
            Plan::Adaptive(plan, _) => 1 + 2 * usize::from(plan.prompt) + usize::from(plan.response),
        }
    }

    /// What the adaptive cache renews.
    fn refreshed(&self) -> Option<AdaptivePlan> {
        match self {
            Plan::Block(_) => None,
            Plan::Adaptive(plan, _) => Some(*plan),
        }
    }
}

/// What a sequence does in the next pass.
pub(super) struct SequencePass {
    pub sequence: usize,
    pub block: Range<usize>,
    /// Masked positions in here are candidates.
    pub candidates: Range<usize>,
    /// Candidates from here on are only looked at.
    pub commit_before: usize,
    pub selection: CommitRule,
}

/// The state of a decode, and what follows from it.
pub(super) struct State<'a> {
    pub options: &'a Options,
    pub unmask: SamplingParams,
    pub mask: u32,
    pub end_tokens: Vec<u32>,
    pub tokens: Vec<Vec<u32>>,
    pub sequences: Vec<Sequence>,
    pub nfe: usize,
}

impl Sequence {
    pub fn new(family: Family, prompt: &[u32], mask: u32) -> Sequence {
        let source = if family == Family::Dream { 1 } else { 0 };
        Sequence {
            prompt_len: prompt.len(),
            first_active_row: first_active_row(family, prompt, mask),
            source,
            step: 0,
            ended: None,
        }
    }
}

impl State<'_> {
    pub fn blocks(&self) -> usize {
        self.options.gen_length / self.options.block_length()
    }

    pub fn each<T>(&self, f: impl Fn(&Self, usize) -> T) -> Vec<T> {
        (0..self.sequences.len()).map(|s| f(self, s)).collect()
    }

    /// Positions of a block.
    pub fn block(&self, sequence: usize, block: usize) -> Range<usize> {
        let length = self.options.block_length();
        let start = self.sequences[sequence].prompt_len + block * length;
        start..start + length
    }

    /// What a pass of this kind runs of a sequence, and the rows that it has.
    pub fn plan(&self, kind: PassKind, turn: &SequencePass) -> (Plan, QueryRows) {
        self.plan_at(kind, turn, self.sequences[turn.sequence].step)
    }

    /// The same, in forward `step` of the sequence.
    pub fn plan_at(&self, kind: PassKind, turn: &SequencePass, step: usize) -> (Plan, QueryRows) {
        let sequence = &self.sequences[turn.sequence];
        let options = self.options;
        if let Some(adaptive) = options.adaptive() {
            let plan = adaptive.plan(step);
            let twin = if options.cfg_scale > 0.0 { adaptive.twin(step) } else { CfgPlan::Batched };
            return (Plan::Adaptive(plan, twin), self.adaptive_window(plan, turn.sequence));
        }
        let refresh = match options.keeps_refreshes() {
            false => Refresh::Whole,
            true if turn.block.start == sequence.prompt_len => Refresh::Keep,
            true => Refresh::Some(Ratio::new(options.effective_refresh_ratio())),
        };
        let plan = BlockPlan { mode: options.cache, pass: kind, refresh };
        (Plan::Block(plan), self.window(kind, turn.sequence, &turn.block))
    }

    /// The rows of a pass around a block.
    pub fn window(&self, kind: PassKind, sequence: usize, block: &Range<usize>) -> QueryRows {
        let Sequence { first_active_row, source, .. } = self.sequences[sequence];
        let len = self.tokens[sequence].len();
        let num_keys = self.options.suffix_window.map_or(len, |window| block.end.saturating_add(window).min(len));
        let mut rows = kind.window(block, first_active_row, num_keys);
        if !kind.refreshes() {
            let vicinity = self.options.vicinity;
            rows = rows.start.saturating_sub(vicinity)..rows.end.saturating_add(vicinity).min(num_keys);
        }
        QueryRows { sequence, rows, block: block.start.saturating_sub(source)..block.end, num_keys }
    }

    /// The rows of a pass with the adaptive cache.
    pub fn adaptive_window(&self, plan: AdaptivePlan, sequence: usize) -> QueryRows {
        let len = self.tokens[sequence].len();
        QueryRows::new(sequence, plan.window(self.sequences[sequence].first_active_row, len), len)
    }

    /// Masked positions in `range`.
    pub fn masks(&self, sequence: usize, range: Range<usize>) -> Vec<usize> {
        range.filter(|p| self.tokens[sequence][*p] == self.mask).collect()
    }

    /// The policy's selection.
    pub fn selection(&self, quota: usize) -> CommitRule {
        match self.options.policy {
            Policy::Fixed => CommitRule::Quota(quota),
            // Where confidences are f32, the original compares them with the threshold as f32.
            Policy::Threshold(t) => {
                let threshold = if self.unmask.f32_confidence { f64::from(t as f32) } else { t };
                match quota {
                    usize::MAX => CommitRule::Threshold(threshold),
                    top_n => CommitRule::ThresholdTopN { threshold, top_n },
                }
            }
            Policy::Factor(f) => CommitRule::Factor(f),
        }
    }

    /// Ends a sequence, if asked to, where an end-of-text token stands with no mask before it.
    pub fn check_end(&mut self, sequence: usize) {
        if !self.options.early_stop {
            return;
        }
        let generated = &self.tokens[sequence][self.sequences[sequence].prompt_len..];
        let settled = generated.iter().take_while(|t| **t != self.mask);
        let end = settled.enumerate().find(|(_, t)| self.end_tokens.contains(t));
        self.sequences[sequence].ended = end.map(|(i, _)| i + 1);
    }

    /// What a pass did, for observers.
    pub fn describe(
        &self,
        kind: PassKind,
        block: usize,
        (plans, windows): (&[Plan], &[QueryRows]),
        groups: &[Candidates],
        verdicts: &[Vec<Prediction>],
        selected_rows: Vec<Vec<(usize, Vec<usize>)>>,
    ) -> Step<'_> {
        let idle = |s: usize| {
            let block = self.block(s, block);
            SequenceStep {
                active: false,
                window: self.window(kind, s, &block).rows,
                block,
                candidates: vec![],
                confidence: vec![],
                transferred: vec![],
                refreshed: None,
                selected_rows: vec![],
                tokens: self.generated(s),
            }
        };
        let mut sequences: Vec<_> = (0..self.sequences.len()).map(idle).collect();
        let plans = plans.iter().zip(windows);
        for ((((plan, window), group), own), selected_rows) in plans.zip(groups).zip(verdicts).zip(selected_rows) {
            let committed = group.positions.iter().zip(own).filter(|(_, v)| v.commit);
            let step = &mut sequences[group.sequence];
            step.active = true;
            step.window = if plan.refreshed().is_some() { step.window.clone() } else { window.rows.clone() };
            step.refreshed = plan.refreshed();
            step.selected_rows = selected_rows;
            step.transferred = committed.map(|(p, _)| *p).collect();
            step.confidence = own.iter().map(|v| v.confidence).collect();
            step.candidates = group.positions.clone();
        }
        Step { index: self.nfe - 1, kind, sequences }
    }

    /// The generated region as it stands, up to where the sequence was ended.
    pub fn generated(&self, sequence: usize) -> &[u32] {
        let Sequence { prompt_len, ended, .. } = self.sequences[sequence];
        let generated = &self.tokens[sequence][prompt_len..];
        &generated[..ended.unwrap_or(generated.len())]
    }
}
