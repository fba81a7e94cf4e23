//! The CPU backend: f32 activations, weights read in place from the mapped checkpoint, rayon over all cores of the
//! current pool.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod attention;
pub mod linear;
mod simd;
mod swiglu;
mod tile;
mod transpose;
mod vverify;

pub use simd::Isa;
#[doc(hidden)]
pub use simd::fma_roof;

use super::{Backend, BatchMetadata, Heads, HostUnmask, RowSet, SequenceRows, SessionLimits, UpdateRanges};
use crate::error::{Error, Result};
use crate::reference::{norm, rope};
use crate::sampling::{self, Candidates, Prediction, SamplingParams};
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

/// Where the rows of a pass stand.
#[derive(Debug, Default)]
pub struct Rows {
    spans: Vec<SequenceRows>,
    positions: Vec<usize>,
    tokens: Vec<usize>,
    logit_rows: Vec<usize>,
    parts: Vec<UpdateRanges>,
    /// Of each span, which of the others run, counted among them.
    selected: Vec<Vec<usize>>,
}

impl Rows {
    /// The rows chosen last: index among the rows of the pass, and place in the cache.
    fn selected(&self) -> impl Iterator<Item = (usize, usize)> {
        let firsts = self.spans.iter().scan(0, |next, span| {
            let first = *next;
            *next += span.rows();
            Some(first)
        });
        let spans = self.spans.iter().zip(firsts).zip(self.parts.iter().zip(&self.selected));
        spans.flat_map(|((span, first), (parts, selected))| {
            let places = parts.always.clone().chain(selected.iter().map(|number| parts.other(*number)));
            places.map(move |key| (first + key - span.start, span.cache_base + key))
        })
    }

