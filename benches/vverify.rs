//! vverify of one sequence, a quarter of its rows selected: 256 rows, 4,096, and 16,384.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::{
    Workspace,
    vverify::{self, VVerify},
};
use dllm_kernels::reference::vverify::{cosine, lowest};
use gpu::{Bench, Case, Float, L2, Random, assert_close, bytes_of, few, row_f64};
use half::bf16;

const RATIO: f64 = 0.25;

struct Rows {
    stream: Stream,
    width: usize,
    fresh: Buffer<bf16>,
    cached: Buffer<bf16>,
    cu_rows: Buffer<i32>,
    indices: Buffer<i32>,
    cu_selected: Buffer<i32>,
    similarity: Buffer<f32>,
    workspace: Workspace,
}

impl Rows {
    fn new(stream: &Stream, rows: usize, width: usize) -> Result<Rows> {
        let mut random = Random(6);
        let fresh: Vec<bf16> = random.floats(rows * width, 1.0);
        // Close to the fresh rows, at a different distance for each row.
        let turn: Vec<f32> = (0..rows).map(|_| random.normal()).collect();
        let noise: Vec<bf16> = random.floats(rows * width, 0.3);
        let cached: Vec<bf16> =
            (0..rows * width).map(|i| bf16::of(fresh[i].f32() + turn[i / width] * noise[i].f32())).collect();
        Ok(Rows {
            stream: stream.clone(),
            width,
            fresh: stream.upload(&fresh)?,
            cached: stream.upload(&cached)?,
            cu_rows: stream.upload(&[0, rows as i32])?,
            indices: stream.alloc(rows)?,
            cu_selected: stream.alloc(2)?,
            similarity: stream.alloc(rows)?,
            workspace: vverify::workspace(stream, rows, 1)?,
        })
    }
}

impl Case for Rows {
    fn bytes(&self) -> usize {
        2 * bytes_of::<bf16>(self.similarity.len(), self.width)
    }

    fn launch(&mut self) -> Result<()> {
        let args = VVerify {
            width: self.width,
            ratio: RATIO,
            fresh: &self.fresh,
            fresh_row: None,
            cached: &mut self.cached,
            cached_row: None,
            update_cached: false,
            cu_rows: &self.cu_rows,
            indices: &mut self.indices,
            tables: Default::default(),
            first_selected: None,
            cu_selected: &mut self.cu_selected,
            similarity: Some(&mut self.similarity),
            failed: None,
            workspace: &mut self.workspace,
        };
        vverify::launch(&self.stream, args)
    }

    /// Compares a few cosines with the reference, and the selection with that for the kernel's cosines.
    fn check(&self) -> Result<()> {
        let (fresh, cached, got) = (self.fresh.read()?, self.cached.read()?, self.similarity.read()?);
        for row in few(got.len()) {
            let [a, b] = [&fresh, &cached].map(|matrix| {
                let row = row_f64(matrix, row, self.width);
                row.iter().map(|x| *x as f32).collect::<Vec<f32>>()
            });
            assert_close(&format!("cosine {row}"), &[got[row].into()], &[cosine(&a, &b)], 0.0, 1e-5);
        }
        let want: Vec<i32> =
            lowest(&got.iter().map(|c| f64::from(*c)).collect::<Vec<_>>(), RATIO).iter().map(|i| *i as i32).collect();
        assert_eq!(self.cu_selected.read()?, [0, want.len() as i32]);
        assert_eq!(self.indices.read()?[..want.len()], want);
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("vverify") else { return };
    let width = bench.size(4096, 256);
    for rows in [256, 4096, 16_384] {
        let real = bench.size(rows, 12);
        bench.case::<bf16, _>(&format!("{rows}x4096"), &[L2::Cold], |stream| Rows::new(stream, real, width));
    }
}
