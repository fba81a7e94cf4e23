//! Forward passes and whole decodes: against the recordings of the reference implementations, in batches, with every cache, and
//! on the device in lockstep with the CPU.

mod adaptive;
mod batch;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
mod cuda;
mod golden;
mod hybrid;
#[path = "../../src/selftest/limit.rs"]
mod limit;
mod memory;
mod threads;
