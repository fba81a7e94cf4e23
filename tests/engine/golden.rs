//! Replays recordings of the reference implementations in Python (`tests/golden/README.md`), step by step.
//!
//! `DLLM_GOLDEN_DIR` selects another directory of the same format.

use crate::common::recorded::{
    Tensors, cases, checkpoints, compare, difference, golden_dir, json, names, not_run, numbers, options, token_rows,
};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{BlockPlan, PassKind};
use dllm_kernels::decode::decode;
use dllm_kernels::decode::trace::Trace;
use dllm_kernels::engine::{DecodeEngine, HostEngine, Pass};
use dllm_kernels::model::{QueryRows, Session, SessionConfig, Weights};
use dllm_kernels::reference::{rope, vverify};
use dllm_kernels::sampling::{Candidates, CommitRule, Prediction, SamplingParams, min_kept_logit, sample, score_row};
use dllm_kernels::sampling::{DreamSchedule, llada_quota};
use dllm_kernels::{CacheMode, Confidence, Config, Family, Model, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;

fn models() -> BTreeMap<String, Model> {
    checkpoints().into_iter().map(|name| (name.clone(), Model::open(golden_dir().join(name)).unwrap())).collect()
}

const FULL: BlockPlan = BlockPlan::new(CacheMode::None, PassKind::Full);

#[test]
fn forward() {
    let models = models();
    for name in names("forward") {
        let (json, tensors) = (json(&name), Tensors::open(&name));
        let model = &models[json["model"].as_str().unwrap()];
        for case in cases(&json) {
            let kind = case["kind"].as_str().unwrap();
            let worst = match kind {
                "full" => forward_full(model, case, &tensors),
                "suffix" | "block" => forward_window(model, case, &tensors, kind == "suffix"),
                other => panic!("unknown kind {other}"),
            };
            println!("{name} {:24} {worst:.1e}", case["name"].as_str().unwrap());
            assert!(worst < 5e-4, "{name} {}: {worst}", case["name"]);
        }
    }
}

fn session(model: &Model, batch: usize, length: usize, cached: bool) -> Session<'_, Cpu> {
    let sizes = SessionConfig {
        prompt_lens: vec![0; batch],
        gen_length: length,
        max_candidates: batch * length,
        kv_cache: cached,
        feature_cache: false,
        reuses_guidance: false,
        guided: false,
        max_ratios: 0,
        num_end_tokens: 0,
    };
    Session::new(model.transformer(), Cpu::default(), sizes).unwrap()
}

fn forward_full(model: &Model, case: &Value, tensors: &Tensors) -> f32 {
    let name = case["name"].as_str().unwrap();
    let (batch, length): (usize, usize) = (numbers(&case["batch"]), numbers(&case["length"]));
    let tokens = token_rows(tensors, &format!("{name}.ids"), batch);
    let windows: Vec<_> = (0..batch).map(|s| QueryRows::new(s, 0..length, length)).collect();
    let index: Vec<usize> = (0..batch * length).collect();
    let mut session = session(model, batch, length, false);
    let mut hidden = Vec::new();
    session.forward(&tokens, &windows, &FULL, &index, Some(&mut hidden)).unwrap();
    let mut worst = difference(&session.logits(batch * length).unwrap(), &tensors.f32(&format!("{name}.logits")));
    for (i, hidden) in hidden.iter().enumerate() {
        let name = format!("{name}.hidden_{i}");
        if tensors.has(&name) {
            worst = worst.max(difference(hidden, &tensors.f32(&name)));
        }
    }
    worst
}

