//! gather of 32 and of 8,192 rows of 4,096 elements.

mod gpu;

use dllm_kernels::ops::gather_scatter::Copy;
use dllm_kernels::selftest::gather_scatter::{Copied, Shape};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("gather_scatter") else { return };
    let width = bench.size(4096, 256);
    for rows in [32, 8192] {
        let shape = Shape { copy: Copy::Gather, rows: bench.size(rows, 4), width, count: None };
        let name = format!("gather {rows}x4096");
        bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Copied::<bf16>::new(stream, shape));
    }
}
