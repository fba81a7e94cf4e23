//! The decode state of one sequence within a block.

use std::ops::Range;

/// The state of one sequence at the start of a run. Positions count from the start of the prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceState {
    /// First generated position.
    pub generated: usize,
    /// Forward passes in which the sequence was active so far.
    pub forwards: usize,
    /// The sequence is active while a position of this range is masked.
    pub active_range: Range<usize>,
    /// [`super::QuotaSchedule::Dream`] and [`super::QuotaSchedule::CarryOver`] count the masks of this range.
    pub quota_range: Range<usize>,
    /// Masks of `active_range` at the start of the block.
    pub initial_masks: usize,
    /// [`super::QuotaSchedule::CarryOver`]: positions that each pass considers.
    pub per_step: usize,
    /// [`super::QuotaSchedule::CarryOver`]: positions that earlier passes considered and rejected.
    pub deficit: usize,
    /// Largest number of passes.
    pub max_passes: usize,
    /// Whether the sequence is active in the first pass. An inactive sequence stays inactive.
    pub active: bool,
    /// Quota of the first pass.
    pub first_quota: usize,
    /// In the first pass, positions from this one on are scored but not committed.
    pub first_commit_before: usize,
}
