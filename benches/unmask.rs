//! unmask in one launch, with the selection: the 32 rows of a block with a cold and a warm L2 cache; 256 and 1,024 rows, 32 per
//! sequence; the general form (sampled tokens, entropies); f32 logits.

mod gpu;

use dllm_kernels::Confidence;
use dllm_kernels::selftest::unmask::{Block, Shape};
use gpu::{Bench, L2};
use half::bf16;

/// Returns sequences of up to 32 rows, committed by the threshold 0.9.
fn shape(rows: usize, vocab_size: usize) -> Shape {
    let of_sequence = rows.min(32);
    Shape::llada(vec![of_sequence; rows / of_sequence], vocab_size, 0.9f32.into())
}

fn main() {
    let Some(mut bench) = Bench::open("unmask") else { return };
    for (rows, vocab_size, l2) in [
        (32, 126_464, &[L2::Cold, L2::Warm][..]),
        (256, 126_464, &[L2::Cold]),
        (1024, 126_464, &[L2::Cold]),
        (32, 152_064, &[L2::Cold]),
        (256, 152_064, &[L2::Cold]),
        (1024, 152_064, &[L2::Cold]),
    ] {
        let shape = shape(bench.size(rows, 4), bench.size(vocab_size, 1000));
        let name = format!("{rows}x{vocab_size}");
        bench.case::<bf16, _>(&name, l2, |stream| Block::<bf16>::new(stream, shape));
    }
    let plain = shape(bench.size(32, 4), bench.size(126_464, 1000));
    let general = Shape { confidence: Confidence::Entropy, temperature: 0.5, ..plain.clone() };
    let cold = &[L2::Cold];
    bench.case::<bf16, _>("general 32x126464", cold, |stream| Block::<bf16>::new(stream, general));
    bench.case::<f32, _>("32x126464", cold, |stream| Block::<f32>::new(stream, plain));
}
