//! norm with a residual delta: 32 rows, and 2,048.

mod gpu;

use dllm_kernels::selftest::norm::{Residual, Shape};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("norm") else { return };
    let width = bench.size(4096, 256);
    for rows in [32, 2048] {
        let shape = Shape { rows: bench.size(rows, 4), width, count: None };
        let name = format!("{rows}x4096");
        bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Residual::<bf16>::new(stream, shape));
    }
}
