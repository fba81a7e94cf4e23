//! swiglu of LLaDA-8B's width: 32 rows of 12,288, and 2,048.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::swiglu::{self, Swiglu};
use dllm_kernels::reference::swiglu::{silu, swiglu_rounded};
use gpu::{Bench, Case, Float, L2, Random, assert_close, bytes_of, few, row_f64};
use half::bf16;

struct Rows {
    stream: Stream,
    rows: usize,
    width: usize,
    gate_up: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl Rows {
    fn new(stream: &Stream, rows: usize, width: usize) -> Result<Rows> {
        Ok(Rows {
            stream: stream.clone(),
            rows,
            width,
            gate_up: stream.upload(&Random(4).floats::<bf16>(rows * 2 * width, 1.0))?,
            out: stream.alloc(rows * width)?,
        })
    }
}

impl Case for Rows {
    fn bytes(&self) -> usize {
        3 * bytes_of::<bf16>(self.rows, self.width)
    }

    fn launch(&mut self) -> Result<()> {
        let Rows { rows, width, gate_up, out, .. } = self;
        swiglu::launch(&self.stream, Swiglu { max_rows: *rows, count: None, width: *width, gate_up, out })
    }

    fn check(&self) -> Result<()> {
        let round = |x: f64| f64::from(bf16::of(x as f32));
        let (gate_up, out) = (self.gate_up.read()?, self.out.read()?);
        for row in few(self.rows) {
            let both = row_f64(&gate_up, row, 2 * self.width);
            let (gate, up) = both.split_at(self.width);
            let want: Vec<f64> = gate.iter().zip(up).map(|(g, u)| swiglu_rounded(silu(*g), *u, round)).collect();
            assert_close(&format!("row {row}"), &row_f64(&out, row, self.width), &want, 0.02, 1e-30);
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("swiglu") else { return };
    let width = bench.size(12_288, 512);
    for rows in [32, 2048] {
        let real = bench.size(rows, 4);
        bench.case::<bf16, _>(&format!("{rows}x12288"), &[L2::Cold], |stream| Rows::new(stream, real, width));
    }
}
