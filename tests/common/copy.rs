//! A directory of recordings with other names and sizes than the shipped one, made from it: the tests must take everything from the
//! directory that they read. [`run_elsewhere`] runs tests of the same program on such a directory.
//!
//! - Checkpoints and files have other names.
//! - The vocabulary has [`NEW`] more tokens, which come first, so that every token id is larger by that. Their rows of the embedding
//!   and of the head are zero. Their logits are then zero, and the largest logit of a row is far above that: they are never
//!   predicted, and they do not change a confidence by more than rounding does.
//! - There are fewer cases and fewer trajectories.

use super::recorded::{KINDS, dir_of_checkout, golden_dir, is_shipped, kind_of};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// Number of new tokens.
const NEW: usize = 8;
/// Logit of the new tokens in recordings of the sampler, where no head computes one.
const LOW: f32 = -50.0;

/// Returns the directory of the shipped recordings. Where there is none, says so.
fn shipped_dir() -> Option<PathBuf> {
    let found = [dir_of_checkout(), golden_dir()].into_iter().find(|dir| is_shipped(dir));
    if found.is_none() {
        println!("not run: no shipped recordings in {} or {}", dir_of_checkout().display(), golden_dir().display());
    }
    found
}

/// Writes the copy, if there are shipped recordings. Of the cases of a file and of the trajectories of each model and algorithm it
/// keeps one in `step`; of the trajectories that have tensors it keeps all.
pub fn write_copy(step: usize) -> Option<TempDir> {
    let (from, to) = (shipped_dir()?, TempDir::new().unwrap());
    let mut files: Vec<String> =
        std::fs::read_dir(&from).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    let mut models = BTreeMap::new();
    for name in files.iter().filter(|name| from.join(name).join("config.json").exists()) {
        let new = format!("renamed-{}", models.len());
        copy_checkpoint(&from.join(name), &to.path().join(&new));
        models.insert(name.clone(), new);
    }
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (i, name) in files.iter().filter_map(|file| file.strip_suffix(".json")).enumerate() {
        let kind = kind_of(name).unwrap_or_else(|| panic!("{name}.json: not of {KINDS:?}"));
        let mut json: Value = read_json(&from.join(format!("{name}.json")));
        let tensors = std::fs::read(from.join(format!("{name}.safetensors"))).ok();
        if kind == "trajectory" {
            let group = format!("{} {}", json["model"], json["algorithm"]);
            let count = seen.entry(group).or_default();
            *count += 1;
            if !(*count).is_multiple_of(step) && tensors.is_none() {
                continue;
            }
        }
        let settings = Settings::of(&json);
        move_tokens(&mut json);
        if let Some(model) = json.get_mut("model") {
            *model = models[model.as_str().unwrap()].clone().into();
        }
        if let Some(cases) = json.get_mut("cases").and_then(Value::as_array_mut) {
            let mut count = 0;
            cases.retain(|_| (count % step == 0, count += 1).0);
        }
        let stem = to.path().join(format!("{kind}_{}", 900 - i));
        std::fs::write(stem.with_extension("json"), json.to_string()).unwrap();
        if let Some(tensors) = tensors {
            let model_logits = json.get("model").is_some();
            std::fs::write(stem.with_extension("safetensors"), move_tensors(&tensors, model_logits, &settings))
                .unwrap();
        }
    }
    Some(to)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Settings of each case, on which new columns of tensors depend.
struct Settings(BTreeMap<String, Value>);

impl Settings {
    fn of(json: &Value) -> Settings {
        let of_case = |case: &Value| Some((case["name"].as_str()?.to_string(), case.clone()));
        Settings(json["cases"].as_array().into_iter().flatten().filter_map(of_case).collect())
    }

    /// Whether the filters of a case keep all tokens of a vocabulary.
    fn keeps_all(&self, case: &str, vocab: usize) -> bool {
        let case = &self.0[case];
        case["top_k"].as_u64().is_none_or(|k| k >= vocab as u64) && case["top_p"].as_f64().is_none_or(|p| p >= 1.0)
    }
}

/// Makes room for the new tokens: in every list of tokens and in the fields that are tokens or the size of the vocabulary.
fn move_tokens(json: &mut Value) {
    fn moved(value: &mut Value) {
        match value {
            Value::Array(list) => list.iter_mut().for_each(moved),
            value => *value = (value.as_u64().unwrap() + NEW as u64).into(),
        }
    }
    match json {
        Value::Object(fields) => {
            for (key, value) in fields {
                match key.as_str() {
                    "prompt" | "final" | "x_after" => moved(value),
                    "mask_id" | "mask_token_id" | "eos_token_id" | "bos_token_id" | "pad_token_id" => moved(value),
                    "vocab" | "vocab_size" | "embedding_size" => moved(value),
                    _ => move_tokens(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(move_tokens),
        _ => {}
    }
}

/// Copies a checkpoint, all tensors into one file.
fn copy_checkpoint(from: &Path, to: &Path) {
    let mut config = read_json(&from.join("config.json"));
    move_tokens(&mut config);
    std::fs::create_dir(to).unwrap();
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let paths = std::fs::read_dir(from).unwrap().map(|e| e.unwrap().path());
    let shards: Vec<Vec<u8>> = paths
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .map(|p| std::fs::read(p).unwrap())
        .collect();
    let mut tensors = BTreeMap::new();
    for shard in &shards {
        for (name, view) in SafeTensors::deserialize(shard).unwrap().tensors() {
            let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
            let by_token = ["wte.weight", "embed_tokens.weight", "transformer.ff_out.weight", "lm_head.weight"];
            if by_token.iter().any(|end| name.ends_with(end)) {
                let row = data.len() / shape[0];
                data.splice(..0, vec![0; NEW * row]);
                shape[0] += NEW;
            }
            tensors.insert(name, (view.dtype(), shape, data));
        }
    }
    std::fs::write(to.join("model.safetensors"), serialized(&tensors)).unwrap();
}

type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn serialized(tensors: &Stored) -> Vec<u8> {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap_or_else(|e| panic!("{name}: {e}")))
    });
    safetensors::serialize(views, None).unwrap()
}

/// Makes room for the new tokens in the tensors of a recording.
fn move_tensors(file: &[u8], model_logits: bool, settings: &Settings) -> Vec<u8> {
    let mut tensors = Stored::new();
    for (name, view) in SafeTensors::deserialize(file).unwrap().tensors() {
        let (case, what) = name.rsplit_once('.').unwrap_or(("", &name));
        let temperature = || settings.0[case]["temperature"].as_f64().unwrap();
        let keeps_all = |width: usize| settings.keeps_all(case, width + NEW);
        let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
        let logit = if model_logits { 0.0 } else { LOW };
        let uniform = 0.5f64;
        let column: Option<Vec<u8>> = match what {
            what if what.starts_with("logits") => Some(logit.to_le_bytes().to_vec()),
            "uniform" => Some(uniform.to_le_bytes().to_vec()),
            "noised" => Some((f64::from(logit).exp() / (-uniform.ln()).powf(temperature())).to_le_bytes().to_vec()),
            "probs" => Some(0f32.to_le_bytes().to_vec()),
            "kept" => Some(vec![u8::from(keeps_all(shape[shape.len() - 1]))]),
            _ => None,
        };
        if let Some(value) = column {
            let width = shape.last_mut().unwrap();
            let rows = data.chunks(*width * value.len());
            data = rows.flat_map(|row| [&value.repeat(NEW), row].concat()).collect();
            *width += NEW;
        } else if what.starts_with("ids") || ["x", "x0", "prompt"].contains(&what) {
            let ids = data.as_chunks().0.iter().map(|id| i64::from_le_bytes(*id) + NEW as i64);
            data = ids.flat_map(i64::to_le_bytes).collect();
        }
        tensors.insert(name, (view.dtype(), shape, data));
    }
    serialized(&tensors)
}

/// Runs the tests of this program whose names contain one of `filters`, on the recordings in `dir`, one after the other. Those that
/// call this function must not be among them.
pub fn run_elsewhere(dir: &Path, filters: &[&str]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("DLLM_GOLDEN_DIR", dir).args(filters).args(["--skip", "elsewhere", "--nocapture", "--test-threads=1"]);
    command.output().unwrap()
}

/// Runs these tests on a copy with other names and sizes, in which they must pass, and on an empty directory, in which each must
/// fail.
pub fn check_elsewhere(step: usize, filters: &[&str]) {
    let Some(copy) = write_copy(step) else { return };
    let printed = passes(copy.path(), filters);
    assert!(!printed.contains("not run: no "), "{printed}");
    fails(TempDir::new().unwrap().path(), filters);
}

/// Runs these tests, which must pass, and returns what they print.
pub fn passes(dir: &Path, filters: &[&str]) -> String {
    let output = run_elsewhere(dir, filters);
    let printed = text(&output);
    assert!(output.status.success() && !printed.contains(" 0 passed"), "{printed}");
    println!("{printed}");
    printed
}

/// Runs these tests, each of which must fail.
pub fn fails(dir: &Path, filters: &[&str]) {
    let output = run_elsewhere(dir, filters);
    let printed = text(&output);
    assert!(!output.status.success() && printed.contains("FAILED. 0 passed"), "{printed}");
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
