//! Logits of the recorded passes, and how far bf16 takes them from f32.

use crate::common::device;
use crate::margin::{ERROR, deviation};
use crate::recorded::{Tensors, cases, json, numbers, token_rows};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::backend::cuda::Cuda;
use dllm_kernels::cache::{BlockPlan, CacheMode, PassKind};
use dllm_kernels::model::{Model, Session, Sizes};
use serde_json::Value;
use std::ops::Range;

/// Errors of logits in standard deviations of their row: the largest of each row.
#[derive(Default)]
struct Errors(Vec<f64>);

impl Errors {
    fn add(&mut self, got: &[f32], want: &[f32], vocab_size: usize) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.chunks(vocab_size).zip(want.chunks(vocab_size)) {
            assert!(got.iter().all(|l| l.is_finite()));
            let worst = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs())).fold(0.0, f64::max);
            self.0.push(worst / deviation(want));
        }
    }

    /// Median and largest.
    fn finish(&mut self) -> [f64; 2] {
        self.0.sort_by(f64::total_cmp);
        [self.0[self.0.len() / 2], self.0[self.0.len() - 1]]
    }
}

/// The recorded passes of every kind, with the cache that the first leaves to the others: no logit is off by more than the
/// margin rule grants it, by the recorded f32 logits and by the CPU's.
pub fn logits_are_within_the_margin() {
    for name in ["tiny-llada", "tiny-llada-b", "tiny-dream"] {
        let model = crate::on_device(name);
        let file = format!("forward_{name}.json");
        let (json, tensors) = (json(&file), Tensors::open(&file));
        let (mut recorded, mut cpu) = (Errors::default(), Errors::default());
        for case in cases(&json) {
            run(&model, case, &tensors, &mut recorded, &mut cpu);
        }
        let rows = recorded.0.len();
        let ([median, recorded], [_, cpu]) = (recorded.finish(), cpu.finish());
        println!(
            "{name}: {rows} rows, largest error of a row: median {median:.4}, most {recorded:.4}; by the CPU's {cpu:.4}"
        );
        assert!(recorded <= ERROR && cpu <= ERROR, "{name}: {recorded} {cpu}");
    }
}

fn run(model: &Model, case: &Value, tensors: &Tensors, recorded: &mut Errors, cpu: &mut Errors) {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&case[key]) };
    let (batch, length) = (size("batch"), size("length"));
    let sizes = Sizes {
        prompt_lens: vec![0; batch],
        gen_length: length,
        candidates: batch * length,
        cached: true,
        kept: false,
        guided: false,
        ratios: 0,
        end_tokens: 0,
    };
    let cuda = Cuda::new(&device()).unwrap();
    let mut there = Session::new(model.device_transformer().unwrap(), cuda, sizes.clone()).unwrap();
    let mut here = Session::new(model.transformer(), Cpu::default(), sizes).unwrap();
    let (mode, later) = match case["kind"].as_str().unwrap() {
        "full" => (CacheMode::None, None),
        "suffix" => (CacheMode::Prefix, Some(PassKind::Suffix)),
        "block" => (CacheMode::Dual, Some(PassKind::Block)),
        other => panic!("unknown kind {other}"),
    };
    let passes: Vec<(String, PassKind)> = match later {
        None => vec![(String::new(), PassKind::Full)],
        Some(later) => vec![("0".into(), PassKind::Full), ("1".into(), later), ("2".into(), later)],
    };
    for (call, pass) in passes {
        let block: Range<usize> = if later.is_some() { size("start")..size("end") } else { 0..length };
        let window = pass.window(&block, length);
        let windows: Vec<_> = (0..batch).map(|s| (s, window.clone())).collect();
        let index: Vec<usize> = (0..batch * window.len()).collect();
        let tokens = token_rows(tensors, &format!("{name}.ids{call}"), batch);
        let plan = BlockPlan { mode, pass };
        there.forward(&tokens, &windows, &plan, &index, None).unwrap();
        here.forward(&tokens, &windows, &plan, &index, None).unwrap();
        let got = there.logits(index.len()).unwrap();
        let vocab_size = model.config().vocab_size;
        recorded.add(&got, &tensors.f32(&format!("{name}.logits{call}")), vocab_size);
        cpu.add(&got, &here.logits(index.len()).unwrap(), vocab_size);
    }
}

