//! Rotary position embedding, half-split (NeoX) form: element i pairs with element i + head_dim / 2.

/// Cosines and sines of positions 0, 1, 2 ..., grown on demand. Angles are rounded to f32, as in the reference implementations.
#[derive(Debug, Default)]
pub struct Angles {
    frequencies: Vec<f32>,
    /// `[positions, head_dim / 2]` pairs (cos, sin).
    table: Vec<(f32, f32)>,
}

impl Angles {
    /// Makes positions below `positions` available. `theta` and `head_dim` stay what they were at the first call.
    pub fn extend(&mut self, theta: f32, head_dim: usize, positions: usize) {
        if self.frequencies.is_empty() {
            let exponent = |i: usize| (2 * i) as f64 / head_dim as f64;
            self.frequencies = (0..head_dim / 2).map(|i| (1.0 / (theta as f64).powf(exponent(i))) as f32).collect();
        }
        for position in self.table.len() / self.frequencies.len()..positions {
            for frequency in &self.frequencies {
                let angle = (position as f32 * frequency) as f64;
                self.table.push((angle.cos() as f32, angle.sin() as f32));
            }
        }
    }

    /// (cos, sin) of one position, `head_dim / 2` pairs.
    ///
    /// # Panics
    /// When [`Angles::extend`] has not reached the position.
    pub fn at(&self, position: usize) -> &[(f32, f32)] {
        let half = self.frequencies.len();
        &self.table[position * half..(position + 1) * half]
    }
}

/// Rotates every head of a row `[heads, head_dim]` in place.
pub fn rotate(row: &mut [f32], head_dim: usize, angles: &[(f32, f32)]) {
    for head in row.chunks_exact_mut(head_dim) {
        let (low, high) = head.split_at_mut(head_dim / 2);
        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// [`rotate`] with the roundings said: every product and every sum is rounded to f32, the results by `round`.
pub fn rotate_rounded(row: &mut [f64], head_dim: usize, angles: &[(f32, f32)], round: impl Fn(f64) -> f64) {
    let f32 = |x: f64| f64::from(x as f32);
    for head in row.chunks_exact_mut(head_dim) {
        let (low, high) = head.split_at_mut(head_dim / 2);
        for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
            let (a, b, cos, sin) = (*low, *high, f64::from(*cos), f64::from(*sin));
            *low = round(f32(f32(a * cos) - f32(b * sin)));
            *high = round(f32(f32(b * cos) + f32(a * sin)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without further rounding, both functions are the same.
    #[test]
    fn rounded_is_rotate_in_f32() {
        let mut angles = Angles::default();
        angles.extend(500_000.0, 64, 9);
        let mut row: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut rounded: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        rotate(&mut row, 64, angles.at(8));
        rotate_rounded(&mut rounded, 64, angles.at(8), |x| x);
        assert_eq!(rounded, row.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
    }

    /// Rotation keeps lengths, leaves position 0 alone, and makes dot products depend on the distance only.
    #[test]
    fn rotates() {
        let mut angles = Angles::default();
        angles.extend(10_000.0, 32, 40);
        let q: Vec<f32> = (0..32).map(|i| (i as f32 * 0.7).sin()).collect();
        let k: Vec<f32> = (0..32).map(|i| (i as f32 * 1.3).cos()).collect();
        let at = |v: &[f32], position| {
            let mut v = v.to_vec();
            rotate(&mut v, 32, angles.at(position));
            v
        };
        assert_eq!(at(&q, 0), q);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        assert!((dot(&at(&q, 7), &at(&q, 7)) - dot(&q, &q)).abs() < 1e-4);
        assert!((dot(&at(&q, 9), &at(&k, 4)) - dot(&at(&q, 36), &at(&k, 31))).abs() < 1e-4);
    }
}
