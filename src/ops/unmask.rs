//! Sampling and commit of masked tokens from logits, in one launch: the kernel of `cuda/any/unmask.cu`.
//!
//! For each masked row the op samples a token and computes its confidence. For each sequence it then selects the rows to
//! commit by a [`Policy`], and writes their tokens in place. Rows whose token is not the mask token are skipped.
//!
//! - The mask token is never chosen. Where its logit is the largest it counts as minus infinity.
//! - NaN logits count as minus infinity, plus infinity as the largest finite value.
//! - Ties go to the lowest token, then to the first row.
//! - Random numbers are Philox, keyed by seed, step, position and token. Results do not depend on the batch.
//! - Element types of the logits: bf16, f16, f32; arithmetic in f32.
//!
//! The policies are those of LLaDA (arXiv:2502.09992), Dream (arXiv:2508.15487) and Fast-dLLM (arXiv:2505.22618, sections 3.2
//! and 3.3).

use super::{Element, Plan, Workspace, WorkspaceLayout, buffers, validate};
use crate::abi::{self, dllm_unmask_params, dllm_unmask_row};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use crate::sampling::Confidence;
use std::collections::HashSet;
use std::ffi::c_void;

/// Number of logits of a row that one block reads; `kChunk` of the kernel.
const CHUNK: u32 = 8192;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_unmask_params) -> Result<()> {
    validate::struct_size::<dllm_unmask_params>(params.size)?;
    validate::address("logits", params.logits, 16)?;
    validate::optional("uncond_logits", params.uncond_logits, 16)?;
    validate::address("rows", params.rows, 16)?;
    for (name, address) in [
        ("cu_rows", params.cu_rows),
        ("tokens", params.tokens),
        ("masks_left", params.masks_left),
        ("committed", params.committed),
        ("failed", params.failed),
    ] {
        validate::address(name, address, 4)?;
    }
    for (name, address) in [
        ("quota", params.quota),
        ("commit_before", params.commit_before),
        ("steps", params.steps),
        ("min_logit", params.min_logit),
        ("predicted", params.predicted),
        ("confidence", params.confidence),
    ] {
        validate::optional(name, address, 4)?;
    }
    validate::within("max_rows", params.max_rows.into(), 1, 65_535)?;
    validate::size("num_sequences", params.num_sequences)?;
    validate::within("num_tokens", params.num_tokens.into(), 0, i32::MAX.into())?;
    validate::within("num_logits_rows", params.num_logits_rows.into(), 0, i32::MAX.into())?;
    // Above, an index into a chunk could overflow.
    validate::within("vocab_size", params.vocab_size.into(), 1, 1 << 30)?;
    validate::within("mask_token", params.mask_token.into(), 0, i32::MAX.into())?;
    let bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16, abi::DLLM_F32])?;
    let width = i64::from(params.vocab_size);
    validate::stride("logits_stride", params.logits_stride, width, bytes)?;
    validate::within("confidence_kind", params.confidence_kind.into(), 0, abi::DLLM_CONFIDENCE_RANDOM.into())?;
    validate::within("policy", params.policy.into(), 0, abi::DLLM_POLICY_FACTOR.into())?;
    validate::flag("tempered_confidence", params.tempered_confidence)?;
    validate::temperature("temperature", params.temperature)?;
    validate::temperature("alg_temp", params.alg_temp)?;
    validate::finite("cfg_scale", params.cfg_scale)?;
    validate::finite("threshold", params.threshold)?;
    if params.policy as abi::dllm_policy == abi::DLLM_POLICY_FACTOR
        && !(params.factor > 0.0 && params.factor.is_finite())
    {
        return Err(Error::argument("factor", "a number above 0", params.factor));
    }
    let fixed = params.policy as u32 == abi::DLLM_POLICY_FIXED;
    if fixed && params.quota == 0 {
        return Err(Error::argument("quota", "a device address, as the policy is fixed", 0));
    }
    if !fixed && params.alg_temp > 0.0 {
        return Err(Error::argument("alg_temp", "0, as the policy is not fixed", params.alg_temp));
    }
    validate::guidance(params.cfg_scale, params.uncond_logits)?;
    validate::Region::new("logits", params.logits, params.num_logits_rows.max(1), params.logits_stride, width, bytes)
        .fits_address_space()?;
    validate::workspace(params.workspace, params.workspace_bytes, &plan(params))
}

