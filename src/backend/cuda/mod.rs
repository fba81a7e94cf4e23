//! The CUDA backend: weights and activations in bf16 on the device, logits in f32; the crate's kernels, and products by
//! cuBLASLt.
//!
//! Where the rows of a pass stand lies in device memory too ([`Rows`]), so that a graph of launches can be replayed for
//! other rows of the same [`LaunchBucket`]. Nothing here waits for the device but [`Backend::read`].

mod rows;
mod staging;

pub use rows::Rows;
pub(crate) use staging::Staging;

use super::{Backend, BatchMetadata, Heads, LaunchBucket, RowSet, SessionLimits, UpdateRanges};
use crate::abi;
use crate::error::{Error, Result};
use crate::gpu::blas::{Blas, Shape};
use crate::gpu::{Buffer, Device, Stream};
use crate::ops;
use crate::ops::gather_scatter::Copy;
use crate::tensor::Tensor;
use half::bf16;
use staging::Uploader;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A stream of a device, and what passes need there. One per decode.
pub struct Cuda {
    stream: Stream,
    multiprocessors: usize,
    /// Until weights have been loaded with it, or a session was made of it.
    uploader: Mutex<Option<Uploader>>,
    session: Option<Prepared>,
}

/// What a session adds.
struct Prepared {
    blas: Blas,
    tokens: Buffer<i32>,
    token_staging: Staging<i32>,
    angles: Buffer<[f32; 2]>,
    num_positions: usize,
    /// For the splits of attention.
    workspace: Buffer<f32>,
    /// For V-verify, where choices are made.
    vverify: Option<Buffer<u8>>,
    /// Rows of all sequences, as caches have them.
    rows: usize,
}

/// A weight matrix `[rows, cols]`.
pub struct Matrix {
    weights: Buffer<bf16>,
    bias: Option<Buffer<bf16>>,
    rows: usize,
    cols: usize,
}

/// Activations, or logits.
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

/// Keys (rotated) and values `[layers, positions, width]`.
pub struct KvCache {
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    positions: usize,
    width: usize,
}

impl KvCache {
    /// Where the keys and the values of a layer begin.
    fn layer(&self, layer: usize) -> [u64; 2] {
        let bytes = bytes(layer * self.positions * self.width);
        [self.k.address() + bytes, self.v.address() + bytes]
    }

    /// Part of a layer, by tables of starts and lengths for each span.
    fn segment(&self, layer: usize, [start, len]: [u64; 2]) -> Result<abi::dllm_segment> {
        let [k, v] = self.layer(layer);
        let (stride, num_rows) = (self.width as i64, count("positions", self.positions)?);
        Ok(abi::dllm_segment { k, v, start, len, k_stride: stride, v_stride: stride, num_rows, ..Default::default() })
    }
}

impl Cuda {
    /// A new stream of the device.
    pub fn new(device: &Device) -> Result<Cuda> {
        let (stream, multiprocessors) = (device.stream()?, device.multiprocessors()?);
        Ok(Cuda { stream, multiprocessors, uploader: Mutex::new(None), session: None })
    }

    /// The same, for loading weights; `progress` is told of the bytes that are on the device.
    pub fn for_weights(device: &Device, progress: impl FnMut(u64) + Send + 'static) -> Result<Cuda> {
        let cuda = Cuda::new(device)?;
        let uploader = Uploader::new(&cuda.stream, Box::new(progress))?;
        *cuda.uploader.lock().unwrap_or_else(PoisonError::into_inner) = Some(uploader);
        Ok(cuda)
    }

    /// The stream that everything is put into.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The tokens that rows are embedded of, on the device.
    pub(crate) fn tokens(&self) -> Result<&Buffer<i32>> {
        self.session.as_ref().map(|session| &session.tokens).ok_or_else(unprepared)
    }

