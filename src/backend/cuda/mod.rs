//! The CUDA backend: weights and activations in bf16 on the device, logits in f32; the crate's kernels, and products by
//! cuBLASLt.
//!
//! Where the rows of a pass stand lies in device memory too ([`Rows`]), so that a graph of launches can be replayed for
//! other rows of the same [`Room`](super::Room). Nothing here waits for the device but [`Backend::read`].

mod rows;
mod staging;

pub use rows::Rows;
pub(crate) use staging::Staging;

use super::{Backend, Heads, Needs, Placement};
use crate::abi;
use crate::error::{Error, Result};
use crate::gpu::blas::{Blas, Shape};
use crate::gpu::{Buffer, Device, Stream};
use crate::ops;
use crate::tensor::Tensor;
use half::bf16;
use staging::Uploader;
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
        let bytes = (layer * self.positions * self.width * size_of::<bf16>()) as u64;
        [self.k.address() + bytes, self.v.address() + bytes]
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
    pub(crate) fn session_bytes(needs: &Needs, slots: usize, multiprocessors: usize) -> usize {
        let angles = needs.longest * needs.heads.head_dim / 2 * size_of::<[f32; 2]>();
        let workspace = attention_workspace(needs, multiprocessors) * size_of::<f32>();
        let ints = needs.tokens + slots * Rows::len(needs);
        Blas::memory_bytes() + angles + workspace + ints * size_of::<i32>()
    }
}

fn unprepared() -> Error {
    Error::Unavailable("the CUDA backend was not prepared for a session".into())
}

/// As the op calls them.
pub(crate) fn op_heads(heads: Heads) -> ops::attention::Heads {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    ops::attention::Heads { num_heads, num_kv_heads, head_dim }
}

