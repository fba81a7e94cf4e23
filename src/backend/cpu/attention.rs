//! Bidirectional attention over [prefix cache | live rows | suffix cache], nothing concatenated.
//!
//! One task per (span, head, tile of query rows). A tile computes all its scores `[keys, rows]` with the register
//! tiles of `tile.rs`, takes the softmax lane by lane, and multiplies by the values in the same tiles. Scores
//! stay in a scratch of `keys x 64` floats per thread.

use super::simd::{Isa, Simd, dispatch};
use super::tile::{max_vectors, tile};
use super::transpose::transpose;
use crate::backend::{Heads, SequenceRows};
use rayon::prelude::*;
use std::cell::RefCell;

/// Keys copied beside each other at a time.
const KEYS: usize = 64;
/// Widest head.
const MAX_HEAD_DIM: usize = 128;
/// Stride of copied keys: off the powers of two.
const STRIDE: usize = MAX_HEAD_DIM + 16;
/// Widest tile of query rows.
const ROWS: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Floats of scratch per thread for sequences of up to `len` positions.
pub const fn scratch_len(len: usize, head_dim: usize) -> usize {
    ROWS * (len + 2 * head_dim) + KEYS * STRIDE
}

/// One run of keys and values: row `i` of either starts at `i * stride`.
#[derive(Clone, Copy)]
struct Segment<'a> {
    k: &'a [f32],
    v: &'a [f32],
    stride: usize,
    len: usize,
}

/// What one task computes: query rows of one head.
struct Task<'a> {
    /// The first query row of the tile, at its head; rows are `q_stride` apart.
    q: &'a [f32],
    q_stride: usize,
    rows: usize,
    head_dim: usize,
    segments: [Segment<'a>; 3],
    /// Where the first output row of the tile and head goes, and the stride of output rows.
    out: usize,
    out_stride: usize,
}

/// Output that tasks write to in disjoint places.
struct Out(*mut f32);
// SAFETY: every task writes rows and heads of its own.
unsafe impl Sync for Out {}

/// `out[row][head] = softmax(q k^T / sqrt(head_dim)) v`. `qkv` is `[rows, q | k | v]`, rotated; `out` is
/// `[rows, num_heads * head_dim]`; `cache` holds keys and values `[positions, kv_width]` of all sequences, and without
/// one a span's rows see only each other.
///
/// # Panics
/// When a buffer is too short for the spans.
pub fn attention(qkv: &[f32], heads: Heads, spans: &[SequenceRows], cache: Option<(&[f32], &[f32])>, out: &mut [f32]) {
    attention_on(Isa::detect(), qkv, heads, spans, cache, out);
}

fn attention_on(
    isa: Isa,
    qkv: &[f32],
    heads: Heads,
    spans: &[SequenceRows],
    cache: Option<(&[f32], &[f32])>,
    out: &mut [f32],
) {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (width, q_width, kv_width) = (heads.qkv_width(), num_heads * head_dim, num_kv_heads * head_dim);
    let total: usize = spans.iter().map(SequenceRows::rows).sum();
    assert!(qkv.len() >= total * width && out.len() >= total * q_width, "buffer too short");
    assert!(head_dim <= MAX_HEAD_DIM && num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads), "{heads:?}");
    for span in spans {
        let cached = (span.cache_base + span.num_keys) * kv_width;
        assert!(span.start <= span.end && span.end <= span.num_keys, "{span:?}");
        assert!(cache.is_none_or(|(k, v)| cached <= k.len() && cached <= v.len()), "cache too short for {span:?}");
    }
    let mut tasks = Vec::new();
    let mut first = 0;
    for span in spans {
        for head in 0..num_heads {
            let kv = head / (num_heads / num_kv_heads) * head_dim;
            let segment = |from: usize, to: usize| match cache {
                Some((k, v)) if from < to => {
                    let at = (span.cache_base + from) * kv_width + kv;
                    Segment { k: &k[at..], v: &v[at..], stride: kv_width, len: to - from }
                }
                _ => Segment { k: &[], v: &[], stride: 0, len: 0 },
            };
            let live = first * width + q_width + kv;
            let live = Segment { k: &qkv[live..], v: &qkv[live + kv_width..], stride: width, len: span.rows() };
            let segments = [segment(0, span.start), live, segment(span.end, span.num_keys)];
            for row in (0..span.rows()).step_by(ROWS) {
                tasks.push(Task {
                    q: &qkv[(first + row) * width + head * head_dim..],
                    q_stride: width,
                    rows: ROWS.min(span.rows() - row),
                    head_dim,
                    segments,
                    out: (first + row) * q_width + head * head_dim,
                    out_stride: q_width,
                });
            }
        }
        first += span.rows();
    }
    // SAFETY: `isa` was detected; tasks write disjoint parts of `out`, whose length was checked above.
    unsafe { run_all(isa, &tasks, head_dim, out) }
}

