//! swiglu of LLaDA-8B's width: 32 rows of 12,288, and 2,048.

mod gpu;

use dllm_kernels::selftest::swiglu::{Gate, Shape};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("swiglu") else { return };
    let width = bench.size(12_288, 512);
    for rows in [32, 2048] {
        let shape = Shape { rows: bench.size(rows, 4), width, count: None };
        let name = format!("{rows}x12288");
        bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Gate::<bf16>::new(stream, shape));
    }
}
