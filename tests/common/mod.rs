//! Helpers that the test programs share.

// No test program uses all of it.
#![allow(dead_code, unused_imports, unused_macros)]

pub mod checkpoint;
pub mod copy;
#[cfg(feature = "cuda")]
mod device;
pub mod process;
pub mod recorded;

#[cfg(feature = "cuda")]
pub use device::*;
#[cfg(feature = "cuda")]
pub(crate) use device::{device_tests, on_device, once_on_device};
pub use recorded::golden_dir;

use dllm_kernels::{Config, Family};
use std::path::{Path, PathBuf};

/// Share of a long test that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A representative part, in every run.
    Few,
    /// Everything, in runs with `--include-ignored`.
    All,
}

impl Part {
    /// Returns `all`, or `few` of them, in order. The choice is fixed, and has no period that a list of nested loops could share.
    pub fn of<T>(self, all: impl IntoIterator<Item = T>, few: usize) -> Vec<T> {
        let all: Vec<T> = all.into_iter().collect();
        let mut ranked: Vec<usize> = (0..all.len()).collect();
        // Multiples of the golden ratio: any number of them is spread evenly.
        ranked.sort_by_key(|i| (*i as u32).wrapping_mul(0x9e37_79b9));
        ranked.truncate(self.count(all.len(), few));
        all.into_iter().enumerate().filter(|(i, _)| ranked.contains(i)).map(|(_, item)| item).collect()
    }

    /// Returns `all`, or `few`.
    pub fn count(self, all: usize, few: usize) -> usize {
        if self == Part::All { all } else { few.min(all) }
    }
}

/// Makes two tests of each of these functions, which take a [`Part`] and need no device: one in the module `few`, and one in the
/// module `whole`, which is ignored unless requested.
macro_rules! in_parts {
    ($($test:ident),+ $(,)?) => {
        mod few {
            $(
                #[test]
                fn $test() {
                    super::$test(crate::common::Part::Few);
                }
            )+
        }
        mod whole {
            $(
                #[test]
                #[ignore = "long: all cases of a test that runs a few of them by default"]
                fn $test() {
                    super::$test(crate::common::Part::All);
                }
            )+
        }
    };
}
pub(crate) use in_parts;

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
