//! Reads the recordings of the reference implementations in Python (`tests/golden/README.md`).

use dllm_kernels::decode::Decoded;
use dllm_kernels::decode::trace::Trace;
use dllm_kernels::{CacheMode, Confidence, Config, Options, Policy};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Kinds of recordings. A file belongs to the longest of these names with which its own starts: `sampler_dream_quota.json` is not
/// of the kind `sampler_dream`.
pub const KINDS: [&str; 9] = [
    "forward",
    "sampler_dream",
    "sampler_dream_quota",
    "sampler_gumbel",
    "sampler_llada",
    "sampler_schedule",
    "sampler_vverify",
    "scripted",
    "trajectory",
];

pub fn kind_of(name: &str) -> Option<&'static str> {
    KINDS.into_iter().filter(|kind| name.starts_with(kind)).max_by_key(|kind| kind.len())
}

/// Directory of the recordings in this checkout.
pub fn dir_of_checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Directory of the recordings: `DLLM_GOLDEN_DIR` (for test programs that run on another machine, or for other recordings), or that
/// of this checkout.
pub fn golden_dir() -> PathBuf {
    std::env::var_os("DLLM_GOLDEN_DIR").map_or_else(dir_of_checkout, PathBuf::from)
}

/// Returns whether the recordings in `dir` are the shipped ones or a copy of them, by their page. Only they must have every kind,
/// and only of them shares and counts are known.
pub fn is_shipped(dir: &Path) -> bool {
    std::fs::read_to_string(dir.join("README.md")).is_ok_and(|page| page == include_str!("../golden/README.md"))
}

/// Says that the directory has no recordings of some kind. It is a failure only in the shipped directory.
pub fn not_run(what: &str) {
    let dir = golden_dir();
    assert!(!is_shipped(&dir), "no {what} in {}: it must have every kind of recording", dir.display());
    println!("not run: no {what} in {}", dir.display());
}

fn entries() -> Vec<String> {
    let dir = golden_dir();
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut list: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    list.sort();
    let is_recording = |file: &String| file.ends_with(".json") && kind_of(file).is_some();
    assert!(list.iter().any(is_recording), "no recordings in {}: expected {KINDS:?}", dir.display());
    list
}

/// Names of all recordings of a kind, without `.json`. Where there is none, says that they are not run.
pub fn names(kind: &str) -> Vec<String> {
    assert!(KINDS.contains(&kind), "{kind}: expected one of {KINDS:?}");
    let files = entries();
    let names = files.iter().filter_map(|file| file.strip_suffix(".json"));
    let list: Vec<_> = names.filter(|name| kind_of(name) == Some(kind)).map(str::to_string).collect();
    if list.is_empty() {
        not_run(&format!("{kind}*.json"));
    }
    list
}

/// Names of the checkpoints: the folders with a config. Where there is none, says so.
pub fn checkpoints() -> Vec<String> {
    let dir = golden_dir();
    let list: Vec<_> = entries().into_iter().filter(|name| dir.join(name).join("config.json").exists()).collect();
    if list.is_empty() {
        not_run("checkpoint");
    }
    list
}

/// The JSON file of the recording `name`.
pub fn json(name: &str) -> Value {
    let path = golden_dir().join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn cases(json: &Value) -> &Vec<Value> {
    let cases = json["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    cases
}

pub fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

/// Tensors of the safetensors file next to a JSON file.
pub struct Tensors(Vec<u8>);

impl Tensors {
    /// The file of the recording `name`.
    pub fn open(name: &str) -> Tensors {
        Tensors::find(name).unwrap_or_else(|| panic!("no {name}.safetensors in {}", golden_dir().display()))
    }

    /// The file of the recording `name`, if it has one.
    pub fn find(name: &str) -> Option<Tensors> {
        std::fs::read(golden_dir().join(format!("{name}.safetensors"))).ok().map(Tensors)
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        self.file().names().into_iter().map(str::to_string).collect()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).shape().to_vec()
    }

    pub fn raw(&self, name: &str, dtype: Dtype) -> Vec<u8> {
        let file = self.file();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), dtype, "{name}");
        view.data().to_vec()
    }

    pub fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.raw(name, Dtype::F32).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub fn f64(&self, name: &str) -> Vec<f64> {
        self.raw(name, Dtype::F64).as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        self.raw(name, Dtype::I64).as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    pub fn u8(&self, name: &str) -> Vec<u8> {
        self.raw(name, Dtype::U8)
    }
}

/// Largest absolute difference. Panics when lengths differ or a difference is not finite.
pub fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let gaps = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    gaps.fold(0.0, |max, gap| if gap.is_finite() { f32::max(max, gap) } else { panic!("not finite") })
}

