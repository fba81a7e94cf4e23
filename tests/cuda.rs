//! The CUDA backend: whole decodes on the device, against the CPU backend and against what the originals computed.
//! `cuda/margin.rs` states what of it has to be equal.
#![cfg(feature = "cuda")]

mod checkpoint;
mod common;
mod recorded;

#[path = "cuda/company.rs"]
mod company;
#[path = "cuda/formats.rs"]
mod formats;
#[path = "cuda/forward.rs"]
mod forward;
#[path = "cuda/kept.rs"]
mod kept;
#[path = "cuda/lockstep.rs"]
mod lockstep;
#[path = "cuda/margin.rs"]
mod margin;
#[path = "cuda/random.rs"]
mod random;
#[path = "cuda/recorded_decodes.rs"]
mod recorded_decodes;
#[path = "cuda/rounded.rs"]
mod rounded;
#[path = "cuda/watched.rs"]
mod watched;

use common::{device, once_on_device};
use dllm_kernels::gpu::Device;
use dllm_kernels::{Family, Model};

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// The device, with few multiprocessors where it is a software device: attention is then cut into few parts, and takes less
/// time. `cuda_device.rs` has the others.
fn small_device() -> Device {
    let device = device();
    if softgpu::active() {
        softgpu::set(softgpu::Opt::Multiprocessors, 2);
    }
    device
}

/// A made-up checkpoint, its weights on the device.
fn made_up(family: Family) -> Model {
    let dir = checkpoint::Checkpoint::new(family).write();
    Model::open(dir.path()).unwrap().to_device(&small_device(), |_, _| ()).unwrap()
}

use company::alone_and_in_a_batch;
use formats::{element_types, tied_head};
use forward::logits_are_within_the_margin;
use kept::{
    guidance_at_intervals, kept_alone_and_in_a_batch, kept_in_lockstep, kept_masks_in_the_prompt,
    kept_watched_or_not_dream, kept_watched_or_not_llada, recorded_kept_decodes, work_is_counted_for_each_pass,
};
use random::{random_settings_dream, random_settings_llada};
use recorded_decodes::recorded_decodes;
use watched::{many_blocks, masks_in_the_prompt, watched_or_not_dream, watched_or_not_llada};

once_on_device!(
    alone_and_in_a_batch,
    element_types,
    guidance_at_intervals,
    kept_alone_and_in_a_batch,
    kept_in_lockstep,
    kept_masks_in_the_prompt,
    kept_watched_or_not_dream,
    kept_watched_or_not_llada,
    logits_are_within_the_margin,
    many_blocks,
    masks_in_the_prompt,
    random_settings_dream,
    random_settings_llada,
    recorded_decodes,
    recorded_kept_decodes,
    tied_head,
    watched_or_not_dream,
    watched_or_not_llada,
    work_is_counted_for_each_pass,
);
