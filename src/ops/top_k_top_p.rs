//! Logit threshold of top-p and top-k sampling per masked row: the kernel of `cuda/any/top_k_top_p.cu`.
//!
//! For each masked row it writes the smallest logit that top-p, then top-k, keep. [`unmask`](super::unmask) takes it as
//! `min_logit`, and treats lower logits as minus infinity. Probabilities are summed as integers, so results do not depend on
//! the order of the additions. Element types of the logits: bf16, f16, f32.

use super::unmask::RowTable;
use super::{Element, Plan, buffers, validate};
use crate::abi::{self, dllm_top_k_top_p_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_top_k_top_p_params) -> Result<()> {
    validate::struct_size::<dllm_top_k_top_p_params>(params.size)?;
    validate::address("logits", params.logits, 16)?;
    validate::optional("uncond_logits", params.uncond_logits, 16)?;
    validate::address("rows", params.rows, 16)?;
    validate::optional("count", params.count, 4)?;
    validate::address("tokens", params.tokens, 4)?;
    validate::address("min_logit", params.min_logit, 4)?;
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

/// Returns the plan of a launch: a block of 1,024 threads per row.
pub fn plan(params: &dllm_top_k_top_p_params) -> Plan {
    let kernel = match params.dtype as u32 {
        abi::DLLM_BF16 => "top_k_top_p_bf16",
        abi::DLLM_F16 => "top_k_top_p_f16",
        _ => "top_k_top_p_f32",
    };
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 1024, workspace_bytes: 0 }
}

/// Enqueues the kernel on `stream`. Allocates nothing, does not synchronise, and may be captured in a graph. May be called from
/// several threads.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_top_k_top_p_params`] gives, until the work is done.
/// 3. `min_logit` overlaps no other memory of the struct.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_top_k_top_p_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "top_k_top_p", plan(params), params) }
}

/// Inputs and outputs of [`launch`].
pub struct TopKTopP<'a, T> {
    /// Logits `[num_logits_rows, vocab_size]`.
    pub logits: &'a Buffer<T>,
    /// Logits of the unconditional sequences, in the same layout. Ignored when `cfg_scale` is 0.
    pub uncond_logits: Option<&'a Buffer<T>>,
    /// Number of logits of a row, below 2^24.
    pub vocab_size: usize,
    /// Elements from one row to the next; a multiple of 16 bytes.
    pub logits_stride: usize,
    /// Rows of the batch.
    pub rows: &'a RowTable,
    /// Tokens of the batch, `[num_tokens]`.
    pub tokens: &'a Buffer<i32>,
    /// Keeps the fewest most probable tokens whose probabilities sum to more than this value, 0 to 1; `None`: all.
    pub top_p: Option<f32>,
    /// Keeps the k largest logits, and those equal to the k-th; `None`: all.
    pub top_k: Option<usize>,
    /// Temperature of the probabilities: 1e-6 to 1e6, or 0, which counts as 1.
    pub temperature: f32,
    /// Scale w of classifier-free guidance, above 0 with `uncond_logits`; 0 without guidance.
    pub cfg_scale: f32,
    /// Mask token. Rows whose token is another one get minus infinity.
    pub mask_token: u32,
    /// Output: threshold of each row, `[rows]`.
    pub min_logit: &'a mut Buffer<f32>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`]. Without rows nothing is enqueued.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or a value is out of range; the driver's.
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
        min_logit: buffers::buffer("min_logit", min_logit, rows.len(), stream)?,
        logits_stride: logits_stride as i64,
        max_rows: buffers::count("rows", rows.len())?,
        num_tokens: buffers::count("tokens", tokens.len())?,
        num_logits_rows,
        vocab_size: buffers::count("vocab_size", vocab_size)?,
        mask_token: buffers::count("mask_token", args.mask_token as usize)?,
        dtype: T::DTYPE as i32,
        // From vocab_size on all are kept.
        top_k: args.top_k.map_or(0, |k| k.min(vocab_size)) as i32,
        top_p: args.top_p.unwrap_or(1.0),
        temperature: args.temperature,
        cfg_scale: args.cfg_scale,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; the kernel checks every index.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}
