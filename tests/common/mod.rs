//! Helpers that the test programs share.

// No test program uses all of it.
#![allow(dead_code, unused_imports, unused_macros)]

pub mod checkpoint;
#[cfg(feature = "cuda")]
mod device;
pub mod recorded;

#[cfg(feature = "cuda")]
pub use device::*;
#[cfg(feature = "cuda")]
pub(crate) use device::{on_device, once_on_device};
pub use recorded::golden_dir;

use dllm_kernels::{Config, Family};
use std::path::{Path, PathBuf};

/// Folder of the shipped checkpoints: `DLLM_MODELS_DIR`, or that of this checkout.
pub fn models_dir() -> PathBuf {
    let of_checkout = || Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    std::env::var_os("DLLM_MODELS_DIR").map_or_else(of_checkout, PathBuf::from)
}

/// The smallest model that the kernels support.
pub fn one_layer(family: Family) -> Config {
    Config {
        family,
        d_model: 64,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 2,
        head_dim: 32,
        mlp_hidden_size: 64,
        vocab_size: 64,
        mask_token_id: 63,
        eos_token_ids: vec![62],
        ..Config::shape("mid").unwrap()
    }
}