    fn prepared(&mut self) -> Result<&mut Prepared> {
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

    /// Device bytes that [`Backend::prepare`] and so many [`Backend::rows`] take.
    pub(crate) fn session_bytes(needs: &SessionLimits, slots: usize, multiprocessors: usize) -> usize {
        let angles = needs.longest * needs.heads.head_dim / 2 * size_of::<[f32; 2]>();
        let workspace = attention_workspace(needs, multiprocessors) * size_of::<f32>();
        let ints = needs.tokens + slots * Rows::len(needs);
        let vverify = if needs.selects { vverify_workspace(needs) } else { 0 };
        Blas::memory_bytes() + angles + workspace + vverify + ints * size_of::<i32>()
    }
}

/// What the ops of a pass have in common with those of chosen rows.
impl Cuda {
    /// Copies rows of `width` elements, of which an index is given for so many: [source, target], the indexed one with
    /// `num_indexed` rows.
    fn copy(
        &self,
        copy: Copy,
        [source, target]: [u64; 2],
        width: usize,
        (index, max_rows): (u64, usize),
        num_indexed: usize,
    ) -> Result<()> {
        let row_bytes = bytes(width) as i64;
        let params = abi::dllm_gather_scatter_params {
            size: size_of::<abi::dllm_gather_scatter_params>() as u64,
            source,
            target,
            index,
            source_stride_bytes: row_bytes,
            target_stride_bytes: row_bytes,
            row_bytes,
            max_rows: count("rows", max_rows)?,
            num_indexed_rows: count("rows", num_indexed)?,
            ..Default::default()
        };
        // SAFETY: buffers of the session, of these sizes; indices are checked on the device, and a placement gives no row of
        // a cache twice.
        unsafe { ops::gather_scatter::launch_raw(self.stream.device(), self.stream.raw(), &params, copy) }
    }

