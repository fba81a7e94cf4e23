//! The bits of every op are the same in rayon pools of any number of threads, for sizes that threads cannot share evenly.

use super::attention::{attention, attention_cached};
use super::linear::{Matrix, linear, packed_len};
use super::*;
use crate::tensor::{Dtype, test_tensor};

fn noise(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Runs `work` in pools of 1, 2, 3 and 8 threads, and compares its results bit for bit.
fn in_every_pool(what: &str, work: impl Fn() -> Vec<f32> + Sync) {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| work().iter().map(|x| x.to_bits()).collect::<Vec<u32>>())
    };
    let one = run(1);
    assert!(one.iter().any(|bits| *bits != 0), "{what}: no results");
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{what}: {threads} threads give other bits than one");
    }
}

#[test]
fn products() {
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        // Partial panels and sweeps; several blocks of columns; and shapes that AMX takes.
        for (rows, n, k) in [(1, 130, 2_100), (37, 200, 1_100), (300, 70, 515), (37, 160, 1_120)] {
            let (first, second) = (noise(n * k, 1), noise(32 * k, 2));
            let tensors = vec![test_tensor(dtype, &[n, k], &first), test_tensor(dtype, &[32, k], &second)];
            let w = Matrix::new(tensors, noise(n + 32, 3));
            let x = noise(rows * k, 4);
            in_every_pool(&format!("{dtype:?} {rows}x{n}x{k}"), || {
                let mut out = vec![0.0; rows * (n + 32)];
                linear(&x, &w, &mut out, rows, &mut vec![0.0; packed_len(rows, k)]);
                out
            });
        }
    }
}

#[test]
fn attention_of_a_batch() {
    let heads = Heads { num_heads: 3, num_kv_heads: 1, head_dim: 40 };
    let sequence = |start, end, num_keys, cache_base| SequenceRows { sequence: 0, start, end, num_keys, cache_base };
    let sequences = [sequence(10, 147, 301, 0), sequence(0, 1, 1, 301), sequence(7, 72, 90, 302)];
    let qkv = noise(203 * heads.qkv_width(), 1);
    let (k, v) = (noise(392 * 40, 2), noise(392 * 40, 3));
    for cache in [None, Some((&k[..], &v[..]))] {
        in_every_pool("attention", || {
            let mut out = vec![0.0; 203 * heads.q_width()];
            attention(&qkv, heads, &sequences, cache, &mut out);
            out
        });
    }
    in_every_pool("attention of selected rows", || {
        let mut out = vec![0.0; 80 * heads.q_width()];
        attention_cached(&qkv, heads.qkv_width(), heads, &sequences, &[70, 1, 9], (&k, &v), &mut out);
        out
    });
}

#[test]
fn ops_on_rows() {
    let (rows, width) = (37, 131);
    let (x, delta, weight) = (noise(rows * width, 1), noise(rows * width, 2), noise(width, 3));
    let gate_up = noise(rows * 2 * width, 4);
    in_every_pool("swiglu", || {
        let mut out = vec![0.0; rows * width];
        swiglu::swiglu(&gate_up, width, &mut out, rows);
        out
    });
    in_every_pool("norm", || {
        let (mut x, mut out) = (x.clone(), vec![0.0; rows * width]);
        let residual = Residual::Rows(&delta);
        Cpu::default().residual_norm(&mut x, residual, &CpuBatch::default(), (&weight, 1e-5), &mut out, rows).unwrap();
        [x, out].concat()
    });
    in_every_pool("V-verify", || {
        let runs = [(&x[..9 * width], &delta[..9 * width]), (&x[9 * width..], &delta[9 * width..])];
        vverify::vverify(runs, width, 11).into_iter().map(|row| row as f32).collect()
    });
}
