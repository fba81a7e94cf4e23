//! Logits of the recorded forwards on the device, and their distance from f32 due to bf16.

use super::FAMILIES;
use super::bf16_reference::Bf16Reference;
use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::{MARGIN, Tally, errors_of_rows, mean_error};
use crate::common::checkpoint::Checkpoint;
use crate::common::device;
use crate::common::recorded::{Tensors, cases, difference, json, names, numbers, token_rows};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::backend::cuda::Cuda;
use dllm_kernels::cache::{BlockPlan, CacheMode, PassKind};
use dllm_kernels::model::{QueryRows, Session, SessionConfig};
use dllm_kernels::{Family, Options, Policy};
use serde_json::Value;
use std::ops::Range;

/// Errors of logits relative to the CPU's.
#[derive(Default)]
struct Errors {
    /// Mean squared error of each row on the device and of the bf16 reference, divided by the row's mean square.
    gpu: Vec<f64>,
    rounded: Vec<f64>,
    /// Largest error of a difference between the largest logit and another, in the r of the margin rule.
    gap: f64,
}

impl Errors {
    fn add(&mut self, gpu: &[f32], cpu: &[f32], rounded: &[f32], vocab_size: usize) {
        assert_eq!(gpu.len(), cpu.len());
        let of_rows = |logits: &[f32]| -> Vec<Vec<f32>> { logits.chunks(vocab_size).map(<[f32]>::to_vec).collect() };
        let errors = errors_of_rows(&of_rows(rounded), &of_rows(cpu));
        let rows = gpu.chunks(vocab_size).zip(cpu.chunks(vocab_size)).zip(rounded.chunks(vocab_size)).zip(errors);
        for (((gpu, cpu), rounded), r) in rows {
            assert!(gpu.iter().all(|l| l.is_finite()));
            let zero = vec![0.0; vocab_size];
            let unit = mean_error(cpu, &zero);
            let mean = mean_error(rounded, cpu);
            self.gpu.push((mean_error(gpu, cpu) / unit).powi(2));
            self.rounded.push((mean / unit).powi(2));
            let best = (0..vocab_size).max_by(|a, b| cpu[*a].total_cmp(&cpu[*b])).unwrap();
            let error = |t: usize| f64::from(gpu[t] - cpu[t]);
            let worst = (0..vocab_size).map(|t| (error(t) - error(best)).abs()).fold(0.0, f64::max);
            self.gap = self.gap.max(worst / r);
        }
    }
}

/// Runs the recorded forwards of every kind; later ones use the cache of the first. The device's error is at most that of the bf16
/// reference plus 10 %, and its logits are within the margin.
pub fn logits_are_within_the_margin() {
    let models = TestModel::recorded();
    for name in names("forward") {
        let (json, tensors) = (json(&name), Tensors::open(&name));
        let test_model = &models[json["model"].as_str().unwrap()];
        let mut errors = Errors::default();
        for case in cases(&json) {
            run(test_model, case, &tensors, &mut errors);
        }
        let rows = errors.gpu.len() as f64;
        let mean = |squares: &[f64]| (squares.iter().sum::<f64>() / rows).sqrt();
        let (gpu, rounded, gap) = (mean(&errors.gpu), mean(&errors.rounded), errors.gap);
        println!("{name}: {rows} rows, error {gpu:.4} of the logits, the bf16 reference's {rounded:.4};");
        println!("  largest error of a difference of logits: {gap:.2} r");
        assert!(gpu <= 1.1 * rounded, "{name}: the error is larger than that of bf16");
        assert!(gap <= MARGIN, "{name}");
    }
}

fn run(test_model: &TestModel, case: &Value, tensors: &Tensors, errors: &mut Errors) {
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
    let model = &test_model.model;
    let cuda = Cuda::new(&device()).unwrap();
    let mut gpu = Session::new(model.device_transformer().unwrap(), cuda, sizes.clone()).unwrap();
    let mut cpu = Session::new(model.transformer(), Cpu::default(), sizes.clone()).unwrap();
    let mut rounded = Session::new(&test_model.rounded, Bf16Reference::default(), sizes).unwrap();
    let (mode, later) = match case["kind"].as_str().unwrap() {
        "full" => (CacheMode::None, None),
        "suffix" => (CacheMode::Prefix, Some(PassKind::Suffix)),
        "block" => (CacheMode::Dual, Some(PassKind::Block)),
        other => panic!("unknown kind {other}"),
    };
    let passes: Vec<(String, PassKind)> = match later {
        None => vec![(String::new(), PassKind::Full)],
        Some(later) => {
            let calls = (0..).take_while(|call| tensors.has(&format!("{name}.ids{call}")));
            calls.map(|call| (call.to_string(), if call == 0 { PassKind::Full } else { later })).collect()
        }
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
        assert!(difference(&cpu, &recorded) < 5e-4, "{name}: the CPU's logits differ from the recorded ones");
        errors.add(&gpu, &cpu, &rounded, model.config().vocab_size);
    }
}

/// Decodes with more than 256 rows of a sequence in a pass, together with a short sequence, with every cache.
pub fn long_sequences() {
    let mut tally = Tally::default();
    for family in FAMILIES {
        let mut checkpoint = Checkpoint::new(family);
        let key = match family {
            Family::Llada => "max_sequence_length",
            Family::Dream => "max_position_embeddings",
        };
        checkpoint.config = checkpoint.config_with(key, Some(1024.into()));
        let test_model = TestModel::open(checkpoint.write().path());
        let prompts = [(0..300).map(|i| i * 7 % 37).collect(), vec![5, 9]];
        for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual, CacheMode::Adaptive] {
            let refresh_ratio = (cache == CacheMode::Adaptive).then_some(0.3);
            let base = Options { cache, refresh_ratio, prompt_interval: 2, response_interval: 2, ..Options::default() };
            let options = Options { gen_length: 8, block_length: Some(4), policy: Policy::Threshold(0.4), ..base };
            let what = format!("{family} {options:?}");
            let (_, seen) = decode_in_lockstep(&test_model, &options, &prompts, &what, &mut ());
            tally.add(seen);
        }
    }
    println!("{tally}");
    assert!(tally.candidates > 100, "{tally}");
}
