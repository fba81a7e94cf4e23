//! Each op, launched by the shipped code, against its reference in f64. A file or folder has the name of its op.
#![cfg(feature = "cuda")]

mod advance;
mod attention;
mod blas;
#[path = "../common/mod.rs"]
mod common;
mod embed;
mod gather_scatter;
#[path = "../../src/selftest/limit.rs"]
mod limit;
mod merge_state;
mod norm;
mod offsets;
mod read_bandwidth;
mod rope;
mod selftest;
mod swiglu;
mod tiles;
mod unmask;
mod vverify;
