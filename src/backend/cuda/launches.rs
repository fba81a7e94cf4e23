//! Launches that several methods of the backend share, with the parameters that all of them have in common.

use super::{BF16, Cuda, KvCache, bytes, checked_i32, unprepared};
use crate::abi;
use crate::error::Result;
use crate::gpu::Buffer;
use crate::ops;
use crate::ops::gather_scatter::Copy;
use crate::tensor::Heads;
use half::bf16;

impl Cuda {
    /// Enqueues a copy of `max_rows` rows of `width` elements. `addresses` are source and target; `index` selects the rows of the
    /// source (gather) or target (scatter), which has `num_indexed` rows.
    pub(super) fn copy(
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
            max_rows: checked_i32("rows", max_rows)?,
            num_indexed_rows: checked_i32("rows", num_indexed)?,
            ..Default::default()
        };
        // SAFETY: buffers of the session, of these sizes. Indices are checked on the device, and the metadata of a pass names no
        // row of a cache twice.
        unsafe { ops::gather_scatter::launch_raw(self.stream.device(), self.stream.raw(), &params, copy) }
    }

    /// Enqueues a norm, after filling in the fields that all norms share.
    pub(super) fn norm(&self, params: abi::dllm_norm_params, weight: &Buffer<bf16>, rows: usize) -> Result<()> {
        let width = weight.len() as i64;
        let params = abi::dllm_norm_params {
            size: size_of::<abi::dllm_norm_params>() as u64,
            weight: weight.address(),
            x_stride: width,
            delta_stride: width,
            out_stride: width,
            max_rows: checked_i32("rows", rows)?,
            width: checked_i32("width", weight.len())?,
            dtype: BF16,
            ..params
        };
        // SAFETY: distinct buffers of the session, of these sizes; weights of the model, which outlives the session. Rows of the
        // residual are checked on the device.
        unsafe { ops::norm::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    /// Enqueues a rotation. Keys go to the cache of `store`, and values where rows hold them.
    pub(super) fn rotate(
        &self,
        params: abi::dllm_rope_params,
        heads: Heads,
        store: Option<(&mut KvCache, usize)>,
    ) -> Result<()> {
        let Some(session) = &self.session else { return Err(unprepared()) };
        let mut params = abi::dllm_rope_params {
            size: size_of::<abi::dllm_rope_params>() as u64,
            angles: session.angles.address(),
            num_positions: checked_i32("positions", session.num_positions)?,
            num_heads: checked_i32("num_heads", heads.num_heads)?,
            num_kv_heads: checked_i32("num_kv_heads", heads.num_kv_heads)?,
            head_dim: checked_i32("head_dim", heads.head_dim)?,
            dtype: BF16,
            ..params
        };
        if let Some((cache, layer)) = store {
            let [k, v] = cache.layer(layer);
            params.k_cache = k;
            params.v_cache = if params.qkv_stride == heads.qkv_width() as i64 { v } else { 0 };
            params.cache_stride = cache.width() as i64;
            params.num_cache_rows = checked_i32("positions", cache.positions())?;
        }
        // SAFETY: buffers of the session, of these sizes. Positions and cache rows are checked on the device, and the metadata
        // names no cache row twice.
        unsafe { ops::rope::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    /// Enqueues attention of `max_rows` query rows, at most `longest` of one sequence.
    pub(super) fn attend(
        &self,
        params: abi::dllm_attention_params,
        heads: Heads,
        max_rows: usize,
        longest: usize,
    ) -> Result<()> {
        let Some(session) = &self.session else { return Err(unprepared()) };
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let splits = ops::attention::splits(longest, heads, self.multiprocessors);
        let params = abi::dllm_attention_params {
            size: size_of::<abi::dllm_attention_params>() as u64,
            workspace: session.workspace.address(),
            workspace_bytes: (session.workspace.len() * size_of::<f32>()) as u64,
            out_stride: (num_heads * head_dim) as i64,
            scale: 1.0 / (head_dim as f32).sqrt(),
            max_rows: checked_i32("rows", max_rows)?,
            max_sequence_rows: checked_i32("rows", longest)?,
            num_heads: checked_i32("num_heads", num_heads)?,
            num_kv_heads: checked_i32("num_kv_heads", num_kv_heads)?,
            head_dim: checked_i32("head_dim", head_dim)?,
            dtype: BF16,
            max_splits: checked_i32("splits", splits)?,
            ..params
        };
        // SAFETY: buffers of the session, of these sizes. Starts and lengths are checked on the device, and no sequence has more
        // than `longest` rows.
        unsafe { ops::attention::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }
}
