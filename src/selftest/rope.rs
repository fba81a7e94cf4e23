//! Rotary embedding with writes to the cache; and with rows that are not cached.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, narrowed, pick, widened};
use crate::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::attention::Heads;
use crate::ops::rope::{self, Caches, Rope};
use crate::reference::rope::{Angles, rotate_rounded};
use half::{bf16, f16};

const THETA: f32 = 500_000.0;

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, num_heads) = pick(small, (256, 32), (2, 32));
    let llada = Heads { num_heads, num_kv_heads: num_heads, head_dim: 128 };
    let odd = Heads { num_heads: 6, num_kv_heads: 2, head_dim: 32 };
    vec![
        Entry::new::<bf16, _>("rope", format!("{rows}x{num_heads}/{num_heads}x128"), move |stream| {
            Rotation::<bf16>::new(stream, Shape { heads: llada, rows, odd: false })
        }),
        Entry::new::<f16, _>("rope", "9x6/2x32, one uncached, one out of range".into(), move |stream| {
            Rotation::<f16>::new(stream, Shape { heads: odd, rows: 9, odd: true })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Heads of a row.
    pub heads: Heads,
    /// Rows, and rows of the caches.
    pub rows: usize,
    /// Whether a row is not cached, and a position out of range.
    pub odd: bool,
}

/// Rows that are rotated in place, and the caches.
pub struct Rotation<T> {
    stream: Stream,
    heads: Heads,
    /// Queries, keys and values. Each launch rotates them once more.
    qkv: HostDevice<T>,
    positions: HostDevice<i32>,
    angles: Buffer<[f32; 2]>,
    k_cache: HostDevice<T>,
    v_cache: HostDevice<T>,
    cache_row: HostDevice<i32>,
    failed: Buffer<i32>,
}

impl<T: Float> Rotation<T> {
    /// Uploads random rows of ascending positions and descending cache rows.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Rotation<T>> {
        let Shape { heads, rows, odd } = shape;
        let mut random = Random(7);
        let (mut positions, mut cache_row): (Vec<i32>, Vec<i32>) =
            (0..rows as i32).map(|i| (i, rows as i32 - 1 - i)).unzip();
        if odd {
            cache_row[rows / 2] = -1;
            positions[rows / 3] = rows as i32;
        }
        let qkv = random.values(rows * heads.qkv_width(), 2.0);
        let mut cache = || HostDevice::new(stream, random.values(rows * heads.kv_width(), 1.0));
        Ok(Rotation {
            stream: stream.clone(),
            heads,
            qkv: HostDevice::new(stream, qkv)?,
            positions: HostDevice::new(stream, positions)?,
            angles: rope::angles(stream, THETA, heads.head_dim, rows)?,
            k_cache: cache()?,
            v_cache: cache()?,
            cache_row: HostDevice::new(stream, cache_row)?,
            failed: stream.upload(&[DLLM_NONE_FAILED])?,
        })
    }
}

impl<T: Float> Case for Rotation<T> {
    /// Queries and keys are read and written, keys and values written to the cache, values read.
    fn bytes(&self) -> usize {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        self.positions.host.len() * (2 * (num_heads + num_kv_heads) + 3 * num_kv_heads) * head_dim * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Rotation { heads, qkv, positions, angles, k_cache, v_cache, cache_row, failed, .. } = self;
        let caches = Caches { k: &mut k_cache.device, v: Some(&mut v_cache.device), row: &cache_row.device };
        let rope = Rope {
            heads: *heads,
            qkv: &mut qkv.device,
            positions: &positions.device,
            count: None,
            angles,
            caches: Some(caches),
            failed: Some(failed),
        };
        rope::launch(&self.stream, rope)
    }

    /// Compares all rows: a row of the caches may come from any of them.
    fn check(&self, _: Rows) -> Result<Vec<ErrorBound>> {
        let head_dim = self.heads.head_dim;
        let (width, kv_width) = (self.heads.qkv_width(), self.heads.kv_width());
        let positions = &self.positions.host;
        let mut angles = Angles::default();
        angles.extend(THETA, head_dim, positions.len());
        let [mut qkv, mut k, mut v] = [&self.qkv, &self.k_cache, &self.v_cache].map(|matrix| matrix.host.clone());
        let mut failed = DLLM_NONE_FAILED;
        for ((row, position), to) in qkv.chunks_exact_mut(width).zip(positions).zip(&self.cache_row.host) {
            let Some(position) = usize::try_from(*position).ok().filter(|position| *position < positions.len()) else {
                failed = DLLM_INDEX_FAILED;
                continue;
            };
            let (rotated, values) = row.split_at_mut(width - kv_width);
            let mut wide = widened(rotated);
            rotate_rounded(&mut wide, head_dim, angles.at(position), T::round);
            rotated.copy_from_slice(&narrowed::<T>(&wide));
            if let Ok(to) = usize::try_from(*to) {
                k[to * kv_width..][..kv_width].copy_from_slice(&rotated[rotated.len() - kv_width..]);
                v[to * kv_width..][..kv_width].copy_from_slice(values);
            }
        }
        Ok(vec![
            ErrorBound::bits("elements that differ", &self.qkv.device.read()?, &qkv),
            ErrorBound::bits("cached keys that differ", &self.k_cache.device.read()?, &k),
            ErrorBound::bits("cached values that differ", &self.v_cache.device.read()?, &v),
            ErrorBound::bits("failure codes that differ", &self.failed.read()?, &[failed]),
        ])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![
            Output::new("rows", &mut self.qkv.device),
            Output::new("cached keys", &mut self.k_cache.device),
            Output::new("cached values", &mut self.v_cache.device),
            Output::new("failure code", &mut self.failed),
        ]
    }
}
