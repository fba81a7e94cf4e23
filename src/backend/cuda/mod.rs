//! The CUDA backend: weights and activations in bf16 on the device, logits in f32. It runs the crate's kernels, and cuBLASLt
//! for matrix products.
//!
//! Metadata of a pass is in device memory too ([`CudaBatch`]), so that a captured graph can be replayed for other rows of the
//! same [`LaunchBucket`]. Only [`Backend::read`] and [`Backend::selected_rows`] synchronise.

mod batch;
mod decode_state;
mod kv_cache;
mod launches;
mod sampler;
mod staging;

pub use batch::CudaBatch;
pub(crate) use decode_state::{DecodeSizes, DecodeState, RowTable, RunStart, TableRow};
pub use kv_cache::KvCache;
pub(crate) use sampler::{SamplingInputs, SamplingKey};
use staging::{Staging, Uploader};

use super::{
    Backend, BatchMetadata, BufferKind, Heads, LaunchBucket, QkvRows, Residual, RowSet, SessionLimits, UpdateRanges,
};
use crate::abi;
use crate::error::{Error, Result};
use crate::gpu::blas::{Blas, Shape};
use crate::gpu::{Buffer, Device, Stream};
use crate::ops;
use crate::ops::gather_scatter::Copy;
use crate::tensor::Tensor;
use half::bf16;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A CUDA stream with the memory that passes need. One per decode.
pub struct Cuda {
    stream: Stream,
    multiprocessors: usize,
    /// Staging memory for weights; made at the first upload.
    uploader: Mutex<Option<Uploader>>,
    session: Option<SessionState>,
}

/// State of a session.
struct SessionState {
    blas: Blas,
    tokens: Buffer<i32>,
    token_staging: Staging<i32>,
    angles: Buffer<[f32; 2]>,
    num_positions: usize,
    /// Partial results of split attention.
    workspace: Buffer<f32>,
    /// Workspace of V-verify, when layers select rows.
    vverify: Option<Buffer<u8>>,
    /// Positions of all sequences: rows of a cache.
    rows: usize,
}

/// A weight matrix `[rows, cols]`.
pub struct Matrix {
    weights: Buffer<bf16>,
    bias: Option<Buffer<bf16>>,
    rows: usize,
    cols: usize,
}

/// A buffer of the CUDA backend.
pub enum Activations {
    /// Activations.
    Bf16(Buffer<bf16>),
    /// Logits.
    F32(Buffer<f32>),
}

impl Activations {
    pub(crate) fn address(&self) -> u64 {
        match self {
            Activations::Bf16(buffer) => buffer.address(),
            Activations::F32(buffer) => buffer.address(),
        }
    }
}

impl Cuda {
    /// Creates a backend on a new stream of the device.
    pub fn new(device: &Device) -> Result<Cuda> {
        let (stream, multiprocessors) = (device.stream()?, device.multiprocessors()?);
        Ok(Cuda { stream, multiprocessors, uploader: Mutex::new(None), session: None })
    }

    /// Creates a backend for loading weights. `progress` receives the number of bytes uploaded so far.
    pub fn for_weights(device: &Device, progress: impl FnMut(u64) + Send + 'static) -> Result<Cuda> {
        let cuda = Cuda::new(device)?;
        let uploader = Uploader::new(&cuda.stream, Box::new(progress))?;
        *cuda.uploader.lock().unwrap_or_else(PoisonError::into_inner) = Some(uploader);
        Ok(cuda)
    }

    /// The stream that all work is enqueued on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Tokens of all sequences, on the device.
    pub(crate) fn tokens(&self) -> Result<&Buffer<i32>> {
        self.session.as_ref().map(|session| &session.tokens).ok_or_else(unprepared)
    }

    fn session_mut(&mut self) -> Result<&mut SessionState> {
        self.session.as_mut().ok_or_else(unprepared)
    }

