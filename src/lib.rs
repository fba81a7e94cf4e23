//! Decoding of diffusion language models (LLaDA, Dream): Fast-dLLM's block caches and confidence-aware parallel unmasking, and
//! dLLM-Cache's adaptive cache, on CPUs and with hand-written CUDA kernels.
//!
//! [`Model::open`] opens a checkpoint, whose weights stay mapped. A [`Generator`] decodes prompts with it, and an [`Observer`]
//! follows every step. Prompts and answers are token ids; `tokenizer::Tokenizer` converts text
//! (feature `tokenizers`). `Model::to_device` uploads the weights to a CUDA device (feature `cuda`), where the generator then
//! decodes.
//!
//! Other inference engines call single ops on their own device pointers and stream: `ops` has one module per kernel, `gpu` has devices,
//! streams and buffers, and `abi` has the parameter structs that C, C++ and Rust share.
//!
//! A [`Model`] can be shared between threads; each decode has its own buffers. CPU work runs on the current rayon pool.
//!
//! `docs/architecture.md` in the repository describes the modules, the life of one denoising step, and the terms used here.
//! Modules that this documentation does not list are not part of the stable interface.

#![warn(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "cuda")]
pub mod abi;
#[doc(hidden)]
pub mod backend;
#[doc(hidden)]
pub mod cache;
#[doc(hidden)]
pub mod decode;
#[doc(hidden)]
pub mod engine;
#[doc(hidden)]
pub mod error;
#[cfg(feature = "cuda")]
pub mod gpu;
mod host_memory;
#[cfg(test)]
#[path = "selftest/limit.rs"]
mod limit;
#[doc(hidden)]
pub mod model;
#[cfg(feature = "cuda")]
pub mod ops;
#[doc(hidden)]
pub mod reference;
#[doc(hidden)]
pub mod sampling;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod selftest;
mod tensor;
#[cfg(feature = "tokenizers")]
pub mod tokenizer;

pub use cache::adaptive::AdaptivePlan;
pub use cache::{CacheMode, PassKind};
pub use decode::{Generation, Generator, Observer, Options, Policy, SequenceStep, Step};
pub use engine::Model;
pub use error::{Error, Result};
pub use model::{Config, Family, Weights};
pub use sampling::Confidence;
