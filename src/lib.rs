//! Diffusion language models (LLaDA, Dream) decoded fast: Fast-dLLM's block caches and confidence-aware parallel
//! unmasking, over weights that stay mapped in the checkpoint's files.
//!
//! Open a checkpoint with [`Model::open`], decode with a [`Generator`], follow it with an [`Observer`]. Everything works
//! on token ids; tokenizers and chat templates come with the feature `cli`.
//!
//! Calls go down this list only: [`decode`] (rules, policies, the loop), [`cache`] (which rows run), [`model`] (config,
//! weights, the forward pass), [`backend`] (the ops of a layer on a device), [`reference`] (what each op computes).
//! The CUDA kernels stand beside them: `ops` (one a file: parameters, checks, launch) over `gpu` (devices, streams, memory);
//! [`Model::to_device`] brings a model to a device, where the generator then decodes with them.
//!
//! Work is spread over the current rayon pool. A [`Model`] is shared freely between threads; each decode has buffers of
//! its own.

#![warn(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

#[cfg(feature = "cuda")]
pub mod abi;
pub mod backend;
pub mod cache;
pub mod decode;
pub mod engine;
#[cfg(feature = "cuda")]
mod engine_requirements;
pub mod error;
#[cfg(feature = "cuda")]
pub mod gpu;
mod host_memory;
pub mod model;
#[cfg(feature = "cuda")]
pub mod ops;
pub mod reference;
pub mod sampling;
mod tensor;
#[cfg(feature = "cli")]
pub mod tokenizer;

pub use cache::CacheMode;
pub use decode::{Generation, Generator, Observer, Options, Policy, Step};
pub use engine::Model;
pub use error::{Error, Result};
pub use model::{Config, Family};
pub use sampling::Confidence;
