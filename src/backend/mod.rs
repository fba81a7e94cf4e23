//! What the transformer needs of a device. [`cpu`] is the one implementation so far; a CUDA one goes beside it.

pub mod cpu;

use crate::error::Result;
pub use crate::oracle::{Heads, Span};
use crate::tensor::Tensor;

use crate::oracle::unmask::{Group, Unmask, Verdict};

/// A device that holds weights and activations and runs the ops of a layer.
///
/// A `Buffer` is a matrix of activations `[rows, width]`, row-major, in the backend's own element type; the rows of a
/// pass are the spans' rows, one after the other. Ops take the number of rows in use; buffers may be longer.
pub trait Backend {
    /// Activations.
    type Buffer;
    /// A weight matrix `[out, in]`, with or without bias.
    type Matrix;
    /// A weight vector.
    type Vector;
    /// Keys (rotated) and values `[layers, positions, kv_width]` of all sequences.
    type Cache;

    /// Stacks matrices `[rows_i, in]` (and biases `[rows_i]`, or none) into one.
    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Self::Matrix>;
    /// A vector.
    fn vector(&self, tensor: Tensor) -> Result<Self::Vector>;
    /// A buffer of `rows x width`.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer>;
    /// A cache; its contents are unspecified.
    fn cache(&self, layers: usize, positions: usize, kv_width: usize) -> Result<Self::Cache>;

    /// `out[i] = table[tokens[i]]`
    fn embed(&mut self, table: &Self::Matrix, tokens: &[u32], out: &mut Self::Buffer);
    /// `x += delta` (if any), then `out = x / rms(x) * weight`.
    fn add_norm(
        &mut self,
        x: &mut Self::Buffer,
        delta: Option<&Self::Buffer>,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
        rows: usize,
    );
    /// `out = x w^T + bias`
    fn linear(&mut self, x: &Self::Buffer, w: &Self::Matrix, out: &mut Self::Buffer, rows: usize);
    /// Rotates the queries and keys of `qkv` by their positions and, given a cache, leaves keys and values there.
    fn rope(
        &mut self,
        qkv: &mut Self::Buffer,
        heads: Heads,
        spans: &[Span],
        theta: f32,
        store: Option<(&mut Self::Cache, usize)>,
    );
    /// Bidirectional attention of the rows over their own keys and values and, given a cache, those that it holds for
    /// the positions before and after each span.
    fn attention(
        &mut self,
        qkv: &Self::Buffer,
        heads: Heads,
        spans: &[Span],
        reuse: Option<(&Self::Cache, usize)>,
        out: &mut Self::Buffer,
    );
    /// `out = silu(gate) * up` of rows `[gate | up]`.
    fn swiglu(&mut self, gate_up: &Self::Buffer, width: usize, out: &mut Self::Buffer, rows: usize);
    /// `out[i] = x[index[i]]`
    fn gather(&mut self, x: &Self::Buffer, index: &[usize], width: usize, out: &mut Self::Buffer);
    /// From logits `[candidates, vocab]` (with guidance `[2 * candidates, vocab]`, the unconditional rows last) to a
    /// token and a confidence for each candidate, and whether its group's selection commits it. The logits are used
    /// up.
    fn unmask(
        &mut self,
        logits: &mut Self::Buffer,
        vocab_size: usize,
        groups: &[Group],
        unmask: &Unmask,
    ) -> Result<Vec<Verdict>>;
    /// The first `rows * width` elements as f32, for observers and tests.
    fn read(&self, buffer: &Self::Buffer, rows: usize, width: usize) -> Vec<f32>;
}
