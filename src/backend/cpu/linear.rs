//! `out = x W^T + bias` for f32 activations and weights that stay as the checkpoint has them (bf16, f16, f32).
//!
//! On AMX, bf16 weights go to `amx.rs`. Everything else here, with one kernel for any number of rows. A panel of weight
//! rows is widened once into a scratch that stays in L2, read row after row as it lies in memory, and then swept with
//! register tiles (`tile.rs`) over activations packed lane by lane; meanwhile the next panel is prefetched. The weights
//! are read once per 256 rows. Work is split over panels; no sum is ever split, so neither threads nor the number of rows
//! change a bit. Bound: multiply-adds from 32 rows on (`DLLM_CPU=avx512 cargo bench --bench linear` prints their roof).

use super::simd::{Isa, Simd, dispatch};
use super::tile::{max_vectors, tile};
use super::transpose::transpose;
use crate::tensor::{Dtype, Tensor};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Weight rows of a panel: one task.
const PANEL: usize = 48;
/// Weight rows between two helpings of prefetches: a multiple of every tile's.
const ROWS: usize = 24;
/// Columns widened, packed and multiplied at a time: 2 KiB of a bf16 row, long enough for the hardware prefetcher.
/// (Blocks of 128, whose activations would stay in L1, were slower: the sums come and go too often.)
const DEPTH: usize = 1024;
/// Row stride of the widened panel: off the powers of two, which would all fall into the same cache sets.
const STRIDE: usize = DEPTH + 16;
/// Rows of activations per sweep, so that the scratch stays small however long the sequence.
pub(super) const SWEEP: usize = 256;
/// Row stride of the sums.
pub(super) const SUMS: usize = SWEEP + 16;
/// Packed activations are padded to this many rows, on every instruction set.
const LANES: usize = 16;

/// A weight matrix `[rows, cols]`, row-major, stacked from one or more tensors of the checkpoint (QKV, gate and up)
/// and read in place, with an optional bias.
#[derive(Clone, Debug)]
pub struct Matrix {
    parts: Vec<Tensor>,
    rows: usize,
    cols: usize,
    pub(super) bias: Option<Vec<f32>>,
}

impl Matrix {
    /// Stacks tensors `[rows_i, cols]` of one `cols`; `bias` has one value per stacked row, or is empty.
    ///
    /// # Panics
    /// When the shapes do not fit; the caller has checked them against the configuration.
    pub fn new(parts: Vec<Tensor>, bias: Vec<f32>) -> Matrix {
        assert!(parts.iter().all(|p| p.shape().len() == 2), "not a matrix");
        let cols = parts.first().map_or(0, |p| p.shape()[1]);
        assert!(cols > 0 && parts.iter().all(|p| p.shape()[1] == cols), "stacked matrices differ in width");
        let rows = parts.iter().map(|p| p.shape()[0]).sum();
        assert!(bias.is_empty() || bias.len() == rows, "bias does not fit its matrix");
        Matrix { parts, rows, cols, bias: (!bias.is_empty()).then_some(bias) }
    }

    /// Some of the output features, as a matrix of its own: the same weights, read in the same place.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn part(&self, rows: Range<usize>) -> Matrix {
        assert!(rows.start < rows.end && rows.end <= self.rows, "{rows:?} of {}", self.rows);
        let mut parts = Vec::new();
        let mut first = 0;
        for part in &self.parts {
            let here = first..first + part.shape()[0];
            first = here.end;
            let (start, end) = (rows.start.max(here.start), rows.end.min(here.end));
            if start < end {
                parts.push(part.rows(start - here.start..end - here.start));
            }
        }
        Matrix::new(parts, self.bias.as_ref().map_or(vec![], |bias| bias[rows].to_vec()))
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of row `n` and their element type.
    pub(super) fn row(&self, mut n: usize) -> (&[u8], Dtype) {
        for part in &self.parts {
            let rows = part.shape()[0];
            if n < rows {
                let bytes = self.cols * part.dtype().size();
                return (&part.bytes()[n * bytes..(n + 1) * bytes], part.dtype());
            }
            n -= rows;
        }
        unreachable!("row beyond the matrix: callers stay below rows()")
    }

    /// Whether every tile of weights lies whole in one bf16 tensor.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn fits_amx(&self) -> bool {
        use super::amx::{BLOCK, STEP};
        let fits = |part: &Tensor| part.dtype() == Dtype::Bf16 && part.shape()[0].is_multiple_of(BLOCK);
        self.cols.is_multiple_of(STEP) && self.parts.iter().all(fits)
    }

    /// Row `n`, widened into `out` (an embedding look-up).
    pub fn row_into(&self, n: usize, out: &mut [f32]) {
        let (bytes, dtype) = self.row(n);
        dtype.widen(bytes, out);
    }
}

