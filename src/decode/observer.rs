//! Observers: callbacks that follow a decode.

use crate::cache::PassKind;
use crate::cache::adaptive::AdaptivePlan;
use std::ops::Range;

/// Description of one forward pass, for observers.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// Number of forward passes before this one.
    pub index: usize,
    /// Part of the sequences that the pass computed.
    pub kind: PassKind,
    /// One entry per sequence of the batch.
    pub sequences: Vec<SequenceStep<'a>>,
}

/// One sequence's share in a [`Step`]. Positions count from the start of the prompt.
#[derive(Clone, Debug)]
pub struct SequenceStep<'a> {
    /// Whether the sequence was active. An inactive sequence had no token to commit in this pass.
    pub active: bool,
    /// Query rows of the pass. With the adaptive cache all positions.
    pub window: Range<usize>,
    /// Positions of the current block.
    pub block: Range<usize>,
    /// Masked positions that were scored, ascending.
    pub candidates: Vec<usize>,
    /// Confidence of each candidate.
    pub confidence: Vec<f64>,
    /// Positions at which a token was committed, ascending.
    pub transferred: Vec<usize>,
    /// With the adaptive cache, for an active sequence: the parts that were refreshed.
    pub refreshed: Option<AdaptivePlan>,
    /// Between two refreshes of the response: the rows that V-verify selected, by layer, as indices into the generated
    /// region.
    pub selected_rows: Vec<(usize, Vec<usize>)>,
    /// The generated region after the step.
    pub tokens: &'a [u32],
}

/// Follows a decode. The default methods do nothing.
pub trait Observer {
    /// Whether [`Observer::step`] is called.
    ///
    /// Steps cost time: candidates that cannot be committed are scored too, and a GPU reads back every step. A candidate
    /// without a finite logit then ends the decode with an error, even when the pass could not commit it.
    fn wants_steps(&self) -> bool {
        false
    }

    /// Receives each forward pass.
    fn step(&mut self, _step: &Step) {}

    /// Receives the tokens of `sequence` that are final, from the first generated one on. Called after each block and at
    /// the end.
    fn finalized(&mut self, _sequence: usize, _tokens: &[u32]) {}
}

/// Ignores every call.
impl Observer for () {}