fn forward_window(model: &Model, case: &Value, tensors: &Tensors, suffix: bool) -> f32 {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&case[key]) };
    let (batch, length) = (size("batch"), size("length"));
    let block = size("start")..size("end");
    let (mode, pass) = match suffix {
        true => (CacheMode::Prefix, PassKind::Suffix),
        false => (CacheMode::Dual, PassKind::Block),
    };
    let mut session = session(model, batch, length, true);
    assert!(tensors.has(&format!("{name}.ids1")), "{name}: no call that uses the cache");
    let mut worst = 0.0f32;
    let calls = (0..).take_while(|call| tensors.has(&format!("{name}.ids{call}")));
    for call in calls {
        let pass = if call == 0 { PassKind::Full } else { pass };
        let window = pass.rows(&block, 0, length);
        let windows: Vec<_> = (0..batch).map(|s| QueryRows::new(s, window.clone(), length)).collect();
        let index: Vec<usize> = (0..batch * window.len()).collect();
        let tokens = token_rows(tensors, &format!("{name}.ids{call}"), batch);
        session.forward(&tokens, &windows, &BlockPlan::new(mode, pass), &index, None).unwrap();
        let want = tensors.f32(&format!("{name}.logits{call}"));
        worst = worst.max(difference(&session.logits(index.len()).unwrap(), &want));
        if call == 0 {
            worst = worst.max(cached_keys_and_values(model.config(), &session, tensors, name, batch, length));
        }
    }
    worst
}

/// Compares the cache after the full forward with the recorded one, whose keys have no rotary embedding yet.
fn cached_keys_and_values(
    config: &Config,
    session: &Session<Cpu>,
    tensors: &Tensors,
    name: &str,
    batch: usize,
    length: usize,
) -> f32 {
    let (heads, d) = (config.num_kv_heads, config.head_dim);
    let mut angles = rope::Angles::default();
    angles.extend(config.rope_theta, d, length);
    let mut worst = 0.0f32;
    for layer in 0..config.num_layers {
        if !tensors.has(&format!("{name}.cache_k_{layer}")) {
            continue;
        }
        let (k, v) = session.kv_cache().unwrap().layer(layer);
        for (got, what) in [(k, "k"), (v, "v")] {
            let recorded = tensors.f32(&format!("{name}.cache_{what}_{layer}"));
            let mut want = vec![0.0; recorded.len()];
            for (row, want) in want.chunks_mut(heads * d).enumerate() {
                let (sequence, position) = (row / length, row % length);
                for head in 0..heads {
                    // LLaDA stores [B, heads, L, d], Dream [B, L, heads * d].
                    let from = match config.family {
                        Family::Llada => ((sequence * heads + head) * length + position) * d,
                        Family::Dream => (row * heads + head) * d,
                    };
                    want[head * d..(head + 1) * d].copy_from_slice(&recorded[from..from + d]);
                }
                if what == "k" {
                    rope::rotate(want, d, angles.at(position));
                }
            }
            worst = worst.max(difference(&got[..batch * length * heads * d], &want));
        }
    }
    worst
}

fn plain_unmask() -> SamplingParams {
    SamplingParams {
        confidence: Confidence::Probability,
        temperature: 0.0,
        tempered_confidence: false,
        f32_confidence: false,
        top_p: None,
        top_k: None,
        cfg_scale: 0.0,
        alg_temp: 0.0,
        seed: 0,
        mask_token: None,
    }
}

#[test]
fn sampler_llada() {
    for file in names("sampler_llada") {
        let (json, tensors) = (json(&file), Tensors::open(&file));
        cases(&json).iter().for_each(|case| sampler_llada_case(case, &tensors));
    }
}

