//! Memory that a decode needs, and checks that it is there.

use crate::backend::cpu::{attention, linear};
#[cfg(feature = "cuda")]
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::Device;
use crate::model::{Config, SessionConfig};

/// Bytes that a decode allocates besides the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Keys, values and features, and the differences that guidance reuses.
    pub cache: usize,
    /// Activations, logits and packed operands.
    pub workspace: usize,
    /// Scratch of all threads.
    pub scratch: usize,
}

impl MemoryEstimate {
    /// Estimates a decode on the CPU with `threads` threads, in f32.
    pub fn cpu(session: &SessionConfig, config: &Config, threads: usize) -> MemoryEstimate {
        let limits = session.limits(config);
        let deltas = if session.reuses_guidance { session.max_candidates * config.vocab_size } else { 0 };
        let cache = session.cache_elements(config) + deltas;
        // Logits of both branches, and the guided ones.
        let guidance = 3 * deltas;
        let packed = linear::packed_len(limits.rows, SessionConfig::widest_input(config));
        let scratch = linear::SCRATCH_BYTES + 4 * attention::scratch_len(limits.longest, config.head_dim);
        let logits = limits.logit_rows * config.vocab_size;
        let angles = limits.longest * config.head_dim;
        let workspace = session.activation_elements(config) + logits + packed + guidance + angles;
        MemoryEstimate { cache: 4 * cache, workspace: 4 * workspace, scratch: threads * scratch }
    }

    /// Sum of all parts, in bytes.
    pub fn total(&self) -> usize {
        self.cache + self.workspace + self.scratch
    }
}

/// Checks that the device has `bytes` free.
#[cfg(feature = "cuda")]
pub(super) fn ensure_device_memory(device: &Device, what: &str, bytes: usize) -> Result<()> {
    let (free, _) = device.memory_bytes()?;
    if bytes > free {
        return Err(no_device_memory(what, bytes, Some(free as u64), String::new()));
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn no_device_memory(what: &str, bytes: usize, free_bytes: Option<u64>, cause: String) -> Error {
    let memory = "the device's memory";
    Error::OutOfMemory { what: what.into(), memory, needed_bytes: Some(bytes as u64), free_bytes, cause }
}

/// Adds the needed size to the error of a failed allocation on the device. Other errors stay as they are.
#[cfg(feature = "cuda")]
pub(super) fn with_needed_bytes(error: Error, what: &str, bytes: usize) -> Error {
    match error {
        Error::Driver { call: "cuMemHostAlloc", .. } => Error::OutOfMemory {
            what: what.into(),
            memory: "memory of this machine that the device can reach",
            needed_bytes: None,
            free_bytes: None,
            cause: error.to_string(),
        },
        Error::Driver { ref name, .. } if name.contains("OUT_OF_MEMORY") || name.contains("ALLOC_FAILED") => {
            no_device_memory(what, bytes, None, error.to_string())
        }
        other => other,
    }
}
