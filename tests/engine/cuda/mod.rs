//! Whole decodes on the device, compared with the CPU backend and with the recordings of the reference implementations.
//! `cuda/margin.rs` states which results must be equal.

mod batch_invariance;
mod bf16_reference;
mod feature_cache;
mod formats;
mod forward;
mod lockstep;
mod margin;
mod observed;
#[cfg(feature = "tokenizers")]
mod quality;
mod random;
mod recorded_decodes;
#[cfg(feature = "tokenizers")]
mod trained;
mod upload;

use crate::common::{device, once_on_device};
use dllm_kernels::gpu::Device;
use dllm_kernels::{Family, Model};

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// The device. The CUDA emulator gets two multiprocessors: attention then has few KV splits and runs faster.
/// `tests/device/engine.rs` covers the default number.
fn small_device() -> Device {
    let device = device();
    if softgpu::active() {
        softgpu::set(softgpu::Opt::Multiprocessors, 2);
    }
    device
}

/// Model with made-up weights, loaded to the device.
fn made_up(family: Family) -> Model {
    let dir = crate::common::checkpoint::Checkpoint::new(family).write();
    Model::open(dir.path()).unwrap().to_device(&small_device(), |_, _| ()).unwrap()
}

use batch_invariance::alone_and_in_a_batch;
use feature_cache::{
    feature_cache_alone_and_in_a_batch, feature_cache_in_lockstep, feature_cache_masks_in_the_prompt,
    feature_cache_observed_or_not_dream, feature_cache_observed_or_not_llada, guidance_at_intervals,
    recorded_feature_cache_decodes, work_is_counted_for_each_pass,
};
use formats::{element_types, tied_head};
use forward::{logits_are_within_the_margin, long_sequences};
use observed::{many_blocks, masks_in_the_prompt, observed_or_not_dream, observed_or_not_llada};
use random::{random_settings_dream, random_settings_llada};
use recorded_decodes::{recorded_decodes, recordings_elsewhere};

once_on_device!(
    element_types,
    feature_cache_masks_in_the_prompt,
    logits_are_within_the_margin,
    long_sequences,
    recordings_elsewhere,
    tied_head,
    work_is_counted_for_each_pass;
    in_parts:
    alone_and_in_a_batch,
    feature_cache_alone_and_in_a_batch,
    feature_cache_in_lockstep,
    feature_cache_observed_or_not_dream,
    feature_cache_observed_or_not_llada,
    guidance_at_intervals,
    many_blocks,
    masks_in_the_prompt,
    observed_or_not_dream,
    observed_or_not_llada,
    random_settings_dream,
    random_settings_llada,
    recorded_decodes,
    recorded_feature_cache_decodes,
);