    /// Fills in what all norms have in common, and launches.
    fn norm(&self, params: abi::dllm_norm_params, weight: &Buffer<bf16>, rows: usize) -> Result<()> {
        let width = weight.len() as i64;
        let params = abi::dllm_norm_params {
            size: size_of::<abi::dllm_norm_params>() as u64,
            weight: weight.address(),
            x_stride: width,
            delta_stride: width,
            out_stride: width,
            max_rows: count("rows", rows)?,
            width: count("width", weight.len())?,
            dtype: BF16,
            ..params
        };
        // SAFETY: buffers of the session, of these sizes and distinct; weights of the model, which outlives it; rows of what
        // is added are checked on the device.
        unsafe { ops::norm::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    /// The same of rotations; values go to the cache where rows have room for them.
    fn rotate(&self, params: abi::dllm_rope_params, heads: Heads, store: Option<(&mut KvCache, usize)>) -> Result<()> {
        let Some(session) = &self.session else { return Err(unprepared()) };
        let mut params = abi::dllm_rope_params {
            size: size_of::<abi::dllm_rope_params>() as u64,
            angles: session.angles.address(),
            num_positions: count("positions", session.num_positions)?,
            num_heads: count("num_heads", heads.num_heads)?,
            num_kv_heads: count("num_kv_heads", heads.num_kv_heads)?,
            head_dim: count("head_dim", heads.head_dim)?,
            dtype: BF16,
            ..params
        };
        if let Some((cache, layer)) = store {
            let [k, v] = cache.layer(layer);
            params.k_cache = k;
            params.v_cache = if params.qkv_stride == heads.qkv_width() as i64 { v } else { 0 };
            params.cache_stride = cache.width as i64;
            params.num_cache_rows = count("positions", cache.positions)?;
        }
        // SAFETY: as above; positions and cache rows are checked on the device, and the placement gives no cache row twice.
        unsafe { ops::rope::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    /// The same of attention: launches of so many rows, and so many of one span at most.
    fn attend(&self, params: abi::dllm_attention_params, heads: Heads, max_rows: usize, longest: usize) -> Result<()> {
        let Some(session) = &self.session else { return Err(unprepared()) };
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let splits = ops::attention::splits(longest, heads, self.multiprocessors);
        let params = abi::dllm_attention_params {
            size: size_of::<abi::dllm_attention_params>() as u64,
            workspace: session.workspace.address(),
            workspace_bytes: (session.workspace.len() * size_of::<f32>()) as u64,
            out_stride: (num_heads * head_dim) as i64,
            scale: 1.0 / (head_dim as f32).sqrt(),
            max_rows: count("rows", max_rows)?,
            max_sequence_rows: count("rows", longest)?,
            num_heads: count("num_heads", num_heads)?,
            num_kv_heads: count("num_kv_heads", num_kv_heads)?,
            head_dim: count("head_dim", head_dim)?,
            dtype: BF16,
            max_splits: count("splits", splits)?,
            ..params
        };
        // SAFETY: as above; starts and lengths are checked on the device, and no span is longer than that.
        unsafe { ops::attention::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }
}

/// Of so many elements.
fn bytes(elements: usize) -> u64 {
    (elements * size_of::<bf16>()) as u64
}

/// Elements of a chosen row, with values or without.
fn selected_width(heads: Heads, values: bool) -> usize {
    heads.qkv_width() - if values { 0 } else { heads.num_kv_heads * heads.head_dim }
}

fn unprepared() -> Error {
    Error::Unavailable("the CUDA backend was not prepared for a session".into())
}

/// Floats of workspace that attention needs in any pass of a session.
pub(crate) fn attention_workspace(needs: &SessionLimits, multiprocessors: usize) -> usize {
    let heads = needs.heads;
    let of = |longest: usize| {
        let splits = ops::attention::splits(longest, heads, multiprocessors);
        ops::attention::workspace_len((needs.spans * longest).min(needs.rows), heads, splits)
    };
    // Longer spans are not split.
    (1..=needs.longest.min(256)).map(of).max().unwrap_or(0)
}

/// Bytes of workspace that V-verify needs in any pass of a session.
fn vverify_workspace(needs: &SessionLimits) -> usize {
    let most = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
    let (max_rows, num_sequences) = (most(needs.rows), most(needs.spans));
    let params = abi::dllm_vverify_params { max_rows, num_sequences, ..Default::default() };
    ops::vverify::plan(&params).workspace_bytes as usize
}

fn count(name: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument(name, format!("at most {}", i32::MAX), value))
}

const BF16: i32 = abi::DLLM_BF16 as i32;

impl Backend for Cuda {
    type Buffer = Activations;
    type Matrix = Matrix;
    type Vector = Buffer<bf16>;
    type Cache = KvCache;
    type Rows = Rows;

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

    fn prepare(&mut self, needs: &SessionLimits, theta: f32) -> Result<()> {
        let stream = &self.stream;
        let vverify = match needs.selects {
            true => Some(stream.zeros(vverify_workspace(needs))?),
            false => None,
        };
        self.session = Some(Prepared {
            blas: Blas::new(stream)?,
            tokens: stream.alloc(needs.tokens)?,
            token_staging: Staging::new(stream, needs.tokens)?,
            angles: ops::rope::angles(stream, theta, needs.heads.head_dim, needs.longest)?,
            num_positions: needs.longest,
            workspace: stream.alloc(attention_workspace(needs, self.multiprocessors))?,
            vverify,
            rows: needs.rows,
        });
        Ok(())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Activations> {
        Ok(Activations::Bf16(self.stream.alloc(rows * width)?))
    }

    fn logits(&self, rows: usize, vocab_size: usize) -> Result<Activations> {
        Ok(Activations::F32(self.stream.alloc(rows * vocab_size)?))
    }

    fn cache(&self, layers: usize, positions: usize, width: usize) -> Result<KvCache> {
        let elements = || self.stream.alloc(layers * positions * width);
        Ok(KvCache { k: elements()?, v: elements()?, positions, width })
    }

    fn rows(&self, needs: &SessionLimits) -> Result<Rows> {
        Rows::new(&self.stream, needs)
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let session = self.prepared()?;
        session.token_staging.write(&mut session.tokens, &tokens)
    }

    fn set_batch(&mut self, rows: &mut Rows, placement: &BatchMetadata) -> Result<()> {
        let mask_slot = self.tokens()?.len() - 1;
        rows.write(placement, mask_slot)
    }

    fn embed(&mut self, table: &Matrix, rows: &Rows, out: &mut Activations) -> Result<()> {
        let tokens = self.tokens()?;
        let row_bytes = (table.cols * size_of::<bf16>()) as i64;
        let params = abi::dllm_embed_params {
            size: size_of::<abi::dllm_embed_params>() as u64,
            table: table.weights.address(),
            tokens: tokens.address(),
            index: rows.tokens(),
            out: out.address(),
            table_stride_bytes: row_bytes,
            out_stride_bytes: row_bytes,
            row_bytes,
            max_rows: count("rows", rows.room().rows)?,
            num_tokens: count("tokens", tokens.len())?,
            vocab_size: count("vocab_size", table.rows)?,
            ..Default::default()
        };
        // SAFETY: buffers of the session, of these sizes; tokens and indices are checked on the device.
        unsafe { ops::embed::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn residual_norm(
        &mut self,
        x: &mut Activations,
        delta: Option<&Activations>,
        weight: &Buffer<bf16>,
        eps: f32,
        out: &mut Activations,
        rows: usize,
    ) -> Result<()> {
        let params = abi::dllm_norm_params {
            x: x.address(),
            delta: delta.map_or(0, Activations::address),
            out: out.address(),
            eps,
            ..Default::default()
        };
        self.norm(params, weight, rows)
    }

    fn linear(&mut self, x: &Activations, w: &Matrix, out: &mut Activations, rows: usize) -> Result<()> {
        self.linear_part(x, w, 0..w.rows, out, rows)
    }

    fn linear_part(
        &mut self,
        x: &Activations,
        w: &Matrix,
        outputs: Range<usize>,
        out: &mut Activations,
        rows: usize,
    ) -> Result<()> {
        let f32_out = matches!(out, Activations::F32(_));
        let shape = Shape { rows, out: outputs.len(), inner: w.cols, f32_out, biased: w.bias.is_some() };
        let weights = w.weights.address() + bytes(outputs.start * w.cols);
        let bias = w.bias.as_ref().map_or(0, |bias| bias.address() + bytes(outputs.start));
        let (x, out) = (x.address(), out.address());
        // SAFETY: as above; the outputs lie within the matrix.
        unsafe { self.prepared()?.blas.launch(shape, x, weights, bias, out) }
    }

    fn rope(
        &mut self,
        qkv: &mut Activations,
        heads: Heads,
        rows: &Rows,
        store: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let params = abi::dllm_rope_params {
            qkv: qkv.address(),
            positions: rows.positions(),
            cache_row: if store.is_some() { rows.cache_rows() } else { 0 },
            qkv_stride: heads.qkv_width() as i64,
            max_rows: count("rows", rows.room().rows)?,
            ..Default::default()
        };
        self.rotate(params, heads, store)
    }

    fn attention(
        &mut self,
        qkv: &Activations,
        heads: Heads,
        rows: &Rows,
        reuse: Option<(&KvCache, usize)>,
        out: &mut Activations,
    ) -> Result<()> {
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let room = rows.room();
        let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
        let live = abi::dllm_segment {
            k: qkv.address() + bytes(q),
            v: qkv.address() + bytes(q + kv),
            start: rows.cu_rows(),
            len: rows.live_lens(),
            k_stride: heads.qkv_width() as i64,
            v_stride: heads.qkv_width() as i64,
            num_rows: count("rows", room.rows)?,
            ..Default::default()
        };
        let mut segments = [abi::dllm_segment::default(), live, abi::dllm_segment::default()];
        if let Some((cache, layer)) = reuse {
            segments = [cache.segment(layer, rows.prefix())?, live, cache.segment(layer, rows.suffix())?];
        }
        let params = abi::dllm_attention_params {
            q: qkv.address(),
            out: out.address(),
            cu_rows: rows.cu_rows(),
            segments,
            q_stride: heads.qkv_width() as i64,
            num_sequences: count("sequences", rows.spans())?,
            ..Default::default()
        };
        self.attend(params, heads, room.rows, room.longest)
    }

    fn swiglu(&mut self, gate_up: &Activations, width: usize, out: &mut Activations, rows: usize) -> Result<()> {
        let params = abi::dllm_swiglu_params {
            size: size_of::<abi::dllm_swiglu_params>() as u64,
            gate_up: gate_up.address(),
            out: out.address(),
            gate_up_stride: 2 * width as i64,
            out_stride: width as i64,
            max_rows: count("rows", rows)?,
            width: count("width", width)?,
            dtype: BF16,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { ops::swiglu::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn gather(&mut self, x: &Activations, rows: &Rows, width: usize, out: &mut Activations) -> Result<()> {
        let LaunchBucket { rows: all, logit_rows, .. } = rows.room();
        self.copy(Copy::Gather, [x.address(), out.address()], width, (rows.logit_rows(), logit_rows), all)
    }

    fn select_rows(
        &mut self,
        values: Option<&Activations>,
        _heads: Heads,
        rows: &mut Rows,
        (cache, layer): (&mut KvCache, usize),
    ) -> Result<()> {
        let (Some(tables), Some(values)) = (rows.choice(), values) else { return Ok(()) };
        let ([_, cached], width) = (cache.layer(layer), cache.width);
        let LaunchBucket { rows: all, selected, .. } = rows.room();
        let compared = |parts: &&UpdateRanges| parts.count() < parts.num_others();
        let compared = rows.parts().iter().find(compared).and_then(|parts| parts.share);
        if let Some(share) = compared {
            let workspace = self.prepared()?.vverify.as_ref().ok_or_else(unprepared)?;
            let params = abi::dllm_vverify_params {
                size: size_of::<abi::dllm_vverify_params>() as u64,
                fresh: values.address(),
                fresh_row: tables.others[0],
                cached,
                cached_row: tables.others[2],
                cu_rows: tables.cu_others,
                indices: tables.numbers,
                tables: tables.others,
                selected: tables.selected,
                first_selected: tables.first_other,
                cu_selected: tables.cu_selected,
                workspace: workspace.address(),
                workspace_bytes: workspace.len() as u64,
                fresh_stride: width as i64,
                cached_stride: width as i64,
                ratio: share.get(),
                max_rows: count("rows", all)?,
                num_sequences: count("sequences", rows.spans())?,
                num_fresh_rows: count("rows", all)?,
                num_cached_rows: count("positions", cache.positions)?,
                num_listed: count("rows", selected)?,
                width: count("width", width)?,
                dtype: BF16,
                update_cached: 1,
                ..Default::default()
            };
            // SAFETY: as above; rows are checked on the device, and the placement gives no cache row twice. The workspace was
            // zeroed, and is V-verify's alone.
            unsafe { ops::vverify::launch_raw(self.stream.device(), self.stream.raw(), &params) }?;
        }
        // V-verify has renewed the others.
        if compared.is_some() && rows.parts().iter().all(|parts| parts.always.is_empty()) {
            return Ok(());
        }
        self.copy(Copy::Scatter, [values.address(), cached], width, (tables.stored, all), cache.positions)
    }

    fn selected(&self, rows: &Rows) -> Result<Vec<Vec<usize>>> {
        rows.numbers()
    }

    fn gather_selected(&mut self, x: &Activations, rows: &Rows, width: usize, out: &mut Activations) -> Result<()> {
        let LaunchBucket { rows: all, selected, .. } = rows.room();
        let index = rows.choice().ok_or_else(unprepared)?.selected[0];
        self.copy(Copy::Gather, [x.address(), out.address()], width, (index, selected), all)
    }

    fn rope_selected(
        &mut self,
        qkv: &mut Activations,
        heads: Heads,
        rows: &Rows,
        cache: (&mut KvCache, usize),
        values: bool,
    ) -> Result<()> {
        let [_, positions, cache_row] = rows.choice().ok_or_else(unprepared)?.selected;
        let params = abi::dllm_rope_params {
            qkv: qkv.address(),
            positions,
            cache_row,
            qkv_stride: selected_width(heads, values) as i64,
            max_rows: count("rows", rows.room().selected)?,
            ..Default::default()
        };
        self.rotate(params, heads, Some(cache))
    }

    fn attention_selected(
        &mut self,
        qkv: &Activations,
        heads: Heads,
        rows: &Rows,
        (cache, layer): (&KvCache, usize),
        values: bool,
        out: &mut Activations,
    ) -> Result<()> {
        let tables = rows.choice().ok_or_else(unprepared)?;
        let none = abi::dllm_segment::default();
        let params = abi::dllm_attention_params {
            q: qkv.address(),
            out: out.address(),
            cu_rows: tables.cu_selected_rows,
            segments: [cache.segment(layer, tables.cached)?, none, none],
            q_stride: selected_width(heads, values) as i64,
            num_sequences: count("sequences", rows.spans())?,
            ..Default::default()
        };
        self.attend(params, heads, rows.room().selected, rows.room().longest_selected)
    }

    fn store_features(
        &mut self,
        delta: &Activations,
        part: RowSet,
        width: usize,
        rows: &Rows,
        (feature_cache, first_row): (&mut Activations, usize),
    ) -> Result<()> {
        let (index, max_rows) = match part {
            RowSet::All => (rows.cache_rows(), rows.room().rows),
            RowSet::Selected => (rows.choice().ok_or_else(unprepared)?.selected[2], rows.room().selected),
        };
        let feature_cache = feature_cache.address() + bytes(first_row * width);
        let positions = self.prepared()?.rows;
        self.copy(Copy::Scatter, [delta.address(), feature_cache], width, (index, max_rows), positions)
    }

    fn residual_norm_features(
        &mut self,
        x: &mut Activations,
        (feature_cache, first_row): (&Activations, usize),
        rows: &Rows,
        weight: &Buffer<bf16>,
        eps: f32,
        out: &mut Activations,
    ) -> Result<()> {
        let params = abi::dllm_norm_params {
            x: x.address(),
            delta: feature_cache.address() + bytes(first_row * weight.len()),
            delta_row: rows.cache_rows(),
            num_delta_rows: count("positions", self.prepared()?.rows)?,
            out: out.address(),
            eps,
            ..Default::default()
        };
        self.norm(params, weight, rows.room().rows)
    }

    fn read(&self, buffer: &Activations, rows: usize, width: usize) -> Result<Vec<f32>> {
        match buffer {
            Activations::Bf16(buffer) => Ok(buffer.read_first(rows * width)?.iter().map(|x| x.to_f32()).collect()),
            Activations::F32(buffer) => buffer.read_first(rows * width),
        }
    }
}