fn sampler_llada_case(case: &Value, tensors: &Tensors) {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| -> usize { numbers(&case[key]) };
    let (batch, length, vocab) = (size("batch"), size("length"), size("vocab"));
    let of = |what: &str| format!("{name}.{what}");
    let (logits, x, masked) = (tensors.f32(&of("logits")), tensors.i64(&of("x")), tensors.u8(&of("mask_index")));
    let mut got_x0 = x.clone();
    let mut got_confidence = vec![f64::NEG_INFINITY; batch * length];
    let mut got_transfer = vec![0u8; batch * length];
    let mut candidate_logits = Vec::new();
    let mut groups = Vec::new();
    for row in 0..batch {
        let positions: Vec<usize> = (0..length).filter(|p| masked[row * length + p] == 1).collect();
        for p in &positions {
            let at = (row * length + p) * vocab;
            candidate_logits.extend(&logits[at..at + vocab]);
        }
        let selection = match (&case["num_transfer"][row], &case["threshold"], &case["factor"]) {
            (quota, Value::Null, Value::Null) => CommitRule::Quota(numbers(quota)),
            (_, threshold, Value::Null) => CommitRule::Threshold(numbers(threshold)),
            (_, _, factor) => CommitRule::Factor(numbers(factor)),
        };
        groups.push(Candidates { sequence: row, step: 0, positions, commit_before: length, commit_rule: selection });
    }
    let verdicts = sample(&mut candidate_logits, vocab, &groups, &plain_unmask()).unwrap();
    let places = groups.iter().flat_map(|g| g.positions.iter().map(|p| g.sequence * length + p));
    for (at, verdict) in places.zip(&verdicts) {
        got_x0[at] = verdict.token as i64;
        got_confidence[at] = verdict.confidence;
        got_transfer[at] = verdict.commit as u8;
    }
    assert_eq!(got_x0, tensors.i64(&of("x0")), "{name}");
    assert_eq!(got_transfer, tensors.u8(&of("transfer_index")), "{name}");
    for (got, want) in got_confidence.iter().zip(tensors.f64(&of("confidence"))) {
        assert!(*got == want || (got - want).abs() < 1e-12, "{name}: {got} {want}");
    }
}

#[test]
fn sampler_dream() {
    for file in names("sampler_dream") {
        let (json, tensors) = (json(&file), Tensors::open(&file));
        cases(&json).iter().for_each(|case| sampler_dream_case(case, &tensors));
    }
}

fn sampler_dream_case(case: &Value, tensors: &Tensors) {
    let name = case["name"].as_str().unwrap();
    let logits = tensors.f32(&format!("{name}.logits"));
    let alg = case["alg"].as_str().unwrap();
    let temperature: f64 = numbers(&case["temperature"]);
    let setting = SamplingParams {
        confidence: match alg {
            "topk_margin" => Confidence::Margin,
            "entropy" => Confidence::Entropy,
            _ => Confidence::Probability,
        },
        temperature,
        tempered_confidence: true,
        f32_confidence: true,
        top_p: numbers(&case["top_p"]),
        top_k: numbers(&case["top_k"]),
        ..plain_unmask()
    };
    if alg == "probs" {
        let vocab = *tensors.shape(&format!("{name}.logits")).last().unwrap();
        dream_probabilities(&setting, vocab, &logits, &tensors.f32(&format!("{name}.probs")), name);
        return;
    }
    let confidence = tensors.f32(&format!("{name}.confidence"));
    let x0 = tensors.i64(&format!("{name}.x0"));
    let kept = tensors.u8(&format!("{name}.kept"));
    let vocab = logits.len() / x0.len();
    for (i, row) in logits.chunks(vocab).enumerate() {
        let mut scratch = row.to_vec();
        let (token, got) = score_row(&mut scratch, &setting, 0, 0).unwrap();
        assert_eq!(token as i64, x0[i], "{name} row {i}");
        assert!((got - confidence[i] as f64).abs() < 1e-5, "{name} row {i}: {got} {}", confidence[i]);
        let got: Vec<u8> = scratch.iter().map(|l| (*l > f32::NEG_INFINITY) as u8).collect();
        assert_eq!(got, kept[i * vocab..(i + 1) * vocab], "{name} row {i}");
    }
}