pub fn token_rows(tensors: &Tensors, name: &str, batch: usize) -> Vec<Vec<u32>> {
    let ids = tensors.i64(name);
    ids.chunks(ids.len() / batch).map(|row| row.iter().map(|id| *id as u32).collect()).collect()
}

/// The options that reproduce a recorded decode.
pub fn options(case: &Value) -> Options {
    let (algorithm, params) = (case["algorithm"].as_str().unwrap(), &case["params"]);
    let alg = params["alg"].as_str().unwrap_or_default();
    let gen_length: usize = numbers(&params["gen_length"]);
    let policy = match (&params["threshold"], &params["factor"]) {
        (_, factor @ Value::Number(_)) => Policy::Factor(numbers(factor)),
        // Dream records its default threshold with every algorithm; only this one uses it.
        (threshold @ Value::Number(_), _) if alg.is_empty() || alg == "confidence_threshold" => {
            Policy::Threshold(numbers(threshold))
        }
        _ => Policy::Fixed,
    };
    Options {
        gen_length,
        block_length: Some(params.get("block_length").map_or(gen_length, numbers)),
        steps: Some(numbers(&params["steps"])),
        cache: match algorithm {
            "fast_dllm.generate_with_prefix_cache" => CacheMode::Prefix,
            "fast_dllm.generate_with_dual_cache" => CacheMode::Dual,
            "fast_dllm.dream_block" if params["dual_cache"] == true => CacheMode::Dual,
            "fast_dllm.dream_block" => CacheMode::Prefix,
            "dllm_cache.llada" | "dllm_cache.dream" => CacheMode::Adaptive,
            _ => CacheMode::None,
        },
        prompt_interval: params.get("prompt_interval_steps").map_or(1, numbers),
        response_interval: params.get("gen_interval_steps").map_or(1, numbers),
        refresh_ratio: params.get("transfer_ratio").map(numbers),
        policy,
        confidence: match (algorithm, alg) {
            ("fast_dllm.dream_block", _) => None, // the algorithm's own default
            (_, "topk_margin") => Some(Confidence::Margin),
            (_, "entropy") => Some(Confidence::Entropy),
            _ => None,
        },
        cfg_scale: params.get("cfg_scale").map_or(0.0, numbers),
        eps: params.get("eps").map_or(1e-3, numbers),
        ..Options::default()
    }
}

/// Positions that V-verify selected, by layer and sequence.
fn selected_rows(layers: &Value) -> Vec<(usize, Vec<BTreeSet<usize>>)> {
    let layers = layers.as_array().unwrap();
    layers.iter().map(|layer| (numbers(&layer["layer"]), numbers(&layer["indices"]))).collect()
}

/// Compares a decode with a recorded one.
///
/// LLaDA's fixed rule without a cache exists twice: `llada.generate` and Fast-dLLM's `generate`. They differ only in the precision
/// of confidences, and the crate runs the first for both.
pub fn compare(name: &str, case: &Value, config: &Config, options: &Options, decoded: &Decoded, trace: &Trace) {
    let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
    compare_traces(name, &trace.finish(name, config, options, &prompts, decoded), case);
}

/// Compares a finished trace with a recorded decode.
pub fn compare_traces(name: &str, got: &Value, case: &Value) {
    assert_eq!(got["nfe"], case["nfe"], "{name}: forwards");
    let (steps, want) = (got["steps"].as_array().unwrap(), case["steps"].as_array().unwrap());
    assert_eq!(steps.len(), want.len(), "{name}: steps");
    for (got, want) in steps.iter().zip(want) {
        for key in ["step", "kind", "window", "block", "transferred", "candidates", "x_after"] {
            assert_eq!(got[key], want[key], "{name} step {}: {key}", want["step"]);
        }
        for key in ["refresh_prompt", "refresh_gen"] {
            assert_eq!(got.get(key), want.get(key), "{name} step {}: {key}", want["step"]);
        }
        let layers = |step: &Value| step.get("vverify").map(selected_rows);
        assert_eq!(layers(got), layers(want), "{name} step {}: rows that V-verify selected", want["step"]);
        if let Some(conf) = want.get("conf") {
            let (got, want): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (numbers(&got["conf"]), numbers(conf));
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.len(), want.len(), "{name}");
                for (g, w) in got.iter().zip(want) {
                    assert!((g - w).abs() < 2e-4, "{name}: confidence {g}, recorded {w}");
                }
            }
        }
    }
    assert_eq!(got["final"], case["final"], "{name}: tokens");
}
