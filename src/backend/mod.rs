//! What the transformer needs of a device, and the two that there are: [`cpu`] and `cuda`.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use crate::error::Result;
use crate::sampling::{Candidates, Prediction, SamplingParams};
pub use crate::tensor::Heads;
pub use crate::tensor::Tensor;
use std::ops::Range;

/// The rows of one sequence that a pass runs: places `start .. end` of the `len` that are in view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// Index of the sequence in the batch.
    pub sequence: usize,
    /// First place.
    pub start: usize,
    /// Place after the last.
    pub end: usize,
    /// Places of the sequence that its rows see.
    pub len: usize,
    /// Where the sequence's places begin in the cache.
    pub cache_base: usize,
}

impl SequenceRows {
    /// Rows of this span.
    pub fn rows(&self) -> usize {
        self.end - self.start
    }

    /// Positions that its rows attend to: their own, or with a cache all of the sequence.
    pub fn keys(&self, cached: bool) -> usize {
        if cached { self.len } else { self.rows() }
    }
}

/// How large the passes of a session get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Rows of the largest pass.
    pub rows: usize,
    /// Rows whose logits are asked for, at most.
    pub logit_rows: usize,
    /// Spans of a pass, at most.
    pub spans: usize,
    /// Positions of the longest sequence.
    pub longest: usize,
    /// Tokens of all sequences, and one more.
    pub tokens: usize,
    /// Heads.
    pub heads: Heads,
    /// Whether choices are made among rows.
    pub selects: bool,
}

/// What the launches of a pass are sized for: at least what is there. A device replays the same launches for passes of the
/// same room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LaunchBucket {
    /// Rows.
    pub rows: usize,
    /// Rows of one span.
    pub longest: usize,
    /// Rows whose logits are asked for.
    pub logit_rows: usize,
    /// Rows that run where a [`RowUpdate`] is made.
    pub selected: usize,
    /// Of those, rows of one span.
    pub longest_selected: usize,
}

/// Where the rows of a pass stand.
#[derive(Clone, Copy, Debug)]
pub struct BatchMetadata<'a> {
    /// Whose rows they are, one span after the other.
    pub spans: &'a [SequenceRows],
    /// For each row its position in its sequence.
    pub positions: &'a [usize],
    /// For each row the index of its token in what [`Backend::write_tokens`] took.
    pub tokens: &'a [usize],
    /// Rows whose logits are asked for.
    pub logit_rows: &'a [usize],
    /// Where a choice is made: what it is among, for each span.
    pub parts: &'a [UpdateRanges],
    /// What launches are sized for.
    pub room: LaunchBucket,
}

/// Which rows of a pass run in a layer that does not run them all. How many there are is known beforehand, which ones only
/// the device knows: V-verify chooses them layer by layer, and for each sequence on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowUpdate {
    /// Rows that run.
    pub always: UpdateAlways,
    /// How many of the others run too, those whose values turned most since they were cached; the values of all others are then
    /// renewed, where any row attends to them. None: none of them, and their values stay as they are cached.
    pub others: Option<Ratio>,
}

/// Rows that a [`RowUpdate`] is not among.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpdateAlways {
    /// None; the others are those of the response.
    Nothing,
    /// Those of the prompt, all that the pass has; the others are those of the response.
    Prompt,
    /// Those of the block; the others are all that the pass has besides.
    Block,
}

/// A share of rows, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ratio(u64);

impl Ratio {
    /// This number.
    pub fn new(share: f64) -> Ratio {
        Ratio(share.to_bits())
    }

    /// The number.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }

    /// Of so many rows, rounded down.
    pub fn of(self, rows: usize) -> usize {
        ((rows as f64 * self.get()) as usize).min(rows)
    }
}

/// A [`RowUpdate`] among the rows of one span. Places count as the span's do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpdateRanges {
    /// Rows that run.
    pub always: Range<usize>,
    /// The others, in two pieces.
    pub others: [Range<usize>; 2],
    /// The share of the others that run: [`RowUpdate::others`].
    pub share: Option<Ratio>,
}

impl UpdateRanges {
    /// Rows that run.
    pub fn rows(&self) -> usize {
        self.always.len() + self.count()
    }

    /// How many of the others run.
    pub fn count(&self) -> usize {
        self.share.map_or(0, |share| share.of(self.num_others()))
    }

    /// The others, each by its number among them.
    pub fn other(&self, number: usize) -> usize {
        let [before, after] = &self.others;
        match number.checked_sub(before.len()) {
            None => before.start + number,
            Some(number) => after.start + number,
        }
    }

    /// How many others there are.
    pub fn num_others(&self) -> usize {
        self.others.iter().map(Range::len).sum()
    }
}

