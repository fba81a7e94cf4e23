//! Random weights, for benchmarks without a checkpoint.

use super::config::Config;
use super::names::Names;
use super::weights::Weights;
use crate::error::Result;
use crate::host_memory::ensure_host_memory;
use half::bf16;
use rayon::prelude::*;
use std::path::PathBuf;

impl Weights {
    /// Creates random bf16 weights in memory for the shapes of `config`. Elements are uniform with standard deviation 0.02,
    /// norm weights are 1, and the mask token's row of the output head is 0. Equal seeds give equal weights.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] when the machine does not have enough free memory.
    pub fn random(config: &Config, seed: u64) -> Result<Weights> {
        let mut offset = 0;
        let mut list = Vec::new();
        for (name, shape) in config.tensors() {
            let len = shape.iter().product::<usize>() * 2;
            list.push((name, offset..offset + len, shape));
            offset += len;
        }
        ensure_host_memory("random weights of this shape", offset)?;
        let mut bytes = vec![0u8; offset];
        let mut rest = &mut bytes[..];
        let head = if config.tied_head { Names::of(config.family).embedding } else { Names::of(config.family).head };
        for (i, (name, range, shape)) in list.iter().enumerate() {
            let (tensor, tail) = rest.split_at_mut(range.len());
            rest = tail;
            if name.contains("norm") || name.contains("ln_f") {
                tensor.as_chunks_mut().0.fill(bf16::ONE.to_le_bytes());
            } else {
                fill(tensor, seed ^ (i as u64) << 32);
            }
            if name == head {
                let row = shape[1] * 2;
                let mask = config.mask_token_id as usize * row;
                tensor[mask..mask + row].fill(0);
            }
        }
        Ok(Weights::from_owned(PathBuf::from("random weights"), bytes, list))
    }
}

/// Fills a tensor with uniform bf16 numbers in +-0.02 sqrt(3), by splitmix64: one 64-bit output per four elements.
fn fill(tensor: &mut [u8], seed: u64) {
    const CHUNK: usize = 1 << 16;
    tensor.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, bytes)| {
        let first = (chunk * CHUNK / 8) as u64;
        for (i, elements) in bytes.chunks_mut(8).enumerate() {
            let mut z = seed.wrapping_add((first + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            for (lane, element) in elements.as_chunks_mut().0.iter_mut().enumerate() {
                let unit = ((z >> (16 * lane)) as u16 as f32 - 32767.5) / 32767.5;
                *element = bf16::from_f32(unit * 0.02 * 3f32.sqrt()).to_le_bytes();
            }
        }
    });
}