/// Returns the plan of a launch: a block of 256 threads per row and 8,192 logits of the row.
///
/// The plain form of the kernel serves launches without guidance, `min_logit` and temperature whose confidences are
/// probabilities; the general form serves all others.
pub fn plan(params: &dllm_unmask_params) -> Plan {
    let plain = params.uncond_logits == 0
        && params.min_logit == 0
        && params.temperature == 0.0
        && params.confidence_kind as u32 == abi::DLLM_CONFIDENCE_PROBABILITY;
    let kernel = match (params.dtype as u32, plain) {
        (abi::DLLM_BF16, true) => "unmask_bf16",
        (abi::DLLM_F16, true) => "unmask_f16",
        (_, true) => "unmask_f32",
        (abi::DLLM_BF16, false) => "unmask_general_bf16",
        (abi::DLLM_F16, false) => "unmask_general_f16",
        (_, false) => "unmask_general_f32",
    };
    let chunks = params.vocab_size.max(1).unsigned_abs().div_ceil(CHUNK);
    let rows = params.max_rows.max(1) as u32;
    let counters = (params.num_sequences.max(1) as u64 + rows as u64).next_multiple_of(4) * 4;
    // A result and a key of 8 bytes, and a partial of 32 bytes for each chunk; rows rounded up to keep the alignment.
    let workspace_bytes =
        counters + u64::from(rows.next_multiple_of(2)) * 16 + u64::from(rows) * u64::from(chunks) * 32;
    Plan { kernel, grid: [chunks, rows, 1], block: 256, workspace_bytes }
}

/// Enqueues the kernel on `stream`. Allocates nothing, does not synchronise, and may be captured in a graph. May be called from
/// several threads; each launch in flight needs a workspace of its own.
///
/// # Errors
/// As [`validate`]; the driver's. Rows without a finite logit are reported in `failed`.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_unmask_params`] gives, until the work is done.
/// 3. Memory that the launch writes overlaps no other memory of the struct.
/// 4. `cu_rows` ascends from 0, each row's `sequence` is the one whose range holds it, and no two rows have the same `token`.
///    Otherwise results are wrong, and the workspace must be zeroed again.
/// 5. The workspace was zeroed before its first use. One launch at a time uses it, always with the same `max_rows`,
///    `num_sequences` and `vocab_size`.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_unmask_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "unmask", plan(params), params) }
}

/// Table of the rows of a batch that may be committed, in device memory.
pub struct RowTable {
    /// At least one element.
    rows: Buffer<dllm_unmask_row>,
    len: usize,
    cu_rows: Buffer<i32>,
}

/// One row of a [`RowTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index of the row's token in the batch's tokens; distinct for all rows.
    pub token: usize,
    /// Row of the logits that predicts the token. Dream: the row of the position before (logit shift).
    pub logits_row: usize,
    /// Position in the sequence; keys the random numbers and breaks ties.
    pub position: usize,
}

impl RowTable {
    /// Uploads the rows of each sequence, with ascending positions.
    ///
    /// # Errors
    /// [`Error::Argument`] when positions do not ascend, two rows have the same `token`, or a value does not fit into 32 bits; as
    /// [`Stream::upload`].
    pub fn new(stream: &Stream, sequences: &[Vec<Row>]) -> Result<RowTable> {
        let mut rows = Vec::new();
        let mut tokens = HashSet::new();
        let mut cu_rows = vec![0];
        for (sequence, sequence_rows) in sequences.iter().enumerate() {
            if !sequence_rows.is_sorted_by(|a, b| a.position < b.position) {
                return Err(Error::argument("rows", "ascending positions", format!("others in sequence {sequence}")));
            }
            for row in sequence_rows {
                if !tokens.insert(row.token) {
                    let found = format!("{} twice, in sequence {sequence} again", row.token);
                    return Err(Error::argument("rows", "distinct tokens", found));
                }
                rows.push(dllm_unmask_row {
                    token: buffers::count("token", row.token)?,
                    logits_row: buffers::count("logits_row", row.logits_row)?,
                    position: buffers::count("position", row.position)?,
                    sequence: buffers::count("sequences", sequence)?,
                });
            }
            cu_rows.push(buffers::count("rows", rows.len())?);
        }
        let len = rows.len();
        // The kernel loads a row before it checks whether it exists.
        rows.resize(len.max(1), dllm_unmask_row::default());
        Ok(RowTable { rows: stream.upload(&rows)?, len, cu_rows: stream.upload(&cu_rows)? })
    }

    /// Number of rows of all sequences.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.cu_rows.len() - 1
    }

    pub(super) fn rows(&self) -> &Buffer<dllm_unmask_row> {
        &self.rows
    }
}

/// Rule that selects the masked rows of a sequence to commit.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Policy<'a> {
    /// Commits the given number of rows with the highest confidence per sequence, `[num_sequences]` (LLaDA, Dream).
    Fixed(&'a Buffer<i32>),
    /// Commits the row with the highest confidence, and all others whose confidence is at least `threshold` (Fast-dLLM).
    Threshold {
        /// Minimum confidence.
        threshold: f32,
        /// Only this number of rows with the highest confidence per sequence may be committed, `[num_sequences]`; `None`: all.
        /// For 0 no row of the sequence is committed.
        top_n: Option<&'a Buffer<i32>>,
    },
    /// Commits the n rows with the highest confidence, with the largest n for which `(n + 1) (1 - confidence_n) <= factor`
    /// (Fast-dLLM, section 3.3); at least one row, and all rows if only the last fails. The factor is above 0.
    Factor(f32),
}

