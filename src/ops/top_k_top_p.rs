//! The least logit that top-p and top-k keep: the kernel of `cuda/any/top_k_top_p.cu`. What it writes is the `min_logit` of
//! [`super::unmask`].

use super::unmask::RowTable;
use super::{Element, Plan, buffers, validate};
use crate::abi::{self, dllm_top_k_top_p_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Checks every field but what the addresses point to.
pub fn validate(params: &dllm_top_k_top_p_params) -> Result<()> {
    validate::struct_size::<dllm_top_k_top_p_params>(params.size)?;
    validate::address("logits", params.logits, 16)?;
    validate::optional("uncond_logits", params.uncond_logits, 16)?;
    validate::address("rows", params.rows, 16)?;
    validate::optional("count", params.count, 4)?;
    validate::address("tokens", params.tokens, 4)?;
    validate::address("cut", params.min_logit, 4)?;
    validate::size("max_rows", params.max_rows)?;
    validate::within("num_tokens", params.num_tokens.into(), 0, i32::MAX.into())?;
    validate::within("num_logits_rows", params.num_logits_rows.into(), 0, i32::MAX.into())?;
    // Above, sums of weights could overflow.
    validate::within("vocab_size", params.vocab_size.into(), 1, (1 << 24) - 1)?;
    validate::within("mask_token", params.mask_token.into(), 0, i32::MAX.into())?;
    let bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16, abi::DLLM_F32])?;
    let width = i64::from(params.vocab_size);
    validate::stride("logits_stride", params.logits_stride, width, bytes)?;
    validate::within("top_k", params.top_k.into(), 0, i32::MAX.into())?;
    if !(0.0..=1.0).contains(&params.top_p) {
        return Err(Error::argument("top_p", "0 to 1", params.top_p));
    }
    validate::temperature("temperature", params.temperature)?;
    validate::guidance(params.cfg_scale, params.uncond_logits)?;
    validate::Region::new("logits", params.logits, params.num_logits_rows.max(1), params.logits_stride, width, bytes)
        .fits_address_space()
}

/// What a launch takes: a block of 1,024 threads for each row.
pub fn plan(params: &dllm_top_k_top_p_params) -> Plan {
    let kernel = match params.dtype as u32 {
        abi::DLLM_BF16 => "top_k_top_p_bf16",
        abi::DLLM_F16 => "top_k_top_p_f16",
        _ => "top_k_top_p_f32",
    };
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 1024, workspace_bytes: 0 }
}

/// Launches on a caller's stream and returns. May be captured into a graph; may be called from several threads.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    is there until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_top_k_top_p_params`] gives, until the work is done.
/// 3. `min_logit` overlaps nothing else of the struct.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_top_k_top_p_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "top_k_top_p", plan(params), params) }
}

/// What a safe launch reads and writes, and what it keeps.
pub struct TopKTopP<'a, T> {
    /// `[any, vocab_size]`
    pub logits: &'a Buffer<T>,
    /// The same, unconditional, for guidance.
    pub uncond_logits: Option<&'a Buffer<T>>,
    /// Width of a row.
    pub vocab_size: usize,
    /// Elements from row to row; a multiple of 16 bytes.
    pub logits_stride: usize,
    /// Which rows.
    pub rows: &'a RowTable,
    /// The batch's tokens.
    pub tokens: &'a Buffer<i32>,
    /// Keep the shortest run of most probable tokens whose probabilities sum to more than this.
    pub top_p: Option<f32>,
    /// Keep the k largest logits, and those equal to the k-th.
    pub top_k: Option<usize>,
    /// Temperature of those probabilities; 0 counts as 1.
    pub temperature: f32,
    /// Guidance w, above 0; needs unconditional logits, which are not looked at when it is 0.
    pub cfg_scale: f32,
    /// The token of masked positions; other rows get minus infinity.
    pub mask_token: u32,
    /// `[rows]`: the cut of each.
    pub min_logit: &'a mut Buffer<f32>,
}

/// Launches on our buffers, and returns. Without rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short, belongs to another stream, or a number is out of range; the driver's.
pub fn launch<T: Element>(stream: &Stream, args: TopKTopP<T>) -> Result<()> {
    let TopKTopP { logits, uncond_logits, vocab_size, logits_stride, rows, tokens, min_logit, .. } = args;
    if rows.is_empty() {
        return Ok(());
    }
    if args.top_k == Some(0) {
        return Err(Error::argument("top_k", "at least 1", 0));
    }
    let num_logits_rows = buffers::num_rows("logits", logits.len(), vocab_size, logits_stride)?;
    let params = dllm_top_k_top_p_params {
        size: size_of::<dllm_top_k_top_p_params>() as u64,
        logits: buffers::buffer("logits", logits, 0, stream)?,
        uncond_logits: buffers::optional(
            "uncond_logits",
            uncond_logits.filter(|_| args.cfg_scale != 0.0),
            logits.len(),
            stream,
        )?,
        rows: buffers::buffer("rows", rows.rows(), 0, stream)?,
        count: 0,
        tokens: buffers::buffer("tokens", tokens, 0, stream)?,
        min_logit: buffers::buffer("cut", min_logit, rows.len(), stream)?,
        logits_stride: logits_stride as i64,
        max_rows: buffers::count("rows", rows.len())?,
        num_tokens: buffers::count("tokens", tokens.len())?,
        num_logits_rows,
        vocab_size: buffers::count("vocab_size", vocab_size)?,
        mask_token: buffers::count("mask_token", args.mask_token as usize)?,
        dtype: T::DTYPE as i32,
        // More than there are keeps all, as 0 does.
        top_k: args.top_k.map_or(0, |k| k.min(vocab_size)) as i32,
        top_p: args.top_p.unwrap_or(1.0),
        temperature: args.temperature,
        cfg_scale: args.cfg_scale,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; the kernel checks every index.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}
