//! An op at one shape: how it is made, launched and judged; and the numbers that it is fed.

use bytemuck::Pod;
use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::Element;
use dllm_kernels::sampling::philox::{Purpose, gumbel, uniform};
use half::{bf16, f16};

/// One shape of an op, on the device.
pub trait Case {
    /// Bytes that a launch has to move to and from memory: its floor.
    fn bytes(&self) -> usize;
    /// Puts back what a launch changed and the next would miss; not timed.
    fn reset(&mut self) -> Result<()> {
        Ok(())
    }
    fn launch(&mut self) -> Result<()>;
    /// All that the first launch left, against the oracle.
    fn check(&self) -> Result<Vec<Measure>>;
}

/// Makes a case on a stream's device.
type Make = Box<dyn Fn(&Stream) -> Result<Box<dyn Case>>>;

/// A case that is yet to be made.
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
        Entry::of(op, shape, T::NAME, make)
    }

    /// Of numbers of no type that models have.
    pub fn of<C: Case + 'static>(
        op: &'static str,
        shape: String,
        dtype: &'static str,
        make: impl Fn(&Stream) -> Result<C> + 'static,
    ) -> Entry {
        Entry { op, shape, dtype, make: Box::new(move |stream| Ok(Box::new(make(stream)?))) }
    }
}

/// Numbers on the device, and what they were before the first launch.
pub struct Both<T> {
    pub host: Vec<T>,
    pub device: Buffer<T>,
}

impl<T: Pod> Both<T> {
    pub fn new(stream: &Stream, host: Vec<T>) -> Result<Both<T>> {
        Ok(Both { device: stream.upload(&host)?, host })
    }

    /// Of one number, if there is one.
    pub fn of(stream: &Stream, number: Option<T>) -> Result<Option<Both<T>>> {
        number.map(|number| Both::new(stream, vec![number])).transpose()
    }
}

/// The number that there is, or `otherwise`.
pub fn count_or(count: &Option<Both<i32>>, otherwise: usize) -> usize {
    count.as_ref().map_or(otherwise, |count| count.host[0] as usize)
}

/// How far results are from the oracle's.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Of what, and in which unit.
    pub what: &'static str,
    /// The largest error.
    pub error: f64,
    /// What it may be.
    pub bound: f64,
}

impl Measure {
    /// Whether the error is within its bound; what is no number is not.
    pub fn holds(&self) -> bool {
        self.error <= self.bound
    }

    /// The error in bounds; above 1 it is wrong. Where nothing may differ, one difference is without bound.
    pub fn in_bounds(&self) -> f64 {
        match (self.error == 0.0, self.error.is_nan()) {
            (true, _) => 0.0,
            (_, true) => f64::INFINITY,
            _ => self.error / self.bound,
        }
    }

    /// How many elements have other bits, of which none may.
    pub fn bits<T: Pod>(what: &'static str, got: &[T], want: &[T]) -> Measure {
        let same = |(a, b): &(&T, &T)| bytemuck::bytes_of(*a) == bytemuck::bytes_of(*b);
        let differing = got.iter().zip(want).filter(|pair| !same(pair)).count() + got.len().abs_diff(want.len());
        Measure { what, error: differing as f64, bound: 0.0 }
    }

    /// The largest difference, in units of `unit` for each element.
    pub fn within(what: &'static str, triples: impl Iterator<Item = (f64, f64, f64)>, bound: f64) -> Measure {
        let error = |(got, want, unit): (f64, f64, f64)| if got == want { 0.0 } else { (got - want).abs() / unit };
        // NaN is the largest of all.
        let worst = |most: f64, error: f64| if error.is_nan() || error > most { error } else { most };
        let largest = triples.map(error).fold(0.0, |most: f64, e| if most.is_nan() { most } else { worst(most, e) });
        Measure { what, error: largest, bound }
    }

    /// Results that are rounded twice, where an error of f32 may now and then move each rounding by one place: by no more
    /// than two, and seldom.
    pub fn rounded_twice<T: Float>(got: &[T], want: &[T]) -> [Measure; 2] {
        let pairs = || got.iter().zip(want).map(|(got, want)| (got.wide(), want.wide()));
        let relative = pairs().map(|(got, want)| (got, want, want.abs().max(T::LEAST)));
        let moved = Measure::bits("", got, want).error / want.len().max(1) as f64;
        [
            Measure::within("result, relative", relative, 2.0 * T::PLACE),
            Measure { what: "results rounded otherwise, share", error: moved, bound: 0.01 },
        ]
    }
}

