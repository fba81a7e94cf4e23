//! From prompts to text: which rule runs, block by block, step by step.

mod generate;
mod generator;
mod observer;
mod options;
pub mod presets;
mod state;
mod stretch;
pub mod trace;

pub use generate::{Decoded, decode};
pub use generator::{Generation, Generator};
pub use observer::{Observer, SequenceStep, Step};
pub use options::{Algorithm, Options, Policy};
