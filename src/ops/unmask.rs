//! From logits to committed tokens: the kernel of `cuda/any/unmask.cu`.

use super::{Element, Layout, Plan, Workspace, buffers, validate};
use crate::abi::{self, dllm_unmask_params, dllm_unmask_row};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use crate::sampling::Confidence;
use std::collections::HashSet;
use std::ffi::c_void;

/// Logits of a row that one block looks at; `kChunk` of the kernel.
const CHUNK: u32 = 8192;

/// Checks every field but what the addresses point to.
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
        ("cut", params.min_logit),
        ("chosen", params.predicted),
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

/// What a launch takes: a block of 256 threads for each 8,192 logits of each row.
///
/// Logits without guidance, cut, temperature and with probabilities as confidences take the plain form of the kernel.
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

/// Launches on a caller's stream and returns. May be captured into a graph; may be called from several threads, with a
/// workspace each.
///
/// # Errors
/// As [`validate`]; the driver's. Rows without a finite logit are told in `failed`.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    is there until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_unmask_params`] gives, until the work is done.
/// 3. What is written overlaps nothing else of the struct.
/// 4. `cu_rows` ascends from 0, each row's `sequence` is the one that owns it there, and no two rows have the same token.
///    Otherwise results are wrong, and the workspace must be zeroed again.
/// 5. The workspace was zeroed before its first use, and is used by one launch at a time, with the same `max_rows`,
///    `num_sequences` and `vocab_size`.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_unmask_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "unmask", plan(params), params) }
}

/// The rows of a batch that may be committed, on the device.
pub struct RowTable {
    /// One at least.
    rows: Buffer<dllm_unmask_row>,
    len: usize,
    cu_rows: Buffer<i32>,
}

/// A row of a [`RowTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index of its token in the batch's tokens.
    pub token: usize,
    /// The row of logits that predicts it: with Dream, that of the position before.
    pub logits_row: usize,
    /// Its position in its sequence.
    pub position: usize,
}

