//! Compares the kernels with PyTorch's scaled_dot_product_attention in float64, recorded by `reference.py`.

use super::*;
use safetensors::SafeTensors;
use serde::Deserialize;

on_device!(equals_pytorch);

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Recorded>,
}

#[derive(Deserialize)]
struct Recorded {
    name: String,
    dtype: String,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    rows: usize,
    keys: [usize; 3],
    tiles: Option<Vec<i32>>,
}

fn equals_pytorch() {
    let reference: Reference = serde_json::from_str(include_str!("reference.json")).unwrap();
    let tensors = SafeTensors::deserialize(include_bytes!("reference.safetensors")).unwrap();
    assert_eq!(reference.cases.len(), 12);
    for recorded in &reference.cases {
        match &recorded.dtype[..] {
            "bf16" => equals::<bf16>(recorded, &tensors, 1e-2),
            _ => equals::<f16>(recorded, &tensors, 2e-3),
        }
    }
}

fn equals<T: Float>(recorded: &Recorded, tensors: &SafeTensors, tolerance: f64) {
    let Recorded { num_heads, num_kv_heads, head_dim, rows, keys, .. } = *recorded;
    let heads = Heads { num_heads, num_kv_heads, head_dim };
    let bytes = |what: &str| tensors.tensor(&format!("{}.{what}", recorded.name)).unwrap().data();
    let elements = |what: &str| bytemuck::pod_collect_to_vec::<u8, T>(bytes(what));
    let floats = |what: &str| bytemuck::pod_collect_to_vec::<u8, f32>(bytes(what));
    for splits in [1, 2, 3] {
        let case = Case {
            heads,
            sequences: vec![Sequence { rows, keys, tiles: recorded.tiles.iter().cloned().collect() }],
            sparse: recorded.tiles.is_some(),
            per_head: false,
            splits,
            form: None,
            q: elements("q"),
            first: 0,
            q_stride: num_heads * head_dim,
            segments: [0, 1, 2].map(|i| (elements(&format!("k{i}")), elements(&format!("v{i}")), vec![0])),
            kv_stride: num_kv_heads * head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let got = run(&case);
        let name = format!("{}, {splits} splits", recorded.name);
        for (got, want) in got.out.chunks_exact(head_dim).zip(floats("out").chunks_exact(head_dim)) {
            let difference: Vec<f32> = got.iter().zip(want).map(|(a, b)| a - b).collect();
            let error = norm(&difference) / norm(want);
            assert!(error < tolerance, "{name}: {error}");
        }
        for (got, want) in got.lse.iter().zip(floats("lse")) {
            assert!((got - want).abs() <= 1e-5 + 1e-6 * want.abs(), "{name}: lse {got} {want}");
        }
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}