/// Floats that [`linear`] needs for the packed activations of `rows` rows of width `cols`.
pub fn packed_len(rows: usize, cols: usize) -> usize {
    let floats = rows.min(SWEEP).next_multiple_of(LANES) * cols;
    // On AMX three bf16 each; and room to begin at a cache line.
    LANES + if has_amx() { floats.div_ceil(2) * 3 } else { floats }
}

fn has_amx() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return super::amx::available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return false;
}

/// Bytes of scratch per thread.
pub const SCRATCH_BYTES: usize = (PANEL * STRIDE + PANEL * SUMS + LANES) * size_of::<f32>();

thread_local! {
    pub(super) static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The part of a buffer that begins at a cache line: vectors, and tiles of AMX still more, load slowly across two.
pub(super) fn from_cache_line(buffer: &mut [f32]) -> &mut [f32] {
    let line = buffer.as_ptr().align_offset(64).min(buffer.len());
    &mut buffer[line..]
}

/// `out[m][n] = sum over k of x[m][k] * w[n][k] (+ bias[n])` for m < rows. `x` is `[rows, w.cols()]` and `out`
/// `[rows, w.rows()]`, both row-major; `packed` holds at least [`packed_len`] floats.
///
/// # Panics
/// When a slice is too short.
pub fn linear(x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if has_amx() && w.fits_amx() {
        return super::amx::linear(x, w, out, rows, packed);
    }
    linear_on(Isa::detect(), x, w, out, rows, packed);
}

fn linear_on(isa: Isa, x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
    let (k, n) = (w.cols, w.rows);
    assert!(x.len() >= rows * k && out.len() >= rows * n && packed.len() >= packed_len(rows, k), "buffer too short");
    for m0 in (0..rows).step_by(SWEEP) {
        let m = SWEEP.min(rows - m0);
        let x = &x[m0 * k..(m0 + m) * k];
        let padded = m.next_multiple_of(LANES);
        let packed = &mut from_cache_line(packed)[..padded * k];
        packed.par_chunks_mut(padded * DEPTH).enumerate().for_each(|(block, packed)| {
            let k0 = block * DEPTH;
            // SAFETY: `isa` was detected; the last chunk holds the columns that are left.
            unsafe { dispatch!(isa, pack(x: &[f32], m: usize, k: usize, k0: usize, packed: &mut [f32])) };
        });
        let out = Out(out[m0 * n..(m0 + m) * n].as_mut_ptr());
        let packed = &*packed;
        (0..n.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
            let out = &out;
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(SCRATCH_BYTES / size_of::<f32>(), 0.0);
                let scratch = from_cache_line(scratch);
                // SAFETY: `isa` was detected; panels write disjoint columns of `out`, which holds m rows of n floats.
                unsafe {
                    dispatch!(isa, panel_of(
                        w: &Matrix, panel: usize, packed: &[f32], m: usize, out: &Out, scratch: &mut [f32],
                    ))
                }
            });
        });
    }
}

/// Where the panels write; each to columns of its own.
pub(super) struct Out(pub(super) *mut f32);
// SAFETY: see the write in `panel_of`: tasks touch disjoint elements.
unsafe impl Sync for Out {}

/// Rows `m0..` of a sweep as tiles: (first row, rows) with the widest tile the registers hold.
fn tiles<S: Simd>(padded: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = max_vectors::<S>() * S::LANES;
    (0..padded).step_by(width).map(move |m0| (m0, width.min(padded - m0)))
}

/// Columns `k0..` of `x [m, k]` into `packed`: tile by tile, `[depth][tile rows]`; rows beyond `m` are zero.
///
/// # Safety
/// 1. The CPU has `S`. 2. `packed` has at most `k - k0` columns.
#[inline(always)]
unsafe fn pack<S: Simd>(x: &[f32], m: usize, k: usize, k0: usize, packed: &mut [f32]) {
    let padded = m.next_multiple_of(LANES);
    let depth = packed.len() / padded;
    for (m0, lanes) in tiles::<S>(padded) {
        let tile = &mut packed[m0 * depth..(m0 + lanes) * depth];
        tile.fill(0.0);
        let real = lanes.min(m.saturating_sub(m0));
        if real > 0 {
            // SAFETY: `real` rows of `depth` columns inside x; the tile is `[depth, lanes]`.
            unsafe { transpose(x.as_ptr().add(m0 * k + k0), k, tile.as_mut_ptr(), lanes, real, depth) };
        }
    }
}