    fn upload(&self, parts: &[Tensor]) -> Result<Buffer<bf16>> {
        let len = |tensor: &Tensor| tensor.shape().iter().product::<usize>();
        let mut buffer = self.stream.alloc(parts.iter().map(len).sum())?;
        let mut uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner);
        if uploader.is_none() {
            *uploader = Some(Uploader::new(&self.stream, Box::new(|_| ()))?);
        }
        let Some(uploader) = uploader.as_mut() else { return Err(unprepared()) };
        let mut at = 0;
        for part in parts {
            uploader.upload(part, &mut buffer, at)?;
            at += len(part);
        }
        Ok(buffer)
    }

    /// Device bytes that [`Backend::prepare`] and `batches` calls of [`Backend::batch`] allocate.
    pub(crate) fn session_bytes(limits: &SessionLimits, batches: usize, multiprocessors: usize) -> usize {
        let angles = limits.longest * limits.heads.head_dim / 2 * size_of::<[f32; 2]>();
        let workspace = attention_workspace(limits, multiprocessors) * size_of::<f32>();
        let ints = limits.tokens + batches * CudaBatch::len(limits);
        let vverify = if limits.selects_rows { vverify_workspace(limits) } else { 0 };
        Blas::memory_bytes() + angles + workspace + vverify + ints * size_of::<i32>()
    }
}

/// Bytes of `elements` bf16 elements.
fn bytes(elements: usize) -> u64 {
    (elements * size_of::<bf16>()) as u64
}

/// Elements of a row `[q | k | v]`, or `[q | k]` without values.
fn qkv_width(heads: Heads, has_values: bool) -> usize {
    heads.qkv_width() - if has_values { 0 } else { heads.kv_width() }
}

fn unprepared() -> Error {
    Error::Unavailable("the CUDA backend was not prepared for a session".into())
}

/// Floats of workspace that attention needs in any pass within `limits`.
pub(crate) fn attention_workspace(limits: &SessionLimits, multiprocessors: usize) -> usize {
    let workspace_len = |longest: usize| {
        let rows = (limits.sequences * longest).min(limits.rows);
        attention_workspace_of(limits.heads, rows, longest, multiprocessors)
    };
    // Sequences of more rows are not split.
    (1..=limits.longest.min(256)).map(workspace_len).max().unwrap_or(0)
}

/// Floats of workspace that attention needs for `rows` query rows, at most `longest` of one sequence.
pub(crate) fn attention_workspace_of(heads: Heads, rows: usize, longest: usize, multiprocessors: usize) -> usize {
    let splits = ops::attention::splits(longest, heads, multiprocessors);
    ops::attention::workspace_len(rows, heads, splits)
}

/// Bytes of workspace that V-verify needs in any pass within `limits`.
fn vverify_workspace(limits: &SessionLimits) -> usize {
    let saturating_i32 = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
    let (max_rows, num_sequences) = (saturating_i32(limits.rows), saturating_i32(limits.sequences));
    let params = abi::dllm_vverify_params { max_rows, num_sequences, ..Default::default() };
    ops::vverify::plan(&params).workspace_bytes as usize
}

/// Converts a size to the ABI's type; the error names it.
fn checked_i32(name: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument(name, format!("at most {}", i32::MAX), value))
}

const BF16: i32 = abi::DLLM_BF16 as i32;

impl Backend for Cuda {
    type Buffer = Activations;
    type Matrix = Matrix;
    type Vector = Buffer<bf16>;
    type KvCache = KvCache;
    type Batch = CudaBatch;

    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Matrix> {
        let cols = parts.first().and_then(|part| part.shape().get(1).copied()).unwrap_or(0);
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        let weights = self.upload(&parts)?;
        let bias = if biases.is_empty() { None } else { Some(self.upload(&biases)?) };
        Ok(Matrix { weights, bias, rows, cols })
    }

    fn vector(&self, tensor: Tensor) -> Result<Buffer<bf16>> {
        self.upload(&[tensor])
    }

