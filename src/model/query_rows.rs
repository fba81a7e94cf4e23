//! Rows of a sequence that a forward computes, and the keys that they attend to.

use std::ops::Range;

/// The query rows of one sequence in a forward. Rows and keys are positions of the sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryRows {
    /// Index of the sequence in the batch.
    pub sequence: usize,
    /// Positions that the forward computes.
    pub rows: Range<usize>,
    /// Positions that are always computed under [`crate::backend::UpdateAlways::Block`].
    pub block: Range<usize>,
    /// Visible keys: the rows attend to every position below this one.
    pub num_keys: usize,
}

impl QueryRows {
    /// Rows that attend to all `len` positions of a sequence.
    pub fn new(sequence: usize, rows: Range<usize>, len: usize) -> QueryRows {
        QueryRows { sequence, block: rows.clone(), rows, num_keys: len }
    }
}
