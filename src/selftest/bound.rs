//! Errors of results against the reference, with their bounds.

use super::float::Float;
use bytemuck::Pod;
use std::fmt;

/// Largest error of results against the reference, with its bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorBound {
    /// Compared values, and the unit of the error.
    pub what: &'static str,
    /// Largest error.
    pub error: f64,
    /// Largest accepted error.
    pub bound: f64,
}

impl ErrorBound {
    /// Returns whether the error is within its bound; NaN is not.
    pub fn holds(&self) -> bool {
        self.error <= self.bound
    }

    /// Returns the error divided by its bound; infinity for NaN, and for any difference where none is accepted.
    pub fn relative(&self) -> f64 {
        if self.error == 0.0 {
            0.0
        } else if self.error.is_nan() {
            f64::INFINITY
        } else {
            self.error / self.bound
        }
    }

    /// Counts the elements that differ in bits. None is accepted.
    pub fn bits<T: Pod>(what: &'static str, got: &[T], want: &[T]) -> ErrorBound {
        let same = |(a, b): &(&T, &T)| bytemuck::bytes_of(*a) == bytemuck::bytes_of(*b);
        let differing = got.iter().zip(want).filter(|pair| !same(pair)).count() + got.len().abs_diff(want.len());
        ErrorBound { what, error: differing as f64, bound: 0.0 }
    }

    /// Returns the largest difference of (result, reference, unit), in units of the element.
    pub fn within(what: &'static str, triples: impl IntoIterator<Item = (f64, f64, f64)>, bound: f64) -> ErrorBound {
        let error = |(got, want, unit): (f64, f64, f64)| if got == want { 0.0 } else { (got - want).abs() / unit };
        // NaN counts as the largest error.
        let worst = |largest: f64, e: f64| if largest.is_nan() || e <= largest { largest } else { e };
        let largest = triples.into_iter().map(error).fold(0.0, worst);
        ErrorBound { what, error: largest, bound }
    }

    /// Bounds for results that are rounded twice: f32 errors may change each rounding by one unit in the last place. At most
    /// two units, in at most 1 % of the results.
    pub fn rounded_twice<T: Float>(got: &[T], want: &[T]) -> [ErrorBound; 2] {
        let pairs = || got.iter().zip(want).map(|(got, want)| (got.f64(), want.f64()));
        let relative = pairs().map(|(got, want)| (got, want, want.abs().max(T::MIN_POSITIVE)));
        let moved = ErrorBound::bits("", got, want).error / want.len().max(1) as f64;
        [
            ErrorBound::within("result, relative", relative, 2.0 * T::EPSILON),
            ErrorBound { what: "share of results that differ", error: moved, bound: 0.01 },
        ]
    }
}

/// Writes the compared values, with the accepted and the found error.
impl fmt::Display for ErrorBound {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: expected at most {}, found {}", self.what, number(self.bound), number(self.error))
    }
}

/// Describes the bounds that do not hold; `None` when all hold.
pub fn broken(bounds: &[ErrorBound]) -> Option<String> {
    let broken: Vec<String> = bounds.iter().filter(|bound| !bound.holds()).map(ErrorBound::to_string).collect();
    (!broken.is_empty()).then(|| broken.join("; "))
}

/// Formats a number briefly.
pub fn number(x: f64) -> String {
    if x == x.round() && x.abs() < 1e6 { format!("{x}") } else { format!("{x:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::super::random::Random;
    use super::*;
    use half::bf16;

    #[test]
    fn nan_exceeds_every_bound() {
        let bound = |error, bound| ErrorBound { what: "", error, bound };
        assert!(bound(0.0, 0.0).holds() && !bound(1.0, 0.0).holds() && !bound(f64::NAN, 1.0).holds());
        assert_eq!(bound(0.5, 2.0).relative(), 0.25);
        assert_eq!(bound(1.0, 0.0).relative(), f64::INFINITY);
        assert_eq!(bound(f64::NAN, 1.0).relative(), f64::INFINITY);
        let worst = |got: &[f64]| ErrorBound::within("", got.iter().map(|got| (*got, 1.0, 1.0)), 1.0).error;
        assert_eq!(worst(&[1.0, 3.0, 2.0]), 2.0);
        assert!(worst(&[1.0, f64::NAN, 2.0]).is_nan());
        let infinite = [(f64::NEG_INFINITY, f64::NEG_INFINITY, 1.0)];
        assert_eq!(ErrorBound::within("", infinite.into_iter(), 0.0).error, 0.0);
    }

    #[test]
    fn one_unit_in_the_last_place_is_found() {
        let want: Vec<bf16> = Random(1).values(1000, 3.0);
        let step = |by: u16| -> Vec<bf16> { want.iter().map(|x| bf16::from_bits(x.to_bits() + by)).collect() };
        let holds = |got: &[bf16]| ErrorBound::rounded_twice(got, &want).map(|bound| bound.holds());
        assert_eq!(holds(&want), [true, true]);
        assert_eq!(holds(&step(1)), [true, false]);
        assert_eq!(holds(&step(3)), [false, false]);
        let mut one = want.clone();
        one[7] = bf16::from_bits(one[7].to_bits() + 1);
        assert_eq!(holds(&one), [true, true]);
    }

    #[test]
    fn missing_elements_count_as_differences() {
        assert_eq!(ErrorBound::bits("", &[1, 2], &[1, 2, 3]).error, 1.0);
        assert_eq!(ErrorBound::bits("", &[1, 2], &[1, 3]).error, 1.0);
    }
}
