//! `out = x W^T + bias` for f32 activations and weights in the checkpoint's element type (bf16, f16, f32).
//!
//! With AMX, bf16 weights are multiplied by `amx.rs`. All other products use the kernel of this file, for any number of
//! rows:
//!
//! 1. A panel of weight rows is widened once, in memory order, into a scratch that stays in L2.
//! 2. Register tiles (`tile.rs`) multiply it by all packed rows of a sweep, while the next panel is prefetched.
//!
//! The weights are read once per 256 rows. Panels are divided among threads and no sum is ever split, so that neither
//! the number of threads nor the number of rows changes a bit. Bound: MACs from 32 rows on
//! (`DLLM_CPU=avx512 cargo bench --bench linear` prints their roof).

pub use super::matrix::Matrix;
use super::scratch::{LANES, SUMS_STRIDE, SWEEP, SharedOut, from_cache_line, with_scratch};
use super::simd::{Isa, Simd, dispatch};
use super::tile::{max_vectors, tile};
use super::transpose::transpose;
use crate::tensor::Dtype;
use rayon::prelude::*;

/// Weight rows of a panel: one task.
const PANEL: usize = 48;
/// Weight rows between two groups of prefetches: a multiple of every register tile's rows.
const ROWS: usize = 24;
/// Columns widened, packed and multiplied at a time: 2 KiB of a bf16 row, long enough for the hardware prefetcher.
/// Blocks of 128, whose activations would stay in L1, were slower: they load and store the sums too often.
const DEPTH: usize = 1024;
/// Row stride of the widened panel, in floats: not a power of two, which would map all rows to the same cache sets.
const STRIDE: usize = DEPTH + 16;

/// Returns the number of floats that [`linear`] needs for the packed activations of `rows` rows of width `cols`.
pub fn packed_len(rows: usize, cols: usize) -> usize {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if super::amx::available() {
        return super::amx::packed_len(rows, cols);
    }
    rows.min(SWEEP).next_multiple_of(LANES) * cols + LANES // room to start at a cache line
}

/// Floats of scratch per thread: the widened panel, its sums, and room to start at a cache line.
const SCRATCH_LEN: usize = PANEL * STRIDE + PANEL * SUMS_STRIDE + LANES;
/// Bytes of scratch per thread, with every instruction set.
pub const SCRATCH_BYTES: usize = SCRATCH_LEN * size_of::<f32>();
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const _: () = assert!(super::amx::SCRATCH_LEN <= SCRATCH_LEN);

/// Computes `out[m][n] = sum over k of x[m][k] * w[n][k] (+ bias[n])` for m < rows. `x` is `[rows, w.cols()]` and `out`
/// `[rows, w.rows()]`, both row-major. `packed` is scratch of at least [`packed_len`] floats.
///
/// # Panics
/// When a slice is too short.
pub fn linear(x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if super::amx::available() && super::amx::fits(w) {
        return super::amx::linear(x, w, out, rows, packed);
    }
    linear_on(Isa::detect(), x, w, out, rows, packed);
}

/// Computes [`linear`] with the kernel of this file, on the instruction set `isa`.
fn linear_on(isa: Isa, x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
    let (k, n) = (w.cols(), w.rows());
    assert!(
        x.len() >= rows * k && out.len() >= rows * n && packed.len() >= packed_len(rows, k),
        "buffer too short for {rows} rows"
    );
    for m0 in (0..rows).step_by(SWEEP) {
        let m = SWEEP.min(rows - m0);
        let x = &x[m0 * k..(m0 + m) * k];
        let padded = m.next_multiple_of(LANES);
        let packed = &mut from_cache_line(packed)[..padded * k];
        packed.par_chunks_mut(padded * DEPTH).enumerate().for_each(|(block, packed)| {
            let k0 = block * DEPTH;
            // SAFETY: `isa` was detected; the last chunk holds the remaining columns.
            unsafe { dispatch!(isa, pack(x: &[f32], m: usize, k: usize, k0: usize, packed: &mut [f32])) };
        });
        let out = SharedOut(out[m0 * n..(m0 + m) * n].as_mut_ptr());
        let packed = &*packed;
        (0..n.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
            let out = &out;
            with_scratch(SCRATCH_LEN, |scratch| {
                // SAFETY: `isa` was detected; panels write disjoint columns of `out`, which holds m rows of n floats.
                unsafe {
                    dispatch!(isa, multiply_panel(
                        w: &Matrix, panel: usize, packed: &[f32], m: usize, out: &SharedOut, scratch: &mut [f32],
                    ))
                }
            });
        });
    }
}

/// Returns the register tiles of a sweep of `padded` rows as (first row, rows), each as wide as the registers allow.
fn tiles<S: Simd>(padded: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = max_vectors::<S>() * S::LANES;
    (0..padded).step_by(width).map(move |m0| (m0, width.min(padded - m0)))
}

/// Packs the columns of `x [m, k]` from `k0` on into `packed`, tile by tile as `[depth][tile rows]`. Rows beyond `m` are
/// zero.
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

