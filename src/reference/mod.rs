//! Reference implementation of every op, on the CPU, written for reading; one file per op.
//!
//! Tests, benches and `dllm doctor` compare the CUDA kernels and the CPU backend with these functions. They share no code
//! with either. Rounding is part of the definition of some ops: their functions compute in f64 and take a `round` function,
//! which they apply wherever the kernel rounds to f32 or to the element type of the tensor.

pub mod advance;
pub mod attention;
pub mod embed;
pub mod gather_scatter;
pub mod merge_state;
pub mod norm;
pub mod rope;
pub mod swiglu;
pub mod top_k_top_p;
pub mod unmask;
pub mod vverify;
