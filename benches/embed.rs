//! embed of a block: 32 tokens, rows of 4,096 elements.

mod gpu;

use dllm_kernels::selftest::embed::{Shape, Tokens};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("embed") else { return };
    let (width, vocab_size) = (bench.size(4096, 256), bench.size(32_768, 100));
    let shape = Shape { rows: bench.size(32, 4), width, vocab_size, count: None };
    bench.case::<bf16, _>("32x4096", &[L2::Cold], |stream| Tokens::<bf16>::new(stream, shape));
}
