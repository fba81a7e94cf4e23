//! top_k_top_p: top-p, and top-k, for the 32 rows of a block.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::top_k_top_p::{self, TopKTopP};
use dllm_kernels::ops::unmask::{Row, RowTable};
use dllm_kernels::reference::top_k_top_p::min_kept_logit;
use gpu::{Bench, Case, L2, Random, bytes_of, few};
use half::bf16;

const MASK: i32 = 3;

struct Block {
    stream: Stream,
    vocab_size: usize,
    top_p: Option<f32>,
    top_k: Option<usize>,
    table: RowTable,
    logits: Buffer<bf16>,
    tokens: Buffer<i32>,
    min_logit: Buffer<f32>,
}

impl Block {
    fn new(stream: &Stream, [rows, vocab_size]: [usize; 2], top_p: Option<f32>, top_k: Option<usize>) -> Result<Block> {
        let table: Vec<Row> = (0..rows).map(|row| Row { token: row, logits_row: row, position: row }).collect();
        Ok(Block {
            stream: stream.clone(),
            vocab_size,
            top_p,
            top_k,
            table: RowTable::new(stream, &[table])?,
            logits: stream.upload(&Random(9).floats::<bf16>(rows * vocab_size, 2.0))?,
            tokens: stream.upload(&vec![MASK; rows])?,
            min_logit: stream.alloc(rows)?,
        })
    }
}

impl Case for Block {
    fn bytes(&self) -> usize {
        bytes_of::<bf16>(self.table.len(), self.vocab_size)
    }

    fn launch(&mut self) -> Result<()> {
        let args = TopKTopP {
            logits: &self.logits,
            uncond_logits: None,
            vocab_size: self.vocab_size,
            logits_stride: self.vocab_size,
            rows: &self.table,
            tokens: &self.tokens,
            top_p: self.top_p,
            top_k: self.top_k,
            temperature: 1.0,
            cfg_scale: 0.0,
            mask_token: MASK as u32,
            min_logit: &mut self.min_logit,
        };
        top_k_top_p::launch(&self.stream, args)
    }

    fn check(&self) -> Result<()> {
        let (logits, min_logit) = (self.logits.read()?, self.min_logit.read()?);
        for row in few(min_logit.len()) {
            let mut of_row: Vec<f32> =
                logits[row * self.vocab_size..][..self.vocab_size].iter().map(|l| l.to_f32()).collect();
            let largest = of_row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if of_row.iter().position(|l| *l == largest) == Some(MASK as usize) {
                of_row[MASK as usize] = f32::NEG_INFINITY;
            }
            // With sums in f32 a token this close to the bound may be on either side of it.
            let want = |by: f64| min_kept_logit(&of_row, 1.0, self.top_p.map(|p| f64::from(p) + by), self.top_k);
            let (low, high) = (want(-1e-6), want(1e-6));
            assert!(
                low >= min_logit[row] && min_logit[row] >= high,
                "row {row}: {}, expected {low} to {high}",
                min_logit[row]
            );
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("top_k_top_p") else { return };
    let shape = [bench.size(32, 4), bench.size(126_464, 1000)];
    let cold = &[L2::Cold];
    bench.case::<bf16, _>("top-p 32x126464", cold, |stream| Block::new(stream, shape, Some(0.9), None));
    bench.case::<bf16, _>("top-k 32x126464", cold, |stream| Block::new(stream, shape, None, Some(50)));
}
