//! Bidirectional attention over [prefix cache | live rows | suffix cache], without concatenating them.
//!
//! One task per (sequence, head, tile of query rows). A task computes all its scores `[keys, rows]` with the register
//! tiles of `tile.rs`, takes the softmax lane by lane, and multiplies by the values with the same register tiles. Scores
//! are stored in a scratch of `keys x 64` floats per thread.

use super::simd::{Isa, Simd, dispatch};
use super::tile::{max_vectors, tile};
use super::transpose::transpose;
use crate::backend::{Heads, SequenceRows};
use rayon::prelude::*;
use std::cell::RefCell;

/// Keys copied to contiguous memory at a time.
const KEYS: usize = 64;
/// Largest supported `head_dim`.
const MAX_HEAD_DIM: usize = 128;
/// Row stride of the copied keys, in floats: not a power of two.
const STRIDE: usize = MAX_HEAD_DIM + 16;
/// Query rows of a task at most.
const ROWS: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Returns the floats of scratch per thread for sequences of up to `len` positions.
pub const fn scratch_len(len: usize, head_dim: usize) -> usize {
    ROWS * (len + 2 * head_dim) + KEYS * STRIDE
}

/// Keys and values of consecutive positions: row `i` of either starts at element `i * stride`.
#[derive(Clone, Copy)]
struct Segment<'a> {
    k: &'a [f32],
    v: &'a [f32],
    stride: usize,
    len: usize,
}

/// One task: up to [`ROWS`] query rows of one sequence and head.
struct Task<'a> {
    /// Queries, from the head's elements of the task's first row on; rows are `q_stride` elements apart.
    q: &'a [f32],
    q_stride: usize,
    rows: usize,
    head_dim: usize,
    segments: [Segment<'a>; 3],
    /// Index of the first output element; output rows are `out_stride` elements apart.
    out: usize,
    out_stride: usize,
}

/// Output that parallel tasks write; each task writes its own rows and head.
struct Out(*mut f32);
// SAFETY: tasks write disjoint elements.
unsafe impl Sync for Out {}

/// Computes `out[row][head] = softmax(q k^T / sqrt(head_dim)) v`.
///
/// `qkv` is `[rows, q | k | v]` with rotated queries and keys, the sequences one after another. `out` is
/// `[rows, num_heads * head_dim]`. `cache` holds keys and values `[positions, kv_width]` of all sequences. Without a
/// cache, the rows of a sequence attend only to each other.
///
/// # Panics
/// When a buffer is too short for the sequences, or a head is wider than 128.
pub fn attention(
    qkv: &[f32],
    heads: Heads,
    sequences: &[SequenceRows],
    cache: Option<(&[f32], &[f32])>,
    out: &mut [f32],
) {
    attention_on(Isa::detect(), qkv, heads, sequences, cache, out);
}

/// Computes [`attention`] on the instruction set `isa`.
fn attention_on(
    isa: Isa,
    qkv: &[f32],
    heads: Heads,
    sequences: &[SequenceRows],
    cache: Option<(&[f32], &[f32])>,
    out: &mut [f32],
) {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (width, q_width, kv_width) = (heads.qkv_width(), num_heads * head_dim, num_kv_heads * head_dim);
    let total: usize = sequences.iter().map(SequenceRows::rows).sum();
    assert!(qkv.len() >= total * width && out.len() >= total * q_width, "buffer too short for {total} rows");
    assert!(head_dim <= MAX_HEAD_DIM && num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads), "{heads:?}");
    for sequence in sequences {
        let cached = (sequence.cache_base + sequence.num_keys) * kv_width;
        assert!(sequence.start <= sequence.end && sequence.end <= sequence.num_keys, "{sequence:?}");
        assert!(cache.is_none_or(|(k, v)| cached <= k.len() && cached <= v.len()), "cache too short for {sequence:?}");
    }
    let mut tasks = Vec::new();
    let mut first = 0;
    for sequence in sequences {
        for head in 0..num_heads {
            let kv = head / (num_heads / num_kv_heads) * head_dim;
            let cached = |from: usize, to: usize| match cache {
                Some((k, v)) if from < to => {
                    let start = (sequence.cache_base + from) * kv_width + kv;
                    Segment { k: &k[start..], v: &v[start..], stride: kv_width, len: to - from }
                }
                _ => Segment { k: &[], v: &[], stride: 0, len: 0 },
            };
            let live = first * width + q_width + kv;
            let live = Segment { k: &qkv[live..], v: &qkv[live + kv_width..], stride: width, len: sequence.rows() };
            let segments = [cached(0, sequence.start), live, cached(sequence.end, sequence.num_keys)];
            for row in (0..sequence.rows()).step_by(ROWS) {
                tasks.push(Task {
                    q: &qkv[(first + row) * width + head * head_dim..],
                    q_stride: width,
                    rows: ROWS.min(sequence.rows() - row),
                    head_dim,
                    segments,
                    out: (first + row) * q_width + head * head_dim,
                    out_stride: q_width,
                });
            }
        }
        first += sequence.rows();
    }
    // SAFETY: `isa` was detected; tasks write disjoint parts of `out`, whose length was checked above.
    unsafe { run_all(isa, &tasks, head_dim, out) }
}

