//! Random numbers for the inputs of cases and tests.

use super::float::Float;

/// Deterministic random numbers (xorshift64*), the same on every machine. The seed is not 0.
pub struct Random(pub u64);

impl Random {
    /// Returns 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Returns a number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }

    /// Returns an approximately normal number with variance 1, from -4 to 4.
    pub fn normal(&mut self) -> f32 {
        let unit = |random: &mut Random| (random.bits() >> 40) as f32 / (1u64 << 24) as f32;
        ((0..12).map(|_| unit(self)).sum::<f32>() - 6.0).clamp(-4.0, 4.0)
    }

    /// Returns a uniform number in [-1, 1).
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Returns `len` normal numbers.
    pub fn floats<T: Float>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::of(self.normal())).collect()
    }

    /// Returns `len` numbers, uniform in [-scale, scale).
    pub fn values<T: Float>(&mut self, len: usize, scale: f32) -> Vec<T> {
        (0..len).map(|_| T::of(self.number() * scale)).collect()
    }

    /// Returns `len` normal numbers times `scale`. One in a hundred is four times as large, because a softmax without outliers
    /// is nearly uniform. The numbers repeat after about a million, a period that divides no width.
    pub fn outliers<T: Float>(&mut self, len: usize, scale: f32) -> Vec<T> {
        let outlier = |random: &mut Random| if random.below(100) == 0 { 4.0 } else { 1.0 };
        let period: Vec<T> = (0..len.min(1_048_583)).map(|_| T::of(self.normal() * scale * outlier(self))).collect();
        period.iter().copied().cycle().take(len).collect()
    }

    /// Returns `len` logits, a few of them clearly the largest.
    pub fn logits<T: Float>(&mut self, len: usize) -> Vec<T> {
        self.outliers(len, 2.0)
    }

    /// Returns `len` distinct numbers below `n`, in random order.
    pub fn distinct(&mut self, len: usize, n: usize) -> Vec<i32> {
        let mut all: Vec<i32> = (0..n as i32).collect();
        for i in 0..len {
            let other = i + self.below(n - i);
            all.swap(i, other);
        }
        all.truncate(len);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variance(x: &[f32]) -> f32 {
        x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32
    }

    #[test]
    fn numbers_have_their_distributions() {
        let mut random = Random(1);
        let [normal, uniform, outliers]: [Vec<f32>; 3] =
            [random.floats(100_000), random.values(100_000, 2.0), random.outliers(100_000, 3.0)];
        for (x, want, largest) in [(&normal, 1.0, 4.0), (&uniform, 4.0 / 3.0, 2.0), (&outliers, 9.0 * 1.15, 48.0)] {
            assert!(x.iter().sum::<f32>().abs() / 100_000.0 < 0.02);
            assert!((variance(x) - want).abs() < 0.05 * want, "{} instead of {want}", variance(x));
            let found = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(found <= largest && found > 0.7 * largest, "{found}, expected at most {largest}");
        }
        assert!(uniform.iter().all(|x| *x < 2.0));
        assert!(outliers.iter().filter(|x| x.abs() > 12.0).count() > 100, "no normal number times 3 is above 12");
    }

    #[test]
    fn outliers_repeat_after_a_period_that_divides_no_width() {
        let all: Vec<f32> = Random(2).outliers(1_048_583 + 1000, 1.0);
        assert_eq!(all[1_048_583..], all[..1000]);
        let matches = |shift: usize| all[shift..shift + 1000] == all[..1000];
        assert!(!(1..5000).chain([1 << 20]).any(matches));
    }

    #[test]
    fn distinct_numbers_are_a_permutation() {
        let mut all = Random(3).distinct(100, 100);
        assert_ne!(all, (0..100).collect::<Vec<_>>());
        all.sort();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        let some = Random(3).distinct(10, 1000);
        assert!(some.len() == 10 && some.iter().any(|i| *i >= 100) && some.iter().all(|i| *i < 1000));
    }
}