/// Checks probabilities and the confidence of drawn tokens. Sampling by Gumbel-max computes no probabilities, so they are rebuilt
/// from the smallest logit that top-k and top-p keep.
fn dream_probabilities(setting: &SamplingParams, vocab: usize, logits: &[f32], probs: &[f32], name: &str) {
    assert_eq!(logits.len(), probs.len(), "{name}");
    let tempered = if setting.temperature > 0.0 { setting.temperature } else { 1.0 };
    for (row, probs) in logits.chunks(vocab).zip(probs.chunks(vocab)) {
        let min_kept = min_kept_logit(row, tempered, setting.top_p, setting.top_k);
        let weight = |l: f32| if l >= min_kept { (l as f64 / tempered).exp() } else { 0.0 };
        let total: f64 = row.iter().map(|l| weight(*l)).sum();
        for (l, want) in row.iter().zip(probs) {
            assert!((weight(*l) / total - *want as f64).abs() < 1e-6, "{name}");
        }
        for position in 0..20 {
            let (token, confidence) = score_row(&mut row.to_vec(), setting, 0, position).unwrap();
            assert!((confidence - probs[token as usize] as f64).abs() < 1e-6, "{name}");
        }
    }
}

#[test]
fn sampler_gumbel() {
    for file in names("sampler_gumbel") {
        let (json, tensors) = (json(&file), Tensors::open(&file));
        cases(&json).iter().for_each(|case| sampler_gumbel_case(case, &tensors));
    }
}

fn sampler_gumbel_case(case: &Value, tensors: &Tensors) {
    let name = case["name"].as_str().unwrap();
    let temperature: f64 = numbers(&case["temperature"]);
    let (logits, uniform) = (tensors.f32(&format!("{name}.logits")), tensors.f64(&format!("{name}.uniform")));
    let (noised, x0) = (tensors.f64(&format!("{name}.noised")), tensors.i64(&format!("{name}.x0")));
    let vocab = logits.len() / x0.len();
    // The crate adds T * gumbel to the logit; the reference implementation divides e^logit by (-ln u)^T, which is equivalent.
    let got: Vec<f64> = logits.iter().zip(&uniform).map(|(l, u)| *l as f64 - temperature * (-u.ln()).ln()).collect();
    for (got, want) in got.iter().zip(&noised) {
        assert!((got.exp() - want).abs() <= 1e-12 * want, "{name}: {} {want}", got.exp());
    }
    for (row, want) in got.chunks(vocab).zip(&x0) {
        let best = (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a))).unwrap();
        assert_eq!(best as i64, *want, "{name}");
    }
}

fn all_cases(kind: &str) -> Vec<Value> {
    names(kind).iter().flat_map(|name| cases(&json(name)).clone()).collect()
}

#[test]
fn schedules() {
    for case in all_cases("sampler_schedule") {
        let want: Vec<usize> = numbers(&case["schedule"]);
        let (masked, steps) = (numbers(&case["masked"]), numbers(&case["steps"]));
        let got: Vec<usize> = (0..steps).map(|i| llada_quota(masked, steps, i)).collect();
        assert_eq!(got, want, "{case}");
    }
    for case in all_cases("sampler_dream_quota") {
        let schedule = DreamSchedule::new(numbers(&case["steps"]), numbers(&case["eps"]));
        let want: Vec<f32> = numbers(&case["timesteps"]);
        assert_eq!(schedule.timesteps(), want, "{case}");
        let mut left: usize = numbers(&case["masked"]);
        for (i, want) in numbers::<Vec<usize>>(&case["quota"]).into_iter().enumerate() {
            assert_eq!(schedule.quota(i, left), want, "step {i} of {case}");
            left -= want;
        }
    }
}

#[test]
fn sampler_vverify() {
    for file in names("sampler_vverify") {
        let (json, tensors) = (json(&file), Tensors::open(&file));
        cases(&json).iter().for_each(|case| sampler_vverify_case(case, &tensors));
    }
}