/// Weight rows `panel * PANEL ..` times all packed rows, written to their columns of `out`.
///
/// # Safety
/// 1. The CPU has `S`. 2. `out` holds `[m, w.rows()]` and nobody else touches this panel's columns.
#[inline(always)]
unsafe fn panel_of<S: Simd>(w: &Matrix, panel: usize, packed: &[f32], m: usize, out: &Out, scratch: &mut [f32]) {
    let n0 = panel * PANEL;
    let nl = PANEL.min(w.rows - n0);
    let padded = m.next_multiple_of(LANES);
    let (wide, sums) = scratch.split_at_mut(PANEL * STRIDE);
    for k0 in (0..w.cols).step_by(DEPTH) {
        let depth = DEPTH.min(w.cols - k0);
        for n in 0..nl {
            let (bytes, dtype) = w.row(n0 + n);
            let bytes = &bytes[k0 * dtype.size()..(k0 + depth) * dtype.size()];
            // SAFETY: the CPU has S.
            unsafe { widen::<S>(dtype, bytes, &mut wide[n * STRIDE..n * STRIDE + depth]) };
        }
        // What is widened next: the same rows further on, or the next panel from its start.
        let (next_row, next_k) = if k0 + DEPTH < w.cols { (n0, k0 + DEPTH) } else { (n0 + PANEL, 0) };
        let mut ahead = Ahead { w, row: next_row, end: (next_row + PANEL).min(w.rows), k0: next_k, byte: 0 };
        let lines = (PANEL * DEPTH * 2 / 64).div_ceil(tiles::<S>(padded).count() * nl.div_ceil(ROWS));
        let block = &packed[k0 * padded..(k0 + depth) * padded];
        for (m0, lanes) in tiles::<S>(padded) {
            for n in (0..nl).step_by(ROWS) {
                ahead.prefetch(lines);
                // SAFETY: wide holds nl rows, the block `depth x lanes` of this tile, sums nl rows.
                unsafe {
                    tile::<S, STRIDE>(
                        ROWS.min(nl - n),
                        lanes / S::LANES,
                        depth,
                        wide.as_ptr().add(n * STRIDE),
                        1,
                        block.as_ptr().add(m0 * depth),
                        sums.as_mut_ptr().add(n * SUMS + m0),
                        SUMS,
                        k0 > 0,
                    );
                }
            }
        }
    }
    if let Some(bias) = &w.bias {
        for n in 0..nl {
            for s in &mut sums[n * SUMS..n * SUMS + m] {
                *s += bias[n0 + n];
            }
        }
    }
    // SAFETY: sums is `[nl, m]`; rows below m and this panel's columns of out.
    unsafe { transpose(sums.as_ptr(), SUMS, out.0.add(n0), w.rows, nl, m) };
}

/// Walks over the cache lines of a panel, a few at a time, so that they arrive while the panel before is worked on.
/// (All at once they would only queue up: a core has a dozen or so requests under way.)
struct Ahead<'a> {
    w: &'a Matrix,
    row: usize,
    end: usize,
    k0: usize,
    byte: usize,
}

impl Ahead<'_> {
    #[inline(always)]
    fn prefetch(&mut self, mut lines: usize) {
        while lines > 0 && self.row < self.end {
            let (bytes, dtype) = self.w.row(self.row);
            let bytes = &bytes[self.k0 * dtype.size()..];
            let bytes = &bytes[..bytes.len().min(DEPTH * dtype.size())];
            while lines > 0 && self.byte < bytes.len() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a hint, and the address lies in `bytes`.
                unsafe {
                    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                    _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().add(self.byte).cast());
                }
                self.byte += 64;
                lines -= 1;
            }
            if self.byte >= bytes.len() {
                (self.row, self.byte) = (self.row + 1, 0);
            }
        }
    }
}

