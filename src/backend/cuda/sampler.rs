//! Sampling on the device: top_k_top_p, unmask and advance, after the head of a pass.

use super::decode_state::{DecodeState, RowTable};
use super::{Activations, Cuda, checked_i32};
use crate::abi::*;
use crate::error::Result;
use crate::gpu::Buffer;
use crate::ops;
use crate::sampling::{CommitRule, Confidence, SamplingParams};

/// Parameters of unmask that a captured graph holds. The other ones are read from device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct SamplingKey {
    policy: dllm_policy,
    /// Bits of the policy's number.
    limit: u32,
    confidence: dllm_confidence,
    temperature: u64,
    tempered_confidence: bool,
    f32_confidence: bool,
    top_p: Option<u64>,
    top_k: Option<usize>,
    cfg_scale: u32,
    alg_temp: u64,
    seed: u64,
    mask_token: Option<u32>,
}

impl SamplingKey {
    /// Returns the key of these parameters.
    pub fn new(rule: CommitRule, params: &SamplingParams) -> SamplingKey {
        let (policy, limit) = match rule {
            CommitRule::Quota(_) => (DLLM_POLICY_FIXED, 0.0),
            CommitRule::Threshold(threshold) | CommitRule::ThresholdTopN { threshold, .. } => {
                (DLLM_POLICY_THRESHOLD, threshold as f32)
            }
            CommitRule::Factor(factor) => (DLLM_POLICY_FACTOR, factor as f32),
        };
        let confidence = match params.confidence {
            Confidence::Probability => DLLM_CONFIDENCE_PROBABILITY,
            Confidence::Margin => DLLM_CONFIDENCE_MARGIN,
            Confidence::Entropy => DLLM_CONFIDENCE_ENTROPY,
            Confidence::Random => DLLM_CONFIDENCE_RANDOM,
        };
        SamplingKey {
            policy,
            limit: limit.to_bits(),
            confidence,
            temperature: params.temperature.to_bits(),
            tempered_confidence: params.tempered_confidence,
            f32_confidence: params.f32_confidence,
            top_p: params.top_p.map(f64::to_bits),
            top_k: params.top_k,
            cfg_scale: params.cfg_scale.to_bits(),
            alg_temp: params.alg_temp.to_bits(),
            seed: params.seed,
            mask_token: params.mask_token,
        }
    }
}

/// Inputs of the sampling of one kind of pass.
pub(crate) struct SamplingInputs<'a> {
    /// State of the decode.
    pub state: &'a DecodeState,
    /// Candidates.
    pub rows: &'a RowTable,
    /// Logits, with guidance those of unconditional sequences after `logit_rows` rows.
    pub logits: &'a Activations,
    /// Rows of the logits of one branch.
    pub logit_rows: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// The mask token.
    pub mask_token: u32,
}

/// Fields that top_k_top_p and unmask share.
struct Shared {
    logits: u64,
    uncond_logits: u64,
    tokens: u64,
    num_tokens: i32,
    mask_token: i32,
}

impl Cuda {
    /// Enqueues the sampling of a pass: commits tokens, and prepares the state for the next pass.
    pub(crate) fn sample(&self, inputs: &SamplingInputs, params: &SamplingParams, key: SamplingKey) -> Result<()> {
        let tokens = self.tokens()?;
        let logits = inputs.logits.address();
        let unconditional = logits + (inputs.logit_rows * inputs.vocab_size * size_of::<f32>()) as u64;
        let shared = Shared {
            logits,
            uncond_logits: if params.cfg_scale > 0.0 { unconditional } else { 0 },
            tokens: tokens.address(),
            num_tokens: checked_i32("tokens", tokens.len() - 1)?, // without the mask token after them
            mask_token: checked_i32("mask_token", inputs.mask_token as usize)?,
        };
        let filters = params.top_p.is_some_and(|p| p < 1.0) || params.top_k.is_some();
        if filters {
            self.top_k_top_p(inputs, params, &shared)?;
        }
        self.unmask(inputs, params, key, &shared, filters)?;
        self.advance(inputs, &shared)
    }

