//! Rotary embedding with writes to the cache; and with rows that are not cached.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, widened};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use dllm_kernels::backend::Heads;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::rope::{self, Caches, Rope};
use dllm_kernels::reference::rope::{Angles, rotate_rounded};
use half::{bf16, f16};

const THETA: f32 = 500_000.0;

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, num_heads) = pick(small, (256, 32), (2, 32));
    let llada = Heads { num_heads, num_kv_heads: num_heads, head_dim: 128 };
    let odd = Heads { num_heads: 6, num_kv_heads: 2, head_dim: 32 };
    vec![
        Entry::new::<bf16, _>("rope", format!("{rows}x{num_heads}/{num_heads}x128"), move |stream| {
            Rotation::<bf16>::new(stream, llada, rows, false)
        }),
        Entry::new::<f16, _>("rope", "9x6/2x32, one uncached, one out of range".into(), move |stream| {
            Rotation::<f16>::new(stream, odd, 9, true)
        }),
    ]
}

struct Rotation<T> {
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
    /// Makes rows of ascending positions and descending cache rows.
    fn new(stream: &Stream, heads: Heads, rows: usize, odd: bool) -> Result<Rotation<T>> {
        let mut rng = Rng::new(7);
        let (mut positions, mut cache_row): (Vec<i32>, Vec<i32>) =
            (0..rows as i32).map(|i| (i, rows as i32 - 1 - i)).unzip();
        if odd {
            cache_row[rows / 2] = -1;
            positions[rows / 3] = rows as i32;
        }
        let qkv = rng.values(rows * heads.qkv_width(), 2.0);
        let mut cache = || HostDevice::new(stream, rng.values(rows * heads.num_kv_heads * heads.head_dim, 1.0));
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

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let head_dim = self.heads.head_dim;
        let (width, kv_width) = (self.heads.qkv_width(), self.heads.num_kv_heads * head_dim);
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
            rotated.iter_mut().zip(wide).for_each(|(rotated, wide)| *rotated = T::from_wide(wide));
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
}