fn sampler_vverify_case(case: &Value, tensors: &Tensors) {
    let name = case["name"].as_str().unwrap();
    let (fresh, cached) = (tensors.f32(&format!("{name}.v_new")), tensors.f32(&format!("{name}.v_cached")));
    let (cosine, indices) = (tensors.f32(&format!("{name}.cosine")), tensors.i64(&format!("{name}.indices")));
    let width = fresh.len() / cosine.len();
    let selected: usize = numbers(&case["num_replace"]);
    for (i, want) in cosine.iter().enumerate() {
        let row = i * width..(i + 1) * width;
        let got = vverify::cosine(&fresh[row.clone()], &cached[row]);
        assert!((got - *want as f64).abs() < 2e-6, "{name}: {got} {want}");
    }
    let batch = indices.len().checked_div(selected).unwrap_or(1);
    let rows = cosine.len() / batch * width;
    for (b, (fresh, cached)) in fresh.chunks(rows).zip(cached.chunks(rows)).enumerate() {
        let got = vverify::vverify(fresh, cached, width, numbers(&case["transfer_ratio"]));
        let mut want: Vec<usize> = indices[b * selected..(b + 1) * selected].iter().map(|i| *i as usize).collect();
        want.sort_unstable();
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn trajectories() {
    let models = models();
    let (mut replayed, mut selected_rows) = (0, 0);
    for name in names("trajectory") {
        let case = json(&name);
        let layers = |step: &Value| step["vverify"].as_array().map_or(0, Vec::len);
        selected_rows += case["steps"].as_array().unwrap().iter().map(layers).sum::<usize>();
        let model = &models[case["model"].as_str().unwrap()];
        let options = options(&case);
        let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
        options.validate(model.config(), &prompts).unwrap();
        let sizes = options.sizes(model.config(), &prompts);
        let mut session = HostEngine::new(model.transformer(), Cpu::default(), sizes).unwrap();
        let mut trace = Trace::default();
        let decoded = decode(&mut session, model.config(), &prompts, &options, None, &mut trace).unwrap();
        compare(&name, &case, model.config(), &options, &decoded, &trace);
        superfluous_forwards(&name, &case, options.cache);
        // A decode without an observer computes fewer logit rows.
        let quiet = decode(&mut session, model.config(), &prompts, &options, None, &mut ()).unwrap();
        assert_eq!(quiet.tokens, decoded.tokens, "{name}: tokens depend on the observer");
        replayed += 1;
    }
    println!("{replayed} trajectories replayed, with {selected_rows} selections by V-verify");
    if selected_rows == 0 {
        not_run("trajectory with selections by V-verify");
    }
}

/// The earlier revision of Fast-dLLM runs one more forward in each block that the first forward completes, if it has a block cache.
fn superfluous_forwards(name: &str, case: &Value, cache: CacheMode) {
    let (Some(legacy), CacheMode::Prefix | CacheMode::Dual) = (case["nfe_legacy"].as_u64(), cache) else { return };
    let mut forwards: BTreeMap<String, usize> = BTreeMap::new();
    for step in case["steps"].as_array().unwrap() {
        *forwards.entry(step["block"].to_string()).or_default() += 1;
    }
    let short = forwards.values().filter(|forwards| **forwards == 1).count() as u64;
    assert_eq!(legacy, numbers::<u64>(&case["nfe"]) + short, "{name}: forwards of the earlier revision");
}

/// Engine that compares the logits of a recorded decode with those of its own, and samples from these.
struct Compared<'m> {
    session: Session<'m, Cpu>,
    family: Family,
    recorded: Tensors,
    /// Positions of the recorded rows, by step.
    rows: Vec<Range<usize>>,
    step: usize,
    compared: usize,
    worst: f32,
}

impl DecodeEngine for Compared<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let rows = self.rows[self.step].clone();
        // Dream's tokens are predicted by the row before them, but for the first of the computed rows.
        let before = |window: &Range<usize>| usize::from(self.family == Family::Dream && window.start < rows.start);
        let (mut index, mut first) = (Vec::new(), 0);
        for QueryRows { rows: window, .. } in pass.query_rows {
            index.extend((rows.start - before(window)..rows.end).map(|position| first + position - window.start));
            first += window.len();
        }
        self.session.forward(tokens, pass.query_rows, pass.plan, &index, None)?;
        let logits = self.session.logits(index.len())?;
        let vocab = logits.len() / index.len();
        let (mut recorded_rows, mut own, mut first) = (Vec::new(), Vec::new(), 0);
        for QueryRows { sequence, rows: window, .. } in pass.query_rows {
            let extra = before(window);
            recorded_rows.extend(&logits[(first + extra) * vocab..(first + extra + rows.len()) * vocab]);
            for group in pass.candidates.iter().filter(|group| group.sequence == *sequence) {
                let shift = usize::from(self.family == Family::Dream);
                let row = |position: &usize| first + (position + extra - rows.start).saturating_sub(shift);
                own.extend(group.positions.iter().flat_map(|p| &logits[row(p) * vocab..(row(p) + 1) * vocab]));
            }
            first += extra + rows.len();
        }
        let name = format!("step_{}.logits", self.step);
        if self.recorded.has(&name) {
            self.worst = self.worst.max(difference(&recorded_rows, &self.recorded.f32(&name)));
            self.compared += 1;
        }
        self.step += 1;
        sample(&mut own, vocab, pass.candidates, pass.sampling)
    }
}

