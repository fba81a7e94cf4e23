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

use super::{Backend, Choice, Heads, HostUnmask, Needs, Part, Placement, Response, Span};
use crate::error::{Error, Result};
use crate::oracle::unmask::{self, Group, Unmask, Verdict};
use crate::oracle::{norm, rope};
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
    spans: Vec<Span>,
    tokens: Vec<usize>,
    scored: Vec<usize>,
    gen_length: usize,
    /// Of each span, the positions of the rows that a layer runs, ascending.
    chosen: Vec<Vec<usize>>,
}

impl Rows {
    /// The rows chosen last: index among the rows of the pass, span, position.
    fn chosen(&self) -> impl Iterator<Item = (usize, &Span, usize)> {
        let firsts = self.spans.iter().scan(0, |next, span| {
            let first = *next;
            *next += span.rows();
            Some(first)
        });
        let spans = self.spans.iter().zip(firsts).zip(&self.chosen);
        spans.flat_map(|((span, first), positions)| positions.iter().map(move |p| (first + p - span.start, span, *p)))
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
    let fail = || Error::Unavailable(format!("no memory for {what} of {sizes:?} f32"));
    let len = sizes.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).ok_or_else(fail)?;
    // Pages that are never written never take memory.
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| fail())
}

/// Errs when the system says that it could not hand out `bytes` more. Allocating would tell later, or not at all: a
/// system that overcommits ends the process instead.
pub(crate) fn ensure_memory(what: &str, bytes: usize) -> Result<()> {
    match free_memory() {
        Some(free) if bytes > free => {
            let (need, free) = (bytes >> 20, free >> 20);
            Err(Error::Unavailable(format!("{what} need {need} MiB of memory; {free} MiB are free")))
        }
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

    fn prepare(&mut self, needs: &Needs, theta: f32) -> Result<()> {
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

    fn rows(&self, _needs: &Needs) -> Result<Rows> {
        Ok(Rows::default())
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    fn place(&mut self, rows: &mut Rows, placement: &Placement) -> Result<()> {
        let Placement { spans, tokens, scored, gen_length, .. } = *placement;
        let (spans, tokens, scored) = (spans.to_vec(), tokens.to_vec(), scored.to_vec());
        *rows = Rows { spans, tokens, scored, gen_length, chosen: vec![] };
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, rows: &Rows, out: &mut Vec<f32>) -> Result<()> {
        for (index, row) in rows.tokens.iter().zip(out.chunks_exact_mut(table.cols())) {
            table.row_into(self.tokens[*index] as usize, row);
        }
        Ok(())
    }

    fn add_norm(
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

    fn choose(
        &mut self,
        values: Option<&Vec<f32>>,
        heads: Heads,
        choice: Choice,
        rows: &mut Rows,
        (cache, layer): (&mut KvCache, usize),
    ) -> Result<()> {
        let width = heads.num_kv_heads * heads.head_dim;
        let gen_length = rows.gen_length;
        rows.chosen.clear();
        let mut first = 0;
        for span in &rows.spans {
            let response = span.len - gen_length;
            let mut positions: Vec<usize> = if choice.prompt { (span.start..response).collect() } else { vec![] };
            if let (Some(values), Response::Fresh(count)) = (values, choice.response) {
                let at = |position: usize| (layer * cache.positions + span.cache_base + position) * width;
                let fresh = &values[first * width..(first + span.rows()) * width];
                let (of_prompt, of_response) = fresh.split_at((response - span.start) * width);
                let cached = &mut cache.v[at(response)..at(span.len)];
                let turned = match count == gen_length {
                    true => (0..gen_length).collect(),
                    false => vverify::vverify(of_response, cached, width, count),
                };
                positions.extend(turned.iter().map(|i| response + i));
                cached.copy_from_slice(of_response);
                if choice.prompt {
                    cache.v[at(span.start)..at(response)].copy_from_slice(of_prompt);
                }
            }
            rows.chosen.push(positions);
            first += span.rows();
        }
        Ok(())
    }

    fn chosen(&self, rows: &Rows) -> Result<Vec<Vec<usize>>> {
        let of = |(span, positions): (&Span, &Vec<usize>)| {
            let response = span.len - rows.gen_length;
            positions.iter().filter(|p| **p >= response).map(|p| p - response).collect()
        };
        Ok(rows.spans.iter().zip(&rows.chosen).map(of).collect())
    }

    fn gather_chosen(&mut self, x: &Vec<f32>, rows: &Rows, width: usize, out: &mut Vec<f32>) -> Result<()> {
        for ((row, ..), to) in rows.chosen().zip(out.chunks_exact_mut(width)) {
            to.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
        Ok(())
    }

    fn rope_chosen(
        &mut self,
        qkv: &mut Vec<f32>,
        heads: Heads,
        rows: &Rows,
        (cache, layer): (&mut KvCache, usize),
        values: bool,
    ) -> Result<()> {
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let width = q + if values { 2 * kv } else { kv };
        for ((_, span, position), row) in rows.chosen().zip(qkv.chunks_exact_mut(width)) {
            rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(position));
            let at = (layer * cache.positions + span.cache_base + position) * kv;
            cache.k[at..at + kv].copy_from_slice(&row[q..q + kv]);
            if values {
                cache.v[at..at + kv].copy_from_slice(&row[q + kv..]);
            }
        }
        Ok(())
    }

    fn attention_chosen(
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
        let counts: Vec<usize> = rows.chosen.iter().map(Vec::len).collect();
        attention::attention_cached(qkv, stride, heads, &rows.spans, &counts, cache.layer(layer), out);
        Ok(())
    }

    fn keep(
        &mut self,
        delta: &Vec<f32>,
        part: Part,
        width: usize,
        rows: &Rows,
        (kept, first_row): (&mut Vec<f32>, usize),
    ) -> Result<()> {
        let copy = |(place, row): (usize, &[f32])| {
            kept[(first_row + place) * width..(first_row + place + 1) * width].copy_from_slice(row);
        };
        let delta = delta.chunks_exact(width);
        match part {
            Part::Whole => rows.places().zip(delta).for_each(copy),
            Part::Chosen => rows.chosen().map(|(_, span, p)| span.cache_base + p).zip(delta).for_each(copy),
        }
        Ok(())
    }

    fn add_norm_kept(
        &mut self,
        x: &mut Vec<f32>,
        (kept, first_row): (&Vec<f32>, usize),
        rows: &Rows,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let width = weight.len();
        let places: Vec<usize> = rows.places().collect();
        let pairs = x.par_chunks_exact_mut(width).zip(out.par_chunks_exact_mut(width));
        places.par_iter().zip(pairs).for_each(|(place, (x, out))| {
            norm::add(x, &kept[(first_row + place) * width..][..width]);
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
        let mut rows_of_all = qkv.chunks_exact_mut(heads.qkv_width());
        for span in &rows.spans {
            for (position, row) in (span.start..span.end).zip(&mut rows_of_all) {
                rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(position));
                if let Some((cache, layer)) = &mut store {
                    let at = (*layer * cache.positions + span.cache_base + position) * kv;
                    cache.k[at..at + kv].copy_from_slice(&row[q..q + kv]);
                    cache.v[at..at + kv].copy_from_slice(&row[q + kv..]);
                }
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
        for (from, row) in rows.scored.iter().zip(out.chunks_exact_mut(width)) {
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
        groups: &[Group],
        unmask: &Unmask,
    ) -> Result<Vec<Verdict>> {
        unmask::unmask(logits, vocab_size, groups, unmask)
    }
}
