//! A model that is ready to run, on the CPU or on a CUDA device.

#[cfg(feature = "cuda")]
use super::cuda::{CudaEngine, check_model};
use super::host::HostEngine;
use super::limits::MemoryEstimate;
#[cfg(feature = "cuda")]
use super::limits::{ensure_device_memory, with_needed_bytes};
use super::pass::DecodeEngine;
use super::requirements::EngineRequirements;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::Cuda;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::{Device, SyncOnDrop};
use crate::host_memory::ensure_host_memory;
use crate::model::{Config, SessionConfig, Transformer, Weights};
use std::path::Path;

/// A model that is ready to run, on the CPU or on a CUDA device.
///
/// A model can be shared between threads. Each decode has its own buffers.
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
    /// Dropped last, so that it synchronises after the weights have freed their memory.
    _sync: SyncOnDrop,
}

impl Model {
    /// Opens a checkpoint directory in the published layout: `config.json` and `model*.safetensors`, with or without an index.
    ///
    /// Weights are mapped, not read: this takes milliseconds. The files must not change while the model exists.
    ///
    /// # Errors
    /// Names the file, key or tensor that is missing, malformed, or has another shape than the configuration requires.
    pub fn open(dir: impl AsRef<Path>) -> Result<Model> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            use std::io::ErrorKind::{NotADirectory, NotFound};
            let (kind, message) = if dir.exists() {
                (NotADirectory, "not a directory, as a checkpoint is")
            } else {
                (NotFound, "no such checkpoint directory")
            };
            return Err(Error::Io { path: dir.to_path_buf(), source: std::io::Error::new(kind, message) });
        }
        Model::new(Config::open(dir)?, Weights::open(dir)?)
    }

    /// Creates a model with random weights in memory, for benchmarks.
    ///
    /// # Errors
    /// When there is no memory for the weights.
    pub fn random(config: Config, seed: u64) -> Result<Model> {
        let weights = Weights::random(&config, seed)?;
        Model::new(config, weights)
    }

    /// Creates a model from weights that are open already.
    ///
    /// # Errors
    /// Names the first tensor that is missing or has another shape than `config` requires.
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

    /// Uploads the weights to a CUDA device, as bf16. [`crate::Generator`] then decodes there.
    ///
    /// Returns when the upload is complete. `progress` receives the uploaded and the total number of bytes. The files stay mapped.
    ///
    /// # Errors
    /// When the kernels do not support a model of this shape, or the device does not have enough free memory: the message has the
    /// numbers, and no memory stays allocated. The driver's errors.
    #[cfg(feature = "cuda")]
    pub fn to_device(self, device: &Device, mut progress: impl FnMut(u64, u64) + Send + 'static) -> Result<Model> {
        check_model(&self.config)?;
        let bytes = self.device_bytes();
        ensure_device_memory(device, "the weights", bytes)?;
        let cuda = Cuda::for_weights(device, move |uploaded| progress(uploaded, bytes as u64))?;
        let sync = cuda.stream().sync_on_drop();
        let transformer = Transformer::load(&cuda, &self.config, &self.weights)
            .map_err(|error| with_needed_bytes(error, "the weights", bytes))?;
        cuda.stream().synchronize()?;
        Ok(Model { on_device: Some(OnDevice { transformer, device: device.clone(), _sync: sync }), ..self })
    }

    /// Bytes of the weights on a device.
    #[cfg(feature = "cuda")]
    fn device_bytes(&self) -> usize {
        self.config.tensors().iter().map(|(_, shape)| 2 * shape.iter().product::<usize>()).sum()
    }

    /// The device that holds the weights, after [`Model::to_device`].
    #[cfg(feature = "cuda")]
    pub fn device(&self) -> Option<&Device> {
        self.on_device.as_ref().map(|on_device| &on_device.device)
    }

    /// Sizes and constants of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The transformer on the CPU, for callers that run passes themselves.
    #[doc(hidden)]
    pub fn transformer(&self) -> &Transformer<Cpu> {
        &self.transformer
    }

    /// The transformer on the device, after [`Model::to_device`].
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    pub fn device_transformer(&self) -> Option<&Transformer<Cuda>> {
        self.on_device.as_ref().map(|on_device| &on_device.transformer)
    }

    /// Checks that the engine of this model supports a decode.
    ///
    /// # Errors
    /// [`Error::Argument`] names the option that the engine does not support.
    pub(crate) fn check(&self, requirements: &EngineRequirements) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.on_device.is_some() {
            return requirements.check_cuda();
        }
        // The host engine supports every decode.
        let _ = requirements;
        Ok(())
    }

    /// Creates an engine for a decode of these sizes, on the device that holds the weights.
    ///
    /// # Errors
    /// When there is no memory for the buffers, with the numbers; the driver's errors.
    #[doc(hidden)]
    pub fn engine(&self, session: SessionConfig) -> Result<Box<dyn DecodeEngine + '_>> {
        #[cfg(feature = "cuda")]
        if let Some(OnDevice { transformer, device, .. }) = &self.on_device {
            return Ok(Box::new(CudaEngine::new(transformer, device, session)?));
        }
        let needed = MemoryEstimate::cpu(&session, &self.config, rayon::current_num_threads()).total();
        let what = format!("{} sequences of up to {} positions", session.prompt_lens.len(), session.longest());
        ensure_host_memory(&what, needed)?;
        Ok(Box::new(HostEngine::new(&self.transformer, Cpu::default(), session)?))
    }
}
