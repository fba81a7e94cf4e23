//! The recorded samplers of the reference implementations (`tests/golden/README.md`), against the kernels.

use super::case::{Case, OnDevice, plain, run};
use super::check::{check, close};
use crate::common::{Random, device, golden_dir, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use safetensors::SafeTensors;
use serde_json::Value;

once_on_device! {
    llada,
    dream,
}

struct Golden {
    cases: Vec<Value>,
    tensors: Vec<u8>,
}

impl Golden {
    fn open(name: &str) -> Golden {
        let dir = golden_dir();
        let read = |end: &str| std::fs::read(dir.join(format!("{name}.{end}"))).unwrap();
        let json: Value = serde_json::from_slice(&read("json")).unwrap();
        Golden { cases: json["cases"].as_array().unwrap().clone(), tensors: read("safetensors") }
    }

    fn tensor<U: bytemuck::Pod>(&self, name: &str) -> Vec<U> {
        bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&self.tensors).unwrap().tensor(name).unwrap().data())
    }
}

/// Mask token outside every recorded vocabulary.
const OUTSIDE: i32 = 1 << 20;

fn llada() {
    let golden = Golden::open("sampler_llada");
    for recorded in &golden.cases {
        let name = recorded["name"].as_str().unwrap();
        let size = |key: &str| recorded[key].as_u64().unwrap() as usize;
        let (batch, length, vocab) = (size("batch"), size("length"), size("vocab"));
        let masked: Vec<u8> = golden.tensor(&format!("{name}.mask_index"));
        let commit_rule = |row: usize| match (&recorded["threshold"], &recorded["factor"]) {
            (Value::Null, Value::Null) => CommitRule::Quota(recorded["num_transfer"][row].as_u64().unwrap() as usize),
            (threshold, Value::Null) => CommitRule::Threshold(threshold.as_f64().unwrap()),
            (_, factor) => CommitRule::Factor(factor.as_f64().unwrap()),
        };
        let mut case = Case::<f32>::new(&mut Random(1), vocab, &vec![length; batch]);
        case.mask_token = OUTSIDE;
        case.params.mask_token = None;
        case.masked = masked.chunks(length).map(|row| row.iter().map(|m| *m == 1).collect()).collect();
        let logits: Vec<f32> = golden.tensor(&format!("{name}.logits"));
        for (to, from) in case.logits.chunks_mut(case.stride).zip(logits.chunks(vocab)) {
            to[..vocab].copy_from_slice(from);
        }
        case.commit_rule = (0..batch).map(commit_rule).collect();
        let output = run(&case);
        check(&case, &output, name);
        let (x0, confidence) =
            (golden.tensor::<i64>(&format!("{name}.x0")), golden.tensor::<f64>(&format!("{name}.confidence")));
        let transfer: Vec<u8> = golden.tensor(&format!("{name}.transfer_index"));
        for row in (0..batch * length).filter(|row| masked[*row] == 1) {
            assert_eq!(output.predicted[row] as i64, x0[row], "{name} row {row}");
            assert!(close(output.confidence[row], confidence[row], Confidence::Probability), "{name} row {row}");
            assert_eq!(output.tokens[row] != OUTSIDE, transfer[row] == 1, "{name} row {row}");
        }
    }
}

fn dream() {
    let golden = Golden::open("sampler_dream");
    let mut cases = 0;
    for recorded in golden.cases.iter().filter(|case| case["alg"] != "probs") {
        let name = recorded["name"].as_str().unwrap();
        let (x0, confidence) =
            (golden.tensor::<i64>(&format!("{name}.x0")), golden.tensor::<f32>(&format!("{name}.confidence")));
        let (logits, kept) =
            (golden.tensor::<f32>(&format!("{name}.logits")), golden.tensor::<u8>(&format!("{name}.kept")));
        let (rows, vocab) = (x0.len(), logits.len() / x0.len());
        let mut case = Case::<f32>::new(&mut Random(1), vocab, &[rows]);
        case.mask_token = OUTSIDE;
        case.masked = vec![vec![true; rows]];
        case.params = SamplingParams {
            confidence: match recorded["alg"].as_str().unwrap() {
                "topk_margin" => Confidence::Margin,
                "entropy" => Confidence::Entropy,
                _ => Confidence::Probability,
            },
            temperature: recorded["temperature"].as_f64().unwrap(),
            tempered_confidence: true,
            top_p: recorded["top_p"].as_f64(),
            top_k: recorded["top_k"].as_u64().map(|k| k as usize),
            mask_token: None,
            ..plain()
        };
        for (to, from) in case.logits.chunks_mut(case.stride).zip(logits.chunks(vocab)) {
            to[..vocab].copy_from_slice(from);
        }
        let stream = device().stream().unwrap();
        let mut on_device = OnDevice::new(&stream, &case);
        on_device.launch(&stream, &case).unwrap();
        let output = on_device.read();
        for row in 0..rows {
            assert_eq!(output.predicted[row] as i64, x0[row], "{name} row {row}");
            let (got, want) = (output.confidence[row], confidence[row]);
            assert!((got - want).abs() < 1e-5, "{name} row {row}: {got}, expected {want}");
        }
        if let Some(min_logit) = &on_device.min_logit {
            for (row, min_logit) in min_logit.read().unwrap().iter().enumerate() {
                let got: Vec<u8> = logits[row * vocab..][..vocab].iter().map(|l| (*l >= *min_logit) as u8).collect();
                assert_eq!(got, kept[row * vocab..][..vocab], "{name} row {row}");
            }
        }
        cases += 1;
    }
    assert!(cases > 0);
}
