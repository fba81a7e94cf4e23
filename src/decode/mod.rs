//! From prompts to answers: options, the published decoding algorithms, and the loops that run them over an engine.

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