/// Configuration of sampling, confidence and commit.
#[derive(Clone, Copy, Debug)]
pub struct UnmaskConfig<'a> {
    /// Confidence that ranks the rows.
    pub confidence: Confidence,
    /// Rule that selects the rows to commit.
    pub policy: Policy<'a>,
    /// 0: the token is the argmax. 1e-6 to 1e6: it is drawn from softmax(logits / temperature) by the Gumbel-max config.
    pub temperature: f32,
    /// Whether confidences are computed after the temperature (Dream) or from the plain logits (LLaDA).
    pub tempered_confidence: bool,
    /// Scale w of classifier-free guidance, logits = u + (w + 1) (c - u): above 0 with unconditional logits u; 0 without guidance.
    pub cfg_scale: f32,
    /// 0: rows are ranked by confidence. Above 0, with [`Policy::Fixed`] only: rows are drawn from softmax(confidence / alg_temp).
    pub alg_temp: f32,
    /// Seed of every random number.
    pub seed: u64,
    /// Mask token, which is never chosen.
    pub mask_token: u32,
}

// SAFETY: four 32-bit integers, no padding; any bits are a value.
unsafe impl bytemuck::Zeroable for dllm_unmask_row {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for dllm_unmask_row {}

/// Inputs and outputs of [`launch`].
pub struct Unmask<'a, T> {
    /// Logits `[num_logits_rows, vocab_size]`.
    pub logits: &'a Buffer<T>,
    /// Logits of the unconditional sequences, in the same layout. Ignored when `cfg_scale` is 0.
    pub uncond_logits: Option<&'a Buffer<T>>,
    /// Number of logits of a row, at most 2^30.
    pub vocab_size: usize,
    /// Elements from one row to the next; a multiple of 16 bytes.
    pub logits_stride: usize,
    /// Rows that may be committed.
    pub rows: &'a RowTable,
    /// Tokens of the batch, `[num_tokens]`, read and written.
    pub tokens: &'a mut Buffer<i32>,
    /// Rows at this position and later ones are predicted but not committed, `[num_sequences]`; `None`: no limit.
    pub commit_before: Option<&'a Buffer<i32>>,
    /// Number of forwards that each sequence took part in, `[num_sequences]`; keys the random numbers. `None`: 0.
    pub steps: Option<&'a Buffer<i32>>,
    /// Logits below this value count as minus infinity, `[rows]`: the output of [`top_k_top_p`](super::top_k_top_p).
    pub min_logit: Option<&'a Buffer<f32>>,
    /// Results.
    pub outcome: &'a mut Outcome,
    /// Workspace of [`workspace`], for these rows and this vocabulary.
    pub workspace: &'a mut Workspace,
}

/// Results of a launch, in device memory.
pub struct Outcome {
    /// Number of rows that could be committed and are still masked, `[num_sequences]`.
    pub masks_left: Buffer<i32>,
    /// Number of rows committed, `[num_sequences]`.
    pub committed: Buffer<i32>,
    /// Status of each sequence, `[num_sequences]`. A sequence that failed commits nothing.
    /// - -1: no failure;
    /// - -2: the row table points outside the tokens or logits;
    /// - otherwise: the position of the first row without a finite logit.
    pub failed: Buffer<i32>,
    /// Predicted token of each masked row, -1 for other rows, `[rows]`.
    pub predicted: Buffer<i32>,
    /// Confidence of each masked row, 0 for other rows, `[rows]`.
    pub confidence: Buffer<f32>,
}

impl Outcome {
    /// Allocates the results for the given rows, without initialising them.
    ///
    /// # Errors
    /// As [`Stream::alloc`].
    pub fn new(stream: &Stream, rows: &RowTable) -> Result<Outcome> {
        let (num_rows, num_sequences) = (rows.len(), rows.num_sequences());
        Ok(Outcome {
            masks_left: stream.alloc(num_sequences)?,
            committed: stream.alloc(num_sequences)?,
            failed: stream.alloc(num_sequences)?,
            predicted: stream.alloc(num_rows)?,
            confidence: stream.alloc(num_rows)?,
        })
    }
}

