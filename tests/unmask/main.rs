//! Compares the kernels unmask and top_k_top_p, launched by the shipped code, with the reference in f64.
#![cfg(feature = "cuda")]

mod case;
mod check;
mod commits;
#[path = "../common/mod.rs"]
mod common;
mod confidences;
mod filters;
mod golden;
mod launches;
mod logits;
#[path = "../recorded/mod.rs"]
mod recorded;
