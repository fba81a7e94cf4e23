//! rope with caches: the rows of a block and of a long sequence, with the heads of LLaDA-8B and of Dream-7B.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::backend::Heads;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::rope::{self, Caches, Rope};
use dllm_kernels::reference::rope::{Angles, rotate_rounded};
use gpu::{Bench, Case, Float, L2, Random, assert_close, bytes_of, few, row_f64};
use half::bf16;

const THETA: f32 = 500_000.0;

struct Rows {
    stream: Stream,
    heads: Heads,
    /// Rows before the first launch; each launch rotates them again.
    before: Vec<bf16>,
    qkv: Buffer<bf16>,
    positions: Buffer<i32>,
    angles: Buffer<[f32; 2]>,
    k_cache: Buffer<bf16>,
    v_cache: Buffer<bf16>,
    cache_row: Buffer<i32>,
}

impl Rows {
    /// Positions are ascending and equal the cache rows.
    fn new(stream: &Stream, heads: Heads, rows: usize) -> Result<Rows> {
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let positions: Vec<i32> = (0..rows as i32).collect();
        let before = Random(5).floats(rows * (num_heads + 2 * num_kv_heads) * head_dim, 1.0);
        Ok(Rows {
            stream: stream.clone(),
            heads,
            qkv: stream.upload(&before)?,
            positions: stream.upload(&positions)?,
            angles: rope::angles(stream, THETA, head_dim, rows)?,
            k_cache: stream.alloc(rows * num_kv_heads * head_dim)?,
            v_cache: stream.alloc(rows * num_kv_heads * head_dim)?,
            cache_row: stream.upload(&positions)?,
            before,
        })
    }
}

impl Case for Rows {
    /// Queries and keys are read and written; keys and values are written to the cache; values are read.
    fn bytes(&self) -> usize {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        bytes_of::<bf16>(self.positions.len(), (2 * (num_heads + num_kv_heads) + 3 * num_kv_heads) * head_dim)
    }

    fn launch(&mut self) -> Result<()> {
        let caches = Caches { k: &mut self.k_cache, v: Some(&mut self.v_cache), row: &self.cache_row };
        let Rows { heads, qkv, positions, angles, .. } = self;
        let caches = Some(caches);
        rope::launch(&self.stream, Rope { heads: *heads, qkv, positions, count: None, angles, caches, failed: None })
    }

    fn check(&self) -> Result<()> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let [kv_width, turned] = [num_kv_heads * head_dim, (num_heads + num_kv_heads) * head_dim];
        let (qkv, k, v) = (self.qkv.read()?, self.k_cache.read()?, self.v_cache.read()?);
        let mut angles = Angles::default();
        angles.extend(THETA, head_dim, self.positions.len());
        for row in few(self.positions.len()) {
            let mut want = row_f64(&self.before, row, turned + kv_width);
            rotate_rounded(&mut want[..turned], head_dim, angles.at(row), |x| bf16::of(x as f32).f32().into());
            assert_close(&format!("row {row}"), &row_f64(&qkv, row, turned + kv_width), &want, 0.01, 1e-30);
            let keys = &want[turned - kv_width..turned];
            assert_close(&format!("key {row}"), &row_f64(&k, row, kv_width), keys, 0.01, 1e-30);
            assert_close(&format!("value {row}"), &row_f64(&v, row, kv_width), &want[turned..], 0.0, 0.0);
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("rope") else { return };
    for (model, num_heads, num_kv_heads) in [("llada", 32, 32), ("dream", 28, 4)] {
        for rows in [32, 4096] {
            let heads = Heads { num_heads, num_kv_heads, head_dim: bench.size(128, 32) };
            let real = bench.size(rows, 4);
            let name = format!("{model} {rows}x{num_heads}/{num_kv_heads}x128");
            bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Rows::new(stream, heads, real));
        }
    }
}