/// `bytes` of `dtype`, widened to f32.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn widen<S: Simd>(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let whole = out.len() / S::LANES * S::LANES;
    // SAFETY: i + LANES <= out.len() elements on both sides.
    unsafe {
        match dtype {
            Dtype::Bf16 => {
                for i in (0..whole).step_by(S::LANES) {
                    S::store(out.as_mut_ptr().add(i), S::widen_bf16(bytes.as_ptr().add(2 * i)));
                }
            }
            Dtype::F16 => {
                for i in (0..whole).step_by(S::LANES) {
                    S::store(out.as_mut_ptr().add(i), S::widen_f16(bytes.as_ptr().add(2 * i)));
                }
            }
            Dtype::F32 => {
                for i in (0..whole).step_by(S::LANES) {
                    S::store(out.as_mut_ptr().add(i), S::load(bytes.as_ptr().add(4 * i).cast()));
                }
            }
        }
    }
    dtype.widen(&bytes[whole * dtype.size()..], &mut out[whole..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::test_tensor;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Every way to compute a product on this machine; None is the matrix unit.
    fn paths(w: &Matrix) -> Vec<Option<Isa>> {
        let mut paths: Vec<_> = Isa::available().into_iter().map(Some).collect();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if has_amx() && w.fits_amx() {
            paths.push(None);
        }
        paths
    }

    fn run(path: Option<Isa>, x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
        match path {
            Some(isa) => linear_on(isa, x, w, out, rows, packed),
            None => linear(x, w, out, rows, packed),
        }
    }

    /// Against f64 sums, for every instruction set of this machine, element type, and sizes off every tile.
    #[test]
    fn equals_f64_sums() {
        let odd = [(1, 1, 1), (3, 65, 129), (17, 64, 128), (33, 100, 300), (70, 24, 257), (300, 7, 40)];
        let even = [(1, 32, 32), (16, 64, 544), (17, 96, 512), (33, 160, 1056), (48, 32, 1024), (300, 64, 608)];
        for (rows, n, k) in odd.into_iter().chain(even) {
            let tail = if n % 32 == 0 { 32 } else { 5 };
            for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
                let x = noise(rows * k, 1);
                let first = test_tensor(dtype, &[n, k], &noise(n * k, 2));
                let second = test_tensor(dtype, &[tail, k], &noise(tail * k, 3));
                let bias = noise(n + tail, 4);
                let w = Matrix::new(vec![first, second], bias.clone());
                let mut wide = vec![0.0; k];
                // The sum, and the sum of absolute values, which bounds its rounding.
                let mut expected = vec![(0.0f64, 0.0f64); rows * (n + tail)];
                for c in 0..n + tail {
                    w.row_into(c, &mut wide);
                    for r in 0..rows {
                        let products = (0..k).map(|p| x[r * k + p] as f64 * wide[p] as f64);
                        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                        expected[r * (n + tail) + c] = (sum + bias[c] as f64, size + bias[c].abs() as f64);
                    }
                }
                for path in paths(&w) {
                    let mut out = vec![f32::NAN; rows * (n + tail)];
                    let mut packed = vec![f32::NAN; packed_len(rows, k)];
                    run(path, &x, &w, &mut out, rows, &mut packed);
                    for (got, (want, size)) in out.iter().zip(&expected) {
                        let error = (*got as f64 - want).abs() / size;
                        assert!(error < 4e-7, "{path:?} {dtype:?} {rows}x{n}x{k}: {got} {want}");
                    }
                }
            }
        }
    }

    /// A part of the outputs is what it is among all of them, bit for bit: across tensors and within, with their biases.
    #[test]
    fn parts_are_what_they_are_among_all() {
        let (rows, n, k) = (33, 64, 160);
        let tensors = [2, 3, 4].map(|seed| test_tensor(Dtype::Bf16, &[n, k], &noise(n * k, seed)));
        let w = Matrix::new(tensors.to_vec(), noise(3 * n, 5));
        let x = noise(rows * k, 1);
        let mut all = vec![0.0; rows * 3 * n];
        linear(&x, &w, &mut all, rows, &mut vec![0.0; packed_len(rows, k)]);
        for part in [0..2 * n, 2 * n..3 * n, n / 2..n + 7, 0..3 * n] {
            let width = part.len();
            let mut got = vec![0.0; rows * width];
            linear(&x, &w.part(part.clone()), &mut got, rows, &mut vec![0.0; packed_len(rows, k)]);
            for r in 0..rows {
                let want = &all[r * 3 * n..][part.clone()];
                // On AMX a part that is no whole tile takes the other way, and rounds otherwise.
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5;
                let equal = part.start % n == 0 && part.end % n == 0;
                let got = &got[r * width..(r + 1) * width];
                assert!(if equal { got == want } else { got.iter().zip(want).all(near) }, "{part:?} row {r}");
            }
        }
    }

    /// A row's bits do not depend on the rows beside it.
    #[test]
    fn rows_do_not_depend_on_their_company() {
        for (rows, n, k) in [(261, 130, 515), (261, 160, 1120)] {
            let w = Matrix::new(vec![test_tensor(Dtype::Bf16, &[n, k], &noise(n * k, 2))], vec![]);
            let x = noise(rows * k, 1);
            for path in paths(&w) {
                let mut all = vec![0.0; rows * n];
                run(path, &x, &w, &mut all, rows, &mut vec![0.0; packed_len(rows, k)]);
                for (first, count) in [(0, 1), (5, 3), (30, 20), (100, 50), (200, 61)] {
                    let mut some = vec![0.0; count * n];
                    let x = &x[first * k..(first + count) * k];
                    run(path, x, &w, &mut some, count, &mut vec![0.0; packed_len(count, k)]);
                    assert_eq!(some, all[first * n..(first + count) * n], "{path:?} rows {first}+{count}");
                }
            }
        }
    }
}
