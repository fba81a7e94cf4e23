//! Element types of models, with their limits and conversions.

use crate::ops::Element;
use bytemuck::Zeroable;
use half::{bf16, f16};
use std::fmt::Debug;

/// Element type of models, with conversions from f32 (rounded to nearest, ties to even) and to f32.
pub trait Float: Element + Zeroable + PartialEq + Debug {
    /// Name in reports.
    const NAME: &'static str;
    /// Smallest positive number; it is subnormal.
    const SMALLEST: f32;
    /// Largest finite number.
    const LARGEST: f32;
    /// Smallest positive normal number.
    const MIN_POSITIVE: f64;
    /// Largest relative distance of neighbouring normal numbers.
    const EPSILON: f64;
    /// Rounds to this type.
    fn of(x: f32) -> Self;
    /// Converts to f32, exactly.
    fn f32(self) -> f32;
    /// Converts to f64, exactly.
    fn f64(self) -> f64 {
        self.f32().into()
    }
    /// Rounds a result in f64 as a kernel does: to f32, then to this type.
    fn round(x: f64) -> f64 {
        Self::of(x as f32).f64()
    }
}

impl Float for bf16 {
    const NAME: &'static str = "bf16";
    const SMALLEST: f32 = f32::from_bits(0x1_0000);
    const LARGEST: f32 = f32::from_bits(0x7f7f_0000);
    const MIN_POSITIVE: f64 = f32::MIN_POSITIVE as f64;
    const EPSILON: f64 = 1.0 / 128.0;
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

impl Float for f16 {
    const NAME: &'static str = "f16";
    const SMALLEST: f32 = 1.0 / (1 << 24) as f32;
    const LARGEST: f32 = 65504.0;
    const MIN_POSITIVE: f64 = 1.0 / 16384.0;
    const EPSILON: f64 = 1.0 / 1024.0;
    fn of(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

impl Float for f32 {
    const NAME: &'static str = "f32";
    const SMALLEST: f32 = f32::from_bits(1);
    const LARGEST: f32 = f32::MAX;
    const MIN_POSITIVE: f64 = f32::MIN_POSITIVE as f64;
    const EPSILON: f64 = 1.0 / (1 << 23) as f64;
    fn of(x: f32) -> f32 {
        x
    }
    fn f32(self) -> f32 {
        self
    }
}

/// Converts to f64, exactly.
pub fn widened<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.f64()).collect()
}

/// Rounds results in f64 as a kernel does: to f32, then to the type.
pub fn narrowed<T: Float>(x: &[f64]) -> Vec<T> {
    x.iter().map(|x| T::of(*x as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limits of `T` are those of its conversions.
    fn limits_hold<T: Float>() {
        assert_eq!([T::of(T::SMALLEST).f32(), T::of(T::LARGEST).f32()], [T::SMALLEST, T::LARGEST], "{}", T::NAME);
        assert_eq!(T::round(f64::from(T::SMALLEST) / 2.0), 0.0, "{}", T::NAME);
        assert_eq!(T::round(2.0 * f64::from(T::LARGEST)), f64::INFINITY, "{}", T::NAME);
        // 1 and the next number; half of that distance is a tie, which goes to 1.
        assert_eq!(T::round(1.0 + T::EPSILON), 1.0 + T::EPSILON, "{}", T::NAME);
        assert_eq!(T::round(1.0 + T::EPSILON / 2.0), 1.0, "{}", T::NAME);
        // Below the smallest normal number, numbers have the same distance as above it.
        let (normal, smallest) = (T::MIN_POSITIVE, f64::from(T::SMALLEST));
        assert_eq!(normal * T::EPSILON, smallest, "{}", T::NAME);
        assert_eq!(T::round(normal - smallest), normal - smallest, "{}", T::NAME);
    }

    #[test]
    fn limits_are_those_of_the_conversions() {
        limits_hold::<bf16>();
        limits_hold::<f16>();
        limits_hold::<f32>();
    }
}
