//! Partial updates of a layer (dLLM-Cache, section 3.3): the rows that are always recomputed, and the share of the other rows
//! that V-verify selects.

use std::ops::Range;

/// Rows of a pass that an op processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSet {
    /// All rows of the pass.
    All,
    /// The rows that need logits.
    Logits,
    /// The rows of the last [`super::Backend::select_rows`]: those that are always recomputed, and the selected ones.
    Selected,
}

/// Rows of a projection buffer `[q | k | v]`, or `[q | k]` when values were projected before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkvRows {
    /// Rows of the pass that the buffer holds: [`RowSet::All`] or [`RowSet::Selected`].
    pub rows: RowSet,
    /// Whether each row holds its value.
    pub has_values: bool,
}

impl QkvRows {
    /// All rows of the pass, with values.
    pub const ALL: QkvRows = QkvRows { rows: RowSet::All, has_values: true };
}

/// Partial update of a layer. The number of rows is known in advance; V-verify selects them on the device, layer by layer and
/// sequence by sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowUpdate {
    /// Rows that are always recomputed.
    pub always: UpdateAlways,
    /// Share of the other rows that are recomputed: those whose values changed most since they were cached. V-verify then stores
    /// the fresh values of all of them, selected or not. `None`: no other row is recomputed, and cached values stay.
    pub others: Option<Ratio>,
}

/// Rows that a [`RowUpdate`] always recomputes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpdateAlways {
    /// No rows. V-verify selects among the rows of the response.
    Nothing,
    /// The rows of the prompt. V-verify selects among the rows of the response.
    Prompt,
    /// The rows of the block. V-verify selects among all other rows of the pass.
    Block,
}

/// A share between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ratio(u64);

impl Ratio {
    /// Wraps `ratio`, so that plans that hold it can be compared and hashed.
    pub fn new(ratio: f64) -> Ratio {
        Ratio(ratio.to_bits())
    }

    /// Returns the number.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }

    /// Returns `rows * ratio`, rounded down.
    pub fn of(self, rows: usize) -> usize {
        ((rows as f64 * self.get()) as usize).min(rows)
    }
}

/// A [`RowUpdate`] applied to the rows of one sequence. Ranges hold key indices, as [`super::SequenceRows`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpdateRanges {
    /// Rows that are always recomputed.
    pub always: Range<usize>,
    /// The other rows, before and after `always`.
    pub others: [Range<usize>; 2],
    /// Share of the other rows that are recomputed: [`RowUpdate::others`].
    pub ratio: Option<Ratio>,
}

impl UpdateRanges {
    /// Returns the number of rows that are recomputed.
    pub fn rows(&self) -> usize {
        self.always.len() + self.num_selected()
    }

    /// Returns the number of other rows that are recomputed.
    pub fn num_selected(&self) -> usize {
        self.ratio.map_or(0, |ratio| ratio.of(self.num_others()))
    }

    /// Returns the number of other rows.
    pub fn num_others(&self) -> usize {
        self.others.iter().map(Range::len).sum()
    }

    /// Returns the key index of other row `index`, counted from 0 over both ranges.
    pub fn other(&self, index: usize) -> usize {
        let [before, after] = &self.others;
        match index.checked_sub(before.len()) {
            None => before.start + index,
            Some(index) => after.start + index,
        }
    }
}

impl RowUpdate {
    /// Applies the update to the rows `start .. end` of a sequence whose response begins at `response`. `block` holds the rows of
    /// the block.
    pub fn ranges(&self, (start, end): (usize, usize), response: usize, block: &Range<usize>) -> UpdateRanges {
        let response = response.clamp(start, end);
        let (always, others) = match self.always {
            UpdateAlways::Nothing => (response..response, [response..end, end..end]),
            UpdateAlways::Prompt => (start..response, [response..end, end..end]),
            UpdateAlways::Block => {
                let block = block.start.clamp(start, end)..block.end.clamp(start, end);
                (block.clone(), [start..block.start, block.end..end])
            }
        };
        UpdateRanges { always, others, ratio: self.others }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_round_down() {
        let selected = |ratio, rows| Ratio::new(ratio).of(rows);
        let counts = [selected(0.25, 7), selected(0.25, 3), selected(1.0, 7), selected(0.0, 7), selected(0.25, 0)];
        assert_eq!(counts, [1, 0, 7, 0, 0]);
    }

    /// Rows 4 .. 20 of a sequence whose response begins at 6, with its block at 10 .. 13.
    #[test]
    fn ranges_of_a_sequence() {
        let ranges = |always, others: Option<f64>| {
            RowUpdate { always, others: others.map(Ratio::new) }.ranges((4, 20), 6, &(10..13))
        };
        let response = ranges(UpdateAlways::Nothing, Some(0.5));
        assert_eq!((&response.always, &response.others, response.rows()), (&(6..6), &[6..20, 20..20], 7));
        let prompt = ranges(UpdateAlways::Prompt, None);
        assert_eq!((&prompt.always, &prompt.others, prompt.rows()), (&(4..6), &[6..20, 20..20], 2));
        let block = ranges(UpdateAlways::Block, Some(0.5));
        assert_eq!((&block.always, &block.others, block.rows()), (&(10..13), &[4..10, 13..20], 9));
        assert_eq!([0, 5, 6, 12].map(|index| block.other(index)), [4, 9, 13, 19]);
        // A sequence without the block recomputes no row.
        let outside = RowUpdate { always: UpdateAlways::Block, others: None }.ranges((4, 8), 6, &(10..13));
        assert_eq!((outside.rows(), outside.num_others()), (0, 4));
    }
}