impl RowTable {
    /// The rows of each sequence, positions ascending.
    ///
    /// # Errors
    /// [`Error::Argument`] when positions do not ascend, two rows have the same token, or a number does not fit 32 bits; the driver's.
    pub fn new(stream: &Stream, sequences: &[Vec<Row>]) -> Result<RowTable> {
        let mut rows = Vec::new();
        let mut tokens = HashSet::new();
        let mut cu_rows = vec![0];
        for (sequence, of_sequence) in sequences.iter().enumerate() {
            if !of_sequence.is_sorted_by(|a, b| a.position < b.position) {
                return Err(Error::argument("rows", "ascending positions", format!("others in sequence {sequence}")));
            }
            for row in of_sequence {
                if !tokens.insert(row.token) {
                    let found = format!("{} twice, in sequence {sequence} again", row.token);
                    return Err(Error::argument("rows", "tokens of their own", found));
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
        // The kernel loads a row before it knows that there is none.
        rows.resize(len.max(1), dllm_unmask_row::default());
        Ok(RowTable { rows: stream.upload(&rows)?, len, cu_rows: stream.upload(&cu_rows)? })
    }

    /// Rows of all sequences.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sequences.
    pub fn num_sequences(&self) -> usize {
        self.cu_rows.len() - 1
    }

    pub(super) fn rows(&self) -> &Buffer<dllm_unmask_row> {
        &self.rows
    }
}

/// Which masked rows of a sequence to commit.
#[derive(Clone, Copy, Debug)]
pub enum Policy<'a> {
    /// The best so many of each sequence: `[num_sequences]`.
    Fixed(&'a Buffer<i32>),
    /// The best, and all others with at least this confidence.
    Threshold {
        /// Least confidence.
        threshold: f32,
        /// Among how many of the best, `[num_sequences]`; among all, if not given.
        top_n: Option<&'a Buffer<i32>>,
    },
    /// Fast-dLLM's factor.
    Factor(f32),
}

/// How a row's token and confidence come about, and which rows are committed.
#[derive(Clone, Copy, Debug)]
pub struct UnmaskConfig<'a> {
    /// What ranks the rows.
    pub confidence: Confidence,
    /// Which are committed.
    pub policy: Policy<'a>,
    /// 0 takes the argmax; above, tokens are drawn from softmax(logits / temperature).
    pub temperature: f32,
    /// Whether confidences are taken after the temperature (Dream) or from the plain logits (LLaDA).
    pub tempered_confidence: bool,
    /// Guidance w, above 0; needs unconditional logits, which are not looked at when it is 0.
    pub cfg_scale: f32,
    /// Above 0, with [`Policy::Fixed`], rows are drawn from softmax(confidence / alg_temp).
    pub alg_temp: f32,
    /// Seed of every random number.
    pub seed: u64,
    /// The token of masked positions, which is never chosen.
    pub mask_token: u32,
}

// SAFETY: four 32-bit integers, no padding; any bits are a value.
unsafe impl bytemuck::Zeroable for dllm_unmask_row {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for dllm_unmask_row {}

/// What a safe launch reads and writes.
pub struct Unmask<'a, T> {
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
    /// The batch's tokens, read and written.
    pub tokens: &'a mut Buffer<i32>,
    /// `[num_sequences]`: positions from here on are scored but not committed.
    pub commit_before: Option<&'a Buffer<i32>>,
    /// `[num_sequences]`: forwards that each sequence has had; keys the random numbers.
    pub steps: Option<&'a Buffer<i32>>,
    /// `[rows]`, from [`super::top_k_top_p`].
    pub min_logit: Option<&'a Buffer<f32>>,
    /// What becomes of them.
    pub outcome: &'a mut Outcome,
    /// Of the size that [`plan`] asks for these rows and this vocabulary: see [`workspace`].
    pub workspace: &'a mut Workspace,
}

/// What unmask tells, on the device.
pub struct Outcome {
    /// `[num_sequences]`: rows that could be committed and still are masked.
    pub masks_left: Buffer<i32>,
    /// `[num_sequences]`: rows committed.
    pub committed: Buffer<i32>,
    /// `[num_sequences]`: position of the first row without a finite logit, -1 when there is none; -2 when the row table
    /// points outside the tokens or logits. A sequence that failed commits nothing.
    pub failed: Buffer<i32>,
    /// `[rows]`: each masked row's token, -1 elsewhere.
    pub predicted: Buffer<i32>,
    /// `[rows]`: each masked row's confidence, 0 elsewhere.
    pub confidence: Buffer<f32>,
}

impl Outcome {
    /// Room for what becomes of these rows.
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

/// A workspace for launches over these rows and this vocabulary.
pub fn workspace(stream: &Stream, rows: &RowTable, vocab_size: usize) -> Result<Workspace> {
    let params = dllm_unmask_params {
        max_rows: buffers::count("rows", rows.len().max(1))?,
        num_sequences: buffers::count("sequences", rows.num_sequences())?,
        vocab_size: buffers::count("vocab_size", vocab_size)?,
        ..Default::default()
    };
    Workspace::new(stream, &plan(&params), layout(&params))
}

/// What the places of the workspace's counters depend on.
fn layout(params: &dllm_unmask_params) -> Layout {
    Layout("unmask", [params.num_sequences, params.max_rows, params.vocab_size])
}

/// Launches on our buffers, and returns. A table without sequences or rows launches nothing.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short, belongs to another stream, or the rule is out of range; the driver's.
pub fn launch<T: Element>(stream: &Stream, unmask: Unmask<T>, rule: &UnmaskConfig) -> Result<()> {
    let Unmask { logits, uncond_logits, vocab_size, logits_stride, rows, tokens, .. } = unmask;
    let Unmask { commit_before, steps, min_logit, outcome, workspace, .. } = unmask;
    let (num_rows, num_sequences) = (rows.len(), rows.num_sequences());
    if num_sequences == 0 {
        return Ok(());
    }
    let guided = |_: &&Buffer<T>| rule.cfg_scale != 0.0;
    let num_logits_rows = buffers::num_rows("logits", logits.len(), vocab_size, logits_stride)?;
    let (policy, quota, threshold, factor) = match rule.policy {
        Policy::Fixed(quota) => (abi::DLLM_POLICY_FIXED, Some(quota), 0.0, 0.0),
        Policy::Threshold { threshold, top_n } => (abi::DLLM_POLICY_THRESHOLD, top_n, threshold, 0.0),
        Policy::Factor(factor) => (abi::DLLM_POLICY_FACTOR, None, 0.0, factor),
    };
    let confidence_kind = match rule.confidence {
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
        min_logit: buffers::optional("cut", min_logit, num_rows, stream)?,
        masks_left: buffers::buffer("masks_left", &outcome.masks_left, num_sequences, stream)?,
        committed: buffers::buffer("committed", &outcome.committed, num_sequences, stream)?,
        failed: buffers::buffer("failed", &outcome.failed, num_sequences, stream)?,
        predicted: buffers::buffer("chosen", &outcome.predicted, num_rows, stream)?,
        confidence: buffers::buffer("confidence", &outcome.confidence, num_rows, stream)?,
        workspace: 0,
        workspace_bytes: 0,
        seed: rule.seed,
        logits_stride: logits_stride as i64,
        max_rows: buffers::count("rows", num_rows.max(1))?,
        num_sequences: buffers::count("sequences", num_sequences)?,
        num_tokens: buffers::count("tokens", tokens.len())?,
        num_logits_rows,
        vocab_size: buffers::count("vocab_size", vocab_size)?,
        mask_token: buffers::count("mask_token", rule.mask_token as usize)?,
        dtype: T::DTYPE as i32,
        confidence_kind: confidence_kind as i32,
        policy: policy as i32,
        tempered_confidence: rule.tempered_confidence.into(),
        temperature: rule.temperature,
        cfg_scale: rule.cfg_scale,
        alg_temp: rule.alg_temp,
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
