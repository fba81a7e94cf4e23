//! Weight matrices of the CPU backend, read in place from the mapped checkpoint.

use crate::tensor::{Dtype, Tensor};
use std::ops::Range;

/// Weight matrix `[rows, cols]`, row-major, with an optional bias per row. It stacks one or more tensors of the
/// checkpoint (QKV; gate and up) and copies none of them.
#[derive(Clone, Debug)]
pub struct Matrix {
    tensors: Vec<Tensor>,
    rows: usize,
    cols: usize,
    bias: Option<Vec<f32>>,
}

impl Matrix {
    /// Stacks tensors `[rows_i, cols]` of equal `cols`. `bias` has one value per stacked row, or is empty.
    ///
    /// # Panics
    /// When the shapes do not fit; the caller has checked them against the configuration.
    pub fn new(tensors: Vec<Tensor>, bias: Vec<f32>) -> Matrix {
        assert!(tensors.iter().all(|t| t.shape().len() == 2), "expected tensors of two dimensions");
        let cols = tensors.first().map_or(0, |t| t.shape()[1]);
        assert!(cols > 0 && tensors.iter().all(|t| t.shape()[1] == cols), "stacked tensors differ in width");
        let rows = tensors.iter().map(|t| t.shape()[0]).sum();
        assert!(bias.is_empty() || bias.len() == rows, "bias of {} values for {rows} rows", bias.len());
        Matrix { tensors, rows, cols, bias: (!bias.is_empty()).then_some(bias) }
    }

    /// Returns the rows (output features) `rows` as a matrix. The weights are shared; the bias is copied.
    ///
    /// # Panics
    /// When `rows` is empty or exceeds the matrix.
    pub fn part(&self, rows: Range<usize>) -> Matrix {
        assert!(rows.start < rows.end && rows.end <= self.rows, "{rows:?} of {}", self.rows);
        let mut tensors = Vec::new();
        let mut first = 0;
        for tensor in &self.tensors {
            let here = first..first + tensor.shape()[0];
            first = here.end;
            let (start, end) = (rows.start.max(here.start), rows.end.min(here.end));
            if start < end {
                tensors.push(tensor.rows(start - here.start..end - here.start));
            }
        }
        Matrix::new(tensors, self.bias.as_ref().map_or(vec![], |bias| bias[rows].to_vec()))
    }

    /// Number of rows (output features).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (input features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Stacked tensors, top to bottom.
    pub(super) fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Bias, one value per row.
    pub(super) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Returns the bytes of row `n` and their element type.
    pub(super) fn row(&self, mut n: usize) -> (&[u8], Dtype) {
        for tensor in &self.tensors {
            let rows = tensor.shape()[0];
            if n < rows {
                let bytes = self.cols * tensor.dtype().size();
                return (&tensor.bytes()[n * bytes..(n + 1) * bytes], tensor.dtype());
            }
            n -= rows;
        }
        unreachable!("row beyond the matrix: callers stay below rows()")
    }

    /// Widens row `n` to f32 into `out`, which holds [`Matrix::cols`] elements (an embedding look-up).
    pub fn row_into(&self, n: usize, out: &mut [f32]) {
        let (bytes, dtype) = self.row(n);
        dtype.widen(bytes, out);
    }
}