/// Allocates a workspace for launches over the given rows and vocabulary size.
///
/// # Errors
/// [`Error::Argument`] when a size does not fit into 32 bits; as [`Stream::alloc`].
pub fn workspace(stream: &Stream, rows: &RowTable, vocab_size: usize) -> Result<Workspace> {
    let params = dllm_unmask_params {
        max_rows: buffers::count("rows", rows.len().max(1))?,
        num_sequences: buffers::count("sequences", rows.num_sequences())?,
        vocab_size: buffers::count("vocab_size", vocab_size)?,
        ..Default::default()
    };
    Workspace::new(stream, &plan(&params), layout(&params))
}

/// Returns the layout of the workspace, whose counters depend on these sizes.
fn layout(params: &dllm_unmask_params) -> WorkspaceLayout {
    WorkspaceLayout("unmask", [params.num_sequences, params.max_rows, params.vocab_size])
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`]. Without sequences nothing is
/// enqueued.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or a value of `config` is out of range; the
/// driver's.
pub fn launch<T: Element>(stream: &Stream, unmask: Unmask<T>, config: &UnmaskConfig) -> Result<()> {
    let Unmask { logits, uncond_logits, vocab_size, logits_stride, rows, tokens, .. } = unmask;
    let Unmask { commit_before, steps, min_logit, outcome, workspace, .. } = unmask;
    let (num_rows, num_sequences) = (rows.len(), rows.num_sequences());
    if num_sequences == 0 {
        return Ok(());
    }
    let guided = |_: &&Buffer<T>| config.cfg_scale != 0.0;
    let num_logits_rows = buffers::num_rows("logits", logits.len(), vocab_size, logits_stride)?;
    let (policy, quota, threshold, factor) = match config.policy {
        Policy::Fixed(quota) => (abi::DLLM_POLICY_FIXED, Some(quota), 0.0, 0.0),
        Policy::Threshold { threshold, top_n } => (abi::DLLM_POLICY_THRESHOLD, top_n, threshold, 0.0),
        Policy::Factor(factor) => (abi::DLLM_POLICY_FACTOR, None, 0.0, factor),
    };
    let confidence_kind = match config.confidence {
        Confidence::Probability => abi::DLLM_CONFIDENCE_PROBABILITY,
        Confidence::Margin => abi::DLLM_CONFIDENCE_MARGIN,
        Confidence::Entropy => abi::DLLM_CONFIDENCE_ENTROPY,
        Confidence::Random => abi::DLLM_CONFIDENCE_RANDOM,
    };
    let params = dllm_unmask_params {
        size: size_of::<dllm_unmask_params>() as u64,
        logits: buffers::buffer("logits", logits, 0, stream)?,
        uncond_logits: buffers::optional("uncond_logits", uncond_logits.filter(guided), logits.len(), stream)?,
        rows: buffers::buffer("rows", &rows.rows, 0, stream)?,
        cu_rows: buffers::buffer("rows", &rows.cu_rows, 0, stream)?,
        tokens: buffers::buffer("tokens", tokens, 0, stream)?,
        quota: buffers::optional("quota", quota, num_sequences, stream)?,
        commit_before: buffers::optional("commit_before", commit_before, num_sequences, stream)?,
        steps: buffers::optional("steps", steps, num_sequences, stream)?,
        min_logit: buffers::optional("min_logit", min_logit, num_rows, stream)?,
        masks_left: buffers::buffer("masks_left", &outcome.masks_left, num_sequences, stream)?,
        committed: buffers::buffer("committed", &outcome.committed, num_sequences, stream)?,
        failed: buffers::buffer("failed", &outcome.failed, num_sequences, stream)?,
        predicted: buffers::buffer("predicted", &outcome.predicted, num_rows, stream)?,
        confidence: buffers::buffer("confidence", &outcome.confidence, num_rows, stream)?,
        workspace: 0,
        workspace_bytes: 0,
        seed: config.seed,
        logits_stride: logits_stride as i64,
        max_rows: buffers::count("rows", num_rows.max(1))?,
        num_sequences: buffers::count("sequences", num_sequences)?,
        num_tokens: buffers::count("tokens", tokens.len())?,
        num_logits_rows,
        vocab_size: buffers::count("vocab_size", vocab_size)?,
        mask_token: buffers::count("mask_token", config.mask_token as usize)?,
        dtype: T::DTYPE as i32,
        confidence_kind: confidence_kind as i32,
        policy: policy as i32,
        tempered_confidence: config.tempered_confidence.into(),
        temperature: config.temperature,
        cfg_scale: config.cfg_scale,
        alg_temp: config.alg_temp,
        threshold,
        factor,
        reserved: 0,
    };
    let (workspace, workspace_bytes) = buffers::workspace(workspace, layout(&params), stream)?;
    let params = dllm_unmask_params { workspace, workspace_bytes, ..params };
    // SAFETY: addresses and sizes come from buffers of this stream, which are distinct where they are written; the table
    // was checked when it was made, and the kernel checks its indices.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}