impl RowUpdate {
    /// The choice among the rows `start .. end` of a sequence whose response begins at `response`, and of whose rows those in
    /// `block` belong to the block.
    pub fn parts(&self, (start, end): (usize, usize), response: usize, block: &Range<usize>) -> UpdateRanges {
        let response = response.clamp(start, end);
        let (always, others) = match self.always {
            UpdateAlways::Nothing => (response..response, [response..end, end..end]),
            UpdateAlways::Prompt => (start..response, [response..end, end..end]),
            UpdateAlways::Block => {
                let block = block.start.clamp(start, end)..block.end.clamp(start, end);
                (block.clone(), [start..block.start, block.end..end])
            }
        };
        UpdateRanges { always, others, share: self.others }
    }
}

/// Which rows of a pass an op takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSet {
    /// All of them.
    All,
    /// Those that [`Backend::select_rows`] chose last.
    Selected,
}

/// A device that holds weights and activations and runs the ops of a layer.
///
/// A `Buffer` is a matrix of activations `[rows, width]`, row-major, in the backend's own element type; the rows of a
/// pass are the spans' rows, one after the other. Ops take the number of rows in use; buffers may be longer. Ops on a GPU
/// return before the work is done, allocate nothing and may be captured into a graph, but for `write_tokens`, `set_batch` and `read`.
pub trait Backend {
    /// Activations.
    type Buffer;
    /// A weight matrix `[out, in]`, with or without bias.
    type Matrix;
    /// A weight vector.
    type Vector;
    /// Keys (rotated) and values `[layers, positions, kv_width]` of all sequences.
    type Cache;
    /// A [`BatchMetadata`] as the device has it.
    type Rows;

    /// Stacks matrices `[rows_i, in]` (and biases `[rows_i]`, or none) into one.
    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Self::Matrix>;
    /// A vector.
    fn vector(&self, tensor: Tensor) -> Result<Self::Vector>;
    /// Gets ready for passes of these sizes. `theta` is the base of the rotary embedding.
    fn prepare(&mut self, needs: &SessionLimits, theta: f32) -> Result<()>;
    /// A buffer of `rows x width`.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer>;
    /// A buffer for logits.
    fn logits(&self, rows: usize, vocab_size: usize) -> Result<Self::Buffer>;
    /// A cache; its contents are unspecified.
    fn cache(&self, layers: usize, positions: usize, kv_width: usize) -> Result<Self::Cache>;
    /// Room for placements of these sizes.
    fn rows(&self, needs: &SessionLimits) -> Result<Self::Rows>;

