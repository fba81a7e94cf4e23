//! What the rules of the originals have in common: passes over a block, or over everything, until it is done.

use super::state::State;
use crate::cache::PassKind;
use crate::sampling::{QuotaSchedule, SequenceState, dream_quota, llada_quota};
use std::ops::Range;

/// Passes over a block, or over everything.
#[derive(Clone, Debug)]
pub(super) struct BlockLoop {
    /// The block; None for everything.
    pub block: Option<usize>,
    /// What the first pass runs, and what all later ones do.
    pub stages: [PassSpec; 2],
    /// How many tokens a pass commits.
    pub schedule: QuotaSchedule,
    /// Passes at most.
    pub steps: usize,
}

/// What a pass runs, and what it decides about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PassSpec {
    pub pass: PassKind,
    /// Candidates are the masks from here to the end of the block.
    pub from: CandidateStart,
    /// Only the first position of the block is decided, always.
    pub first_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CandidateStart {
    /// The first position of the sequence.
    Start,
    /// The first position that runs, but for a block's vicinity.
    Window,
    /// The first position of the block.
    Block,
}

impl PassSpec {
    /// Positions whose masks are candidates. Those that cannot be committed are left out, unless somebody looks.
    pub fn candidates(&self, state: &State, sequence: usize, block: &Range<usize>, observed: bool) -> Range<usize> {
        let start = match self.from {
            CandidateStart::Start => 0,
            CandidateStart::Window => {
                self.pass.window(block, state.sequences[sequence].first_active_row, block.end).start
            }
            CandidateStart::Block => block.start,
        };
        start..if observed { block.end } else { block.end.min(self.commit_before(block)) }
    }

    /// Candidates from here on are only looked at.
    pub fn commit_before(&self, block: &Range<usize>) -> usize {
        if self.first_only { block.start + 1 } else { usize::MAX }
    }
}

impl BlockLoop {
    /// Where a sequence stands when the stretch begins.
    pub fn course(&self, state: &State, sequence: usize) -> SequenceState {
        let all = 0..state.tokens[sequence].len();
        let active_range = self.block.map_or(all.clone(), |block| state.block(sequence, block));
        let initial_masks = state.masks(sequence, active_range.clone()).len();
        let (max_passes, per_step) = match self.schedule {
            QuotaSchedule::CarryOver => {
                let steps = state.options.steps.unwrap_or(initial_masks);
                (steps, initial_masks.checked_div(steps).unwrap_or(0))
            }
            _ => (self.steps, 0),
        };
        SequenceState {
            generated: state.sequences[sequence].prompt_len,
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

    /// How many tokens pass `i` commits, or among how many it chooses.
    pub fn quota(&self, state: &State, sequence: usize, course: &SequenceState, i: usize) -> usize {
        let initial_masks = || state.masks(sequence, course.quota_range.clone()).len();
        match &self.schedule {
            QuotaSchedule::Unlimited => usize::MAX,
            // Past its end (masks in the prompt have used some of it up) the schedule goes on by ones.
            QuotaSchedule::Llada { steps } if i < *steps => llada_quota(course.initial_masks, *steps, i),
            QuotaSchedule::Llada { .. } => 1,
            QuotaSchedule::Dream(ratios) => dream_quota(ratios, i, initial_masks()),
            QuotaSchedule::CarryOver => (course.per_step + course.deficit).min(initial_masks()),
        }
    }

    /// What pass `i` has left of its quota goes on to the next.
    pub fn after(&self, course: &mut SequenceState, i: usize, quota: usize, committed: usize) {
        if let QuotaSchedule::CarryOver = self.schedule {
            course.deficit = quota - committed;
            if i + 1 >= course.max_passes && course.deficit > 0 {
                course.max_passes += 1;
                course.per_step = 0;
            }
        }
    }
}
