//! Use of a device by the library: memory, modules, captures, launches, blocking calls, and errors.
//!
//! These tests set options of the CUDA emulator that hold for the whole process. So they share their process with no others, and
//! run one at a time.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
mod driver;
mod engine;
#[path = "../../src/selftest/limit.rs"]
mod limit;
mod memory;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Waits until no other test of this process runs. A test that has failed before is no reason to fail.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