/// Compares recorded logits of whole decodes: with dLLM-Cache those of all generated rows, including those that did not run;
/// with a block cache those of the block.
#[test]
fn recorded_logits() {
    let models = models();
    let (mut adaptive, mut blocks) = (0, 0);
    for name in names("trajectory") {
        let Some(recorded) = Tensors::find(&name) else { continue };
        let case = json(&name);
        let model = &models[case["model"].as_str().unwrap()];
        let options = options(&case);
        let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
        let (prompt_len, steps) = (prompts[0].len(), recorded.names().len());
        let rows = |step: &Value| match options.cache {
            CacheMode::Adaptive => prompt_len..prompt_len + options.gen_length,
            _ => {
                let [start, end]: [usize; 2] = numbers(&step["block"]);
                start..end
            }
        };
        let rows = case["steps"].as_array().unwrap().iter().map(rows).collect();
        let candidates = prompts.len() * (options.gen_length + 1);
        let sizes = SessionConfig { max_candidates: candidates, ..options.sizes(model.config(), &prompts) };
        let session = Session::new(model.transformer(), Cpu::default(), sizes).unwrap();
        let family = model.config().family;
        let mut engine = Compared { session, family, recorded, rows, step: 0, compared: 0, worst: 0.0 };
        let decoded = decode(&mut engine, model.config(), &prompts, &options, None, &mut ()).unwrap();
        println!("{name} {} steps {:.1e}", engine.compared, engine.worst);
        assert!(engine.compared == steps && engine.worst < 1e-3, "{name}: {} of {steps} steps", engine.compared);
        assert_eq!(serde_json::json!(decoded.tokens), case["final"]);
        *if options.cache == CacheMode::Adaptive { &mut adaptive } else { &mut blocks } += 1;
    }
    for (count, what) in [(adaptive, "dLLM-Cache"), (blocks, "a block cache")] {
        if count == 0 {
            not_run(&format!("trajectory of {what} with logits"));
        }
    }
}

/// Engine that reads logits from a table instead of a model.
struct Scripted<'a> {
    logits: &'a [f32],
    batch: usize,
    length: usize,
    vocab: usize,
    family: Family,
    call: usize,
}

impl DecodeEngine for Scripted<'_> {
    fn step(&mut self, _tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let mut rows = Vec::new();
        for group in pass.candidates {
            let window = &pass.query_rows.iter().find(|w| w.sequence == group.sequence).unwrap().rows;
            for position in &group.positions {
                // Dream's logits come from the row before, within the window.
                let row = match self.family {
                    Family::Dream if *position > window.start => position - 1,
                    _ => *position,
                };
                let at = ((self.call * self.batch + group.sequence) * self.length + row) * self.vocab;
                rows.extend(&self.logits[at..at + self.vocab]);
            }
        }
        self.call += 1;
        sample(&mut rows, self.vocab, pass.candidates, pass.sampling)
    }
}

