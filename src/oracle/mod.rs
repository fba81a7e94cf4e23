//! One file per op: what it computes, on the CPU, written for reading.
//!
//! The CPU backend runs these where speed does not matter, and is tested against them where it does; so will the CUDA
//! kernels be.

pub mod attention;
pub mod norm;
pub mod philox;
pub mod rope;
pub mod swiglu;
pub mod unmask;
pub mod vverify;
