//! The interface between the transformer and a device, and its two implementations: [`cpu`] and `cuda`.

mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod row_update;

pub use crate::tensor::{Heads, Tensor};
pub use batch::{BatchMetadata, LaunchBucket, SequenceRows, SessionLimits};
pub use row_update::{QkvRows, Ratio, RowSet, RowUpdate, UpdateAlways, UpdateRanges};

use crate::error::Result;
use std::ops::Range;

/// Contents of a [`Backend::Buffer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferKind {
    /// Activations, in the backend's element type.
    Activations,
    /// Logits, in f32.
    Logits,
}

/// The summand of [`Backend::residual_norm`].
pub enum Residual<'a, B: Backend> {
    /// Nothing is added.
    None,
    /// Row i of this buffer is added to row i.
    Rows(&'a B::Buffer),
    /// Cached features are added: row `first_row + p`, where p is the sequence's `cache_base` plus the position.
    Features(&'a B::Buffer, usize),
}

/// A device that holds weights and activations and runs the ops of a layer.
///
/// A `Buffer` is a row-major matrix `[rows, width]`. The rows of a pass are stored sequence after sequence. Buffers may be
/// longer than the rows in use. Ops of a GPU enqueue their work and return; all but [`Backend::write_tokens`],
/// [`Backend::set_batch`], [`Backend::selected_rows`] and [`Backend::read`] may be captured in a graph. Ops allocate nothing.
pub trait Backend: Sized {
    /// A matrix of activations or logits.
    type Buffer;
    /// A weight matrix `[out, in]`, with or without bias.
    type Matrix;
    /// A weight vector.
    type Vector;
    /// Keys, which are rotated, and values, `[layers, positions, kv_width]` each, of all sequences.
    type KvCache;
    /// Metadata of a pass, as the device stores it.
    type Batch;

    /// Loads matrices `[rows_i, in]`, stacked into one, with their biases `[rows_i]`, if any.
    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Self::Matrix>;
    /// Loads a vector.
    fn vector(&self, tensor: Tensor) -> Result<Self::Vector>;
    /// Prepares for passes within `limits`: scratch memory, and the rotary table for base `rope_theta`.
    fn prepare(&mut self, limits: &SessionLimits, rope_theta: f32) -> Result<()>;
    /// Allocates a buffer of `rows` rows of `width` elements.
    fn buffer(&self, kind: BufferKind, rows: usize, width: usize) -> Result<Self::Buffer>;
    /// Allocates a key/value cache. Its contents are unspecified.
    fn kv_cache(&self, layers: usize, positions: usize, kv_width: usize) -> Result<Self::KvCache>;
    /// Allocates metadata for passes within `limits`.
    fn batch(&self, limits: &SessionLimits) -> Result<Self::Batch>;

    /// Stores the tokens that later passes embed.
    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()>;
    /// Stores the metadata of a pass.
    fn set_batch(&mut self, batch: &mut Self::Batch, metadata: &BatchMetadata) -> Result<()>;
    /// Computes `out[i] = table[token of row i]`.
    fn embed(&mut self, table: &Self::Matrix, batch: &Self::Batch, out: &mut Self::Buffer) -> Result<()>;
    /// Computes `x += residual`, then `out = x / rms(x) * weight`, for `rows` rows. `eps` is added to the mean square.
    fn residual_norm(
        &mut self,
        x: &mut Self::Buffer,
        residual: Residual<Self>,
        batch: &Self::Batch,
        weight_and_eps: (&Self::Vector, f32),
        out: &mut Self::Buffer,
        rows: usize,
    ) -> Result<()>;
    /// Computes `out = x w^T + bias` for the outputs `outputs` of `w`, or for all. Rows of `out` have that many elements.
    fn linear(
        &mut self,
        x: &Self::Buffer,
        w: &Self::Matrix,
        outputs: Option<Range<usize>>,
        out: &mut Self::Buffer,
        rows: usize,
    ) -> Result<()>;
    /// Rotates queries and keys by their positions. With a cache and a layer, stores keys, and values if the rows hold them.
    fn rope(
        &mut self,
        qkv: (&mut Self::Buffer, QkvRows),
        heads: Heads,
        batch: &Self::Batch,
        store: Option<(&mut Self::KvCache, usize)>,
    ) -> Result<()>;
    /// Computes bidirectional attention.
    ///
    /// With [`RowSet::All`], rows attend to their own keys and, given a cache and a layer, to the cached keys before and after
    /// the rows of their sequence. With [`RowSet::Selected`], a cache is required, and rows attend to all cached keys of their
    /// sequence.
    fn attention(
        &mut self,
        qkv: (&Self::Buffer, QkvRows),
        heads: Heads,
        batch: &Self::Batch,
        cache: Option<(&Self::KvCache, usize)>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Computes `out = silu(gate) * up` for rows `[gate | up]`, each `width` elements wide.
    fn swiglu(&mut self, gate_up: &Self::Buffer, width: usize, out: &mut Self::Buffer, rows: usize) -> Result<()>;
    /// Copies the rows of `set` to the first rows of `out`.
    fn gather(
        &mut self,
        x: &Self::Buffer,
        batch: &Self::Batch,
        set: RowSet,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// V-verify: selects the rows of one layer that are recomputed, by [`BatchMetadata::updates`].
    ///
    /// `values` `[rows, kv_width]` holds fresh values of all rows of the pass. They are compared with the cached values, and
    /// replace them. Without `values`, only the rows that are always recomputed are selected.
    fn select_rows(
        &mut self,
        values: Option<&Self::Buffer>,
        heads: Heads,
        batch: &mut Self::Batch,
        cache: (&mut Self::KvCache, usize),
    ) -> Result<()>;
    /// Reads back the rows that the last [`Backend::select_rows`] picked: one ascending list per sequence, as indices of
    /// [`UpdateRanges::other`]. Synchronises; for observers and tests.
    fn selected_rows(&self, batch: &Self::Batch) -> Result<Vec<Vec<usize>>>;
    /// Stores rows of `delta`, `width` elements each, in the feature cache: a row with place p in the cache becomes row
    /// `first_row + p` of `features`.
    fn store_features(
        &mut self,
        delta: (&Self::Buffer, RowSet),
        width: usize,
        batch: &Self::Batch,
        features: (&mut Self::Buffer, usize),
    ) -> Result<()>;

    /// Reads back the first `rows * width` elements as f32. Synchronises; for observers and tests.
    fn read(&self, buffer: &Self::Buffer, rows: usize, width: usize) -> Result<Vec<f32>>;
}

/// A backend whose logits are in host memory.
pub trait HostLogits: Backend {
    /// Returns the logits of a buffer of [`BufferKind::Logits`], row-major.
    fn host_logits(buffer: &mut Self::Buffer) -> &mut [f32];
}