#[test]
fn scripted() {
    for name in names("scripted") {
        scripted_decodes(&json(&name), &Tensors::open(&name));
    }
}

fn scripted_decodes(json: &Value, tensors: &Tensors) {
    let (logits, prompt) = (tensors.f32("logits"), tensors.i64("prompt"));
    let size = |key: &str| -> usize { numbers(&json[key]) };
    let (prompt_len, gen_length, vocab) = (size("prompt_len"), size("gen_length"), size("vocab"));
    let table_batch = prompt.len() / prompt_len;
    for case in cases(json) {
        let name = case["name"].as_str().unwrap();
        let family = if case["algorithm"].as_str().unwrap().contains("dream") { Family::Dream } else { Family::Llada };
        let config = Config {
            family,
            vocab_size: vocab,
            mask_token_id: numbers(&json["mask_id"]),
            eos_token_ids: vec![],
            ..Config::shape("mid").unwrap()
        };
        let batch: usize = numbers(&case["batch"]);
        let prompts: Vec<Vec<u32>> =
            prompt.chunks(prompt_len).take(batch).map(|row| row.iter().map(|id| *id as u32).collect()).collect();
        let options = options(case);
        options.validate(&config, &prompts).unwrap();
        let mut table =
            Scripted { logits: &logits, batch: table_batch, length: prompt_len + gen_length, vocab, family, call: 0 };
        let mut trace = Trace::default();
        let decoded = decode(&mut table, &config, &prompts, &options, None, &mut trace).unwrap();
        let mut with_prompt = case.clone();
        with_prompt["prompt"] = serde_json::to_value(&prompts).unwrap();
        compare(name, &with_prompt, &config, &options, &decoded, &trace);
    }
}

/// The tests of this file on other recordings than the shipped ones.
mod elsewhere {
    use crate::common::copy::{check_elsewhere, passes, write_copy};
    use crate::common::recorded::{KINDS, golden_dir, is_shipped, names, not_run};

    /// Start of the names of this file's tests.
    fn filters() -> Vec<&'static str> {
        let here = module_path!().trim_end_matches("::elsewhere");
        here.split_once("::").map(|(_, module)| module).into_iter().collect()
    }

    #[test]
    fn names_and_sizes_come_from_the_directory() {
        check_elsewhere(4, &filters());
    }

    /// A directory with recordings of one kind.
    #[test]
    fn kinds_that_lack_are_named() {
        let Some(copy) = write_copy(1) else { return };
        for entry in std::fs::read_dir(copy.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                std::fs::remove_dir_all(path).unwrap();
            } else if !path.file_name().unwrap().to_str().unwrap().starts_with("sampler_vverify") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let printed = passes(copy.path(), &filters());
        let says = |what: &str| printed.contains(&format!("not run: no {what} in {}\n", copy.path().display()));
        for kind in KINDS {
            assert_eq!(says(&format!("{kind}*.json")), kind != "sampler_vverify", "{kind}: {printed}");
        }
        assert!(says("checkpoint"), "{printed}");
    }

    #[test]
    fn the_shipped_directory_has_every_kind() {
        if is_shipped(&golden_dir()) {
            assert!(KINDS.iter().all(|kind| !names(kind).is_empty()));
            assert!(std::panic::catch_unwind(|| not_run("recording of another kind")).is_err());
        } else {
            println!("not run: other recordings need not have every kind");
        }
    }
}

/// Every golden checkpoint has exactly the tensors that its config requires.
#[test]
fn tensor_lists() {
    for (name, model) in models() {
        let weights = Weights::open(&golden_dir().join(&name)).unwrap();
        let mut want = model.config().tensors();
        want.sort();
        let got: Vec<_> = weights.list().into_iter().map(|(n, _, shape)| (n.to_string(), shape.to_vec())).collect();
        assert_eq!(got, want);
    }
}