    fn prepare(&mut self, limits: &SessionLimits, rope_theta: f32) -> Result<()> {
        let stream = &self.stream;
        let vverify = if limits.selects_rows { Some(stream.zeros(vverify_workspace(limits))?) } else { None };
        self.session = Some(SessionState {
            blas: Blas::new(stream)?,
            tokens: stream.alloc(limits.tokens)?,
            token_staging: Staging::new(stream, limits.tokens)?,
            angles: ops::rope::angles(stream, rope_theta, limits.heads.head_dim, limits.longest)?,
            num_positions: limits.longest,
            workspace: stream.alloc(attention_workspace(limits, self.multiprocessors))?,
            vverify,
            rows: limits.rows,
        });
        Ok(())
    }

    fn buffer(&self, kind: BufferKind, rows: usize, width: usize) -> Result<Activations> {
        Ok(match kind {
            BufferKind::Activations => Activations::Bf16(self.stream.alloc(rows * width)?),
            BufferKind::Logits => Activations::F32(self.stream.alloc(rows * width)?),
        })
    }

    fn kv_cache(&self, layers: usize, positions: usize, width: usize) -> Result<KvCache> {
        let elements = || self.stream.alloc(layers * positions * width);
        Ok(KvCache::new(elements()?, elements()?, positions, width))
    }

    fn batch(&self, limits: &SessionLimits) -> Result<CudaBatch> {
        CudaBatch::new(&self.stream, limits)
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let session = self.session_mut()?;
        session.token_staging.write(&mut session.tokens, &tokens)
    }

    fn set_batch(&mut self, batch: &mut CudaBatch, metadata: &BatchMetadata) -> Result<()> {
        let mask_index = self.tokens()?.len() - 1;
        batch.write(metadata, mask_index)
    }

