//! The key/value cache in device memory.

use super::{bytes, checked_i32};
use crate::abi;
use crate::error::Result;
use crate::gpu::Buffer;
use half::bf16;

/// Keys (rotated) and values `[layers, positions, width]`.
pub struct KvCache {
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    positions: usize,
    width: usize,
}

impl KvCache {
    pub(super) fn new(k: Buffer<bf16>, v: Buffer<bf16>, positions: usize, width: usize) -> KvCache {
        KvCache { k, v, positions, width }
    }

    /// Positions of each layer: rows of the cache.
    pub(super) fn positions(&self) -> usize {
        self.positions
    }

    /// Elements of a key, and of a value.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Device addresses of the keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> [u64; 2] {
        let offset = bytes(layer * self.positions * self.width);
        [self.k.address() + offset, self.v.address() + offset]
    }

    /// A segment for attention, by tables of starts and lengths per sequence.
    pub(super) fn segment(&self, layer: usize, [start, len]: [u64; 2]) -> Result<abi::dllm_segment> {
        let [k, v] = self.layer(layer);
        let (stride, num_rows) = (self.width as i64, checked_i32("positions", self.positions)?);
        Ok(abi::dllm_segment { k, v, start, len, k_stride: stride, v_stride: stride, num_rows, ..Default::default() })
    }
}
