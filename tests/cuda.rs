//! The CUDA backend: whole decodes on the device, against the CPU backend and against what the originals computed.
//! `cuda/margin.rs` states what of it has to be equal.
#![cfg(feature = "cuda")]

mod checkpoint;
mod common;
mod recorded;

#[path = "cuda/forward.rs"]
mod forward;
#[path = "cuda/lockstep.rs"]
mod lockstep;
#[path = "cuda/margin.rs"]
mod margin;
#[path = "cuda/recorded_decodes.rs"]
mod recorded_decodes;
#[path = "cuda/watched.rs"]
mod watched;

use common::{device, golden_dir, once_on_device};
use dllm_kernels::{CacheMode, Error, Family, Generator, Model};

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// A recorded checkpoint, its weights on the device.
fn on_device(name: &str) -> Model {
    Model::open(golden_dir().join(name)).unwrap().to_device(&device(), |_, _| ()).unwrap()
}

/// A made-up one.
fn made_up(family: Family) -> Model {
    let dir = checkpoint::Checkpoint::new(family).write();
    Model::open(dir.path()).unwrap().to_device(&device(), |_, _| ()).unwrap()
}

/// The adaptive cache is the CPU's; a device says so before it does anything.
fn adaptive_is_refused() {
    let model = made_up(Family::Llada);
    let generator = Generator::new(&model).gen_length(8).cache(CacheMode::Adaptive);
    let error = generator.generate(&[vec![1, 2, 3]]).unwrap_err();
    assert!(matches!(&error, Error::Unavailable(message) if message.contains("--cache adaptive")), "{error}");
}

use forward::logits_are_within_the_margin;
use recorded_decodes::recorded_decodes;
use watched::{masks_in_the_prompt, watched_or_not};

use forward::statistics;
once_on_device!(
    adaptive_is_refused,
    statistics,
    logits_are_within_the_margin,
    recorded_decodes,
    watched_or_not,
    masks_in_the_prompt
);
