//! The decode state of one sequence within a block.

use std::ops::Range;

/// Where a sequence stands when passes begin. Positions count from the start of its prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceState {
    /// First generated position.
    pub generated: usize,
    /// Forwards that it has taken part in.
    pub forwards: usize,
    /// It takes part as long as there is a mask in here.
    pub active_range: Range<usize>,
    /// Masks in here count for [`QuotaSchedule::Dream`] and [`QuotaSchedule::CarryOver`].
    pub quota_range: Range<usize>,
    /// Masks in `active_range` at the beginning.
    pub initial_masks: usize,
    /// Of [`QuotaSchedule::CarryOver`].
    pub per_step: usize,
    /// Of [`QuotaSchedule::CarryOver`].
    pub deficit: usize,
    /// Passes at most.
    pub max_passes: usize,
    /// Whether it takes part in the first pass; if not, it takes part in none.
    pub active: bool,
    /// Quota of the first pass.
    pub first_quota: usize,
    /// Candidates from here on are only looked at in the first pass.
    pub first_commit_before: usize,
}
