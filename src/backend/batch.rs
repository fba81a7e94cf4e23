//! The rows of one forward pass: whose they are, where they are, and the sizes that launches are padded to.

use super::UpdateRanges;
use crate::tensor::Heads;

/// Query rows of one sequence in a pass: the positions `start .. end`. They can attend to the keys `0 .. num_keys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// Index of the sequence in the batch. Unconditional sequences of guidance come after all others.
    pub sequence: usize,
    /// Key index of the first row.
    pub start: usize,
    /// Key index after the last row.
    pub end: usize,
    /// Keys that the rows of this sequence can attend to.
    pub num_keys: usize,
    /// Row of the cache that holds key 0 of this sequence.
    pub cache_base: usize,
}

impl SequenceRows {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.end - self.start
    }

    /// Number of keys that the rows attend to: their own, or with `cached` all keys of the sequence.
    pub fn keys(&self, cached: bool) -> usize {
        if cached { self.num_keys } else { self.rows() }
    }
}

/// Largest sizes of a session's passes. Buffers are allocated for these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Rows of a pass.
    pub rows: usize,
    /// Rows of a pass that need logits.
    pub logit_rows: usize,
    /// Sequences of a pass, unconditional ones included.
    pub sequences: usize,
    /// Positions of the longest sequence.
    pub longest: usize,
    /// Tokens of all sequences, and one mask token after them.
    pub tokens: usize,
    /// Head counts and head width of the model.
    pub heads: Heads,
    /// Whether layers select rows ([`super::RowUpdate`]).
    pub selects_rows: bool,
}

/// Padded sizes of a pass. A captured graph serves passes of one kind with the same bucket, plan and sampling parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LaunchBucket {
    /// Rows.
    pub rows: usize,
    /// Rows of the sequence with the most rows.
    pub longest: usize,
    /// Rows that need logits.
    pub logit_rows: usize,
    /// Rows that run in layers with a [`super::RowUpdate`].
    pub selected: usize,
    /// Rows of the sequence with the most rows that run in such layers.
    pub longest_selected: usize,
}

/// Metadata of one pass. Rows are stored sequence after sequence.
#[derive(Clone, Copy, Debug)]
pub struct BatchMetadata<'a> {
    /// Rows of each sequence.
    pub sequences: &'a [SequenceRows],
    /// `[rows]`: position of each row in its sequence.
    pub positions: &'a [usize],
    /// `[rows]`: index of each row's token in the tokens of [`super::Backend::write_tokens`].
    pub tokens: &'a [usize],
    /// Rows that need logits.
    pub logit_rows: &'a [usize],
    /// For each sequence the rows that a [`super::RowUpdate`] recomputes; empty when no layer has one.
    pub updates: &'a [UpdateRanges],
    /// Sizes that launches are padded to.
    pub bucket: LaunchBucket,
}
