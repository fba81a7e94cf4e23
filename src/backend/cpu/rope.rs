//! Rotary position embedding in half-split (NeoX) form: element i is paired with element `i + head_dim / 2`.

/// Cosines and sines of positions 0, 1, 2 ..., grown on demand. Angles are rounded to f32, as in the reference implementations.
#[derive(Debug, Default)]
pub struct Angles {
    frequencies: Vec<f32>,
    /// `[positions, head_dim / 2]` pairs (cos, sin).
    table: Vec<(f32, f32)>,
}

impl Angles {
    /// Adds the positions below `positions`. `theta` and `head_dim` must be the same in every call.
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

    /// Returns the `head_dim / 2` pairs (cos, sin) of one position.
    ///
    /// # Panics
    /// When the position was not added by [`Angles::extend`].
    pub fn at(&self, position: usize) -> &[(f32, f32)] {
        let half = self.frequencies.len();
        &self.table[position * half..(position + 1) * half]
    }
}

/// Rotates every head of a row `[heads, head_dim]`, in place.
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
    use crate::reference::rope as reference;

    #[test]
    fn equals_the_reference() {
        let (mut angles, mut expected_angles) = (Angles::default(), reference::Angles::default());
        angles.extend(500_000.0, 64, 5);
        angles.extend(500_000.0, 64, 9);
        expected_angles.extend(500_000.0, 64, 9);
        for position in 0..9 {
            assert_eq!(angles.at(position), expected_angles.at(position), "position {position}");
        }
        // Far positions, where an angle has lost the digits that near ones have.
        let far = [1_023, 1_024, 4_095, 4_096, 4_097, 8_191, 32_768, 65_535, 65_536, 69_999];
        angles.extend(500_000.0, 64, 5_000);
        angles.extend(500_000.0, 64, 70_000);
        for position in far {
            let expected = reference::angles(500_000.0, 64, position);
            assert_eq!(angles.at(position), expected, "position {position}");
        }
        let mut row: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut expected = row.clone();
        rotate(&mut row, 64, angles.at(8));
        reference::rotate(&mut expected, 64, expected_angles.at(8));
        assert_eq!(row, expected);
    }
}
