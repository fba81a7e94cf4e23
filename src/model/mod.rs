//! A checkpoint and its forward pass: config, mapped weights, and the transformer written once over the backend.

pub mod config;
mod course;
mod forward;
mod names;
mod random;
#[cfg(feature = "cuda")]
mod resident;
mod sizes;
pub mod weights;
mod window;

pub use config::{Config, Family};
pub use course::{DecodeRun, DeviceLoop, RunOutcome, StepTemplate};
pub use forward::{
    CachePlan, CfgBranch, DecodeEngine, KernelCounts, LayerPlan, Pass, SelectedRows, Session, Transformer,
};
#[cfg(feature = "cuda")]
pub use resident::{CudaEngine, supports as supports_cuda};
pub use sizes::{MemoryEstimate, SessionConfig};
pub use weights::Weights;
pub use window::{QueryRows, VisibleKeys};

use crate::backend::cpu::{Cpu, ensure_memory};
#[cfg(feature = "cuda")]
use crate::backend::cuda::Cuda;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::{Device, SyncOnDrop};
use std::path::Path;

/// A model ready to run: on the CPU, or on a CUDA device that its weights were brought to.
pub struct Model {
    config: Config,
    #[cfg(feature = "cuda")]
    weights: Weights,
    transformer: Transformer<Cpu>,
    #[cfg(feature = "cuda")]
    on_device: Option<OnDevice>,
}

/// The weights on a device.
#[cfg(feature = "cuda")]
struct OnDevice {
    transformer: Transformer<Cuda>,
    device: Device,
    /// The last, so that it sees to what the weights have freed.
    _settle: SyncOnDrop,
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
        Model::new(Config::open(dir)?, Weights::open(dir)?)
    }

    /// A model of this shape with random weights in memory, for benchmarks.
    pub fn random(config: Config, seed: u64) -> Result<Model> {
        let weights = Weights::random(&config, seed)?;
        Model::new(config, weights)
    }

    /// A model of weights that are already open.
    pub fn new(config: Config, weights: Weights) -> Result<Model> {
        let transformer = Transformer::load(&Cpu::default(), &config, &weights)?;
        #[cfg(feature = "cuda")]
        let on_device = None;
        Ok(Model {
            config,
            #[cfg(feature = "cuda")]
            weights,
            transformer,
            #[cfg(feature = "cuda")]
            on_device,
        })
    }

    /// Brings the weights to a CUDA device, as bf16, and waits until they are there; [`crate::Generator`] then decodes there.
    /// `progress` is told how many of how many bytes have been put on their way. The mapping of the files stays.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernels cannot run a model of this shape; [`Error::OutOfMemory`] when the device has
    /// not that much free memory, and then nothing stays allocated; the driver's.
    #[cfg(feature = "cuda")]
    pub fn to_device(self, device: &Device, mut progress: impl FnMut(u64, u64) + Send + 'static) -> Result<Model> {
        resident::supports(&self.config)?;
        let bytes = self.device_bytes();
        resident::ensure_memory(device, "the weights", bytes)?;
        let cuda = Cuda::for_weights(device, move |done| progress(done, bytes as u64))?;
        let settle = cuda.stream().settle();
        let transformer = Transformer::load(&cuda, &self.config, &self.weights)
            .map_err(|error| resident::out_of_memory(error, "the weights", bytes))?;
        cuda.stream().synchronize()?;
        Ok(Model { on_device: Some(OnDevice { transformer, device: device.clone(), _settle: settle }), ..self })
    }

    /// Bytes of the weights on a device.
    #[cfg(feature = "cuda")]
    fn device_bytes(&self) -> usize {
        self.config.tensors().iter().map(|(_, shape)| 2 * shape.iter().product::<usize>()).sum()
    }

    /// The device that the weights were brought to.
    #[cfg(feature = "cuda")]
    pub fn device(&self) -> Option<&Device> {
        self.on_device.as_ref().map(|there| &there.device)
    }

    /// Sizes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The layers on the CPU, for callers that run passes themselves.
    pub fn transformer(&self) -> &Transformer<Cpu> {
        &self.transformer
    }

    /// The layers on the device, if the weights were brought to one, likewise.
    #[cfg(feature = "cuda")]
    pub fn device_transformer(&self) -> Option<&Transformer<Cuda>> {
        self.on_device.as_ref().map(|there| &there.transformer)
    }

    /// The buffers and caches of a decode of these sizes, where the weights are: on the device that they were brought to, or in
    /// this machine's memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when there is no memory for them; the driver's.
    pub fn network(&self, sizes: SessionConfig) -> Result<Box<dyn DecodeEngine + '_>> {
        #[cfg(feature = "cuda")]
        if let Some(OnDevice { transformer, device, .. }) = &self.on_device {
            return Ok(Box::new(CudaEngine::new(transformer, device, sizes)?));
        }
        let needed = sizes.memory(&self.config, rayon::current_num_threads()).total();
        let what = format!("{} sequences of up to {} positions", sizes.prompt_lens.len(), sizes.longest());
        ensure_memory(&what, needed)?;
        Ok(Box::new(Session::new(&self.transformer, Cpu::default(), sizes)?))
    }
}