pub fn statistics() {
    for name in ["tiny-llada", "tiny-llada-b", "tiny-dream"] {
        let model = crate::on_device(name);
        let file = format!("forward_{name}.json");
        let (json, tensors) = (json(&file), Tensors::open(&file));
        let (mut eps, mut z, mut gaps, mut odds) = (vec![], vec![], vec![], vec![]);
        for case in cases(&json) {
            let mut f = |got: &[f32], want: &[f32], v: usize| {
                for (g, w) in got.chunks(v).zip(want.chunks(v)) {
                    let err: Vec<f64> = g.iter().zip(w).map(|(g, w)| f64::from(g - w)).collect();
                    let rms = (err.iter().map(|e| e * e).sum::<f64>() / v as f64).sqrt();
                    let d = deviation(w);
                    eps.push(rms / d);
                    z.push(err.iter().fold(0.0, |m: f64, e| m.max(e.abs())) / rms);
                    let best = (0..v).max_by(|a, b| w[*a].total_cmp(&w[*b])).unwrap();
                    let (mut worst, mut n) = (0.0f64, 0);
                    for t in 0..v {
                        if t != best && w[t] > w[best] - 2.0 * d as f32 {
                            worst = worst.max((err[t] - err[best]).abs());
                            n += 1;
                        }
                    }
                    if n > 0 {
                        gaps.push(worst / d);
                    }
                    let lo = |x: &[f32]| {
                        let m = x[best] as f64;
                        -(0..v).filter(|t| *t != best).map(|t| (x[t] as f64 - m).exp()).sum::<f64>().ln()
                    };
                    odds.push((lo(g) - lo(w)).abs() / d);
                }
            };
            run2(&model, case, &tensors, &mut f);
        }
        for (n, x) in [("eps", &mut eps), ("z", &mut z), ("gap", &mut gaps), ("odds", &mut odds)] {
            x.sort_by(f64::total_cmp);
            let q = |p: f64| x[((x.len() - 1) as f64 * p) as usize];
            println!(
                "{name} {n} {}: {:.4} {:.4} {:.4} {:.4} max {:.4}",
                x.len(),
                q(0.1),
                q(0.5),
                q(0.9),
                q(0.99),
                q(1.0)
            );
        }
    }
}
fn run2(model: &Model, case: &Value, tensors: &Tensors, f: &mut dyn FnMut(&[f32], &[f32], usize)) {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&case[key]) };
    let (batch, length) = (size("batch"), size("length"));
    let sizes = Sizes {
        prompt_lens: vec![0; batch],
        gen_length: length,
        candidates: batch * length,
        cached: true,
        kept: false,
        guided: false,
        ratios: 0,
        end_tokens: 0,
    };
    let cuda = Cuda::new(&device()).unwrap();
    let mut there = Session::new(model.device_transformer().unwrap(), cuda, sizes.clone()).unwrap();
    let mut here = Session::new(model.transformer(), Cpu::default(), sizes).unwrap();
    let (mode, later) = match case["kind"].as_str().unwrap() {
        "full" => (CacheMode::None, None),
        "suffix" => (CacheMode::Prefix, Some(PassKind::Suffix)),
        "block" => (CacheMode::Dual, Some(PassKind::Block)),
        other => panic!("unknown kind {other}"),
    };
    let passes: Vec<(String, PassKind)> = match later {
        None => vec![(String::new(), PassKind::Full)],
        Some(later) => vec![("0".into(), PassKind::Full), ("1".into(), later), ("2".into(), later)],
    };
    for (call, pass) in passes {
        let block: Range<usize> = if later.is_some() { size("start")..size("end") } else { 0..length };
        let window = pass.window(&block, length);
        let windows: Vec<_> = (0..batch).map(|s| (s, window.clone())).collect();
        let index: Vec<usize> = (0..batch * window.len()).collect();
        let tokens = token_rows(tensors, &format!("{name}.ids{call}"), batch);
        let plan = BlockPlan { mode, pass };
        there.forward(&tokens, &windows, &plan, &index, None).unwrap();
        here.forward(&tokens, &windows, &plan, &index, None).unwrap();
        let got = there.logits(index.len()).unwrap();
        let vocab_size = model.config().vocab_size;
        let _ = tensors;
        f(&got, &here.logits(index.len()).unwrap(), vocab_size);
    }
}
