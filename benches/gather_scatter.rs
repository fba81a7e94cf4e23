//! gather of 32 and of 8,192 rows of 4,096 elements.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::gather_scatter::{self, Copy, GatherScatter};
use gpu::{Bench, Case, L2, Random, bytes_of, few};
use half::bf16;

struct Gather {
    stream: Stream,
    width: usize,
    index: Buffer<i32>,
    source: Buffer<bf16>,
    target: Buffer<bf16>,
}

impl Gather {
    /// Gathers `rows` rows in random order from a matrix of twice as many.
    fn new(stream: &Stream, rows: usize, width: usize) -> Result<Gather> {
        let mut random = Random(2);
        let index: Vec<i32> = (0..rows).map(|_| random.below(2 * rows) as i32).collect();
        Ok(Gather {
            stream: stream.clone(),
            width,
            index: stream.upload(&index)?,
            source: stream.upload(&random.floats::<bf16>(2 * rows * width, 1.0))?,
            target: stream.alloc(rows * width)?,
        })
    }
}

impl Case for Gather {
    fn bytes(&self) -> usize {
        2 * bytes_of::<bf16>(self.index.len(), self.width) + bytes_of::<i32>(self.index.len(), 1)
    }

    fn launch(&mut self) -> Result<()> {
        let Gather { width, index, source, target, .. } = self;
        let args = GatherScatter { index, count: None, width: *width, source, target, failed: None };
        gather_scatter::launch(&self.stream, args, Copy::Gather)
    }

    fn check(&self) -> Result<()> {
        let (index, source, target) = (self.index.read()?, self.source.read()?, self.target.read()?);
        let row = |matrix: &[bf16], row: usize| matrix[row * self.width..(row + 1) * self.width].to_vec();
        for i in few(index.len()) {
            assert_eq!(row(&target, i), row(&source, index[i] as usize), "row {i}");
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("gather_scatter") else { return };
    let width = bench.size(4096, 256);
    for rows in [32, 8192] {
        let real = bench.size(rows, 4);
        let name = format!("gather {rows}x4096");
        bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Gather::new(stream, real, width));
    }
}
