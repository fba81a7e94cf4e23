//! Logits of the recorded passes, and how far bf16 takes them from f32.

use crate::common::device;
use crate::lockstep::Both;
use crate::margin::{MARGIN, mean_error};
use crate::recorded::{Tensors, cases, difference, json, numbers, token_rows};
use crate::rounded::Rounded;
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::backend::cuda::Cuda;
use dllm_kernels::cache::{BlockPlan, CacheMode, PassKind};
use dllm_kernels::model::{QueryRows, Session, SessionConfig};
use serde_json::Value;
use std::ops::Range;

/// What rows of logits are off by, by the CPU's.
#[derive(Default)]
struct Errors {
    /// Mean squares of the device's errors, and of those of the CPU that rounds; by the mean squares of the logits.
    gpu: Vec<f64>,
    rounded: Vec<f64>,
    /// What differences between the largest logit and another are off by at most, in mean errors of the CPU that rounds.
    gap: f64,
}

impl Errors {
    fn add(&mut self, gpu: &[f32], cpu: &[f32], rounded: &[f32], vocab_size: usize) {
        assert_eq!(gpu.len(), cpu.len());
        let rows = gpu.chunks(vocab_size).zip(cpu.chunks(vocab_size)).zip(rounded.chunks(vocab_size));
        for ((gpu, cpu), rounded) in rows {
            assert!(gpu.iter().all(|l| l.is_finite()));
            let zero = vec![0.0; vocab_size];
            let unit = mean_error(cpu, &zero);
            let mean = mean_error(rounded, cpu);
            self.gpu.push((mean_error(gpu, cpu) / unit).powi(2));
            self.rounded.push((mean / unit).powi(2));
            let best = (0..vocab_size).max_by(|a, b| cpu[*a].total_cmp(&cpu[*b])).unwrap();
            let error = |t: usize| f64::from(gpu[t] - cpu[t]);
            let worst = (0..vocab_size).map(|t| (error(t) - error(best)).abs()).fold(0.0, f64::max);
            self.gap = self.gap.max(worst / mean);
        }
    }
}

/// The recorded passes of every kind, with the cache that the first leaves to the others. The device is as far from the CPU
/// as the CPU that rounds is, and its logits are within the margin.
pub fn logits_are_within_the_margin() {
    for name in ["tiny-llada", "tiny-llada-b", "tiny-dream"] {
        let both = Both::recorded(name);
        let file = format!("forward_{name}.json");
        let (json, tensors) = (json(&file), Tensors::open(&file));
        let mut errors = Errors::default();
        for case in cases(&json) {
            run(&both, case, &tensors, &mut errors);
        }
        let rows = errors.gpu.len() as f64;
        let mean = |squares: &[f64]| (squares.iter().sum::<f64>() / rows).sqrt();
        let (gpu, rounded, gap) = (mean(&errors.gpu), mean(&errors.rounded), errors.gap);
        println!("{name}: {rows} rows, off by {gpu:.4} of the logits, the CPU that rounds by {rounded:.4};");
        println!("  a difference of logits by {gap:.2} mean errors at most");
        assert!(gpu <= 1.1 * rounded, "{name}: bf16 does not explain the error");
        assert!(gap <= MARGIN, "{name}");
    }
}

fn run(both: &Both, case: &Value, tensors: &Tensors, errors: &mut Errors) {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&case[key]) };
    let (batch, length) = (size("batch"), size("length"));
    let sizes = SessionConfig {
        prompt_lens: vec![0; batch],
        gen_length: length,
        max_candidates: batch * length,
        kv_cache: true,
        feature_cache: false,
        reuses_guidance: false,
        guided: false,
        max_ratios: 0,
        num_end_tokens: 0,
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
        let window = pass.rows(&block, 0, length);
        let windows: Vec<_> = (0..batch).map(|s| QueryRows::new(s, window.clone(), length)).collect();
        let index: Vec<usize> = (0..batch * window.len()).collect();
        let tokens = token_rows(tensors, &format!("{name}.ids{call}"), batch);
        let plan = BlockPlan::new(mode, pass);
        gpu.forward(&tokens, &windows, &plan, &index, None).unwrap();
        cpu.forward(&tokens, &windows, &plan, &index, None).unwrap();
        rounded.forward(&tokens, &windows, &plan, &index, None).unwrap();
        let [gpu, cpu, rounded] = [gpu.logits(index.len()), cpu.logits(index.len()), rounded.logits(index.len())];
        let (gpu, cpu, rounded) = (gpu.unwrap(), cpu.unwrap(), rounded.unwrap());
        let recorded = tensors.f32(&format!("{name}.logits{call}"));
        assert!(difference(&cpu, &recorded) < 5e-4, "{name}: the CPU's are the recorded ones");
        errors.add(&gpu, &cpu, &rounded, model.config().vocab_size);
    }
}
