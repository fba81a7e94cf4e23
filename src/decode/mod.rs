//! Decoding: from prompts to generated tokens.
//!
//! The path of one step: [`Generator::generate`] calls [`decode`], which selects a function of `algorithms`. That function
//! describes the passes of each block (`block_loop`). They run one at a time (`host_loop`: a forward pass, the commit
//! decision, the observer), or on the device (`device_loop`).

mod algorithms;
mod block_loop;
mod decoder;
mod device_loop;
mod generator;
mod host_loop;
mod observer;
mod options;
pub mod presets;
mod state;
pub mod trace;

pub use decoder::{Decoded, decode};
pub use generator::{Generation, Generator};
pub use observer::{Observer, SequenceStep, Step};
pub use options::{Algorithm, Options, Policy};
