//! Input of users to the library and to `dllm`: commands, checkpoints, tokenizers, and invalid input.

mod bad_input;
#[cfg(feature = "cli")]
mod commands;
#[path = "../common/mod.rs"]
mod common;
#[cfg(all(feature = "cli", feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
mod doctor;
#[path = "../../src/selftest/limit.rs"]
mod limit;
#[cfg(feature = "cli")]
mod printed_numbers;
#[cfg(feature = "cli")]
mod quality;
#[cfg(feature = "tokenizers")]
mod tokenizer;
