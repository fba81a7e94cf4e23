//! embed of a block: 32 tokens, rows of 4,096 elements.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::embed::{self, Embed};
use gpu::{Bench, Case, L2, Random, bytes_of, few};
use half::bf16;

struct Tokens {
    stream: Stream,
    width: usize,
    table: Buffer<bf16>,
    tokens: Buffer<i32>,
    out: Buffer<bf16>,
}

impl Tokens {
    fn new(stream: &Stream, rows: usize, width: usize, vocab_size: usize) -> Result<Tokens> {
        let mut random = Random(3);
        let tokens: Vec<i32> = (0..rows).map(|_| random.below(vocab_size) as i32).collect();
        Ok(Tokens {
            stream: stream.clone(),
            width,
            table: stream.upload(&random.floats::<bf16>(vocab_size * width, 1.0))?,
            tokens: stream.upload(&tokens)?,
            out: stream.alloc(rows * width)?,
        })
    }
}

impl Case for Tokens {
    fn bytes(&self) -> usize {
        2 * bytes_of::<bf16>(self.tokens.len(), self.width) + bytes_of::<i32>(self.tokens.len(), 1)
    }

    fn launch(&mut self) -> Result<()> {
        let Tokens { width, table, tokens, out, .. } = self;
        let args = Embed { table, width: *width, tokens, index: None, count: None, out, failed: None };
        embed::launch(&self.stream, args)
    }

    fn check(&self) -> Result<()> {
        let (table, tokens, out) = (self.table.read()?, self.tokens.read()?, self.out.read()?);
        let row = |matrix: &[bf16], row: usize| matrix[row * self.width..(row + 1) * self.width].to_vec();
        for i in few(tokens.len()) {
            assert_eq!(row(&out, i), row(&table, tokens[i] as usize), "row {i}");
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("embed") else { return };
    let (width, vocab_size) = (bench.size(4096, 256), bench.size(32_768, 100));
    let rows = bench.size(32, 4);
    bench.case::<bf16, _>("32x4096", &[L2::Cold], |stream| Tokens::new(stream, rows, width, vocab_size));
}