    /// All rows of the pass, as places in the cache.
    fn places(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().flat_map(|span| (span.start..span.end).map(move |p| span.cache_base + p))
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

/// Errs when the system says that it could not hand out `bytes` more. Allocating would tell later, or not at all: a
/// system that overcommits ends the process instead.
pub(crate) fn ensure_memory(what: &str, bytes: usize) -> Result<()> {
    match free_memory() {
        Some(free) if bytes > free => Err(Error::OutOfMemory {
            what: what.into(),
            memory: "memory",
            needed_bytes: Some(bytes as u64),
            free_bytes: Some(free as u64),
            cause: String::new(),
        }),
        _ => Ok(()),
    }
}

/// Bytes the system could still hand out, where it says so.
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<usize>().ok().map(|kib| kib << 10)
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Cache = KvCache;
    type Rows = Rows;

    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Matrix> {
        Ok(Matrix::new(parts, biases.iter().flat_map(Tensor::to_f32).collect()))
    }

    fn vector(&self, tensor: Tensor) -> Result<Vec<f32>> {
        Ok(tensor.to_f32())
    }

    fn prepare(&mut self, needs: &SessionLimits, theta: f32) -> Result<()> {
        self.angles.extend(theta, needs.heads.head_dim, needs.longest);
        Ok(())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Vec<f32>> {
        zeroed("activations", &[rows, width])
    }

    fn logits(&self, rows: usize, vocab_size: usize) -> Result<Vec<f32>> {
        zeroed("logits", &[rows, vocab_size])
    }

    fn cache(&self, layers: usize, positions: usize, width: usize) -> Result<KvCache> {
        let k = zeroed("cached keys", &[layers, positions, width])?;
        let v = zeroed("cached values", &[layers, positions, width])?;
        Ok(KvCache { k, v, positions, width })
    }

    fn rows(&self, _needs: &SessionLimits) -> Result<Rows> {
        Ok(Rows::default())
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    fn set_batch(&mut self, rows: &mut Rows, placement: &BatchMetadata) -> Result<()> {
        let BatchMetadata { spans, positions, tokens, logit_rows, parts, .. } = *placement;
        *rows = Rows {
            spans: spans.to_vec(),
            positions: positions.to_vec(),
            tokens: tokens.to_vec(),
            logit_rows: logit_rows.to_vec(),
            parts: parts.to_vec(),
            selected: vec![],
        };
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, rows: &Rows, out: &mut Vec<f32>) -> Result<()> {
        for (index, row) in rows.tokens.iter().zip(out.chunks_exact_mut(table.cols())) {
            table.row_into(self.tokens[*index] as usize, row);
        }
        Ok(())
    }

    fn residual_norm(
        &mut self,
        x: &mut Vec<f32>,
        delta: Option<&Vec<f32>>,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
        rows: usize,
    ) -> Result<()> {
        let width = weight.len();
        let rows = rows * width;
        let pairs = x[..rows].par_chunks_exact_mut(width).zip(out[..rows].par_chunks_exact_mut(width));
        match delta {
            Some(delta) => pairs.zip(delta[..rows].par_chunks_exact(width)).for_each(|((x, out), delta)| {
                norm::add(x, delta);
                norm::rms_norm(x, weight, eps, out);
            }),
            None => pairs.for_each(|(x, out)| norm::rms_norm(x, weight, eps, out)),
        }
        Ok(())
    }

    fn linear(&mut self, x: &Vec<f32>, w: &Matrix, out: &mut Vec<f32>, rows: usize) -> Result<()> {
        let needed = packed_len(rows, w.cols());
        if self.packed.len() < needed {
            self.packed.resize(needed, 0.0);
        }
        linear::linear(x, w, out, rows, &mut self.packed);
        Ok(())
    }

    fn linear_part(
        &mut self,
        x: &Vec<f32>,
        w: &Matrix,
        outputs: Range<usize>,
        out: &mut Vec<f32>,
        rows: usize,
    ) -> Result<()> {
        self.linear(x, &w.part(outputs), out, rows)
    }

    fn select_rows(
        &mut self,
        values: Option<&Vec<f32>>,
        heads: Heads,
        rows: &mut Rows,
        (cache, layer): (&mut KvCache, usize),
    ) -> Result<()> {
        let width = heads.num_kv_heads * heads.head_dim;
        rows.selected.clear();
        let mut first = 0;
        for (span, parts) in rows.spans.iter().zip(&rows.parts) {
            let mut selected = vec![];
            if let Some(values) = values {
                let cached = |places: &Range<usize>| {
                    let at = |key: usize| (layer * cache.positions + span.cache_base + key) * width;
                    at(places.start)..at(places.end)
                };
                let fresh = |places: &Range<usize>| {
                    let at = |key: usize| (first + key - span.start) * width;
                    at(places.start)..at(places.end)
                };
                selected = match parts.count() == parts.num_others() {
                    true => (0..parts.count()).collect(),
                    false => {
                        let pairs = parts.others.each_ref().map(|p| (&values[fresh(p)], &cache.v[cached(p)]));
                        vverify::vverify(pairs, width, parts.count())
                    }
                };
                let [before, after] = &parts.others;
                for places in [&parts.always, before, after] {
                    cache.v[cached(places)].copy_from_slice(&values[fresh(places)]);
                }
            }
            rows.selected.push(selected);
            first += span.rows();
        }
        Ok(())
    }

    fn selected(&self, rows: &Rows) -> Result<Vec<Vec<usize>>> {
        Ok(rows.selected.clone())
    }

    fn gather_selected(&mut self, x: &Vec<f32>, rows: &Rows, width: usize, out: &mut Vec<f32>) -> Result<()> {
        for ((row, _), to) in rows.selected().zip(out.chunks_exact_mut(width)) {
            to.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
        Ok(())
    }

    fn rope_selected(
        &mut self,
        qkv: &mut Vec<f32>,
        heads: Heads,
        rows: &Rows,
        (cache, layer): (&mut KvCache, usize),
        values: bool,
    ) -> Result<()> {
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let width = q + if values { 2 * kv } else { kv };
        for ((of_pass, key), row) in rows.selected().zip(qkv.chunks_exact_mut(width)) {
            rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(rows.positions[of_pass]));
            let at = (layer * cache.positions + key) * kv;
            cache.k[at..at + kv].copy_from_slice(&row[q..q + kv]);
            if values {
                cache.v[at..at + kv].copy_from_slice(&row[q + kv..]);
            }
        }
        Ok(())
    }

    fn attention_selected(
        &mut self,
        qkv: &Vec<f32>,
        heads: Heads,
        rows: &Rows,
        (cache, layer): (&KvCache, usize),
        values: bool,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let stride = q + if values { 2 * kv } else { kv };
        let counts: Vec<usize> = rows.parts.iter().map(UpdateRanges::rows).collect();
        attention::attention_cached(qkv, stride, heads, &rows.spans, &counts, cache.layer(layer), out);
        Ok(())
    }

    fn store_features(
        &mut self,
        delta: &Vec<f32>,
        part: RowSet,
        width: usize,
        rows: &Rows,
        (feature_cache, first_row): (&mut Vec<f32>, usize),
    ) -> Result<()> {
        let copy = |(key, row): (usize, &[f32])| {
            feature_cache[(first_row + key) * width..(first_row + key + 1) * width].copy_from_slice(row);
        };
        let delta = delta.chunks_exact(width);
        match part {
            RowSet::All => rows.places().zip(delta).for_each(copy),
            RowSet::Selected => rows.selected().map(|(_, key)| key).zip(delta).for_each(copy),
        }
        Ok(())
    }

    fn residual_norm_features(
        &mut self,
        x: &mut Vec<f32>,
        (feature_cache, first_row): (&Vec<f32>, usize),
        rows: &Rows,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let width = weight.len();
        let places: Vec<usize> = rows.places().collect();
        let pairs = x.par_chunks_exact_mut(width).zip(out.par_chunks_exact_mut(width));
        places.par_iter().zip(pairs).for_each(|(key, (x, out))| {
            norm::add(x, &feature_cache[(first_row + key) * width..][..width]);
            norm::rms_norm(x, weight, eps, out);
        });
        Ok(())
    }

    fn rope(
        &mut self,
        qkv: &mut Vec<f32>,
        heads: Heads,
        rows: &Rows,
        mut store: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let places = rows.positions.iter().zip(rows.places());
        for ((position, key), row) in places.zip(qkv.chunks_exact_mut(heads.qkv_width())) {
            rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(*position));
            if let Some((cache, layer)) = &mut store {
                let at = (*layer * cache.positions + key) * kv;
                cache.k[at..at + kv].copy_from_slice(&row[q..q + kv]);
                cache.v[at..at + kv].copy_from_slice(&row[q + kv..]);
            }
        }
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Vec<f32>,
        heads: Heads,
        rows: &Rows,
        reuse: Option<(&KvCache, usize)>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        attention::attention(qkv, heads, &rows.spans, reuse.map(|(cache, layer)| cache.layer(layer)), out);
        Ok(())
    }

    fn swiglu(&mut self, gate_up: &Vec<f32>, width: usize, out: &mut Vec<f32>, rows: usize) -> Result<()> {
        swiglu::swiglu(gate_up, width, out, rows);
        Ok(())
    }

    fn gather(&mut self, x: &Vec<f32>, rows: &Rows, width: usize, out: &mut Vec<f32>) -> Result<()> {
        for (from, row) in rows.logit_rows.iter().zip(out.chunks_exact_mut(width)) {
            row.copy_from_slice(&x[from * width..(from + 1) * width]);
        }
        Ok(())
    }

    fn read(&self, buffer: &Vec<f32>, rows: usize, width: usize) -> Result<Vec<f32>> {
        Ok(buffer[..rows * width].to_vec())
    }
}

impl HostUnmask for Cpu {
    fn unmask(
        &mut self,
        logits: &mut Vec<f32>,
        vocab_size: usize,
        groups: &[Candidates],
        unmask: &SamplingParams,
    ) -> Result<Vec<Prediction>> {
        sampling::sample(logits, vocab_size, groups, unmask)
    }
}
