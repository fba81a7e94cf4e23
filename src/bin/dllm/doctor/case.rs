//! Checks of an op at one shape: inputs, launch and error bounds; and random numbers for the inputs.

use bytemuck::Pod;
use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::Element;
use dllm_kernels::sampling::philox::{Purpose, gumbel, uniform};
use half::{bf16, f16};

/// One shape of an op, on the device.
pub trait Case {
    /// Returns the bytes that a launch must move to and from memory.
    fn bytes(&self) -> usize;
    /// Restores inputs that a launch changed. Not timed.
    fn reset(&mut self) -> Result<()> {
        Ok(())
    }
    /// Enqueues the op on the stream of the case.
    fn launch(&mut self) -> Result<()>;
    /// Compares all results of the first launch with the reference. Synchronises.
    fn check(&self) -> Result<Vec<ErrorBound>>;
}

/// Constructor of a case on a stream.
type Make = Box<dyn Fn(&Stream) -> Result<Box<dyn Case>>>;

/// Case to be constructed, with its names in the report.
pub struct Entry {
    pub op: &'static str,
    pub shape: String,
    pub dtype: &'static str,
    pub make: Make,
}

impl Entry {
    pub fn new<T: Float, C: Case + 'static>(
        op: &'static str,
        shape: String,
        make: impl Fn(&Stream) -> Result<C> + 'static,
    ) -> Entry {
        Entry::with_dtype(op, shape, T::NAME, make)
    }

    /// Returns an entry whose element type is none of a model.
    pub fn with_dtype<C: Case + 'static>(
        op: &'static str,
        shape: String,
        dtype: &'static str,
        make: impl Fn(&Stream) -> Result<C> + 'static,
    ) -> Entry {
        Entry { op, shape, dtype, make: Box::new(move |stream| Ok(Box::new(make(stream)?))) }
    }
}

/// Buffer on the device, and its contents before the first launch.
pub struct HostDevice<T> {
    pub host: Vec<T>,
    pub device: Buffer<T>,
}

impl<T: Pod> HostDevice<T> {
    pub fn new(stream: &Stream, host: Vec<T>) -> Result<HostDevice<T>> {
        Ok(HostDevice { device: stream.upload(&host)?, host })
    }

    /// Uploads a buffer of one element; `None` without a value.
    pub fn optional(stream: &Stream, value: Option<T>) -> Result<Option<HostDevice<T>>> {
        value.map(|value| HostDevice::new(stream, vec![value])).transpose()
    }
}

/// Returns the count on the host, or `default` without one.
pub fn count_or(count: &Option<HostDevice<i32>>, default: usize) -> usize {
    count.as_ref().map_or(default, |count| count.host[0] as usize)
}

/// Largest error of results against the reference, with its bound.
#[derive(Clone, Copy, Debug)]
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
    pub fn within(what: &'static str, triples: impl Iterator<Item = (f64, f64, f64)>, bound: f64) -> ErrorBound {
        let error = |(got, want, unit): (f64, f64, f64)| if got == want { 0.0 } else { (got - want).abs() / unit };
        // NaN counts as the largest error.
        let worst = |largest: f64, e: f64| if largest.is_nan() || e <= largest { largest } else { e };
        let largest = triples.map(error).fold(0.0, worst);
        ErrorBound { what, error: largest, bound }
    }

    /// Bounds for results that are rounded twice: f32 errors may change each rounding by one unit in the last place. At most
    /// two units, in at most 1 % of the results.
    pub fn rounded_twice<T: Float>(got: &[T], want: &[T]) -> [ErrorBound; 2] {
        let pairs = || got.iter().zip(want).map(|(got, want)| (got.wide(), want.wide()));
        let relative = pairs().map(|(got, want)| (got, want, want.abs().max(T::MIN_POSITIVE)));
        let moved = ErrorBound::bits("", got, want).error / want.len().max(1) as f64;
        [
            ErrorBound::within("result, relative", relative, 2.0 * T::EPSILON),
            ErrorBound { what: "share of results that differ", error: moved, bound: 0.01 },
        ]
    }
}

/// Element type of models.
pub trait Float: Element {
    const NAME: &'static str;
    /// Largest relative distance of neighbouring numbers.
    const EPSILON: f64;
    /// Smallest positive normal number.
    const MIN_POSITIVE: f64;
    /// Rounds like the kernels, which round from f32.
    fn from_wide(x: f64) -> Self;
    fn wide(self) -> f64;
    fn round(x: f64) -> f64 {
        Self::from_wide(x).wide()
    }
}

impl Float for bf16 {
    const NAME: &'static str = "bf16";
    const EPSILON: f64 = 1.0 / 128.0;
    const MIN_POSITIVE: f64 = f32::MIN_POSITIVE as f64;
    fn from_wide(x: f64) -> bf16 {
        bf16::from_f32(x as f32)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

impl Float for f16 {
    const NAME: &'static str = "f16";
    const EPSILON: f64 = 1.0 / 1024.0;
    const MIN_POSITIVE: f64 = 1.0 / 16384.0;
    fn from_wide(x: f64) -> f16 {
        f16::from_f32(x as f32)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

impl Float for f32 {
    const NAME: &'static str = "f32";
    const EPSILON: f64 = 1.0 / (1 << 23) as f64;
    const MIN_POSITIVE: f64 = f32::MIN_POSITIVE as f64;
    fn from_wide(x: f64) -> f32 {
        x as f32
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

pub fn widened<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.wide()).collect()
}

/// Random numbers of a seed, the same on every machine.
pub struct Rng {
    seed: u64,
    drawn: usize,
}

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng { seed, drawn: 0 }
    }

    /// Returns a number from 0 to 1.
    pub fn unit(&mut self) -> f64 {
        self.drawn += 1;
        uniform(self.seed, Purpose::Token, 0, self.drawn >> 32, self.drawn)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// Returns `len` numbers, uniform from `-scale` to `scale`.
    pub fn values<T: Float>(&mut self, len: usize, scale: f64) -> Vec<T> {
        (0..len).map(|_| T::from_wide((2.0 * self.unit() - 1.0) * scale)).collect()
    }

    /// Returns `len` logits, a few of them clearly the largest.
    pub fn logits<T: Float>(&mut self, len: usize) -> Vec<T> {
        let mut logit = || {
            self.drawn += 1;
            1.5 * gumbel(self.seed, Purpose::Token, 0, self.drawn >> 32, self.drawn)
        };
        (0..len).map(|_| T::from_wide(logit())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let want: Vec<bf16> = Rng::new(1).values(1000, 3.0);
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
