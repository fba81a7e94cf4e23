//! The trace of a decode, in the format of the golden trajectories (`tests/golden/README.md` section 4).

use super::decoder::Decoded;
use super::observer::{Observer, SequenceStep, Step};
use super::options::{Algorithm, Options, Policy};
use crate::cache::{CacheMode, PassKind};
use crate::model::Config;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ops::Range;

/// Observer that records the steps of a decode.
#[derive(Debug, Default)]
pub struct Trace {
    steps: Vec<Value>,
}

impl Trace {
    /// Returns the trajectory of a finished decode as JSON. `model` is the name that it records.
    pub fn finish(
        &self,
        model: &str,
        config: &Config,
        options: &Options,
        prompts: &[Vec<u32>],
        decoded: &Decoded,
    ) -> Value {
        let lens: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let algorithm = algorithm(options.algorithm(config.family), options.cache);
        json!({
            "name": "",
            "algorithm": match hybrid_params(options).next() {
                None => algorithm.to_string(),
                Some(_) => format!("{algorithm}, joined"),
            },
            "model": model,
            "params": params(config, options, prompts.len()),
            "prompt": prompts,
            "prompt_len": one_or_all(&lens),
            "final": decoded.tokens,
            "nfe": decoded.nfe,
            "steps": self.steps,
        })
    }
}

impl Observer for Trace {
    fn wants_steps(&self) -> bool {
        true
    }

    fn step(&mut self, step: &Step) {
        let kind = match step.kind {
            PassKind::Full => "full",
            PassKind::Response => "response",
            PassKind::Suffix => "suffix",
            PassKind::Block => "block",
        };
        let each = |f: &dyn Fn(&SequenceStep) -> Value| -> Vec<Value> { step.sequences.iter().map(f).collect() };
        let range = |r: &Range<usize>| json!([r.start, r.end]);
        let rounded = |c: &f64| (c * 1e8).round() / 1e8;
        let mut entry = json!({
            "step": step.index,
            "kind": kind,
            "window": one_or_all(&each(&|s| range(&s.window))),
            "block": one_or_all(&each(&|s| range(&s.block))),
            "candidates": step.sequences.iter().map(|s| s.candidates.len()).max(),
            "transferred": each(&|s| json!(s.transferred)),
            "conf": each(&|s| s.confidence.iter().map(rounded).collect()),
            "x_after": each(&|s| json!(s.tokens)),
        });
        let refreshed: Vec<_> = step.sequences.iter().filter_map(|s| s.refreshed).collect();
        if !refreshed.is_empty() {
            entry["refresh_prompt"] = one_or_all(&refreshed.iter().map(|plan| plan.prompt).collect::<Vec<_>>());
            entry["refresh_gen"] = one_or_all(&refreshed.iter().map(|plan| plan.response).collect::<Vec<_>>());
            let layers: BTreeSet<usize> =
                step.sequences.iter().flat_map(|s| &s.selected_rows).map(|(l, _)| *l).collect();
            let selected_in = |layer: usize| {
                let rows =
                    |s: &SequenceStep| s.selected_rows.iter().find(|(l, _)| *l == layer).map(|(_, rows)| rows.clone());
                json!({ "layer": layer, "indices": each(&|s| json!(rows(s).unwrap_or_default())) })
            };
            entry["vverify"] = layers.into_iter().map(selected_in).collect();
        }
        self.steps.push(entry);
    }
}

/// Returns the value that all sequences share, or else the list of values.
fn one_or_all<T: PartialEq + serde::Serialize>(values: &[T]) -> Value {
    match values {
        [first, rest @ ..] if rest.iter().all(|v| v == first) => json!(first),
        _ => json!(values),
    }
}

/// Returns the function of the reference implementation that computes the same.
fn algorithm(algorithm: Algorithm, cache: CacheMode) -> &'static str {
    match (algorithm, cache) {
        (Algorithm::Llada, CacheMode::Adaptive) => "dllm_cache.llada",
        (Algorithm::Dream, CacheMode::Adaptive) => "dllm_cache.dream",
        // No reference implementation has the adaptive cache in these algorithms.
        (Algorithm::FastLlada, CacheMode::Adaptive) => "fast_dllm.generate, dllm_cache",
        (Algorithm::DreamThreshold, CacheMode::Adaptive) => "dream.generate, dllm_cache",
        (Algorithm::DreamBlock, CacheMode::Adaptive) => "fast_dllm.dream_block, dllm_cache",
        (Algorithm::Llada, _) => "llada.generate",
        (Algorithm::FastLlada, CacheMode::None) => "fast_dllm.generate",
        (Algorithm::FastLlada, CacheMode::Prefix) => "fast_dllm.generate_with_prefix_cache",
        (Algorithm::FastLlada, CacheMode::Dual) => "fast_dllm.generate_with_dual_cache",
        (Algorithm::Dream | Algorithm::DreamThreshold, _) => "dream.generate",
        (Algorithm::DreamBlock, _) => "fast_dllm.dream_block",
    }
}

/// Returns the parameters of the hybrid cache that differ from their defaults. No reference implementation has them.
fn hybrid_params(options: &Options) -> impl Iterator<Item = (&'static str, Value)> {
    let list = |options: &Options| {
        [
            ("refresh_prompt_every", json!(options.refresh_prompt_every)),
            (
                "refresh_rows",
                json!(if options.cache.has_block_refreshes() { options.effective_refresh_ratio() } else { 1.0 }),
            ),
            ("vicinity", json!(options.vicinity)),
            ("suffix_window", json!(options.suffix_window)),
        ]
    };
    let pairs = list(options).into_iter().zip(list(&Options::default()));
    pairs.filter(|(own, usual)| own != usual).map(|(own, _)| own)
}

fn params(config: &Config, options: &Options, batch: usize) -> Value {
    let (threshold, factor) = match options.policy {
        Policy::Fixed => (None, None),
        Policy::Threshold(t) => (Some(t), None),
        Policy::Factor(f) => (None, Some(f)),
    };
    let confidence = options.confidence(options.algorithm(config.family)).name();
    let mut params = json!({
        "gen_length": options.gen_length,
        "block_length": options.block_length(),
        "steps": options.steps(),
        "cache": options.cache.name(),
        "threshold": threshold,
        "factor": factor,
        "confidence": confidence,
        "temperature": options.temperature,
        "alg_temp": options.alg_temp,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "cfg_scale": options.cfg_scale,
        "eps": options.eps,
        "seed": options.seed,
        "early_stop": options.early_stop,
        "mask_id": config.mask_token_id,
        "batch": batch,
    });
    for (name, value) in hybrid_params(options) {
        params[name] = value;
    }
    if let Some(adaptive) = options.adaptive() {
        params["prompt_interval_steps"] = json!(adaptive.prompt_interval);
        params["gen_interval_steps"] = json!(adaptive.response_interval);
        params["cfg_interval_steps"] = json!(adaptive.cfg_interval);
        params["transfer_ratio"] = json!(adaptive.refresh_ratio);
    }
    params
}
