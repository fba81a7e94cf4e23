//! The CPU backend: f32 activations, weights read in place from the mapped checkpoint, rayon over all cores of the
//! current pool.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod attention;
pub mod linear;
mod matrix;
mod norm;
mod rope;
mod scratch;
mod simd;
mod swiglu;
#[cfg(test)]
mod tests;
mod tile;
mod transpose;
mod vverify;

pub use simd::Isa;
#[doc(hidden)]
pub use simd::fma_roof;

use super::{
    Backend, BatchMetadata, BufferKind, Heads, HostLogits, QkvRows, Residual, RowSet, SequenceRows, SessionLimits,
    UpdateRanges,
};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use linear::{Matrix, packed_len};
use rayon::prelude::*;
use std::ops::Range;

/// The CPU. One per decode: it holds scratch.
#[derive(Debug, Default)]
pub struct Cpu {
    packed: Vec<f32>,
    angles: rope::Angles,
    tokens: Vec<u32>,
}

/// Metadata of a pass, and the rows that were selected last.
#[derive(Debug, Default)]
pub struct CpuBatch {
    sequences: Vec<SequenceRows>,
    positions: Vec<usize>,
    tokens: Vec<usize>,
    logit_rows: Vec<usize>,
    updates: Vec<UpdateRanges>,
    /// For each sequence the selected rows, as indices of [`UpdateRanges::other`].
    selected: Vec<Vec<usize>>,
}

impl CpuBatch {
    /// The rows that were selected last: index among the rows of the pass, and place in the cache.
    fn selected(&self) -> impl Iterator<Item = (usize, usize)> {
        let firsts = self.sequences.iter().scan(0, |next, sequence| {
            let first = *next;
            *next += sequence.rows();
            Some(first)
        });
        let sequences = self.sequences.iter().zip(firsts).zip(self.updates.iter().zip(&self.selected));
        sequences.flat_map(|((sequence, first), (update, selected))| {
            let keys = update.always.clone().chain(selected.iter().map(|index| update.other(*index)));
            keys.map(move |key| (first + key - sequence.start, sequence.cache_base + key))
        })
    }

    /// The place in the cache of each row of the pass.
    fn places(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().flat_map(|rows| (rows.start..rows.end).map(move |key| rows.cache_base + key))
    }
}

/// Keys and values `[layers, positions, width]`.
#[derive(Debug)]
pub struct KvCache {
    k: Vec<f32>,
    v: Vec<f32>,
    positions: usize,
    width: usize,
}

impl KvCache {
    /// Keys and values of one layer, `[positions, width]` each.
    pub fn layer(&self, layer: usize) -> (&[f32], &[f32]) {
        let len = self.positions * self.width;
        (&self.k[layer * len..(layer + 1) * len], &self.v[layer * len..(layer + 1) * len])
    }
}

/// A zeroed vector of `rows * width` floats, or an error when there is no memory for it.
fn zeroed(what: &str, sizes: &[usize]) -> Result<Vec<f32>> {
    let no_memory = |len: Option<usize>| Error::OutOfMemory {
        what: format!("{what} of {sizes:?} f32"),
        memory: "memory",
        needed_bytes: len.map(|len| (len as u64).saturating_mul(4)),
        free_bytes: None,
        cause: String::new(),
    };
    let len = sizes.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).ok_or_else(|| no_memory(None))?;
    // Pages that are never written never take memory.
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| no_memory(Some(len)))
}

