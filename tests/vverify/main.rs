//! Compares the kernel of vverify, launched by the shipped code, with the reference in f64.
//!
//! Cosines must be within 1e-6 of those of the reference. The selection must be the one that the reference makes from the
//! cosines of the kernel. It must also be the one that the reference makes from its own cosines, except for rows whose cosine
//! is within 1e-6 of the boundary: `Case::check` counts the sequences with such rows, and most tests demand that there are none.
#![cfg(feature = "cuda")]

mod case;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod launches;
mod maps;
#[path = "../recorded/mod.rs"]
mod recorded;
mod selection;
