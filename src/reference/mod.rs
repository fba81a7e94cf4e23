//! One file per op: what it computes, on the CPU, written for reading.
//!
//! The CPU backend runs these where speed does not matter, and is tested against them where it does; so are the CUDA
//! kernels. What rounds where is part of what the kernels compute, so some functions here take a rounding: they work in
//! f64 and round where the kernel's results, in f32 or in the type of the tensors, are rounded.

pub mod advance;
pub mod attention;
pub mod embed;
pub mod gather_scatter;
pub mod merge_state;
pub mod norm;
pub mod philox;
pub mod rope;
pub mod swiglu;
pub mod unmask;
pub mod vverify;

/// The rows of one sequence that a pass runs: places `start .. end` of the `len` that are in view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// Index of the sequence in the batch.
    pub sequence: usize,
    /// First place.
    pub start: usize,
    /// Place after the last.
    pub end: usize,
    /// Places of the sequence that its rows see.
    pub len: usize,
    /// Where the sequence's places begin in the cache.
    pub cache_base: usize,
}

impl SequenceRows {
    /// Rows of this span.
    pub fn rows(&self) -> usize {
        self.end - self.start
    }

    /// Positions that its rows attend to: their own, or with a cache all of the sequence.
    pub fn keys(&self, cached: bool) -> usize {
        if cached { self.len } else { self.rows() }
    }
}

/// Head counts and widths, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of a row `[q | k | v]`.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}
