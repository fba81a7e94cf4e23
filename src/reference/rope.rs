//! Rotary position embedding in half-split (NeoX) form: element i of a head is paired with element `i + head_dim / 2`.
//!
//! The reference implementations round frequencies `theta^(-2i / head_dim)`, angles, cosines, sines, products and sums to
//! f32. So does this file; between these roundings it computes in f64.

fn round_f32(x: f64) -> f64 {
    f64::from(x as f32)
}

/// Returns the cosines and sines of one position, `head_dim / 2` pairs (cos, sin).
pub fn angles(theta: f32, head_dim: usize, position: usize) -> Vec<(f32, f32)> {
    let pair = |i: usize| {
        let exponent = -2.0 * i as f64 / head_dim as f64;
        let frequency = round_f32((exponent * f64::from(theta).ln()).exp());
        let (sin, cos) = round_f32(position as f64 * frequency).sin_cos();
        (cos as f32, sin as f32)
    };
    (0..head_dim / 2).map(pair).collect()
}

/// Table of [`angles`] for positions 0, 1, 2 ..., grown on demand.
#[derive(Debug, Default)]
pub struct Angles {
    rows: Vec<Vec<(f32, f32)>>,
}

impl Angles {
    /// Adds the positions below `positions`. `theta` and `head_dim` must be the same in every call.
    pub fn extend(&mut self, theta: f32, head_dim: usize, positions: usize) {
        self.rows.extend((self.rows.len()..positions).map(|position| angles(theta, head_dim, position)));
    }

    /// Returns the `head_dim / 2` pairs (cos, sin) of one position.
    ///
    /// # Panics
    /// When the position was not added by [`Angles::extend`].
    pub fn at(&self, position: usize) -> &[(f32, f32)] {
        &self.rows[position]
    }
}

/// Rotates every head of a row `[heads, head_dim]` in place. Products and sums are rounded to f32, the results by `round`.
pub fn rotate_rounded(row: &mut [f64], head_dim: usize, angles: &[(f32, f32)], round: impl Fn(f64) -> f64) {
    for head in row.chunks_exact_mut(head_dim) {
        for (i, (cos, sin)) in angles.iter().enumerate() {
            let (low, high) = (head[i], head[i + head_dim / 2]);
            let product = |x: f64, factor: f32| round_f32(x * f64::from(factor));
            head[i] = round(round_f32(product(low, *cos) - product(high, *sin)));
            head[i + head_dim / 2] = round(round_f32(product(high, *cos) + product(low, *sin)));
        }
    }
}

/// Rotates every head of a row `[heads, head_dim]` of f32 in place: [`rotate_rounded`] without a further rounding.
pub fn rotate(row: &mut [f32], head_dim: usize, angles: &[(f32, f32)]) {
    let mut wide: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
    rotate_rounded(&mut wide, head_dim, angles, |x| x);
    row.iter_mut().zip(wide).for_each(|(x, wide)| *x = wide as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(a + bi) (cos + i sin)` in f64, to within the roundings to f32.
    #[test]
    fn rotates_pairs_by_an_angle() {
        let (theta, head_dim, position) = (10_000.0f64, 8, 21);
        let row: Vec<f32> = (0..16).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut rotated = row.clone();
        rotate(&mut rotated, head_dim, &angles(theta as f32, head_dim, position));
        for head in [0, 8] {
            for i in 0..4 {
                let angle = position as f64 / theta.powf(i as f64 / 4.0);
                let (a, b) = (f64::from(row[head + i]), f64::from(row[head + i + 4]));
                let expected = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
                for (got, expected) in [rotated[head + i], rotated[head + i + 4]].into_iter().zip(expected) {
                    assert!((f64::from(got) - expected).abs() < 3e-6, "element {i}: {got}, expected {expected}");
                }
            }
        }
    }

    /// Rotation keeps lengths and leaves position 0 unchanged. Dot products depend only on the distance.
    #[test]
    fn dot_products_depend_on_the_distance() {
        let q: Vec<f32> = (0..32).map(|i| (i as f32 * 0.7).sin()).collect();
        let k: Vec<f32> = (0..32).map(|i| (i as f32 * 1.3).cos()).collect();
        let mut table = Angles::default();
        table.extend(10_000.0, 32, 10);
        table.extend(10_000.0, 32, 40);
        let rotated = |row: &[f32], position| {
            let mut row = row.to_vec();
            rotate(&mut row, 32, table.at(position));
            row
        };
        assert_eq!(rotated(&q, 0), q);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        assert!((dot(&rotated(&q, 7), &rotated(&q, 7)) - dot(&q, &q)).abs() < 1e-4);
        assert!((dot(&rotated(&q, 9), &rotated(&k, 4)) - dot(&rotated(&q, 36), &rotated(&k, 31))).abs() < 1e-4);
    }

    #[test]
    fn rounds_products_sums_and_results() {
        // 1 + 2^-24 rounds to 1 in f32: the sum of products loses the second term.
        let mut row = [1.0, 1.0 / f64::from(1 << 24)];
        rotate_rounded(&mut row, 2, &[(1.0, -1.0)], |x| x);
        assert_eq!(row, [1.0, -1.0 + 1.0 / f64::from(1 << 24)]);
        let mut row = [1.25, 0.0];
        rotate_rounded(&mut row, 2, &[(1.0, 0.0)], f64::floor);
        assert_eq!(row, [1.0, 0.0]);
    }
}