/// Attention of query rows of their own, at whatever positions, over the cached keys and values of all positions of their
/// sequence. `queries` are rows `stride` apart that begin with the queries, rotated, `counts[i]` of them for span i; the rest
/// as in [`attention`].
///
/// # Panics
/// When a buffer is too short for the rows and spans.
pub fn attention_cached(
    queries: &[f32],
    stride: usize,
    heads: Heads,
    spans: &[SequenceRows],
    counts: &[usize],
    (k, v): (&[f32], &[f32]),
    out: &mut [f32],
) {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
    let total: usize = counts.iter().sum();
    assert!(stride >= q_width && queries.len() >= total * stride && out.len() >= total * q_width, "buffer too short");
    assert!(head_dim <= MAX_HEAD_DIM && num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads), "{heads:?}");
    let none = Segment { k: &[], v: &[], stride: 0, len: 0 };
    let mut tasks = Vec::new();
    let mut first = 0;
    for (span, count) in spans.iter().zip(counts) {
        let cached = (span.cache_base + span.num_keys) * kv_width;
        assert!(span.num_keys > 0 && cached <= k.len() && cached <= v.len(), "cache too short for {span:?}");
        for head in 0..num_heads {
            let at = span.cache_base * kv_width + head / (num_heads / num_kv_heads) * head_dim;
            let all = Segment { k: &k[at..], v: &v[at..], stride: kv_width, len: span.num_keys };
            for row in (0..*count).step_by(ROWS) {
                tasks.push(Task {
                    q: &queries[(first + row) * stride + head * head_dim..],
                    q_stride: stride,
                    rows: ROWS.min(count - row),
                    head_dim,
                    segments: [all, none, none],
                    out: (first + row) * q_width + head * head_dim,
                    out_stride: q_width,
                });
            }
        }
        first += count;
    }
    // SAFETY: the instruction set was detected; tasks write disjoint parts of `out`, whose length was checked above.
    unsafe { run_all(Isa::detect(), &tasks, head_dim, out) }
}

/// # Safety
/// 1. The CPU has `isa`. 2. `out` is long enough for all tasks, and no two write the same part of it.
unsafe fn run_all(isa: Isa, tasks: &[Task], head_dim: usize, out: &mut [f32]) {
    let out = Out(out.as_mut_ptr());
    tasks.par_iter().for_each(|task| {
        let out = &out;
        SCRATCH.with_borrow_mut(|scratch| {
            let keys: usize = task.segments.iter().map(|s| s.len).sum();
            let needed = scratch_len(keys, head_dim);
            if scratch.len() < needed {
                scratch.resize(needed, 0.0);
            }
            // SAFETY: the caller's conditions.
            unsafe { dispatch!(isa, run(task: &Task, out: &Out, scratch: &mut [f32])) }
        });
    });
}

/// All tiles of one task, as wide as the registers hold.
///
/// # Safety
/// 1. The CPU has `S`. 2. `out` is valid for the task's rows, and nobody else writes them.
#[inline(always)]
unsafe fn run<S: Simd>(task: &Task, out: &Out, scratch: &mut [f32]) {
    let widest = max_vectors::<S>() * S::LANES;
    for row in (0..task.rows).step_by(widest) {
        // SAFETY: rows of this task.
        unsafe { run_tile::<S>(task, row, widest.min(task.rows - row), out, scratch) };
    }
}