/// An element type.
pub trait Float: Element {
    const NAME: &'static str;
    /// Distance of neighbours, relative, at most.
    const PLACE: f64;
    /// The least number with all its places.
    const LEAST: f64;
    /// What becomes of a result in f64: it is f32 in the kernels, and rounded from there.
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
    fn round(x: f64) -> f64 {
        Self::of(x).wide()
    }
}

impl Float for bf16 {
    const NAME: &'static str = "bf16";
    const PLACE: f64 = 1.0 / 128.0;
    const LEAST: f64 = f32::MIN_POSITIVE as f64;
    fn of(x: f64) -> bf16 {
        bf16::from_f32(x as f32)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

impl Float for f16 {
    const NAME: &'static str = "f16";
    const PLACE: f64 = 1.0 / 1024.0;
    const LEAST: f64 = 1.0 / 16384.0;
    fn of(x: f64) -> f16 {
        f16::from_f32(x as f32)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

impl Float for f32 {
    const NAME: &'static str = "f32";
    const PLACE: f64 = 1.0 / (1 << 23) as f64;
    const LEAST: f64 = f32::MIN_POSITIVE as f64;
    fn of(x: f64) -> f32 {
        x as f32
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

pub fn widened<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.wide()).collect()
}

/// Numbers of a seed, the same on every machine.
pub struct Numbers {
    seed: u64,
    drawn: usize,
}

impl Numbers {
    pub fn new(seed: u64) -> Numbers {
        Numbers { seed, drawn: 0 }
    }

    /// Between 0 and 1.
    pub fn unit(&mut self) -> f64 {
        self.drawn += 1;
        uniform(self.seed, Purpose::Token, 0, self.drawn >> 32, self.drawn)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// Evenly from `-scale` to `scale`.
    pub fn values<T: Float>(&mut self, len: usize, scale: f64) -> Vec<T> {
        (0..len).map(|_| T::of((2.0 * self.unit() - 1.0) * scale)).collect()
    }

    /// Logits of which a few stand out.
    pub fn logits<T: Float>(&mut self, len: usize) -> Vec<T> {
        let mut logit = || {
            self.drawn += 1;
            1.5 * gumbel(self.seed, Purpose::Token, 0, self.drawn >> 32, self.drawn)
        };
        (0..len).map(|_| T::of(logit())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_wrong() {
        let measure = |error, bound| Measure { what: "", error, bound };
        assert!(measure(0.0, 0.0).holds() && !measure(1.0, 0.0).holds() && !measure(f64::NAN, 1.0).holds());
        assert_eq!(measure(0.5, 2.0).in_bounds(), 0.25);
        assert_eq!(measure(1.0, 0.0).in_bounds(), f64::INFINITY);
        assert_eq!(measure(f64::NAN, 1.0).in_bounds(), f64::INFINITY);
        let worst = |got: &[f64]| Measure::within("", got.iter().map(|got| (*got, 1.0, 1.0)), 1.0).error;
        assert_eq!(worst(&[1.0, 3.0, 2.0]), 2.0);
        assert!(worst(&[1.0, f64::NAN, 2.0]).is_nan());
        let infinite = [(f64::NEG_INFINITY, f64::NEG_INFINITY, 1.0)];
        assert_eq!(Measure::within("", infinite.into_iter(), 0.0).error, 0.0);
    }

    #[test]
    fn a_place_off_is_found() {
        let want: Vec<bf16> = Numbers::new(1).values(1000, 3.0);
        let step = |by: u16| -> Vec<bf16> { want.iter().map(|x| bf16::from_bits(x.to_bits() + by)).collect() };
        let holds = |got: &[bf16]| Measure::rounded_twice(got, &want).map(|measure| measure.holds());
        assert_eq!(holds(&want), [true, true]);
        assert_eq!(holds(&step(1)), [true, false]);
        assert_eq!(holds(&step(3)), [false, false]);
        let mut one = want.clone();
        one[7] = bf16::from_bits(one[7].to_bits() + 1);
        assert_eq!(holds(&one), [true, true]);
    }

    #[test]
    fn missing_elements_count_as_other_ones() {
        assert_eq!(Measure::bits("", &[1, 2], &[1, 2, 3]).error, 1.0);
        assert_eq!(Measure::bits("", &[1, 2], &[1, 3]).error, 1.0);
    }
}
