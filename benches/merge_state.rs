//! merge_state of two attention states with LLaDA-8B's heads: 32 rows, a block, and 2,048.

mod gpu;

use dllm_kernels::selftest::merge_state::{Shape, States};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("merge_state") else { return };
    let num_heads = bench.size(32, 2);
    for rows in [32, 2048] {
        let shape = Shape { rows: bench.size(rows, 4), num_heads, head_dim: 128, in_place: false };
        let name = format!("{rows}x32x128");
        bench.case::<bf16, _>(&name, &[L2::Cold], |stream| States::<bf16>::new(stream, shape));
    }
}