/// Computes attention of selected query rows over the cached keys and values of all positions of their sequence.
///
/// `queries` holds rows `stride` elements apart, each beginning with its rotated queries: `counts[i]` rows of sequence i,
/// at any positions. The other arguments are those of [`attention`].
///
/// # Panics
/// When a buffer is too short for the rows or the sequences, or a head is wider than 128.
pub fn attention_cached(
    queries: &[f32],
    stride: usize,
    heads: Heads,
    sequences: &[SequenceRows],
    counts: &[usize],
    (k, v): (&[f32], &[f32]),
    out: &mut [f32],
) {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
    let total: usize = counts.iter().sum();
    assert!(
        stride >= q_width && queries.len() >= total * stride && out.len() >= total * q_width,
        "buffer too short for {total} rows"
    );
    assert!(head_dim <= MAX_HEAD_DIM && num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads), "{heads:?}");
    let none = Segment { k: &[], v: &[], stride: 0, len: 0 };
    let mut tasks = Vec::new();
    let mut first = 0;
    for (sequence, count) in sequences.iter().zip(counts) {
        let cached = (sequence.cache_base + sequence.num_keys) * kv_width;
        assert!(sequence.num_keys > 0 && cached <= k.len() && cached <= v.len(), "cache too short for {sequence:?}");
        for head in 0..num_heads {
            let start = sequence.cache_base * kv_width + head / (num_heads / num_kv_heads) * head_dim;
            let all = Segment { k: &k[start..], v: &v[start..], stride: kv_width, len: sequence.num_keys };
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

/// Runs all tasks in parallel.
///
/// # Safety
/// 1. The CPU has `isa`. 2. `out` is long enough for all tasks, and no two tasks write the same elements.
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

/// Runs one task in register tiles, each as wide as the registers allow.
///
/// # Safety
/// 1. The CPU has `S`. 2. `out` is valid for the task's rows, and no other thread accesses them.
#[inline(always)]
unsafe fn run<S: Simd>(task: &Task, out: &Out, scratch: &mut [f32]) {
    let widest = max_vectors::<S>() * S::LANES;
    for row in (0..task.rows).step_by(widest) {
        // SAFETY: rows of this task.
        unsafe { run_tile::<S>(task, row, widest.min(task.rows - row), out, scratch) };
    }
}

/// Computes the query rows `row .. row + rows` of the task.
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
    // The queries, scaled and transposed to `[d, lanes]`.
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
                let block = scores[key * lanes..(key + n) * lanes].as_mut_ptr();
                tile::<S, STRIDE>(n, vectors, d, keys.as_ptr(), 1, query.as_ptr(), block, lanes, false);
            }
            key += n;
        }
    }
    let scores = &mut scores[..key * lanes];
    let mut totals = [0.0f32; ROWS];
    for v in 0..vectors {
        // SAFETY: lanes v * LANES .. of each row of scores, and of totals.
        unsafe {
            let score = |key: usize| key * lanes + v * S::LANES;
            let p = scores.as_mut_ptr();
            let mut max = S::splat(f32::MIN);
            for j in 0..key {
                max = S::max(max, S::load(p.add(score(j)))); // returns the second operand when one is NaN: NaN propagates
            }
            let negated_max = S::mul(max, S::splat(-1.0));
            let mut total = S::splat(0.0);
            for j in 0..key {
                let e = S::exp(S::add(S::load(p.add(score(j))), negated_max));
                total = S::add(total, e);
                S::store(p.add(score(j)), e);
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
    // SAFETY: sums is `[d, lanes]`; the write covers this task's rows and head of out.
    unsafe { transpose(sums.as_ptr(), lanes, out.0.add(task.out + row * task.out_stride), task.out_stride, d, rows) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::attention as reference;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 16) as f32 / 32768.0 - 1.0).collect()
    }

    /// Ragged sequences with each segment empty in turn, GQA, all head widths, all instruction sets.
    #[test]
    fn equals_the_reference() {
        crate::backend::cpu::simd::print_paths_not_run();
        for (num_heads, num_kv_heads, head_dim) in [(2, 2, 32), (7, 1, 64), (4, 2, 128)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            let sequences = [
                SequenceRows { sequence: 0, start: 0, end: 5, num_keys: 5, cache_base: 0 },
                SequenceRows { sequence: 1, start: 0, end: 70, num_keys: 200, cache_base: 5 },
                SequenceRows { sequence: 2, start: 30, end: 63, num_keys: 63, cache_base: 205 },
                SequenceRows { sequence: 3, start: 9, end: 10, num_keys: 90, cache_base: 268 },
            ];
            let rows: usize = sequences.iter().map(SequenceRows::rows).sum();
            let kv_width = num_kv_heads * head_dim;
            let qkv = noise(rows * heads.qkv_width(), 1);
            let (k, v) = (noise(358 * kv_width, 2), noise(358 * kv_width, 3));
            for cache in [None, Some((&k[..], &v[..]))] {
                let mut want = vec![0.0; rows * num_heads * head_dim];
                reference::attention(&qkv, heads, &sequences, cache, &mut want);
                for isa in Isa::available() {
                    let mut got = vec![f32::NAN; want.len()];
                    attention_on(isa, &qkv, heads, &sequences, cache, &mut got);
                    for (got, want) in got.iter().zip(&want) {
                        assert!((got - want).abs() < 3e-6, "{isa:?} {heads:?}: {got} {want}");
                    }
                }
            }
        }
    }

    /// Compares with the reference on every instruction set.
    fn check(
        (what, tolerance): (&str, f32),
        qkv: &[f32],
        heads: Heads,
        sequences: &[SequenceRows],
        cache: Option<(&[f32], &[f32])>,
    ) {
        let rows: usize = sequences.iter().map(SequenceRows::rows).sum();
        let mut want = vec![0.0; rows * heads.q_width()];
        reference::attention(qkv, heads, sequences, cache, &mut want);
        for isa in Isa::available() {
            let mut got = vec![f32::NAN; want.len()];
            attention_on(isa, qkv, heads, sequences, cache, &mut got);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() < tolerance, "{what}, {isa:?} {heads:?}: element {i}: {got} {want}");
            }
        }
    }

    /// More rows and keys than several tiles of queries and blocks of keys hold, alone and in a cache.
    #[test]
    fn long_sequences() {
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 32 };
        let sequence =
            |start, end, num_keys, cache_base| SequenceRows { sequence: 0, start, end, num_keys, cache_base };
        let sequences = [sequence(0, 600, 600, 0), sequence(290, 561, 900, 600)];
        let qkv = noise(871 * heads.qkv_width(), 1);
        let (k, v) = (noise(1500 * 32, 2), noise(1500 * 32, 3));
        check(("alone", 3e-6), &qkv, heads, &sequences, None);
        check(("cached", 3e-6), &qkv, heads, &sequences, Some((&k, &v)));
    }

    /// One cached key before the rows, one after them, one live row, and all three.
    #[test]
    fn segments_of_one_key() {
        let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 32 };
        for (before, live, after) in
            [(1, 5, 9), (9, 5, 1), (5, 1, 9), (1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0), (1, 70, 1), (64, 1, 64)]
        {
            let (end, num_keys) = (before + live, before + live + after);
            let sequence = |cache_base| SequenceRows { sequence: 0, start: before, end, num_keys, cache_base };
            let qkv = noise(2 * live * heads.qkv_width(), 1);
            let (k, v) = (noise(2 * num_keys * 64, 2), noise(2 * num_keys * 64, 3));
            let what = format!("{before}, {live} and {after} keys");
            check((&what, 3e-6), &qkv, heads, &[sequence(0), sequence(num_keys)], Some((&k, &v)));
        }
    }

    /// Scores of about -200 for even rows, about 200 for odd ones: a maximum that starts at 0 would make all weights equal.
    #[test]
    fn scores_far_below_zero() {
        for head_dim in [32, 64, 128] {
            let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim };
            let (q, width) = (heads.q_width(), heads.qkv_width());
            let size = (200.0 / (head_dim as f32).sqrt()).sqrt();
            let mut qkv = noise(80 * width, 1);
            for (row, x) in qkv.chunks_exact_mut(width).enumerate() {
                let sign = if row % 2 == 0 { 1.0 } else { -1.0 };
                x[..q].iter_mut().for_each(|x| *x = sign * (size + 0.1 * *x));
                x[q..q + head_dim].iter_mut().for_each(|x| *x = 0.25 * *x - size);
            }
            let k: Vec<f32> = noise(170 * head_dim, 2).iter().map(|x| 0.25 * x - size).collect();
            let v = noise(170 * head_dim, 3);
            let sequence =
                |start, end, num_keys, cache_base| SequenceRows { sequence: 0, start, end, num_keys, cache_base };
            for cache in [None, Some((&k[..], &v[..]))] {
                let sequences = [sequence(10, 80, 150, 0), sequence(5, 15, 20, 150)];
                // A score of 200 in f32 has an error of up to 2e-5.
                check((&format!("cache {}", cache.is_some()), 3e-5), &qkv, heads, &sequences, cache);
            }
        }
    }

    /// Selected rows equal the same rows of the whole sequence bit for bit.
    #[test]
    fn selected_rows_equal_rows_of_the_whole() {
        let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
        let (q, kv, width) = (128, 64, heads.qkv_width());
        let sequences = [(0, 80), (80, 37)].map(|(base, len)| SequenceRows {
            sequence: 0,
            start: 0,
            end: len,
            num_keys: len,
            cache_base: base,
        });
        let qkv = noise(117 * width, 1);
        let columns = |from: usize, len: usize| -> Vec<f32> {
            qkv.chunks(width).flat_map(|row| row[from..from + len].iter().copied()).collect()
        };
        let mut all = vec![0.0; 117 * q];
        attention(&qkv, heads, &sequences, None, &mut all);
        let selected: [Vec<usize>; 2] = [(0..80).step_by(3).chain(70..80).collect(), vec![80, 99, 116]];
        let queries: Vec<f32> =
            selected.iter().flatten().flat_map(|row| &qkv[row * width..][..q + kv]).copied().collect();
        let counts = selected.each_ref().map(Vec::len);
        let mut got = vec![0.0; counts.iter().sum::<usize>() * q];
        let (k, v) = (columns(q, kv), columns(q + kv, kv));
        attention_cached(&queries, q + kv, heads, &sequences, &counts, (&k, &v), &mut got);
        for (row, got) in selected.iter().flatten().zip(got.chunks(q)) {
            assert_eq!(got, &all[row * q..(row + 1) * q], "row {row}");
        }
    }

    /// The bits of a sequence do not depend on the other sequences of the batch.
    #[test]
    fn sequences_are_batch_invariant() {
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 32 };
        let sequences: Vec<_> =
            [37, 3, 70].map(|end| SequenceRows { sequence: 0, start: 0, end, num_keys: end, cache_base: 0 }).into();
        let qkv = noise(110 * heads.qkv_width(), 5);
        let mut all = vec![0.0; 110 * 64];
        attention(&qkv, heads, &sequences, None, &mut all);
        let mut alone = vec![0.0; 70 * 64];
        attention(&qkv[40 * heads.qkv_width()..], heads, &sequences[2..], None, &mut alone);
        assert_eq!(all[40 * 64..], alone);
    }

    /// NaN in one key reaches every row that attends to it, and no other sequence.
    #[test]
    fn nan_propagates_within_its_sequence() {
        let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 32 };
        let sequence = SequenceRows { sequence: 0, start: 0, end: 20, num_keys: 20, cache_base: 0 };
        let mut qkv = noise(40 * heads.qkv_width(), 5);
        qkv[7 * heads.qkv_width() + 40] = f32::NAN;
        let mut out = vec![0.0; 40 * 32];
        attention(&qkv, heads, &[sequence, sequence], None, &mut out);
        assert!(out[..20 * 32].iter().all(|x| x.is_nan()));
        assert!(out[20 * 32..].iter().all(|x| x.is_finite()));
    }
}
