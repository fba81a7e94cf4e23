//! top_k_top_p: top-p, and top-k, for the 32 rows of a block.

mod gpu;

use dllm_kernels::selftest::top_k_top_p::{Shape, Thresholds};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("top_k_top_p") else { return };
    let (rows, vocab_size) = (bench.size(32, 4), bench.size(126_464, 1000));
    for (name, top_p, top_k) in [("top-p 32x126464", Some(0.9), None), ("top-k 32x126464", None, Some(50))] {
        let shape = Shape { rows, vocab_size, top_p, top_k, temperature: 1.0, odd: false };
        bench.case::<bf16, _>(name, &[L2::Cold], |stream| Thresholds::<bf16>::new(stream, shape));
    }
}