    fn top_k_top_p(&self, inputs: &SamplingInputs, params: &SamplingParams, shared: &Shared) -> Result<()> {
        let SamplingInputs { state, vocab_size, .. } = *inputs;
        let [rows, _, count] = inputs.rows.addresses();
        let top_k = params.top_k.map_or(Ok(0), |k| checked_i32("top_k", k.min(vocab_size)))?;
        let params = dllm_top_k_top_p_params {
            size: size_of::<dllm_top_k_top_p_params>() as u64,
            logits: shared.logits,
            uncond_logits: shared.uncond_logits,
            rows,
            count,
            tokens: shared.tokens,
            min_logit: state.min_logit.address(),
            logits_stride: vocab_size as i64,
            max_rows: checked_i32("candidates", state.sizes.candidates)?,
            num_tokens: shared.num_tokens,
            num_logits_rows: checked_i32("logit_rows", inputs.logit_rows)?,
            vocab_size: checked_i32("vocab_size", vocab_size)?,
            mask_token: shared.mask_token,
            dtype: DLLM_F32 as i32,
            top_k,
            top_p: params.top_p.unwrap_or(1.0) as f32,
            temperature: params.temperature as f32,
            cfg_scale: params.cfg_scale,
        };
        // SAFETY: buffers of the decode, of these sizes. Indices in them are checked on the device.
        unsafe { ops::top_k_top_p::launch_raw(self.stream().device(), self.stream().raw(), &params) }
    }

    fn unmask(
        &self,
        inputs: &SamplingInputs,
        params: &SamplingParams,
        key: SamplingKey,
        shared: &Shared,
        filters: bool,
    ) -> Result<()> {
        let SamplingInputs { state, vocab_size, .. } = *inputs;
        let [rows, cu_rows, _] = inputs.rows.addresses();
        let [masks_left, committed, failed] = state.outcome.each_ref().map(Buffer::address);
        let limit = f32::from_bits(key.limit);
        let params = dllm_unmask_params {
            size: size_of::<dllm_unmask_params>() as u64,
            logits: shared.logits,
            uncond_logits: shared.uncond_logits,
            rows,
            cu_rows,
            tokens: shared.tokens,
            quota: state.address(state.layout.quota),
            commit_before: state.address(state.layout.commit_before),
            steps: state.address(state.layout.steps),
            min_logit: if filters { state.min_logit.address() } else { 0 },
            masks_left,
            committed,
            failed,
            predicted: state.predicted.address(),
            confidence: state.confidence.address(),
            workspace: state.workspace.address(),
            workspace_bytes: state.workspace.len() as u64,
            seed: params.seed,
            logits_stride: vocab_size as i64,
            max_rows: checked_i32("candidates", state.sizes.candidates)?,
            num_sequences: checked_i32("sequences", state.sizes.sequences)?,
            num_tokens: shared.num_tokens,
            num_logits_rows: checked_i32("logit_rows", inputs.logit_rows)?,
            vocab_size: checked_i32("vocab_size", vocab_size)?,
            mask_token: shared.mask_token,
            dtype: DLLM_F32 as i32,
            confidence_kind: key.confidence as i32,
            policy: key.policy as i32,
            tempered_confidence: params.tempered_confidence.into(),
            temperature: params.temperature as f32,
            cfg_scale: params.cfg_scale,
            alg_temp: params.alg_temp as f32,
            threshold: if key.policy == DLLM_POLICY_THRESHOLD { limit } else { 0.0 },
            factor: if key.policy == DLLM_POLICY_FACTOR { limit } else { 0.0 },
            reserved: 0,
        };
        // SAFETY: buffers of the decode, of these sizes. Indices in them are checked on the device. The workspace was zeroed and its
        // shape never changes; `RowTable::write` groups rows by sequence.
        unsafe { ops::unmask::launch_raw(self.stream().device(), self.stream().raw(), &params) }
    }

    fn advance(&self, inputs: &SamplingInputs, shared: &Shared) -> Result<()> {
        let state = inputs.state;
        let [_, committed, failed] = state.outcome.each_ref().map(Buffer::address);
        let address_if = |count: usize, element: usize| if count > 0 { state.address(element) } else { 0 };
        let params = dllm_advance_params {
            size: size_of::<dllm_advance_params>() as u64,
            control: state.address(state.layout.control),
            sequences: state.address(state.layout.sequences),
            tokens: shared.tokens,
            committed,
            failed,
            quota: state.address(state.layout.quota),
            commit_before: state.address(state.layout.commit_before),
            steps: state.address(state.layout.steps),
            ratios: address_if(state.sizes.ratios, state.layout.ratios),
            end_tokens: address_if(state.sizes.end_tokens, state.layout.end_tokens),
            progress: state.progress.address(),
            num_sequences: checked_i32("sequences", state.sizes.sequences)?,
            num_tokens: shared.num_tokens,
            mask_token: shared.mask_token,
            num_end_tokens: checked_i32("end_tokens", state.sizes.end_tokens)?,
            max_ratios: checked_i32("ratios", state.sizes.ratios)?,
            reserved: 0,
        };
        // SAFETY: buffers of the decode, of these sizes. Indices in them are checked on the device.
        unsafe { ops::advance::launch_raw(self.stream().device(), self.stream().raw(), &params) }
    }
}
