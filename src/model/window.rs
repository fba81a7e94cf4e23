//! What a pass runs of a sequence, and what that sees.

use std::ops::Range;

/// The positions of a sequence that its rows see: all up to one, and behind it every so manieth. Places count those in view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisibleKeys {
    /// Positions from 0 on that are all in view.
    pub near: usize,
    /// Of those behind, the last of each so many are in view; 0: none.
    pub stride: usize,
    /// Positions of the sequence.
    pub len: usize,
}

impl VisibleKeys {
    /// All of a sequence.
    pub fn whole(len: usize) -> VisibleKeys {
        VisibleKeys { near: len, stride: 0, len }
    }

    /// Places.
    pub fn num_keys(&self) -> usize {
        self.near + (self.len - self.near).checked_div(self.stride).unwrap_or(0)
    }

    /// The position of a place.
    pub fn position(&self, key: usize) -> usize {
        match key.checked_sub(self.near) {
            None => key,
            Some(behind) => self.near + (behind + 1) * self.stride - 1,
        }
    }
}

/// What a pass runs of a sequence, in places of its view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryRows {
    /// The sequence.
    pub sequence: usize,
    /// The rows that the pass has.
    pub rows: Range<usize>,
    /// Of these, what runs in any case where a [`crate::backend::RowUpdate`] spares the block.
    pub block: Range<usize>,
    /// What they see.
    pub view: VisibleKeys,
}

impl QueryRows {
    /// Rows that see all of a sequence of `len` positions.
    pub fn new(sequence: usize, rows: Range<usize>, len: usize) -> QueryRows {
        QueryRows { sequence, block: rows.clone(), rows, view: VisibleKeys::whole(len) }
    }

    /// From the position of its first row to that of its last, with those between that are not in view.
    pub fn positions(&self) -> Range<usize> {
        let end = self.rows.end.checked_sub(1).map_or(0, |last| self.view.position(last) + 1);
        self.rows.start..end.max(self.rows.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behind_what_is_near_every_so_manieth_is_in_view() {
        let positions = |near, stride, len| {
            let view = VisibleKeys { near, stride, len };
            (0..view.num_keys()).map(|key| view.position(key)).collect::<Vec<_>>()
        };
        assert_eq!(positions(3, 0, 10), [0, 1, 2]);
        assert_eq!(positions(3, 1, 6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(positions(3, 2, 10), [0, 1, 2, 4, 6, 8]);
        assert_eq!(positions(3, 3, 9), [0, 1, 2, 5, 8]);
        assert_eq!(positions(3, 9, 10), [0, 1, 2]);
        assert_eq!(positions(4, 2, 4), [0, 1, 2, 3]);
    }
}
