//! rope with caches: the rows of a block and of a long sequence, with the heads of LLaDA-8B and of Dream-7B.

mod gpu;

use dllm_kernels::backend::Heads;
use dllm_kernels::selftest::rope::{Rotation, Shape};
use gpu::{Bench, L2};
use half::bf16;

fn main() {
    let Some(mut bench) = Bench::open("rope") else { return };
    for (model, num_heads, num_kv_heads) in [("llada", 32, 32), ("dream", 28, 4)] {
        for rows in [32, 4096] {
            let heads = Heads { num_heads, num_kv_heads, head_dim: bench.size(128, 32) };
            let shape = Shape { heads, rows: bench.size(rows, 4), odd: false };
            let name = format!("{model} {rows}x{num_heads}/{num_kv_heads}x128");
            bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Rotation::<bf16>::new(stream, shape));
        }
    }
}
