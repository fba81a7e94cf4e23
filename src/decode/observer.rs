//! Observers of a decode.

use crate::cache::PassKind;
use crate::cache::adaptive::AdaptivePlan;
use std::ops::Range;

/// Result of one forward pass, for observers.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// Number of forward passes before this one.
    pub index: usize,
    /// Part of the sequences that the pass computed.
    pub kind: PassKind,
    /// One entry per sequence of the batch.
    pub sequences: Vec<SequenceStep<'a>>,
}

/// One sequence of a [`Step`]. Positions count from the start of the prompt, except in `selected_rows`.
#[derive(Clone, Debug)]
pub struct SequenceStep<'a> {
    /// Whether the sequence was active. An inactive sequence had no candidates.
    pub active: bool,
    /// Positions of this kind of pass. With the adaptive cache these are all positions, although fewer may be computed.
    pub window: Range<usize>,
    /// The block being decoded.
    pub block: Range<usize>,
    /// Candidates: masked positions whose confidence was computed, ascending.
    pub candidates: Vec<usize>,
    /// Confidence of each candidate.
    pub confidence: Vec<f64>,
    /// Positions whose token was committed, ascending.
    pub transferred: Vec<usize>,
    /// Parts that the adaptive cache refreshed, if the sequence was active.
    pub refreshed: Option<AdaptivePlan>,
    /// Rows that V-verify selected in each layer: (layer, positions in the generated region).
    pub selected_rows: Vec<(usize, Vec<usize>)>,
    /// The generated region after the step.
    pub tokens: &'a [u32],
}

/// Follows a decode. By default, every method does nothing.
pub trait Observer {
    /// Whether [`Observer::step`] is called.
    ///
    /// The decode then also computes the confidences of candidates that the step cannot commit; one of them without a finite logit
    /// is an error. On a GPU the host synchronises in every step.
    fn wants_steps(&self) -> bool {
        false
    }

    /// Receives the result of each forward pass.
    fn step(&mut self, _step: &Step) {}

    /// Receives the final tokens of a sequence, from the start of its generated region. Called after each block.
    fn finalized(&mut self, _sequence: usize, _tokens: &[u32]) {}
}

/// An observer that does nothing.
impl Observer for () {}
