//! vverify of one sequence, a quarter of its rows selected: 256 rows, 4,096, and 16,384.

mod gpu;

use dllm_kernels::selftest::vverify::{Shape, Values};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("vverify") else { return };
    let width = bench.size(4096, 256);
    for rows in [256, 4096, 16_384] {
        let shape = Shape { lengths: vec![bench.size(rows, 12)], width, ratio: 0.25, update: false };
        let name = format!("{rows}x4096");
        bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Values::<bf16>::new(stream, shape));
    }
}
