//! Logits of the recorded passes, and how far bf16 takes them from f32.

use crate::common::device;
use crate::lockstep::Both;
use crate::margin::{F32, REACH, ROUNDED, deviation};
use crate::recorded::{Tensors, cases, json, numbers, token_rows};
use crate::rounded::Rounded;
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::backend::cuda::Cuda;
use dllm_kernels::cache::{BlockPlan, CacheMode, PassKind};
use dllm_kernels::model::{Session, Sizes};
use serde_json::Value;
use std::ops::Range;

/// Errors of rows of logits, in standard deviations of the row.
#[derive(Default)]
struct Errors {
    /// Root mean squares, one a row.
    mean: Vec<f64>,
    /// The largest error of a difference between the largest logit and one not far below it.
    gap: Vec<f64>,
}

impl Errors {
    fn add(&mut self, got: &[f32], want: &[f32], vocab_size: usize) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.chunks(vocab_size).zip(want.chunks(vocab_size)) {
            let error: Vec<f64> = got.iter().zip(want).map(|(g, w)| f64::from(g - w)).collect();
            assert!(error.iter().all(|e| e.is_finite()));
            let unit = deviation(want);
            self.mean.push((error.iter().map(|e| e * e).sum::<f64>() / vocab_size as f64).sqrt() / unit);
            let best = (0..vocab_size).max_by(|a, b| want[*a].total_cmp(&want[*b])).unwrap();
            let near = (0..vocab_size).filter(|t| f64::from(want[best] - want[*t]) <= REACH * unit);
            self.gap.push(near.map(|t| (error[t] - error[best]).abs()).fold(0.0, f64::max) / unit);
        }
    }

    /// The largest gap.
    fn finish(mut self, what: &str) -> f64 {
        self.mean.sort_by(f64::total_cmp);
        let most = self.gap.iter().copied().fold(0.0, f64::max);
        let rows = self.mean.len();
        let (median, largest) = (self.mean[rows / 2], self.mean[rows - 1]);
        println!(
            "{what}: {rows} rows, mean error {median:.4}, at most {largest:.4}; of a difference at most {most:.4}"
        );
        most
    }
}

/// The recorded passes of every kind, with the cache that the first leaves to the others: against the recorded f32 logits,
/// the CPU's, and those of the CPU that rounds.
pub fn logits_are_within_the_margin() {
    for name in ["tiny-llada", "tiny-llada-b", "tiny-dream"] {
        let both = Both::recorded(name);
        let file = format!("forward_{name}.json");
        let (json, tensors) = (json(&file), Tensors::open(&file));
        let mut errors = <[Errors; 3]>::default();
        for case in cases(&json) {
            run(&both, case, &tensors, &mut errors);
        }
        let [recorded, cpu, rounded] = errors;
        assert!(recorded.finish(&format!("{name}, recorded")) <= F32);
        assert!(cpu.finish(&format!("{name}, CPU")) <= F32);
        assert!(rounded.finish(&format!("{name}, rounded CPU")) <= ROUNDED);
    }
}

fn run(both: &Both, case: &Value, tensors: &Tensors, errors: &mut [Errors; 3]) {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&case[key]) };
    let (batch, length) = (size("batch"), size("length"));
    let sizes = Sizes {
        prompt_lens: vec![0; batch],
        gen_length: length,
        candidates: batch * length,
        cached: true,
        guided: false,
        ratios: 0,
        end_tokens: 0,
    };
    let model = &both.model;
    let cuda = Cuda::new(&device()).unwrap();
    let mut gpu = Session::new(model.device_transformer().unwrap(), cuda, sizes.clone()).unwrap();
    let mut cpu = Session::new(model.transformer(), Cpu::default(), sizes.clone()).unwrap();
    let mut rounded = Session::new(&both.rounded, Rounded::default(), sizes).unwrap();
    let (mode, later) = match case["kind"].as_str().unwrap() {
        "full" => (CacheMode::None, None),
        "suffix" => (CacheMode::Prefix, Some(PassKind::Suffix)),
        "block" => (CacheMode::Dual, Some(PassKind::Block)),
        other => panic!("unknown kind {other}"),
    };
    let passes: Vec<(&str, PassKind)> = match later {
        None => vec![("", PassKind::Full)],
        Some(later) => vec![("0", PassKind::Full), ("1", later), ("2", later)],
    };
    let block: Range<usize> = if later.is_some() { size("start")..size("end") } else { 0..length };
    for (call, pass) in passes {
        let window = pass.window(&block, length);
        let windows: Vec<_> = (0..batch).map(|s| (s, window.clone())).collect();
        let index: Vec<usize> = (0..batch * window.len()).collect();
        let tokens = token_rows(tensors, &format!("{name}.ids{call}"), batch);
        let plan = BlockPlan { mode, pass };
        gpu.forward(&tokens, &windows, &plan, &index, None).unwrap();
        cpu.forward(&tokens, &windows, &plan, &index, None).unwrap();
        rounded.forward(&tokens, &windows, &plan, &index, None).unwrap();
        let got = gpu.logits(index.len()).unwrap();
        let recorded = tensors.f32(&format!("{name}.logits{call}"));
        let others = [recorded, cpu.logits(index.len()).unwrap(), rounded.logits(index.len()).unwrap()];
        for (errors, want) in errors.iter_mut().zip(&others) {
            errors.add(&got, want, model.config().vocab_size);
        }
    }
}
