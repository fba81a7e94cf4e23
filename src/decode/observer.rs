//! Following a decode from outside.

use crate::cache::PassKind;
use crate::cache::adaptive::AdaptivePlan;
use std::ops::Range;

/// What one forward pass did, for observers.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// Forward passes before this one.
    pub index: usize,
    /// Which part of the sequences ran.
    pub kind: PassKind,
    /// One entry per sequence of the batch.
    pub sequences: Vec<SequenceStep<'a>>,
}

/// One sequence's part in a [`Step`]. Positions count from the start of the prompt.
#[derive(Clone, Debug)]
pub struct SequenceStep<'a> {
    /// Whether the sequence took part; when not, it had nothing to decide.
    pub active: bool,
    /// From the first position that ran to the last; what is between and not in view did not.
    pub window: Range<usize>,
    /// The block being decoded.
    pub block: Range<usize>,
    /// Masked positions that were scored, ascending.
    pub candidates: Vec<usize>,
    /// Their confidences.
    pub confidence: Vec<f64>,
    /// Positions that went from mask to token, ascending.
    pub transferred: Vec<usize>,
    /// What the adaptive cache renewed, if it is the cache and the sequence took part.
    pub refreshed: Option<AdaptivePlan>,
    /// What V-verify chose between two refreshes of the response: layers, and the positions in the generated region.
    pub selected_rows: Vec<(usize, Vec<usize>)>,
    /// The generated region after the step.
    pub tokens: &'a [u32],
}

/// Follows a decode. Every method does nothing by default.
pub trait Observer {
    /// Whether [`Observer::step`] is to be called. Costs the confidences of candidates that could not be committed
    /// (a row among them without a finite logit ends the decode with an error too), and on a GPU a read-back every step.
    fn wants_steps(&self) -> bool {
        false
    }

    /// After every forward pass.
    fn step(&mut self, _step: &Step) {}

    /// `tokens` of the generated region of `sequence` are final. Called as blocks are completed, and at the end.
    fn finalized(&mut self, _sequence: usize, _tokens: &[u32]) {}
}

/// No observer.
impl Observer for () {}
