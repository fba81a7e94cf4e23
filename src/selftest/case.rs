//! Case of an op: inputs of a shape on the device, launch, and comparison with the reference.

use super::bound::ErrorBound;
use super::float::Float;
use crate::error::Result;
use crate::gpu::{Buffer, Pinned, Stream};
use bytemuck::Pod;

/// One shape of an op, on the device.
pub trait Case {
    /// Returns the bytes that a launch must move to and from memory.
    fn bytes(&self) -> usize;
    /// Returns the floating-point operations of its matrix products; 0 where they cannot be the bound.
    fn flops(&self) -> u64 {
        0
    }
    /// Restores inputs that a launch changed. Not timed.
    fn reset(&mut self) -> Result<()> {
        Ok(())
    }
    /// Enqueues the op on the stream of the case.
    fn launch(&mut self) -> Result<()>;
    /// Compares the results of the first launch with the reference, at least those of `rows`. Synchronises.
    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>>;
    /// Returns all memory that a launch writes, so that a test can see that [`Case::check`] compares it.
    fn outputs(&mut self) -> Vec<Output<'_>>;
}

/// Rows whose results are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// All rows.
    All,
    /// The first, the middle and the last row, for shapes that the reference is too slow for.
    Few,
}

impl Rows {
    /// Returns the compared ones of `count` rows, ascending.
    pub fn of(self, count: usize) -> Vec<usize> {
        let mut rows = match self {
            Rows::All => return (0..count).collect(),
            Rows::Few if count == 0 => return Vec::new(),
            Rows::Few => vec![0, count / 2, count - 1],
        };
        rows.dedup();
        rows
    }

    /// Returns the compared rows of a packed matrix.
    pub fn pick<T: Pod>(self, matrix: &[T], width: usize) -> Vec<T> {
        let rows = self.of(matrix.len() / width).into_iter();
        rows.flat_map(|row| &matrix[row * width..(row + 1) * width]).copied().collect()
    }
}

/// Constructor of a case on a stream.
type Make = Box<dyn Fn(&Stream) -> Result<Box<dyn Case>>>;

/// Case to be constructed, with its names in reports.
pub struct Entry {
    /// Name of the op.
    pub op: &'static str,
    /// Shape and contents, for people.
    pub shape: String,
    /// Element type.
    pub dtype: &'static str,
    /// Constructor.
    pub make: Make,
}

impl Entry {
    /// Returns an entry of a model's element type.
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
    /// Contents before the first launch.
    pub host: Vec<T>,
    /// Buffer on the device.
    pub device: Buffer<T>,
}

impl<T: Pod> HostDevice<T> {
    /// Uploads `host`.
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

/// Memory that a launch writes.
pub struct Output<'a> {
    /// Name, for messages.
    pub what: &'static str,
    /// Number of words that a launch defines. A word is an element, or 4 bytes of a larger one.
    pub words: usize,
    /// The memory; it may have more words.
    pub memory: &'a mut dyn Words,
}

impl<'a> Output<'a> {
    /// Returns an output of which a launch defines everything.
    pub fn new<T: Pod>(what: &'static str, buffer: &'a mut Buffer<T>) -> Output<'a> {
        let words = buffer.len() * size_of::<T>() / word_bytes::<T>();
        Output { what, words, memory: buffer }
    }
}

/// Memory whose words can be changed.
pub trait Words {
    /// Inverts the second highest bit of a word: of a float's exponent, or of an integer's value. Synchronises.
    fn flip(&mut self, word: usize) -> Result<()>;
}

/// Bytes of a word of `T`.
fn word_bytes<T>() -> usize {
    size_of::<T>().min(4)
}

/// Inverts the second highest bit of a word.
fn flip<T: Pod>(elements: &mut [T], word: usize) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(elements);
    bytes[(word + 1) * word_bytes::<T>() - 1] ^= 0x40;
}

impl<T: Pod> Words for Buffer<T> {
    fn flip(&mut self, word: usize) -> Result<()> {
        let mut all = self.read()?;
        flip(&mut all, word);
        self.write(&all)
    }
}

impl<T: Pod> Words for Pinned<T> {
    fn flip(&mut self, word: usize) -> Result<()> {
        let mut all: Vec<T> = (0..self.len()).map(|i| self.get(i)).collect();
        flip(&mut all, word);
        self.write(0, &all);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_the_first_the_middle_and_the_last() {
        assert_eq!([Rows::Few.of(7), Rows::All.of(3)], [[0, 3, 6], [0, 1, 2]]);
        assert_eq!([0, 1, 2].map(|count| Rows::Few.of(count)), [vec![], vec![0], vec![0, 1]]);
        let matrix: Vec<i32> = (0..10).collect();
        assert_eq!(Rows::Few.pick(&matrix, 2), [0, 1, 4, 5, 8, 9]);
        assert_eq!(Rows::All.pick(&matrix, 5), matrix);
    }

    #[test]
    fn a_flip_changes_one_word_much() {
        let mut floats = [1.0f32, 2.0, 3.0];
        flip(&mut floats, 1);
        assert_eq!((floats[0], floats[2]), (1.0, 3.0));
        assert!((floats[1] - 2.0).abs() >= 2.0, "{}", floats[1]);
        let mut pairs = [[1i32, 2], [3, 4]];
        flip(&mut pairs, 2);
        assert_eq!(pairs, [[1, 2], [3 + (1 << 30), 4]]);
        let mut halves = [half::f16::ONE, half::f16::ZERO];
        flip(&mut halves, 1);
        assert_eq!((halves[0].to_f32(), halves[1].to_f32()), (1.0, 2.0));
    }
}
