//! What the rules of the originals have in common: passes over a block, or over everything, until it is done.

use super::schedule::{dream_quota, llada_quota};
use super::state::State;
use crate::cache::PassKind;
use crate::model::{CourseSequence, Schedule};
use std::ops::Range;

/// Passes over a block, or over everything.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    /// The block; None for everything.
    pub block: Option<usize>,
    /// What the first pass runs, and what all later ones do.
    pub stages: [Stage; 2],
    /// How many tokens a pass commits.
    pub schedule: Schedule,
    /// Passes at most.
    pub steps: usize,
}

/// What a pass runs, and what it decides about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage {
    pub pass: PassKind,
    /// Candidates are the masks from here to the end of the block.
    pub from: From,
    /// Only the first position of the block is decided, always.
    pub first_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    /// The first position of the sequence.
    Start,
    /// The first position that runs, but for a block's vicinity.
    Window,
    /// The first position of the block.
    Block,
}

impl Stage {
    /// Positions whose masks are candidates. Those that cannot be committed are left out, unless somebody looks.
    pub fn candidates(&self, state: &State, sequence: usize, block: &Range<usize>, observed: bool) -> Range<usize> {
        let start = match self.from {
            From::Start => 0,
            From::Window => self.pass.window(block, state.sequences[sequence].first_live, block.end).start,
            From::Block => block.start,
        };
        start..if observed { block.end } else { block.end.min(self.commit_before(block)) }
    }

    /// Candidates from here on are only looked at.
    pub fn commit_before(&self, block: &Range<usize>) -> usize {
        if self.first_only { block.start + 1 } else { usize::MAX }
    }
}

impl Stretch {
    /// Where a sequence stands when the stretch begins.
    pub fn course(&self, state: &State, sequence: usize) -> CourseSequence {
        let all = 0..state.tokens[sequence].len();
        let open = self.block.map_or(all.clone(), |block| state.block(sequence, block));
        let masked = state.masks(sequence, open.clone()).len();
        let (limit, per_step) = match self.schedule {
            Schedule::Among => {
                let steps = state.options.steps.unwrap_or(masked);
                (steps, masked.checked_div(steps).unwrap_or(0))
            }
            _ => (self.steps, 0),
        };
        CourseSequence {
            generated: state.sequences[sequence].prompt_len,
            forwards: state.sequences[sequence].step,
            reach: open.clone(),
            open,
            masked,
            per_step,
            left: 0,
            limit,
            active: false,
            first_quota: 0,
            first_commit_before: 0,
        }
    }

    /// How many tokens pass `i` commits, or among how many it chooses.
    pub fn quota(&self, state: &State, sequence: usize, course: &CourseSequence, i: usize) -> usize {
        let masked = || state.masks(sequence, course.reach.clone()).len();
        match &self.schedule {
            Schedule::None => usize::MAX,
            // Past its end (masks in the prompt have used some of it up) the schedule goes on by ones.
            Schedule::Llada { steps } if i < *steps => llada_quota(course.masked, *steps, i),
            Schedule::Llada { .. } => 1,
            Schedule::Dream(ratios) => dream_quota(ratios, i, masked()),
            Schedule::Among => (course.per_step + course.left).min(masked()),
        }
    }

    /// What pass `i` has left of its quota goes on to the next.
    pub fn after(&self, course: &mut CourseSequence, i: usize, quota: usize, committed: usize) {
        if let Schedule::Among = self.schedule {
            course.left = quota - committed;
            if i + 1 >= course.limit && course.left > 0 {
                course.limit += 1;
                course.per_step = 0;
            }
        }
    }
}
