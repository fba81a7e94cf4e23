//! A checkpoint and its forward pass: config, mapped weights, and the transformer written once over the backend.

pub mod config;
mod course;
mod forward;
mod names;
mod random;
pub mod weights;

pub use config::{Config, Family};
pub use course::{Autonomous, Course, CourseSequence, CourseStage, Ran, Schedule};
pub use forward::{CachePlan, LayerPlan, Memory, Network, Pass, Session, Sizes, Transformer};
pub use weights::Weights;

use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use std::path::Path;

/// A model ready to run on the CPU.
pub struct Model {
    config: Config,
    transformer: Transformer<Cpu>,
}

impl Model {
    /// Opens a checkpoint directory in the public layout: `config.json` and `model*.safetensors`, with or without an
    /// index. Weights are mapped, not read: this takes milliseconds, and the files must not change while the model
    /// lives.
    ///
    /// # Errors
    /// Names the file, key or tensor when one is missing, malformed, or of another shape than the configuration says.
    pub fn open(dir: impl AsRef<Path>) -> Result<Model> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            use std::io::ErrorKind::{NotADirectory, NotFound};
            let (kind, message) = match dir.exists() {
                true => (NotADirectory, "not a directory, as a checkpoint is"),
                false => (NotFound, "no such checkpoint directory"),
            };
            return Err(Error::Io { path: dir.to_path_buf(), source: std::io::Error::new(kind, message) });
        }
        Model::new(Config::open(dir)?, &Weights::open(dir)?)
    }

    /// A model of this shape with random weights in memory, for benchmarks.
    pub fn random(config: Config, seed: u64) -> Result<Model> {
        let weights = Weights::random(&config, seed)?;
        Model::new(config, &weights)
    }

    /// A model of weights that are already open.
    pub fn new(config: Config, weights: &Weights) -> Result<Model> {
        let transformer = Transformer::load(&Cpu::default(), &config, weights)?;
        Ok(Model { config, transformer })
    }

    /// Sizes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The layers, for callers that run passes themselves.
    pub fn transformer(&self) -> &Transformer<Cpu> {
        &self.transformer
    }
}
