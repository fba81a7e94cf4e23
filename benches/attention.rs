//! attention: streaming (32 rows over a cache in three segments), full (all rows over all keys), lists with a quarter of the tiles;
//! and both forms for numbers of rows around the plan's switch from one to the other.

mod gpu;

use dllm_kernels::ops::attention::{Form, Heads};
use dllm_kernels::ops::tiles::Sequence;
use dllm_kernels::selftest::attention::{Sequences, Shape, Visits};
use gpu::{Bench, L2};
use half::bf16;

/// Returns sequences of one shape, of which one of `every` key tiles is visited.
fn shape(heads: Heads, sequences: usize, rows: usize, keys: [usize; 3], every: usize, form: Option<Form>) -> Shape {
    let visits = if every == 1 { Visits::All } else { Visits::Every(every) };
    Shape { heads, sequences: vec![Sequence { rows, keys }; sequences], visits, form, lse: false }
}

fn main() {
    let Some(mut bench) = Bench::open("attention") else { return };
    let llada = Heads { num_heads: 32, num_kv_heads: 32, head_dim: 128 };
    let dream = Heads { num_heads: 28, num_kv_heads: 4, head_dim: 128 };
    let few_heads = Heads { num_heads: 16, num_kv_heads: 16, head_dim: 128 };
    let streaming = [
        ("llada 1x32 32/32x128 1024 keys", llada, 1, 1024, 1),
        ("dream 1x32 28/4x128 1024 keys", dream, 1, 1024, 1),
        ("llada 1x32 32/32x128 4096 keys", llada, 1, 4096, 1),
        ("llada 4x32 32/32x128 1024 keys", llada, 4, 1024, 1),
        ("dream 8x32 28/4x128 4096 keys", dream, 8, 4096, 1),
        ("llada 1x32 32/32x128 16384 keys", llada, 1, 16384, 1),
        ("llada 1x32 32/32x128 a quarter of 16384 keys", llada, 1, 16384, 4),
    ];
    for (name, heads, sequences, keys, every) in streaming {
        let (sequences, rows, keys) = (bench.size(sequences, 1), bench.size(32, 8), bench.size(keys, 512));
        // A quarter of the keys outside the block are in the suffix.
        let suffix = (keys - rows) / 4;
        let shape = shape(heads, sequences, rows, [keys - rows - suffix, rows, suffix], every, None);
        bench.case::<bf16, _>(name, &[L2::Cold], |stream| Sequences::<bf16>::new(stream, shape));
    }
    let boundary = [
        ("dream 1x32 28/4x128 4096 keys", dream, 1, 32, 4096),
        ("dream 8x32 28/4x128 4096 keys", dream, 8, 32, 4096),
        ("dream 8x64 28/4x128 4096 keys", dream, 8, 64, 4096),
        ("llada 1x128 32/32x128 4096 keys", llada, 1, 128, 4096),
        ("llada 1x256 32/32x128 4096 keys", llada, 1, 256, 4096),
        ("llada 1x512 32/32x128 4096 keys", llada, 1, 512, 4096),
        ("llada 8x256 32/32x128 1024 keys", llada, 8, 256, 1024),
    ];
    for (name, heads, sequences, rows, keys) in boundary {
        let (sequences, rows, keys) = (bench.size(sequences, 1), bench.size(rows, 40), bench.size(keys, 512));
        for (form, form_name) in [(Form::Streaming, "streaming"), (Form::Full, "full")] {
            let shape = shape(heads, sequences, rows, [keys - rows, rows, 0], 1, Some(form));
            let name = format!("{name}, form {form_name}");
            bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Sequences::<bf16>::new(stream, shape));
        }
    }
    let full = [
        ("full 16x1024 16/16x128", 16, 1024, 1),
        ("full 8x2048 16/16x128", 8, 2048, 1),
        ("full 4x4096 16/16x128", 4, 4096, 1),
        ("full 4x4096 16/16x128 a quarter of the keys", 4, 4096, 4),
    ];
    for (name, sequences, length, every) in full {
        let (sequences, rows) = (bench.size(sequences, 1), bench.size(length, 300));
        let heads = Heads { num_heads: bench.size(16, 2), num_kv_heads: bench.size(16, 2), ..few_heads };
        let shape = shape(heads, sequences, rows, [0, rows, 0], every, None);
        bench.case::<bf16, _>(name, &[L2::Cold], |stream| Sequences::<bf16>::new(stream, shape));
    }
}
