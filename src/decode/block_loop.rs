//! The loop that all algorithms share: passes over one block, or over the whole sequence, until it is complete.

use super::state::{DecodeState, SequencePass};
use crate::cache::PassKind;
use crate::sampling::{CommitRule, QuotaSchedule, SequenceState};
use std::ops::Range;

/// The passes over one block. The loop ends when no sequence has a mask left in the block, or passes left.
#[derive(Clone, Debug)]
pub(super) struct BlockLoop {
    /// Index of the block; `None` for the whole sequence.
    pub block: Option<usize>,
    /// The first pass, and every pass after it.
    pub passes: [PassSpec; 2],
    pub schedule: QuotaSchedule,
    /// Largest number of passes. [`QuotaSchedule::CarryOver`] uses the number of steps instead.
    pub max_passes: usize,
}

/// A pass of a [`BlockLoop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PassSpec {
    pub kind: PassKind,
    /// Candidates are the masks from here to the end of the block.
    pub candidates_from: CandidateStart,
    /// Whether the pass commits the first position of the block, and no other.
    pub first_position_only: bool,
}

/// Start of the candidates of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CandidateStart {
    /// The first position of the sequence.
    Sequence,
    /// The first query row of the pass, without vicinity.
    QueryRows,
    /// The first position of the block.
    Block,
}

impl PassSpec {
    /// Returns the positions whose masks are candidates. Positions that the pass cannot commit are included for observers
    /// only.
    pub fn candidates(
        &self,
        state: &DecodeState,
        sequence: usize,
        block: &Range<usize>,
        observed: bool,
    ) -> Range<usize> {
        let start = match self.candidates_from {
            CandidateStart::Sequence => 0,
            CandidateStart::QueryRows => {
                self.kind.rows(block, state.sequences[sequence].layout.first_active_row, block.end).start
            }
            CandidateStart::Block => block.start,
        };
        start..if observed { block.end } else { block.end.min(self.commit_before(block)) }
    }

    /// Returns the first position that the pass does not commit.
    pub fn commit_before(&self, block: &Range<usize>) -> usize {
        if self.first_position_only { block.start + 1 } else { usize::MAX }
    }
}

impl BlockLoop {
    /// Returns pass `pass` of the loop.
    pub fn spec(&self, pass: usize) -> PassSpec {
        self.passes[pass.min(1)]
    }

    /// Returns the state of every sequence at the start of the loop.
    pub fn sequence_states(&self, state: &DecodeState) -> Vec<SequenceState> {
        state.map_sequences(|s| self.sequence_state(state, s))
    }

    fn sequence_state(&self, state: &DecodeState, sequence: usize) -> SequenceState {
        let active_range = match self.block {
            Some(block) => state.block(sequence, block),
            None => 0..state.tokens[sequence].len(),
        };
        let initial_masks = state.num_masks(sequence, &active_range);
        let (max_passes, per_step) = match self.schedule {
            QuotaSchedule::CarryOver => {
                let steps = state.options.steps.unwrap_or(initial_masks);
                (steps, initial_masks.checked_div(steps).unwrap_or(0))
            }
            _ => (self.max_passes, 0),
        };
        SequenceState {
            generated: state.sequences[sequence].layout.prompt_len,
            forwards: state.sequences[sequence].step,
            quota_range: active_range.clone(),
            active_range,
            initial_masks,
            per_step,
            deficit: 0,
            max_passes,
            active: false,
            first_quota: 0,
            first_commit_before: 0,
        }
    }

    /// Returns the quota of a sequence in pass `pass`.
    pub fn quota(&self, state: &DecodeState, index: usize, sequence: &SequenceState, pass: usize) -> usize {
        self.schedule.next(sequence, pass, state.num_masks(index, &sequence.quota_range))
    }

    /// Returns pass `pass` of every sequence that is still active.
    pub fn sequence_passes(
        &self,
        state: &DecodeState,
        sequences: &[SequenceState],
        pass: usize,
        observed: bool,
    ) -> Vec<SequencePass> {
        let spec = self.spec(pass);
        let is_active = |index: &usize| {
            let sequence = &sequences[*index];
            state.sequences[*index].ended.is_none()
                && pass < sequence.max_passes
                && state.num_masks(*index, &sequence.active_range) > 0
        };
        let sequence_pass = |index: usize| {
            let sequence = &sequences[index];
            SequencePass {
                sequence: index,
                block: state.block(index, self.block.unwrap_or(0)),
                candidates: spec.candidates(state, index, &sequence.active_range, observed),
                commit_before: spec.commit_before(&sequence.active_range),
                commit_rule: if spec.first_position_only {
                    CommitRule::Quota(1)
                } else {
                    state.commit_rule(self.quota(state, index, sequence, pass))
                },
            }
        };
        (0..sequences.len()).filter(is_active).map(sequence_pass).collect()
    }
}
