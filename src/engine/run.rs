//! A run: many passes that an engine executes without the host.

use crate::error::Result;
use crate::model::{CachePlan, QueryRows};
use crate::sampling::{CommitRule, QuotaSchedule, SamplingParams, SequenceState};

/// One kind of pass in a run.
#[derive(Clone, Copy)]
pub struct StepTemplate<'a> {
    /// Cache use, layer by layer.
    pub plan: &'a dyn CachePlan,
    /// Rows that a pass computes.
    pub query_rows: &'a [QueryRows],
    /// Positions that a pass may commit if they are still masked: (sequence, ascending positions), in the order of `query_rows`.
    pub candidates: &'a [(usize, Vec<usize>)],
    /// Whether later runs of the decode have fewer rows. Launches are then padded to a few sizes.
    pub shrinks: bool,
}

/// Many passes. They end when no sequence is active.
pub struct DecodeRun<'a> {
    /// The kinds of passes; `None` for kinds that do not occur. A template keeps its index across runs, so that its captured
    /// graph can be used again.
    pub templates: &'a [Option<StepTemplate<'a>>],
    /// Returns the template of a pass, by its index in the run.
    pub template_of: &'a dyn Fn(usize) -> usize,
    /// Passes of the schedule before this run.
    pub first_pass: usize,
    /// Whether the run ends as soon as one sequence ends. Needed when a pass would change the cache of a sequence that is not
    /// active.
    pub ends_with_first: bool,
    /// Quotas of the passes.
    pub schedule: &'a QuotaSchedule,
    /// Which candidates are committed. Quotas come from `schedule`.
    pub commit_rule: CommitRule,
    /// State of each sequence of the batch.
    pub sequences: &'a [SequenceState],
    /// Sampling parameters.
    pub sampling: &'a SamplingParams,
    /// A sequence ends when one of these tokens has no mask before it.
    pub end_tokens: &'a [u32],
}

/// Result of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunOutcome {
    /// Passes in which a sequence was active.
    pub passes: usize,
    /// State of each sequence after the run. Only `forwards`, `per_step`, `deficit` and `max_passes` are updated.
    pub sequences: Vec<SequenceState>,
    /// Whether the run was interrupted.
    pub interrupted: bool,
    /// Seconds of each pass, until the host knew its result.
    pub seconds: Vec<f64>,
    /// Multiply-accumulates of each pass.
    pub macs: Vec<u64>,
}

/// An engine that runs many passes without the host.
pub trait DeviceLoop {
    /// Executes a run and writes the committed tokens to `tokens`. Calls `go_on` before each pass but the first; the run is
    /// interrupted when it returns false.
    ///
    /// # Errors
    /// - [`crate::Error::NoFiniteLogit`] when a candidate has no finite logit.
    /// - [`crate::Error::Argument`] when the run has more templates, candidates, ratios or end tokens than the engine was made for,
    ///   or `template_of` returns a template that the run does not have.
    /// - The driver's errors.
    ///
    /// # Panics
    /// When rows are outside their sequences, or there are more rows than the engine was made for.
    fn run(&mut self, tokens: &mut [Vec<u32>], run: &DecodeRun, go_on: &dyn Fn() -> bool) -> Result<RunOutcome>;
}
