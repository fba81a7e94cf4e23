//! Rotary position embedding, half-split (NeoX) form: element i pairs with element i + head_dim / 2.

/// Cosines and sines for positions 0, 1, 2 ...; grows on demand. f32 angles, as the originals form them.
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

#[cfg(test)]
mod tests {
    use super::*;

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
