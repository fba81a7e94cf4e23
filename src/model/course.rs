//! A stretch of passes that a network runs by itself: everything it has to know at the beginning.

use super::forward::CachePlan;
use super::window::QueryRows;
use crate::error::Result;
use crate::sampling::{CommitRule, QuotaSchedule, SamplingParams, SequenceState};

/// What a pass runs.
#[derive(Clone, Copy)]
pub struct StepTemplate<'a> {
    /// Cache use, layer by layer.
    pub plan: &'a dyn CachePlan,
    /// What runs.
    pub windows: &'a [QueryRows],
    /// (sequence, positions, ascending) that may be committed if they are still masked, in the order of the windows.
    pub candidates: &'a [(usize, Vec<usize>)],
    /// Whether windows of later courses are shorter: launches are then sized for a few lengths only.
    pub shrinks: bool,
}

/// A stretch of passes: they go on until no sequence takes part any more.
pub struct DecodeRun<'a> {
    /// What passes run; None where none does. What has the same place as in an earlier course may have been recorded there.
    pub stages: &'a [Option<StepTemplate<'a>>],
    /// Which of them a pass runs, by the passes of the course before it.
    pub stage: &'a dyn Fn(usize) -> usize,
    /// Passes of the schedule before this course.
    pub first_pass: usize,
    /// Whether the course ends as soon as a sequence takes part no more: where a pass over it would change what is kept.
    pub together: bool,
    /// Quotas.
    pub schedule: &'a QuotaSchedule,
    /// Which candidates to commit; numbers of them are the schedule's.
    pub selection: CommitRule,
    /// One for each sequence of the batch.
    pub sequences: &'a [SequenceState],
    /// How to score candidates.
    pub unmask: &'a SamplingParams,
    /// A sequence ends when one of these stands with no mask before it.
    pub end_tokens: &'a [u32],
}

/// What has run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunOutcome {
    /// Passes in which a sequence took part.
    pub passes: usize,
    /// Where the sequences stand: `forwards`, `per_step`, `deficit` and `max_passes`.
    pub sequences: Vec<SequenceState>,
    /// Whether it was stopped before the end.
    pub interrupted: bool,
    /// Of each pass, from the end of the one before to the moment when the host knew what came of it.
    pub seconds: Vec<f64>,
    /// Of each pass likewise.
    pub macs: Vec<u64>,
}

/// A network that runs whole courses.
pub trait DeviceLoop {
    /// Runs a course and writes what was committed into `tokens`. `go_on` is asked before each pass but
    /// the first.
    ///
    /// # Errors
    /// [`crate::Error::NoFiniteLogit`] when a row has none; [`crate::Error::Argument`] when there are more stages, candidates, ratios or
    /// end tokens than the network was made for, or a pass runs a stage that the course has not; the driver's.
    ///
    /// # Panics
    /// When windows are larger than the network was made for, or lie outside their sequences.
    fn run(&mut self, tokens: &mut [Vec<u32>], course: &DecodeRun, go_on: &dyn Fn() -> bool) -> Result<RunOutcome>;
}