/// Elements of a row `[q | k | v]`, or `[q | k]` without values.
fn qkv_width(heads: Heads, has_values: bool) -> usize {
    heads.q_width() + heads.kv_width() * if has_values { 2 } else { 1 }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type KvCache = KvCache;
    type Batch = CpuBatch;

    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Matrix> {
        Ok(Matrix::new(parts, biases.iter().flat_map(Tensor::to_f32).collect()))
    }

    fn vector(&self, tensor: Tensor) -> Result<Vec<f32>> {
        Ok(tensor.to_f32())
    }

    fn prepare(&mut self, limits: &SessionLimits, rope_theta: f32) -> Result<()> {
        self.angles.extend(rope_theta, limits.heads.head_dim, limits.longest);
        Ok(())
    }

    fn buffer(&self, kind: BufferKind, rows: usize, width: usize) -> Result<Vec<f32>> {
        let what = match kind {
            BufferKind::Activations => "activations",
            BufferKind::Logits => "logits",
        };
        zeroed(what, &[rows, width])
    }

    fn kv_cache(&self, layers: usize, positions: usize, width: usize) -> Result<KvCache> {
        let k = zeroed("cached keys", &[layers, positions, width])?;
        let v = zeroed("cached values", &[layers, positions, width])?;
        Ok(KvCache { k, v, positions, width })
    }

    fn batch(&self, _limits: &SessionLimits) -> Result<CpuBatch> {
        Ok(CpuBatch::default())
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    fn set_batch(&mut self, batch: &mut CpuBatch, metadata: &BatchMetadata) -> Result<()> {
        let BatchMetadata { sequences, positions, tokens, logit_rows, updates, .. } = *metadata;
        *batch = CpuBatch {
            sequences: sequences.to_vec(),
            positions: positions.to_vec(),
            tokens: tokens.to_vec(),
            logit_rows: logit_rows.to_vec(),
            updates: updates.to_vec(),
            selected: vec![],
        };
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, batch: &CpuBatch, out: &mut Vec<f32>) -> Result<()> {
        for (index, row) in batch.tokens.iter().zip(out.chunks_exact_mut(table.cols())) {
            table.row_into(self.tokens[*index] as usize, row);
        }
        Ok(())
    }

    fn residual_norm(
        &mut self,
        x: &mut Vec<f32>,
        residual: Residual<Cpu>,
        batch: &CpuBatch,
        (weight, eps): (&Vec<f32>, f32),
        out: &mut Vec<f32>,
        rows: usize,
    ) -> Result<()> {
        let width = weight.len();
        let len = rows * width;
        let pairs = x[..len].par_chunks_exact_mut(width).zip(out[..len].par_chunks_exact_mut(width));
        let add_and_norm = |x: &mut [f32], delta: &[f32], out: &mut [f32]| {
            norm::add(x, delta);
            norm::rms_norm(x, weight, eps, out);
        };
        match residual {
            Residual::None => pairs.for_each(|(x, out)| norm::rms_norm(x, weight, eps, out)),
            Residual::Rows(delta) => {
                let deltas = delta[..len].par_chunks_exact(width);
                pairs.zip(deltas).for_each(|((x, out), delta)| add_and_norm(x, delta, out));
            }
            Residual::Features(features, first_row) => {
                let places: Vec<usize> = batch.places().collect();
                let deltas = places.par_iter().map(|place| &features[(first_row + place) * width..][..width]);
                pairs.zip(deltas).for_each(|((x, out), delta)| add_and_norm(x, delta, out));
            }
        }
        Ok(())
    }

    fn linear(
        &mut self,
        x: &Vec<f32>,
        w: &Matrix,
        outputs: Option<Range<usize>>,
        out: &mut Vec<f32>,
        rows: usize,
    ) -> Result<()> {
        let needed = packed_len(rows, w.cols());
        if self.packed.len() < needed {
            self.packed.resize(needed, 0.0);
        }
        match outputs {
            Some(outputs) => linear::linear(x, &w.part(outputs), out, rows, &mut self.packed),
            None => linear::linear(x, w, out, rows, &mut self.packed),
        }
        Ok(())
    }

    fn rope(
        &mut self,
        (qkv, QkvRows { rows, has_values }): (&mut Vec<f32>, QkvRows),
        heads: Heads,
        batch: &CpuBatch,
        mut store: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let rotate_and_store = |((row_of_pass, place), row): ((usize, usize), &mut [f32])| {
            rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(batch.positions[row_of_pass]));
            let Some((cache, layer)) = &mut store else { return };
            let first = (*layer * cache.positions + place) * kv;
            cache.k[first..first + kv].copy_from_slice(&row[q..q + kv]);
            if has_values {
                cache.v[first..first + kv].copy_from_slice(&row[q + kv..]);
            }
        };
        let buffer = qkv.chunks_exact_mut(qkv_width(heads, has_values));
        if rows == RowSet::Selected {
            batch.selected().zip(buffer).for_each(rotate_and_store);
        } else {
            batch.places().enumerate().zip(buffer).for_each(rotate_and_store);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        (qkv, QkvRows { rows, has_values }): (&Vec<f32>, QkvRows),
        heads: Heads,
        batch: &CpuBatch,
        cache: Option<(&KvCache, usize)>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let cached = cache.map(|(cache, layer)| cache.layer(layer));
        match (rows, cached) {
            (RowSet::Selected, Some(cached)) => {
                let counts: Vec<usize> = batch.updates.iter().map(UpdateRanges::rows).collect();
                let stride = qkv_width(heads, has_values);
                attention::attention_cached(qkv, stride, heads, &batch.sequences, &counts, cached, out);
            }
            (_, cached) => attention::attention(qkv, heads, &batch.sequences, cached, out),
        }
        Ok(())
    }

    fn swiglu(&mut self, gate_up: &Vec<f32>, width: usize, out: &mut Vec<f32>, rows: usize) -> Result<()> {
        swiglu::swiglu(gate_up, width, out, rows);
        Ok(())
    }

    fn gather(&mut self, x: &Vec<f32>, batch: &CpuBatch, set: RowSet, width: usize, out: &mut Vec<f32>) -> Result<()> {
        let copy = |(row, to): (usize, &mut [f32])| to.copy_from_slice(&x[row * width..(row + 1) * width]);
        let out = out.chunks_exact_mut(width);
        match set {
            RowSet::All => (0..batch.positions.len()).zip(out).for_each(copy),
            RowSet::Logits => batch.logit_rows.iter().copied().zip(out).for_each(copy),
            RowSet::Selected => batch.selected().map(|(row, _)| row).zip(out).for_each(copy),
        }
        Ok(())
    }

    fn select_rows(
        &mut self,
        values: Option<&Vec<f32>>,
        heads: Heads,
        batch: &mut CpuBatch,
        (cache, layer): (&mut KvCache, usize),
    ) -> Result<()> {
        let width = heads.kv_width();
        batch.selected.clear();
        let mut first = 0;
        for (sequence, update) in batch.sequences.iter().zip(&batch.updates) {
            let mut selected = vec![];
            if let Some(values) = values {
                let cached = |keys: &Range<usize>| {
                    let first = layer * cache.positions + sequence.cache_base;
                    (first + keys.start) * width..(first + keys.end) * width
                };
                let fresh = |keys: &Range<usize>| {
                    (first + keys.start - sequence.start) * width..(first + keys.end - sequence.start) * width
                };
                selected = if update.num_selected() == update.num_others() {
                    (0..update.num_selected()).collect()
                } else {
                    let pairs = update.others.each_ref().map(|keys| (&values[fresh(keys)], &cache.v[cached(keys)]));
                    vverify::vverify(pairs, width, update.num_selected())
                };
                let [before, after] = &update.others;
                for keys in [&update.always, before, after] {
                    cache.v[cached(keys)].copy_from_slice(&values[fresh(keys)]);
                }
            }
            batch.selected.push(selected);
            first += sequence.rows();
        }
        Ok(())
    }

    fn selected_rows(&self, batch: &CpuBatch) -> Result<Vec<Vec<usize>>> {
        Ok(batch.selected.clone())
    }

    fn store_features(
        &mut self,
        (delta, set): (&Vec<f32>, RowSet),
        width: usize,
        batch: &CpuBatch,
        (features, first_row): (&mut Vec<f32>, usize),
    ) -> Result<()> {
        let store = |(place, row): (usize, &[f32])| {
            features[(first_row + place) * width..(first_row + place + 1) * width].copy_from_slice(row);
        };
        let delta = delta.chunks_exact(width);
        if set == RowSet::Selected {
            batch.selected().map(|(_, place)| place).zip(delta).for_each(store);
        } else {
            batch.places().zip(delta).for_each(store);
        }
        Ok(())
    }

    fn read(&self, buffer: &Vec<f32>, rows: usize, width: usize) -> Result<Vec<f32>> {
        Ok(buffer[..rows * width].to_vec())
    }
}

impl HostLogits for Cpu {
    fn host_logits(buffer: &mut Vec<f32>) -> &mut [f32] {
        buffer
    }
}
