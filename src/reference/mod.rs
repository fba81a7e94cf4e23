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
pub mod rope;
pub mod swiglu;
pub mod vverify;