    fn embed(&mut self, table: &Matrix, batch: &CudaBatch, out: &mut Activations) -> Result<()> {
        let tokens = self.tokens()?;
        let row_bytes = bytes(table.cols) as i64;
        let params = abi::dllm_embed_params {
            size: size_of::<abi::dllm_embed_params>() as u64,
            table: table.weights.address(),
            tokens: tokens.address(),
            index: batch.tokens(),
            out: out.address(),
            table_stride_bytes: row_bytes,
            out_stride_bytes: row_bytes,
            row_bytes,
            max_rows: checked_i32("rows", batch.bucket().rows)?,
            num_tokens: checked_i32("tokens", tokens.len())?,
            vocab_size: checked_i32("vocab_size", table.rows)?,
            ..Default::default()
        };
        // SAFETY: buffers of the session, of these sizes. Tokens and indices are checked on the device.
        unsafe { ops::embed::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn residual_norm(
        &mut self,
        x: &mut Activations,
        residual: Residual<Cuda>,
        batch: &CudaBatch,
        (weight, eps): (&Buffer<bf16>, f32),
        out: &mut Activations,
        rows: usize,
    ) -> Result<()> {
        let mut params = abi::dllm_norm_params { x: x.address(), out: out.address(), eps, ..Default::default() };
        match residual {
            Residual::None => (),
            Residual::Rows(delta) => params.delta = delta.address(),
            Residual::Features(features, first_row) => {
                params.delta = features.address() + bytes(first_row * weight.len());
                params.delta_row = batch.cache_rows();
                params.num_delta_rows = checked_i32("positions", self.session_mut()?.rows)?;
            }
        }
        self.norm(params, weight, rows)
    }

    fn linear(
        &mut self,
        x: &Activations,
        w: &Matrix,
        outputs: Option<Range<usize>>,
        out: &mut Activations,
        rows: usize,
    ) -> Result<()> {
        let outputs = outputs.unwrap_or(0..w.rows);
        let f32_out = matches!(out, Activations::F32(_));
        let shape = Shape { rows, out: outputs.len(), inner: w.cols, f32_out, biased: w.bias.is_some() };
        let weights = w.weights.address() + bytes(outputs.start * w.cols);
        let bias = w.bias.as_ref().map_or(0, |bias| bias.address() + bytes(outputs.start));
        let (x, out) = (x.address(), out.address());
        // SAFETY: buffers of the session, of these sizes; the outputs are outputs of the matrix.
        unsafe { self.session_mut()?.blas.launch(shape, x, weights, bias, out) }
    }

    fn rope(
        &mut self,
        (qkv, QkvRows { rows, has_values }): (&mut Activations, QkvRows),
        heads: Heads,
        batch: &CudaBatch,
        store: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let (positions, cache_row, max_rows) = if rows == RowSet::Selected {
            let [_, positions, cache_row] = batch.update_tables().ok_or_else(unprepared)?.selected;
            (positions, cache_row, batch.bucket().selected)
        } else {
            (batch.positions(), batch.cache_rows(), batch.bucket().rows)
        };
        let params = abi::dllm_rope_params {
            qkv: qkv.address(),
            positions,
            cache_row: if store.is_some() { cache_row } else { 0 },
            qkv_stride: qkv_width(heads, has_values) as i64,
            max_rows: checked_i32("rows", max_rows)?,
            ..Default::default()
        };
        self.rotate(params, heads, store)
    }

    fn attention(
        &mut self,
        (qkv, QkvRows { rows, has_values }): (&Activations, QkvRows),
        heads: Heads,
        batch: &CudaBatch,
        cache: Option<(&KvCache, usize)>,
        out: &mut Activations,
    ) -> Result<()> {
        let bucket = batch.bucket();
        let stride = qkv_width(heads, has_values) as i64;
        let none = abi::dllm_segment::default();
        let (cu_rows, segments, max_rows, longest) = if rows == RowSet::Selected {
            let tables = batch.update_tables().ok_or_else(unprepared)?;
            let (cache, layer) = cache.ok_or_else(unprepared)?;
            let cached = cache.segment(layer, tables.cached)?;
            (tables.cu_selected_rows, [cached, none, none], bucket.selected, bucket.longest_selected)
        } else {
            let live = abi::dllm_segment {
                k: qkv.address() + bytes(heads.q_width()),
                v: qkv.address() + bytes(heads.q_width() + heads.kv_width()),
                start: batch.cu_rows(),
                len: batch.live_lens(),
                k_stride: stride,
                v_stride: stride,
                num_rows: checked_i32("rows", bucket.rows)?,
                ..Default::default()
            };
            let segments = match cache {
                Some((cache, layer)) => {
                    [cache.segment(layer, batch.prefix())?, live, cache.segment(layer, batch.suffix())?]
                }
                None => [none, live, none],
            };
            (batch.cu_rows(), segments, bucket.rows, bucket.longest)
        };
        let params = abi::dllm_attention_params {
            q: qkv.address(),
            out: out.address(),
            cu_rows,
            segments,
            q_stride: stride,
            num_sequences: checked_i32("sequences", batch.max_sequences())?,
            ..Default::default()
        };
        self.attend(params, heads, max_rows, longest)
    }

    fn swiglu(&mut self, gate_up: &Activations, width: usize, out: &mut Activations, rows: usize) -> Result<()> {
        let params = abi::dllm_swiglu_params {
            size: size_of::<abi::dllm_swiglu_params>() as u64,
            gate_up: gate_up.address(),
            out: out.address(),
            gate_up_stride: 2 * width as i64,
            out_stride: width as i64,
            max_rows: checked_i32("rows", rows)?,
            width: checked_i32("width", width)?,
            dtype: BF16,
            ..Default::default()
        };
        // SAFETY: distinct buffers of the session, of these sizes.
        unsafe { ops::swiglu::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn gather(
        &mut self,
        x: &Activations,
        batch: &CudaBatch,
        set: RowSet,
        width: usize,
        out: &mut Activations,
    ) -> Result<()> {
        let LaunchBucket { rows, logit_rows, selected, .. } = batch.bucket();
        let index = match set {
            RowSet::Selected => (batch.update_tables().ok_or_else(unprepared)?.selected[0], selected),
            RowSet::Logits => (batch.logit_rows(), logit_rows),
            RowSet::All => return Err(Error::argument("set", "a part of the rows", "all rows")),
        };
        self.copy(Copy::Gather, [x.address(), out.address()], width, index, rows)
    }

    fn select_rows(
        &mut self,
        values: Option<&Activations>,
        _heads: Heads,
        batch: &mut CudaBatch,
        (cache, layer): (&mut KvCache, usize),
    ) -> Result<()> {
        let (Some(tables), Some(values)) = (batch.update_tables(), values) else { return Ok(()) };
        let ([_, cached], width) = (cache.layer(layer), cache.width());
        let LaunchBucket { rows, selected, .. } = batch.bucket();
        let compares = |update: &&UpdateRanges| update.num_selected() < update.num_others();
        let compared_ratio = batch.updates().iter().find(compares).and_then(|update| update.ratio);
        if let Some(ratio) = compared_ratio {
            let workspace = self.session_mut()?.vverify.as_ref().ok_or_else(unprepared)?;
            let params = abi::dllm_vverify_params {
                size: size_of::<abi::dllm_vverify_params>() as u64,
                fresh: values.address(),
                fresh_row: tables.others[0],
                cached,
                cached_row: tables.others[2],
                cu_rows: tables.cu_others,
                indices: tables.indices,
                tables: tables.others,
                selected: tables.selected,
                first_selected: tables.first_other,
                cu_selected: tables.cu_selected,
                workspace: workspace.address(),
                workspace_bytes: workspace.len() as u64,
                fresh_stride: width as i64,
                cached_stride: width as i64,
                ratio: ratio.get(),
                max_rows: checked_i32("rows", rows)?,
                num_sequences: checked_i32("sequences", batch.max_sequences())?,
                num_fresh_rows: checked_i32("rows", rows)?,
                num_cached_rows: checked_i32("positions", cache.positions())?,
                num_listed: checked_i32("rows", selected)?,
                width: checked_i32("width", width)?,
                dtype: BF16,
                update_cached: 1,
                ..Default::default()
            };
            // SAFETY: buffers of the session, of these sizes. Rows are checked on the device, and the metadata names no cache row
            // twice. The workspace was zeroed, and only V-verify uses it.
            unsafe { ops::vverify::launch_raw(self.stream.device(), self.stream.raw(), &params) }?;
        }
        // V-verify has replaced the values of the other rows already.
        if compared_ratio.is_some() && batch.updates().iter().all(|update| update.always.is_empty()) {
            return Ok(());
        }
        self.copy(Copy::Scatter, [values.address(), cached], width, (tables.value_rows, rows), cache.positions())
    }

    fn selected_rows(&self, batch: &CudaBatch) -> Result<Vec<Vec<usize>>> {
        batch.read_selected()
    }

    fn store_features(
        &mut self,
        (delta, set): (&Activations, RowSet),
        width: usize,
        batch: &CudaBatch,
        (features, first_row): (&mut Activations, usize),
    ) -> Result<()> {
        let index = if set == RowSet::Selected {
            (batch.update_tables().ok_or_else(unprepared)?.selected[2], batch.bucket().selected)
        } else {
            (batch.cache_rows(), batch.bucket().rows)
        };
        let features = features.address() + bytes(first_row * width);
        let positions = self.session_mut()?.rows;
        self.copy(Copy::Scatter, [delta.address(), features], width, index, positions)
    }

    fn read(&self, buffer: &Activations, rows: usize, width: usize) -> Result<Vec<f32>> {
        match buffer {
            Activations::Bf16(buffer) => Ok(buffer.read_first(rows * width)?.iter().map(|x| x.to_f32()).collect()),
            Activations::F32(buffer) => buffer.read_first(rows * width),
        }
    }
}
