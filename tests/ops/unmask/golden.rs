//! The recorded samplers of the reference implementations (`tests/golden/README.md`), against the kernels.

use super::case::{Case, OnDevice, plain, run};
use super::check::{check, close};
use crate::common::copy::check_elsewhere;
use crate::common::recorded::{Tensors, cases, json, names, not_run, numbers};
use crate::common::{Random, device, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use serde_json::Value;

once_on_device! {
    llada,
    dream,
    elsewhere,
}

/// Mask token outside every vocabulary.
const OUTSIDE: i32 = i32::MAX;

fn llada() {
    for file in names("sampler_llada") {
        let (json, tensors) = (json(&file), Tensors::open(&file));
        cases(&json).iter().for_each(|recorded| llada_case(recorded, &tensors));
    }
}

fn llada_case(recorded: &Value, tensors: &Tensors) {
    let name = recorded["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&recorded[key]) };
    let (batch, length, vocab) = (size("batch"), size("length"), size("vocab"));
    let masked = tensors.u8(&format!("{name}.mask_index"));
    let commit_rule = |row: usize| match (&recorded["threshold"], &recorded["factor"]) {
        (Value::Null, Value::Null) => CommitRule::Quota(numbers(&recorded["num_transfer"][row])),
        (threshold, Value::Null) => CommitRule::Threshold(numbers(threshold)),
        (_, factor) => CommitRule::Factor(numbers(factor)),
    };
    let mut case = Case::<f32>::new(&mut Random(1), vocab, &vec![length; batch]);
    case.mask_token = OUTSIDE;
    case.params.mask_token = None;
    case.masked = masked.chunks(length).map(|row| row.iter().map(|m| *m == 1).collect()).collect();
    let logits = tensors.f32(&format!("{name}.logits"));
    for (to, from) in case.logits.chunks_mut(case.stride).zip(logits.chunks(vocab)) {
        to[..vocab].copy_from_slice(from);
    }
    case.commit_rule = (0..batch).map(commit_rule).collect();
    let output = run(&case);
    check(&case, &output, name);
    let (x0, confidence) = (tensors.i64(&format!("{name}.x0")), tensors.f64(&format!("{name}.confidence")));
    let transfer = tensors.u8(&format!("{name}.transfer_index"));
    for row in (0..batch * length).filter(|row| masked[*row] == 1) {
        assert_eq!(output.predicted[row] as i64, x0[row], "{name} row {row}");
        assert!(close(output.confidence[row], confidence[row], Confidence::Probability), "{name} row {row}");
        assert_eq!(output.tokens[row] != OUTSIDE, transfer[row] == 1, "{name} row {row}");
    }
}

fn dream() {
    for file in names("sampler_dream") {
        let (json, tensors) = (json(&file), Tensors::open(&file));
        let decisions: Vec<_> = cases(&json).iter().filter(|case| case["alg"] != "probs").collect();
        if decisions.is_empty() {
            not_run("sampler_dream*.json with decisions");
        }
        decisions.iter().for_each(|recorded| dream_case(recorded, &tensors));
    }
}

fn dream_case(recorded: &Value, tensors: &Tensors) {
    let name = recorded["name"].as_str().unwrap();
    let (x0, confidence) = (tensors.i64(&format!("{name}.x0")), tensors.f32(&format!("{name}.confidence")));
    let (logits, kept) = (tensors.f32(&format!("{name}.logits")), tensors.u8(&format!("{name}.kept")));
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
}

fn elsewhere() {
    check_elsewhere(2, &["golden::"]);
}