/// Floats of workspace that attention needs in any pass of a session.
pub(crate) fn attention_workspace(needs: &Needs, multiprocessors: usize) -> usize {
    let heads = op_heads(needs.heads);
    let of = |longest: usize| {
        let splits = ops::attention::splits(longest, heads, multiprocessors);
        ops::attention::workspace_len((needs.spans * longest).min(needs.rows), heads, splits)
    };
    // Longer spans are not split.
    (1..=needs.longest.min(256)).map(of).max().unwrap_or(0)
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

    fn prepare(&mut self, needs: &Needs, theta: f32) -> Result<()> {
        let stream = &self.stream;
        self.session = Some(Prepared {
            blas: Blas::new(stream)?,
            tokens: stream.alloc(needs.tokens)?,
            token_staging: Staging::new(stream, needs.tokens)?,
            angles: ops::rope::angles(stream, theta, needs.heads.head_dim, needs.longest)?,
            num_positions: needs.longest,
            workspace: stream.alloc(attention_workspace(needs, self.multiprocessors))?,
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

    fn rows(&self, needs: &Needs) -> Result<Rows> {
        Rows::new(&self.stream, needs)
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let session = self.prepared()?;
        session.token_staging.write(&mut session.tokens, &tokens)
    }

    fn place(&mut self, rows: &mut Rows, placement: &Placement) -> Result<()> {
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

    fn add_norm(
        &mut self,
        x: &mut Activations,
        delta: Option<&Activations>,
        weight: &Buffer<bf16>,
        eps: f32,
        out: &mut Activations,
        rows: usize,
    ) -> Result<()> {
        let width = weight.len() as i64;
        let params = abi::dllm_norm_params {
            size: size_of::<abi::dllm_norm_params>() as u64,
            x: x.address(),
            delta: delta.map_or(0, Activations::address),
            weight: weight.address(),
            out: out.address(),
            x_stride: width,
            delta_stride: width,
            out_stride: width,
            max_rows: count("rows", rows)?,
            width: count("width", weight.len())?,
            dtype: BF16,
            eps,
            ..Default::default()
        };
        // SAFETY: buffers of the session, of these sizes and distinct; weights of the model, which outlives it.
        unsafe { ops::norm::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn linear(&mut self, x: &Activations, w: &Matrix, out: &mut Activations, rows: usize) -> Result<()> {
        let f32_out = matches!(out, Activations::F32(_));
        let shape = Shape { rows, out: w.rows, inner: w.cols, f32_out, biased: w.bias.is_some() };
        let bias = w.bias.as_ref().map_or(0, Buffer::address);
        let (x, out) = (x.address(), out.address());
        // SAFETY: as above.
        unsafe { self.prepared()?.blas.launch(shape, x, w.weights.address(), bias, out) }
    }

    fn rope(
        &mut self,
        qkv: &mut Activations,
        heads: Heads,
        rows: &Rows,
        store: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let Some(session) = &self.session else { return Err(unprepared()) };
        let mut params = abi::dllm_rope_params {
            size: size_of::<abi::dllm_rope_params>() as u64,
            qkv: qkv.address(),
            positions: rows.positions(),
            angles: session.angles.address(),
            qkv_stride: heads.qkv_width() as i64,
            max_rows: count("rows", rows.room().rows)?,
            num_positions: count("positions", session.num_positions)?,
            num_heads: count("num_heads", heads.num_heads)?,
            num_kv_heads: count("num_kv_heads", heads.num_kv_heads)?,
            head_dim: count("head_dim", heads.head_dim)?,
            dtype: BF16,
            ..Default::default()
        };
        if let Some((cache, layer)) = store {
            [params.k_cache, params.v_cache] = cache.layer(layer);
            params.cache_row = rows.cache_rows();
            params.cache_stride = cache.width as i64;
            params.num_cache_rows = count("positions", cache.positions)?;
        }
        // SAFETY: as above; positions and cache rows are checked on the device, and the placement gives no cache row twice.
        unsafe { ops::rope::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn attention(
        &mut self,
        qkv: &Activations,
        heads: Heads,
        rows: &Rows,
        reuse: Option<(&KvCache, usize)>,
        out: &mut Activations,
    ) -> Result<()> {
        let Some(session) = &self.session else { return Err(unprepared()) };
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let room = rows.room();
        let bytes = |elements: usize| (elements * size_of::<bf16>()) as u64;
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
            let [k, v] = cache.layer(layer);
            let part = |[start, len]: [u64; 2]| -> Result<abi::dllm_segment> {
                let (stride, num_rows) = (cache.width as i64, count("positions", cache.positions)?);
                Ok(abi::dllm_segment { k, v, start, len, k_stride: stride, v_stride: stride, num_rows, ..live })
            };
            segments = [part(rows.prefix())?, live, part(rows.suffix())?];
        }
        let splits = ops::attention::splits(room.longest, op_heads(heads), self.multiprocessors);
        let params = abi::dllm_attention_params {
            size: size_of::<abi::dllm_attention_params>() as u64,
            q: qkv.address(),
            out: out.address(),
            cu_rows: rows.cu_rows(),
            segments,
            workspace: session.workspace.address(),
            workspace_bytes: (session.workspace.len() * size_of::<f32>()) as u64,
            q_stride: heads.qkv_width() as i64,
            out_stride: q as i64,
            scale: 1.0 / (head_dim as f32).sqrt(),
            max_rows: count("rows", room.rows)?,
            max_sequence_rows: count("rows", room.longest)?,
            num_sequences: count("sequences", rows.spans())?,
            num_heads: count("num_heads", num_heads)?,
            num_kv_heads: count("num_kv_heads", num_kv_heads)?,
            head_dim: count("head_dim", head_dim)?,
            dtype: BF16,
            max_splits: count("splits", splits)?,
            ..Default::default()
        };
        // SAFETY: as above; starts and lengths are checked on the device, and no span is longer than the room says.
        unsafe { ops::attention::launch_raw(self.stream.device(), self.stream.raw(), &params) }
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
        let row_bytes = (width * size_of::<bf16>()) as i64;
        let params = abi::dllm_rows_params {
            size: size_of::<abi::dllm_rows_params>() as u64,
            source: x.address(),
            target: out.address(),
            index: rows.scored(),
            source_stride_bytes: row_bytes,
            target_stride_bytes: row_bytes,
            row_bytes,
            max_rows: count("rows", rows.room().scored)?,
            num_indexed_rows: count("rows", rows.room().rows)?,
            ..Default::default()
        };
        // SAFETY: as above; indices are checked on the device.
        unsafe { ops::rows::launch_raw(self.stream.device(), self.stream.raw(), &params, ops::rows::Copy::Gather) }
    }

    fn read(&self, buffer: &Activations, rows: usize, width: usize) -> Result<Vec<f32>> {
        let mut all: Vec<f32> = match buffer {
            Activations::Bf16(buffer) => buffer.read()?.iter().map(|x| x.to_f32()).collect(),
            Activations::F32(buffer) => buffer.read()?,
        };
        all.truncate(rows * width);
        Ok(all)
    }
}
