//! norm with a residual delta: 32 rows, and 2,048.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::norm::{self, Norm};
use dllm_kernels::reference::norm::{add_rounded, rms_norm_rounded, rms_scale};
use gpu::{Bench, Case, Float, L2, Random, assert_close, bytes_of, few, row_f64};
use half::bf16;

const EPS: f32 = 1e-5;

struct Rows {
    stream: Stream,
    rows: usize,
    /// Residual stream before the first launch; each launch adds the delta again.
    x_before: Vec<bf16>,
    x: Buffer<bf16>,
    delta: Buffer<bf16>,
    weight: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl Rows {
    fn new(stream: &Stream, rows: usize, width: usize) -> Result<Rows> {
        let mut random = Random(1);
        let x_before = random.floats(rows * width, 1.0);
        Ok(Rows {
            stream: stream.clone(),
            rows,
            x: stream.upload(&x_before)?,
            // Small, so that x stays in range after many launches.
            delta: stream.upload(&random.floats::<bf16>(rows * width, 1e-3))?,
            weight: stream.upload(&random.floats::<bf16>(width, 1.0))?,
            out: stream.alloc(rows * width)?,
            x_before,
        })
    }
}

impl Case for Rows {
    fn bytes(&self) -> usize {
        4 * bytes_of::<bf16>(self.rows, self.weight.len())
    }

    fn launch(&mut self) -> Result<()> {
        let Rows { rows, x, delta, weight, out, .. } = self;
        let (max_rows, delta) = (*rows, Some(&*delta));
        let norm = Norm { max_rows, count: None, x, delta, delta_row: None, weight, eps: EPS, out };
        norm::launch(&self.stream, norm)
    }

    fn check(&self) -> Result<()> {
        let round = |x: f64| f64::from(bf16::of(x as f32));
        let (delta, weight, out) = (self.delta.read()?, self.weight.read()?, self.out.read()?);
        for row in few(self.rows) {
            let width = weight.len();
            let mut x = row_f64(&self.x_before, row, width);
            add_rounded(&mut x, &row_f64(&delta, row, width), round);
            let want = rms_norm_rounded(&x, &row_f64(&weight, 0, width), rms_scale(&x, EPS.into()), round);
            assert_close(&format!("row {row}"), &row_f64(&out, row, width), &want, 0.02, 1e-30);
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("norm") else { return };
    let width = bench.size(4096, 256);
    for rows in [32, 2048] {
        let real = bench.size(rows, 4);
        bench.case::<bf16, _>(&format!("{rows}x4096"), &[L2::Cold], |stream| Rows::new(stream, real, width));
    }
}
