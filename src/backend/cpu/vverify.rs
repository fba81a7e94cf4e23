//! V-verify: selection of the rows with the lowest cosine similarity to their cached rows.

use rayon::prelude::*;

/// Lower bound of a vector's norm, against division by zero.
const EPS: f64 = 1e-8;
/// Partial sums of a dot product.
const LANES: usize = 8;

/// Returns the `count` rows with the lowest cosine similarity to their cached rows, in ascending row order. Ties go to the
/// lower row. NaN counts as the lowest similarity.
///
/// `runs` holds two pairs of (fresh, cached) rows of `width` floats; the rows of the second follow those of the first in
/// the numbering.
pub fn vverify(runs: [(&[f32], &[f32]); 2], width: usize, count: usize) -> Vec<usize> {
    if count == 0 {
        return vec![];
    }
    let mut similarity: Vec<f64> = vec![];
    for (fresh, cached) in runs {
        let rows = fresh.par_chunks_exact(width).zip(cached.par_chunks_exact(width));
        similarity.par_extend(rows.map(|(a, b)| cosine(a, b)));
    }
    lowest_of(&similarity, count)
}

/// Returns the cosine similarity of `a` and `b`. It is exactly 1 for equal vectors: all three sums add in the same order,
/// and the root is taken of the product of the squared norms.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [[0.0f64; LANES]; 3];
    let mut add = |a: &[f32], b: &[f32]| {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(*b));
            sums[0][i] += a * b;
            sums[1][i] += a * a;
            sums[2][i] += b * b;
        }
    };
    let ((whole_a, rest_a), (whole_b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    whole_a.iter().zip(whole_b).for_each(|(a, b)| add(a, b));
    add(rest_a, rest_b);
    let [dot, aa, bb] = sums.map(|lanes| lanes.iter().sum::<f64>());
    dot / (aa.max(EPS * EPS) * bb.max(EPS * EPS)).sqrt()
}

/// Returns the indices of the `count` lowest similarities, ascending.
fn lowest_of(similarity: &[f64], count: usize) -> Vec<usize> {
    // Adding 0 makes -0 equal to 0.
    let rank = |i: usize| if similarity[i].is_nan() { f64::NEG_INFINITY } else { similarity[i] + 0.0 };
    let mut order: Vec<usize> = (0..similarity.len()).collect();
    order.sort_by(|a, b| rank(*a).total_cmp(&rank(*b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::vverify as reference;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 16) as f32 / 32768.0 - 1.0).collect()
    }

    /// Calls [`vverify`] with the first third of the rows as one run and the remaining rows as the other.
    fn in_two_runs(fresh: &[f32], cached: &[f32], width: usize, count: usize) -> Vec<usize> {
        let split = fresh.len() / width / 3 * width;
        vverify([(&fresh[..split], &cached[..split]), (&fresh[split..], &cached[split..])], width, count)
    }

    #[test]
    fn equals_the_reference() {
        for width in [1, 7, 8, 64, 129] {
            let (fresh, cached) = (noise(40 * width, 1), noise(40 * width, 77));
            for (a, b) in fresh.chunks(width).zip(cached.chunks(width)) {
                assert!((cosine(a, b) - reference::cosine(a, b)).abs() < 1e-14, "{width}");
            }
            for count in [0, 1, 13, 40] {
                let want = reference::vverify(&fresh, &cached, width, (count as f64 + 0.5) / 40.5);
                // Cosines of one-element vectors are 1 or -1 up to the last bit.
                assert!(width == 1 || in_two_runs(&fresh, &cached, width, count) == want, "{width} {count}");
            }
        }
    }

    /// Rows without a change tie, and the lower rows are selected.
    #[test]
    fn ties_go_to_the_lower_row() {
        let rows = noise(50 * 33, 3);
        assert_eq!(in_two_runs(&rows, &rows, 33, 7), [0, 1, 2, 3, 4, 5, 6]);
        let mut one = rows.clone();
        one[20 * 33] += 1.0;
        assert_eq!(in_two_runs(&one, &rows, 33, 3), [0, 1, 20]);
        one[30 * 33] = f32::NAN;
        assert_eq!(in_two_runs(&one, &rows, 33, 1), [30]);
    }
}
