//! From prompts to answers: options, the published decoding algorithms, and the loops that run them over an engine.
//!
//! The path of one step: [`Generator::generate`] calls [`decode`], which calls the function of the selected algorithm
//! (`algorithms`). That function describes the passes over each block (`block_loop`). They run one at a time on the host
//! (`host_loop`), or all of them on the device (`device_loop`).

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