    /// Takes over the tokens that rows are embedded from.
    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()>;
    /// Takes over where the rows of a pass stand.
    fn set_batch(&mut self, rows: &mut Self::Rows, placement: &BatchMetadata) -> Result<()>;
    /// `out[i] = table[token of row i]`
    fn embed(&mut self, table: &Self::Matrix, rows: &Self::Rows, out: &mut Self::Buffer) -> Result<()>;
    /// `x += delta` (if any), then `out = x / rms(x) * weight`.
    fn residual_norm(
        &mut self,
        x: &mut Self::Buffer,
        delta: Option<&Self::Buffer>,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
        rows: usize,
    ) -> Result<()>;
    /// `out = x w^T + bias`
    fn linear(&mut self, x: &Self::Buffer, w: &Self::Matrix, out: &mut Self::Buffer, rows: usize) -> Result<()>;
    /// Rotates the queries and keys of `qkv` by their positions and, given a cache, leaves keys and values there.
    fn rope(
        &mut self,
        qkv: &mut Self::Buffer,
        heads: Heads,
        rows: &Self::Rows,
        store: Option<(&mut Self::Cache, usize)>,
    ) -> Result<()>;
    /// Bidirectional attention of the rows over their own keys and values and, given a cache, those that it holds for
    /// the positions before and after each span.
    fn attention(
        &mut self,
        qkv: &Self::Buffer,
        heads: Heads,
        rows: &Self::Rows,
        reuse: Option<(&Self::Cache, usize)>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = silu(gate) * up` of rows `[gate | up]`.
    fn swiglu(&mut self, gate_up: &Self::Buffer, width: usize, out: &mut Self::Buffer, rows: usize) -> Result<()>;
    /// `out[i] = x[row i of those whose logits are asked for]`
    fn gather(&mut self, x: &Self::Buffer, rows: &Self::Rows, width: usize, out: &mut Self::Buffer) -> Result<()>;
    // What layers need in which only some rows run. Which ones, stays with the rows of the pass.

    /// `out = x w^T + bias` of some of the outputs of `w`; `out` has rows of so many elements.
    fn linear_part(
        &mut self,
        x: &Self::Buffer,
        w: &Self::Matrix,
        outputs: Range<usize>,
        out: &mut Self::Buffer,
        rows: usize,
    ) -> Result<()>;
    /// Chooses the rows that run in a layer, by [`BatchMetadata::parts`]: `values` `[rows, kv_width]` of all rows of the pass
    /// against those that the cache holds for the others, which they then replace, and those of the rows that always run too. No
    /// values are given, and none replaced, where the others' are not renewed.
    fn select_rows(
        &mut self,
        values: Option<&Self::Buffer>,
        heads: Heads,
        rows: &mut Self::Rows,
        cache: (&mut Self::Cache, usize),
    ) -> Result<()>;
    /// Those of the others that were chosen last, of each span, counted among the others, ascending. For observers and tests.
    /// Waits for the device.
    fn selected(&self, rows: &Self::Rows) -> Result<Vec<Vec<usize>>>;
    /// `out[i] = x[row i of those that were selected]`
    fn gather_selected(
        &mut self,
        x: &Self::Buffer,
        rows: &Self::Rows,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Rotates the queries and keys of the chosen rows, and leaves the keys in the cache; with `values`, rows are `[q | k | v]`
    /// and their values are left there too, without they are `[q | k]`.
    fn rope_selected(
        &mut self,
        qkv: &mut Self::Buffer,
        heads: Heads,
        rows: &Self::Rows,
        cache: (&mut Self::Cache, usize),
        values: bool,
    ) -> Result<()>;
    /// Attention of the chosen rows over the cached keys and values of all positions of their sequences.
    fn attention_selected(
        &mut self,
        qkv: &Self::Buffer,
        heads: Heads,
        rows: &Self::Rows,
        cache: (&Self::Cache, usize),
        values: bool,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// From row `feature_cache.1` on, row p of `feature_cache` becomes the row of `delta` (of `width` elements) that stands at position p,
    /// counted as the cache does.
    fn store_features(
        &mut self,
        delta: &Self::Buffer,
        part: RowSet,
        width: usize,
        rows: &Self::Rows,
        feature_cache: (&mut Self::Buffer, usize),
    ) -> Result<()>;
    /// [`Backend::residual_norm`] of all rows of the pass, with what [`Backend::store_features`] left for them.
    fn residual_norm_features(
        &mut self,
        x: &mut Self::Buffer,
        feature_cache: (&Self::Buffer, usize),
        rows: &Self::Rows,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// The first `rows * width` elements as f32, for observers and tests. Waits for the device.
    fn read(&self, buffer: &Self::Buffer, rows: usize, width: usize) -> Result<Vec<f32>>;
}

/// A backend that hands logits to the host's arithmetic.
pub trait HostUnmask: Backend {
    /// From logits `[candidates, vocab]` (with guidance `[2 * candidates, vocab]`, the unconditional rows last) to a
    /// token and a confidence for each candidate, and whether its group's selection commits it. The logits are used
    /// up.
    fn unmask(
        &mut self,
        logits: &mut Self::Buffer,
        vocab_size: usize,
        groups: &[Candidates],
        unmask: &SamplingParams,
    ) -> Result<Vec<Prediction>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_rounded_down() {
        let of = |share, rows| Ratio::new(share).of(rows);
        assert_eq!([of(0.25, 7), of(0.25, 3), of(1.0, 7), of(0.0, 7), of(0.25, 0)], [1, 0, 7, 0, 0]);
    }

    /// Rows 4 .. 20 of a sequence whose response begins at 6, with its block at 10 .. 13.
    #[test]
    fn parts_of_a_span() {
        let parts = |always, others: Option<f64>| {
            RowUpdate { always, others: others.map(Ratio::new) }.parts((4, 20), 6, &(10..13))
        };
        let response = parts(UpdateAlways::Nothing, Some(0.5));
        assert_eq!((&response.always, &response.others, response.rows()), (&(6..6), &[6..20, 20..20], 7));
        let prompt = parts(UpdateAlways::Prompt, None);
        assert_eq!((&prompt.always, &prompt.others, prompt.rows()), (&(4..6), &[6..20, 20..20], 2));
        let block = parts(UpdateAlways::Block, Some(0.5));
        assert_eq!((&block.always, &block.others, block.rows()), (&(10..13), &[4..10, 13..20], 9));
        assert_eq!([0, 5, 6, 12].map(|number| block.other(number)), [4, 9, 13, 19]);
        // Where the block is not, nothing runs in any case.
        let outside = RowUpdate { always: UpdateAlways::Block, others: None }.parts((4, 8), 6, &(10..13));
        assert_eq!((outside.rows(), outside.num_others()), (0, 4));
    }
}
