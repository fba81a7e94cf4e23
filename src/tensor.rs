//! Shapes of attention heads, element types, and tensors that are read in place from a mapped file.

use half::{bf16, f16};
use memmap2::Mmap;
use std::ops::Range;
use std::sync::Arc;

/// Numbers of attention heads, and their width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key/value heads, a divisor of `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head. The CUDA ops take 32, 64 and 128.
    pub head_dim: usize,
}

impl Heads {
    /// Returns the number of elements of all query heads.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Returns the number of elements of all key (or value) heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Returns the number of elements of a row `[q | k | v]`.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16, two bytes.
    Bf16,
    /// IEEE half precision, two bytes.
    F16,
    /// IEEE single precision, four bytes.
    F32,
}

impl Dtype {
    /// Returns the bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// Converts little-endian elements in `bytes` to f32 in `out`: as many as the shorter of the two holds.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
            Dtype::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f16::from_le_bytes(*b).to_f32();
                }
            }
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
        }
    }
}

/// Memory that holds tensors.
#[derive(Debug)]
pub(crate) enum Storage {
    Mapped(Mmap),
    /// Random weights, for benchmarks without a checkpoint.
    Owned(Vec<u8>),
}

impl Storage {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
        }
    }
}

/// A row-major, contiguous, little-endian tensor in shared memory, such as a mapped file. Clones share the data.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Arc<Storage>,
    range: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Tensor {
    /// Returns the tensor in the bytes `range` of `storage`; `None` when the range ends past the storage or does not have the
    /// length that shape and type require. Kernels rely on this length when they read whole rows.
    pub(crate) fn new(storage: Arc<Storage>, range: Range<usize>, dtype: Dtype, shape: Vec<usize>) -> Option<Tensor> {
        let bytes = shape.iter().try_fold(dtype.size(), |bytes, n| bytes.checked_mul(*n))?;
        let fits = range.start <= range.end && range.end <= storage.bytes().len() && range.len() == bytes;
        fits.then_some(Tensor { storage, range, dtype, shape })
    }

    /// Bytes of all elements, with any alignment.
    pub fn bytes(&self) -> &[u8] {
        &self.storage.bytes()[self.range.clone()]
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the given rows of a matrix, sharing the data.
    ///
    /// # Panics
    /// When the tensor is not a matrix, or `rows` is not a range of its rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Tensor {
        assert!(
            self.shape.len() == 2 && rows.start <= rows.end && rows.end <= self.shape[0],
            "{rows:?} of {:?}",
            self.shape
        );
        let row_bytes = self.shape[1] * self.dtype.size();
        let range = self.range.start + rows.start * row_bytes..self.range.start + rows.end * row_bytes;
        Tensor { storage: self.storage.clone(), range, dtype: self.dtype, shape: vec![rows.len(), self.shape[1]] }
    }

    /// Copies all elements to a vector of f32. Meant for vectors (norms, biases), not for matrices.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        self.dtype.widen(self.bytes(), &mut out);
        out
    }
}

/// Returns a tensor of `values`, rounded to `dtype`.
#[cfg(test)]
pub(crate) fn test_tensor(dtype: Dtype, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes: Vec<u8> = match dtype {
        Dtype::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    let range = 0..bytes.len();
    Tensor::new(Arc::new(Storage::Owned(bytes)), range, dtype, shape.to_vec())
        .expect("one value per element of the shape")
}
