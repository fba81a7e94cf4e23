//! Buffers of the matrix products: per-thread scratch, cache-line alignment, and the output that tasks share.

use std::cell::RefCell;

/// Rows of activations per sweep. Limits the scratch for sequences of any length.
pub const SWEEP: usize = 256;
/// Row stride of the sums, in floats: not a power of two.
pub const SUMS_STRIDE: usize = SWEEP + 16;
/// Packed activations are padded to a multiple of this number of rows, on every instruction set. Also the floats of a
/// cache line.
pub const LANES: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `run` with this thread's scratch: from a cache line on, at least `len - LANES` floats of any value.
pub fn with_scratch(len: usize, run: impl FnOnce(&mut [f32])) {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        run(from_cache_line(scratch));
    });
}

/// Returns the part of `buffer` from its first cache line on. Vector and AMX tile loads are slow when they cross one.
pub fn from_cache_line(buffer: &mut [f32]) -> &mut [f32] {
    let line = buffer.as_ptr().align_offset(64).min(buffer.len());
    &mut buffer[line..]
}

/// Output `[rows, features]` that parallel tasks write; each task writes its own columns.
pub struct SharedOut(pub *mut f32);
// SAFETY: tasks write disjoint elements; see the writes in the kernels' `multiply_panel`.
unsafe impl Sync for SharedOut {}
