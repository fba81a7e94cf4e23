//! Engines: they run the forward passes and the sampling of a decode.
//!
//! [`host::HostEngine`] runs one pass at a time and samples on the CPU. The CUDA engine keeps tokens and schedules on the device,
//! and also runs many passes without the host ([`DeviceLoop`]).

#[cfg(feature = "cuda")]
mod cuda;
mod guidance;
mod host;
mod limits;
mod model;
mod pass;
mod requirements;
mod run;

#[cfg(feature = "cuda")]
pub use cuda::{CudaEngine, check_model as check_cuda_model};
pub use host::HostEngine;
pub use limits::MemoryEstimate;
pub use model::Model;
pub use pass::{CfgBranch, DecodeEngine, KernelCounts, Pass};
pub use requirements::EngineRequirements;
pub use run::{DecodeRun, DeviceLoop, RunOutcome, StepTemplate};
