//! Inner loop of the CPU matrix products and attention: a tile of sums held in registers.
//!
//! `c[n][m] (+)= sum over k of w[n][k] * x[k][m]`, with the rows of activations `m` in the vector lanes and the weights
//! `n` broadcast. Every output is one chain of MACs in the order of k in every tile shape, so that the bits of a row do not
//! depend on the number of rows. A dot product along k, as in GEMV kernels, would be no faster from 16 rows on, and its
//! bits would depend on the tile shape.

use super::simd::Simd;

/// Computes `c[n][m] = (accumulate ? c[n][m] : 0) + sum over p < k of w[n * WN + p * wk] * x[p * lanes + m]`
/// for n < NR and m < lanes = MV * LANES.
///
/// # Safety
/// 1. The CPU has `S`. 2. All addresses named above are valid, `c` for writes and unaliased; `c` rows are `cs` apart.
#[inline(always)]
// The operands of a kernel read best as arguments. The loops index register arrays, so that they unroll.
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)]
unsafe fn block<S: Simd, const MV: usize, const NR: usize, const WN: usize>(
    k: usize,
    w: *const f32,
    wk: usize,
    x: *const f32,
    c: *mut f32,
    cs: usize,
    accumulate: bool,
) {
    // SAFETY: the caller's conditions.
    unsafe {
        let mut acc = [[S::splat(0.0); MV]; NR];
        if accumulate {
            for n in 0..NR {
                for v in 0..MV {
                    acc[n][v] = S::load(c.add(n * cs + v * S::LANES));
                }
            }
        }
        let (mut w, mut x) = (w, x);
        for _ in 0..k {
            let mut xv = [S::splat(0.0); MV];
            for v in 0..MV {
                xv[v] = S::load(x.add(v * S::LANES));
            }
            for n in 0..NR {
                let wv = S::splat(*w.add(n * WN));
                for v in 0..MV {
                    acc[n][v] = S::fma(wv, xv[v], acc[n][v]);
                }
            }
            w = w.wrapping_add(wk);
            x = x.wrapping_add(MV * S::LANES);
        }
        for n in 0..NR {
            for v in 0..MV {
                S::store(c.add(n * cs + v * S::LANES), acc[n][v]);
            }
        }
    }
}

/// Returns the maximum number of vectors across a tile of activations: 4 of 16 lanes (32 registers), or 2 of 8 lanes
/// (16 registers).
pub const fn max_vectors<S: Simd>() -> usize {
    if S::LANES >= 16 { 4 } else { 2 }
}

/// Computes [`block`] over `n` weight rows and `mv` vectors of activation rows, in the largest blocks that fit in
/// registers.
///
/// # Safety
/// As [`block`], for all `n` rows; `mv <= max_vectors::<S>()`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn tile<S: Simd, const WN: usize>(
    n: usize,
    mv: usize,
    k: usize,
    w: *const f32,
    wk: usize,
    x: *const f32,
    c: *mut f32,
    cs: usize,
    accumulate: bool,
) {
    /// Computes `$nr` rows at a time, then 4, then single rows.
    macro_rules! rows {
        ($mv:literal, $nr:literal) => {{
            let mut i = 0;
            // SAFETY: rows i .. i + step <= n of the caller's tile.
            unsafe {
                while i + $nr <= n {
                    block::<S, $mv, $nr, WN>(k, w.add(i * WN), wk, x, c.add(i * cs), cs, accumulate);
                    i += $nr;
                }
                while i + 4 <= n {
                    block::<S, $mv, 4, WN>(k, w.add(i * WN), wk, x, c.add(i * cs), cs, accumulate);
                    i += 4;
                }
                while i < n {
                    block::<S, $mv, 1, WN>(k, w.add(i * WN), wk, x, c.add(i * cs), cs, accumulate);
                    i += 1;
                }
            }
        }};
    }
    if S::LANES >= 16 {
        match mv {
            1 => rows!(1, 24),
            2 => rows!(2, 12),
            3 => rows!(3, 8),
            _ => rows!(4, 6),
        }
    } else {
        match mv {
            1 => rows!(1, 8),
            _ => rows!(2, 6),
        }
    }
}
