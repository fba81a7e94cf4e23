//! merge_state of two attention states with LLaDA-8B's heads: 32 rows, a block, and 2,048.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::merge_state::{self, MergeState, Partial};
use dllm_kernels::reference::merge_state::merge as reference;
use gpu::{Bench, Case, L2, Random, assert_close, bytes_of, few, row_f64};
use half::bf16;

const HEAD_DIM: usize = 128;

struct Sides {
    stream: Stream,
    rows: usize,
    heads: usize,
    a: (Buffer<bf16>, Buffer<f32>),
    b: (Buffer<bf16>, Buffer<f32>),
    out: Buffer<bf16>,
    lse: Buffer<f32>,
}

impl Sides {
    fn new(stream: &Stream, rows: usize, heads: usize) -> Result<Sides> {
        let mut random = Random(1);
        let mut side = || -> Result<_> {
            let out = stream.upload(&random.floats::<bf16>(rows * heads * HEAD_DIM, 1.0))?;
            Ok((out, stream.upload(&random.floats::<f32>(rows * heads, 1.0))?))
        };
        let (a, b) = (side()?, side()?);
        let (out, lse) = (stream.alloc(rows * heads * HEAD_DIM)?, stream.alloc(rows * heads)?);
        Ok(Sides { stream: stream.clone(), rows, heads, a, b, out, lse })
    }
}

impl Case for Sides {
    fn bytes(&self) -> usize {
        3 * (bytes_of::<bf16>(self.rows, self.heads * HEAD_DIM) + bytes_of::<f32>(self.rows, self.heads))
    }

    fn launch(&mut self) -> Result<()> {
        let Sides { rows, heads, a, b, out, lse, .. } = self;
        let [a, b] = [a, b].map(|(out, lse)| Partial { out, lse });
        let shape = (*rows, *heads);
        let args = MergeState {
            max_rows: shape.0,
            count: None,
            num_heads: shape.1,
            head_dim: HEAD_DIM,
            a: Some(a),
            b,
            out,
            lse,
        };
        merge_state::launch(&self.stream, args)
    }

    fn check(&self) -> Result<()> {
        let [a, b, got] = [self.a.0.read()?, self.b.0.read()?, self.out.read()?];
        let [a_lse, b_lse] = [self.a.1.read()?, self.b.1.read()?];
        for place in few(self.rows * self.heads) {
            let [a, b, got] = [&a, &b, &got].map(|x| row_f64(x, place, HEAD_DIM));
            let (want, _) = reference((&a, a_lse[place].into()), (&b, b_lse[place].into()));
            assert_close(&format!("row and head {place}"), &got, &want, 0.01, 1e-30);
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("merge_state") else { return };
    let heads = bench.size(32, 2);
    for rows in [32, 2048] {
        let real = bench.size(rows, 4);
        bench.case::<bf16, _>(&format!("{rows}x32x128"), &[L2::Cold], |stream| Sides::new(stream, real, heads));
    }
}