/// Query rows `row .. row + rows` of the task.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn run_tile<S: Simd>(task: &Task, row: usize, rows: usize, out: &Out, scratch: &mut [f32]) {
    let d = task.head_dim;
    let lanes = rows.next_multiple_of(S::LANES);
    let vectors = lanes / S::LANES;
    let (query, scratch) = scratch.split_at_mut(ROWS * d);
    let (sums, scratch) = scratch.split_at_mut(ROWS * d);
    let (keys, scores) = scratch.split_at_mut(KEYS * STRIDE);
    // The queries, transposed to `[d, lanes]`, the scale folded in.
    let scale = 1.0 / (d as f32).sqrt();
    query[..d * lanes].fill(0.0);
    let q = &task.q[row * task.q_stride..(row + rows - 1) * task.q_stride + d];
    // SAFETY: `rows` rows of d floats in q, `[d, lanes]` in query.
    unsafe { transpose(q.as_ptr(), task.q_stride, query.as_mut_ptr(), lanes, rows, d) };
    for q in &mut query[..d * lanes] {
        *q *= scale;
    }
    // scores[key][m]
    let mut key = 0;
    for s in &task.segments {
        for first in (0..s.len).step_by(KEYS) {
            let n = KEYS.min(s.len - first);
            for i in 0..n {
                keys[i * STRIDE..i * STRIDE + d].copy_from_slice(&s.k[(first + i) * s.stride..][..d]);
            }
            // SAFETY: n key rows of d floats, d x lanes of queries, n rows of scores below the scratch's length.
            unsafe {
                let to = scores[key * lanes..(key + n) * lanes].as_mut_ptr();
                tile::<S, STRIDE>(n, vectors, d, keys.as_ptr(), 1, query.as_ptr(), to, lanes, false);
            }
            key += n;
        }
    }
    let scores = &mut scores[..key * lanes];
    let mut totals = [0.0f32; ROWS];
    for v in 0..vectors {
        // SAFETY: lanes v * LANES .. of each row of scores, and of totals.
        unsafe {
            let at = |j: usize| j * lanes + v * S::LANES;
            let p = scores.as_mut_ptr();
            let mut max = S::splat(f32::MIN);
            for j in 0..key {
                max = S::max(max, S::load(p.add(at(j)))); // NaN stands second and comes through
            }
            let minus = S::mul(max, S::splat(-1.0));
            let mut total = S::splat(0.0);
            for j in 0..key {
                let e = S::exp(S::add(S::load(p.add(at(j))), minus));
                total = S::add(total, e);
                S::store(p.add(at(j)), e);
            }
            S::store(totals.as_mut_ptr().add(v * S::LANES), total);
        }
    }
    // sums[d][m]
    let mut key = 0;
    for s in &task.segments {
        if s.len > 0 {
            let v = &s.v[..(s.len - 1) * s.stride + d];
            // SAFETY: s.len value rows of d floats, s.len rows of scores, d rows of sums.
            unsafe {
                let x = scores.as_ptr().add(key * lanes);
                tile::<S, 1>(d, vectors, s.len, v.as_ptr(), s.stride, x, sums.as_mut_ptr(), lanes, key > 0);
            }
            key += s.len;
        }
    }
    for (m, total) in totals[..lanes].iter_mut().enumerate() {
        *total = if m < rows { 1.0 / *total } else { 0.0 };
    }
    for row in sums[..d * lanes].chunks_exact_mut(lanes) {
        for (s, inverse) in row.iter_mut().zip(&totals) {
            *s *= inverse;
        }
    }
    // SAFETY: sums is `[d, lanes]`; this task's rows and head of out.
    unsafe { transpose(sums.as_ptr(), lanes, out.0.add(task.out + row * task.out_stride), task.out_stride, d, rows) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::attention as reference;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 16) as f32 / 32768.0 - 1.0).collect()
    }

    /// Ragged spans with every segment empty in turn, GQA, all head widths, all instruction sets.
    #[test]
    fn equals_the_oracle() {
        for (num_heads, num_kv_heads, head_dim) in [(2, 2, 32), (7, 1, 64), (4, 2, 128)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            let spans = [
                SequenceRows { sequence: 0, start: 0, end: 5, num_keys: 5, cache_base: 0 },
                SequenceRows { sequence: 1, start: 0, end: 70, num_keys: 200, cache_base: 5 },
                SequenceRows { sequence: 2, start: 30, end: 63, num_keys: 63, cache_base: 205 },
                SequenceRows { sequence: 3, start: 9, end: 10, num_keys: 90, cache_base: 268 },
            ];
            let rows: usize = spans.iter().map(SequenceRows::rows).sum();
            let kv_width = num_kv_heads * head_dim;
            let qkv = noise(rows * heads.qkv_width(), 1);
            let (k, v) = (noise(358 * kv_width, 2), noise(358 * kv_width, 3));
            for cache in [None, Some((&k[..], &v[..]))] {
                let mut want = vec![0.0; rows * num_heads * head_dim];
                reference::attention(&qkv, heads, &spans, cache, &mut want);
                for isa in Isa::available() {
                    let mut got = vec![f32::NAN; want.len()];
                    attention_on(isa, &qkv, heads, &spans, cache, &mut got);
                    for (got, want) in got.iter().zip(&want) {
                        assert!((got - want).abs() < 3e-6, "{isa:?} {heads:?}: {got} {want}");
                    }
                }
            }
        }
    }

    /// Rows chosen out of a sequence are what they are among all of its rows, bit for bit.
    #[test]
    fn chosen_rows_are_what_they_are_among_all() {
        let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
        let (q, kv, width) = (128, 64, heads.qkv_width());
        let spans = [(0, 80), (80, 37)].map(|(base, len)| SequenceRows {
            sequence: 0,
            start: 0,
            end: len,
            num_keys: len,
            cache_base: base,
        });
        let qkv = noise(117 * width, 1);
        let part = |from: usize, len: usize| -> Vec<f32> {
            qkv.chunks(width).flat_map(|row| row[from..from + len].iter().copied()).collect()
        };
        let mut all = vec![0.0; 117 * q];
        attention(&qkv, heads, &spans, None, &mut all);
        let selected: [Vec<usize>; 2] = [(0..80).step_by(3).chain(70..80).collect(), vec![80, 99, 116]];
        let queries: Vec<f32> =
            selected.iter().flatten().flat_map(|row| &qkv[row * width..][..q + kv]).copied().collect();
        let counts = selected.each_ref().map(Vec::len);
        let mut got = vec![0.0; counts.iter().sum::<usize>() * q];
        let (k, v) = (part(q, kv), part(q + kv, kv));
        attention_cached(&queries, q + kv, heads, &spans, &counts, (&k, &v), &mut got);
        for (row, got) in selected.iter().flatten().zip(got.chunks(q)) {
            assert_eq!(got, &all[row * q..(row + 1) * q], "row {row}");
        }
    }

    /// A span's bits do not depend on the spans beside it.
    #[test]
    fn spans_do_not_depend_on_their_company() {
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 32 };
        let spans: Vec<_> =
            [37, 3, 70].map(|end| SequenceRows { sequence: 0, start: 0, end, num_keys: end, cache_base: 0 }).into();
        let qkv = noise(110 * heads.qkv_width(), 5);
        let mut all = vec![0.0; 110 * 64];
        attention(&qkv, heads, &spans, None, &mut all);
        let mut alone = vec![0.0; 70 * 64];
        attention(&qkv[40 * heads.qkv_width()..], heads, &spans[2..], None, &mut alone);
        assert_eq!(all[40 * 64..], alone);
    }

    /// NaN in one key reaches every row that sees it, and no other sequence.
    #[test]
    fn nan_comes_through() {
        let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 32 };
        let span = SequenceRows { sequence: 0, start: 0, end: 20, num_keys: 20, cache_base: 0 };
        let mut qkv = noise(40 * heads.qkv_width(), 5);
        qkv[7 * heads.qkv_width() + 40] = f32::NAN;
        let mut out = vec![0.0; 40 * 32];
        attention(&qkv, heads, &[span, span], None, &mut out);
        assert!(out[..20 * 32].iter().all(|x| x.is_nan()));
        assert!(out[20 * 32..].iter().all(|x| x.is_finite()));
    }
}
