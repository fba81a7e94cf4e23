//! Invalid checkpoints, configs, prompts and options in the library. Each is an error that names the input, the expected and the
//! found value. None panics, hangs or produces a token.

mod arguments;
mod config;
mod damage;
mod files;
mod index;
mod numerics;
mod safetensors_file;
mod tensors;

use crate::common::checkpoint::{Checkpoint, FILE, INDEX, MASK, VOCAB, WINDOW, write};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{BlockPlan, PassKind};
use dllm_kernels::model::{QueryRows, Session, SessionConfig};
use dllm_kernels::{CacheMode, Confidence, Error, Family, Generation, Generator, Model, Options, Policy, Result};
use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// Checks the variant of an error, and that its message contains each of `words`.
#[track_caller]
fn refused<T>(result: Result<T>, variant: &str, words: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("accepted; expected {variant} {words:?}"));
    let (found, message) = (format!("{error:?}"), error.to_string());
    assert!(found.starts_with(variant), "expected {variant}, got {found}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

fn open(checkpoint: &Checkpoint) -> Model {
    Model::open(checkpoint.write().path()).unwrap()
}

/// Opens a new directory with this config and model file.
fn open_files(config: &str, file: &[u8]) -> Result<Model> {
    Model::open(write(config, file).path())
}

/// Eight tokens in two blocks.
fn options() -> Options {
    Options { gen_length: 8, block_length: Some(4), ..Options::default() }
}

fn generate(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Result<Generation> {
    Generator::new(model).options(options.clone()).generate(prompts)
}

/// Logits at every position of `tokens`.
fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let n = tokens.len();
    let sizes = SessionConfig {
        prompt_lens: vec![n],
        gen_length: 0,
        max_candidates: n,
        kv_cache: false,
        feature_cache: false,
        reuses_guidance: false,
        guided: false,
        max_ratios: 0,
        num_end_tokens: 0,
    };
    let mut session = Session::new(model.transformer(), Cpu::default(), sizes).unwrap();
    let plan = BlockPlan::new(CacheMode::None, PassKind::Full);
    session
        .forward(&[tokens.to_vec()], &[QueryRows::new(0, 0..n, n)], &plan, &(0..n).collect::<Vec<_>>(), None)
        .unwrap();
    session.logits(n).unwrap()
}