/// Multiplies the weight rows from `panel * PANEL` on by all packed rows, and writes their columns of `out`.
///
/// # Safety
/// 1. The CPU has `S`. 2. `out` holds `[m, w.rows()]`, and no other thread accesses this panel's columns.
#[inline(always)]
unsafe fn multiply_panel<S: Simd>(
    w: &Matrix,
    panel: usize,
    packed: &[f32],
    m: usize,
    out: &SharedOut,
    scratch: &mut [f32],
) {
    let n0 = panel * PANEL;
    let nl = PANEL.min(w.rows() - n0);
    let padded = m.next_multiple_of(LANES);
    let (wide, sums) = scratch.split_at_mut(PANEL * STRIDE);
    for k0 in (0..w.cols()).step_by(DEPTH) {
        let depth = DEPTH.min(w.cols() - k0);
        for n in 0..nl {
            let (bytes, dtype) = w.row(n0 + n);
            let bytes = &bytes[k0 * dtype.size()..(k0 + depth) * dtype.size()];
            // SAFETY: the CPU has S.
            unsafe { widen::<S>(dtype, bytes, &mut wide[n * STRIDE..n * STRIDE + depth]) };
        }
        // The next panel to widen: the following columns of these rows, or the first columns of the next rows.
        let (next_row, next_k) = if k0 + DEPTH < w.cols() { (n0, k0 + DEPTH) } else { (n0 + PANEL, 0) };
        let mut prefetcher =
            Prefetcher { w, row: next_row, end: (next_row + PANEL).min(w.rows()), k0: next_k, byte: 0 };
        let lines = (PANEL * DEPTH * 2 / 64).div_ceil(tiles::<S>(padded).count() * nl.div_ceil(ROWS));
        let block = &packed[k0 * padded..(k0 + depth) * padded];
        for (m0, lanes) in tiles::<S>(padded) {
            for n in (0..nl).step_by(ROWS) {
                prefetcher.prefetch(lines);
                // SAFETY: `wide` holds nl rows, `block` this tile's `[depth, lanes]`, `sums` nl rows.
                unsafe {
                    tile::<S, STRIDE>(
                        ROWS.min(nl - n),
                        lanes / S::LANES,
                        depth,
                        wide.as_ptr().add(n * STRIDE),
                        1,
                        block.as_ptr().add(m0 * depth),
                        sums.as_mut_ptr().add(n * SUMS_STRIDE + m0),
                        SUMS_STRIDE,
                        k0 > 0,
                    );
                }
            }
        }
    }
    if let Some(bias) = w.bias() {
        for n in 0..nl {
            for s in &mut sums[n * SUMS_STRIDE..n * SUMS_STRIDE + m] {
                *s += bias[n0 + n];
            }
        }
    }
    // SAFETY: sums is `[nl, m]`; the write covers m rows of this panel's columns of out.
    unsafe { transpose(sums.as_ptr(), SUMS_STRIDE, out.0.add(n0), w.rows(), nl, m) };
}

/// Prefetches the cache lines of a panel, a few at a time, while the previous panel is multiplied. All at once they
/// would queue: a core has about a dozen requests in flight.
struct Prefetcher<'a> {
    w: &'a Matrix,
    /// Next row; `end` is the end of the panel.
    row: usize,
    end: usize,
    /// First column of the panel.
    k0: usize,
    /// Next byte of `row`, counted from column `k0`.
    byte: usize,
}

impl Prefetcher<'_> {
    /// Prefetches the next `lines` cache lines.
    #[inline(always)]
    fn prefetch(&mut self, mut lines: usize) {
        while lines > 0 && self.row < self.end {
            let (bytes, dtype) = self.w.row(self.row);
            let bytes = &bytes[self.k0 * dtype.size()..];
            let bytes = &bytes[..bytes.len().min(DEPTH * dtype.size())];
            while lines > 0 && self.byte < bytes.len() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a hint, and the address is within `bytes`.
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

/// Widens `bytes` of type `dtype` to f32 into `out`.
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

    /// Every kernel that can compute the product on this machine; `None` is AMX.
    fn paths(w: &Matrix) -> Vec<Option<Isa>> {
        let mut paths: Vec<_> = Isa::available().into_iter().map(Some).collect();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if crate::backend::cpu::amx::available() && crate::backend::cpu::amx::fits(w) {
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

    /// Compares with f64 sums: every instruction set of this machine, every element type, sizes that fill no tile.
    #[test]
    fn equals_f64_sums() {
        crate::backend::cpu::simd::print_paths_not_run();
        let odd = [(1, 1, 1), (3, 65, 129), (17, 64, 128), (33, 100, 300), (70, 24, 257), (300, 7, 40)];
        let even = [(1, 32, 32), (16, 64, 544), (17, 96, 512), (33, 160, 1056), (48, 32, 1024), (300, 64, 608)];
        // Three blocks of columns; three sweeps of rows.
        let odd = odd.into_iter().chain([(5, 50, 2_100), (530, 50, 40)]);
        let even = even.into_iter().chain([(5, 64, 2_144), (530, 64, 64)]);
        for (rows, n, k) in odd.chain(even) {
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

    /// A part of the outputs equals the same columns of the whole product bit for bit, across tensors and with biases.
    #[test]
    fn part_equals_columns_of_the_whole() {
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
                // With AMX, a part that cuts a tile is multiplied by the other kernel, which rounds differently.
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5;
                let equal = part.start % n == 0 && part.end % n == 0;
                let got = &got[r * width..(r + 1) * width];
                assert!(if equal { got == want } else { got.iter().zip(want).all(near) }, "{part:?} row {r}");
            }
        }
    }

    /// The bits of a row do not depend on the other rows of the batch.
    #[test]
    fn rows_are_batch_invariant() {
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
