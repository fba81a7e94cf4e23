//! The shape of a model, read from the `config.json` of a public checkpoint.

use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Which of the two architectures, and so which family of decoding rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// LLaDA: MHA without biases; the logits at a position predict that position.
    Llada,
    /// Dream: Qwen2-like, GQA with q/k/v biases; the logits at a position predict the next one.
    Dream,
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::Llada => "LLaDA",
            Family::Dream => "Dream",
        })
    }
}

/// Sizes and constants of a model. Widths are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture.
    pub family: Family,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head: 32, 64 or 128.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub mlp_hidden_size: usize,
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f32,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Positions the model was made for: the longest prompt and generation together.
    pub max_sequence_length: usize,
    /// Id of the mask token.
    pub mask_token_id: u32,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Whether the head is the embedding matrix.
    pub tied_head: bool,
}

/// Head widths that the kernels are written for.
pub const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// No real model comes near; keeps products of sizes from a lying config far from overflow.
const SIZE_LIMIT: u64 = 1 << 24;

/// Typed access to the keys of one JSON file; errors name the file and the key.
struct Keys<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Keys<'_> {
    fn error(&self, key: &str, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Config {
            path: self.path.to_path_buf(),
            key: key.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// The value of `key`; absent and null are the same.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// What a message says of the value of `key`.
    fn found(&self, key: &str) -> String {
        self.get(key).map_or("nothing".into(), Value::to_string)
    }

    fn size(&self, key: &str) -> Result<usize> {
        let expected = format!("a whole number from 1 to {SIZE_LIMIT}");
        let value = self.get(key).ok_or_else(|| self.error(key, &expected, "nothing"))?;
        match value.as_u64() {
            Some(n) if (1..=SIZE_LIMIT).contains(&n) => Ok(n as usize),
            _ => Err(self.error(key, expected, value)),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key) } else { Ok(default) }
    }

    fn positive(&self, key: &str) -> Result<f32> {
        let value = self.get(key).ok_or_else(|| self.error(key, "a positive number", "nothing"))?;
        match value.as_f64().map(|x| x as f32) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(self.error(key, "a positive number", value)),
        }
    }

    /// One token id, or a list of them, each below `vocab_size`.
    fn tokens(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let expected = format!("a token id below {vocab_size}");
        let values = match self.get(key) {
            None => vec![],
            Some(Value::Array(list)) => list.iter().collect(),
            Some(value) => vec![value],
        };
        let id = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab_size as u64 => Ok(id as u32),
            _ => Err(self.error(key, &expected, value)),
        };
        values.into_iter().map(id).collect()
    }

    /// A switch that is off when absent.
    fn switch(&self, key: &str) -> Result<bool> {
        self.only(key, &[false.into(), true.into()])?;
        Ok(self.get(key) == Some(&Value::Bool(true)))
    }

    /// Errs unless `key` is absent or one of `allowed`.
    fn only(&self, key: &str, allowed: &[Value]) -> Result<()> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => {
                let list: Vec<_> = allowed.iter().map(Value::to_string).collect();
                Err(self.error(key, list.join(" or "), value))
            }
            _ => Ok(()),
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    // Reading a pipe or a link to /dev/zero would never end.
    if path.exists() && !path.is_file() {
        return Err(Error::Format {
            path: path.to_path_buf(),
            message: "expected a file, found something else".into(),
        });
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| Error::Format { path: path.to_path_buf(), message: e.to_string() })
}

impl Config {
    /// Reads `config.json` (and the end-of-text ids of `generation_config.json`, where there is one) of a checkpoint
    /// directory.
    ///
    /// # Errors
    /// [`Error::Config`] names the key when one is missing, out of range, or asks for something that is not computed
    /// here (another architecture, ALiBi, sliding windows, scaled rotary embeddings ...).
    pub fn open(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let mut config = Config::from_json(&path, &read_json(&path)?)?;
        let path = dir.join("generation_config.json");
        if path.is_file() {
            let json = read_json(&path)?;
            let more = Keys { path: &path, json: &json }.tokens("eos_token_id", config.vocab_size)?;
            config.eos_token_ids.extend(more);
            config.eos_token_ids.sort_unstable();
            config.eos_token_ids.dedup();
        }
        Ok(config)
    }

    /// Reads the keys of a `config.json`; `path` only for the messages.
    pub fn from_json(path: &Path, json: &Value) -> Result<Config> {
        let keys = Keys { path, json };
        match keys.get("model_type").and_then(Value::as_str) {
            Some("llada") => llada(&keys),
            Some(name) if name.eq_ignore_ascii_case("dream") => dream(&keys),
            _ => Err(keys.error("model_type", "\"llada\" or \"Dream\"", keys.found("model_type"))),
        }
    }

    /// Shapes for benchmarks without a checkpoint: `mid`, `llada-8b` or `dream-7b`.
    pub fn shape(name: &str) -> Option<Config> {
        let base = Config {
            family: Family::Llada,
            d_model: 1024,
            num_layers: 8,
            num_heads: 16,
            num_kv_heads: 16,
            head_dim: 64,
            mlp_hidden_size: 3072,
            vocab_size: 8192,
            rope_theta: 500_000.0,
            rms_norm_eps: 1e-5,
            max_sequence_length: 4096,
            mask_token_id: 8191,
            eos_token_ids: vec![8190],
            tied_head: false,
        };
        match name {
            "mid" => Some(base),
            "llada-8b" => Some(Config {
                d_model: 4096,
                num_layers: 32,
                num_heads: 32,
                num_kv_heads: 32,
                head_dim: 128,
                mlp_hidden_size: 12288,
                vocab_size: 126_464,
                mask_token_id: 126_336,
                eos_token_ids: vec![126_081],
                ..base
            }),
            "dream-7b" => Some(Config {
                family: Family::Dream,
                d_model: 3584,
                num_layers: 28,
                num_heads: 28,
                num_kv_heads: 4,
                head_dim: 128,
                mlp_hidden_size: 18944,
                vocab_size: 152_064,
                rope_theta: 1e6,
                rms_norm_eps: 1e-6,
                max_sequence_length: 131_072,
                mask_token_id: 151_666,
                eos_token_ids: vec![151_643],
                ..base
            }),
            _ => None,
        }
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Counts and width of its heads.
    pub fn heads(&self) -> crate::tensor::Heads {
        let Config { num_heads, num_kv_heads, head_dim, .. } = *self;
        crate::tensor::Heads { num_heads, num_kv_heads, head_dim }
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Every tensor of a checkpoint of this shape, by the public names.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let names = super::names::Names::of(self.family);
        let (d, m, v) = (self.d_model, self.mlp_hidden_size, self.vocab_size);
        let mut list = vec![(names.embedding.to_string(), vec![v, d]), (names.final_norm.to_string(), vec![d])];
        if !self.tied_head {
            list.push((names.head.to_string(), vec![v, d]));
        }
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: Vec<usize>| list.push((names.layer(layer, name), shape));
            add(names.attn_norm, vec![d]);
            add(names.mlp_norm, vec![d]);
            for (name, rows) in [(names.q, self.q_width()), (names.k, self.kv_width()), (names.v, self.kv_width())] {
                add(&format!("{name}.weight"), vec![rows, d]);
                if self.family == Family::Dream {
                    add(&format!("{name}.bias"), vec![rows]);
                }
            }
            add(names.attn_out, vec![d, self.q_width()]);
            add(names.gate, vec![m, d]);
            add(names.up, vec![m, d]);
            add(names.down, vec![d, m]);
        }
        list
    }
}

fn llada(keys: &Keys) -> Result<Config> {
    keys.only("block_type", &["llama".into()])?;
    keys.only("activation_type", &["silu".into()])?;
    keys.only("layer_norm_type", &["rms".into()])?;
    keys.only("rope", &[true.into()])?;
    for key in [
        "alibi",
        "include_bias",
        "include_qkv_bias",
        "bias_for_layer_norm",
        "attention_layer_norm",
        "input_emb_norm",
        "scale_logits",
        "multi_query_attention",
    ] {
        keys.only(key, &[false.into()])?;
    }
    let num_heads = keys.size("n_heads")?;
    let vocab_size = match keys.size_or("embedding_size", 0)? {
        0 => keys.size("vocab_size")?,
        rows => rows,
    };
    finish(
        keys,
        Config {
            family: Family::Llada,
            d_model: keys.size("d_model")?,
            num_layers: keys.size("n_layers")?,
            num_heads,
            num_kv_heads: keys.size_or("n_kv_heads", num_heads)?,
            head_dim: 0,
            mlp_hidden_size: keys.size("mlp_hidden_size")?,
            vocab_size,
            rope_theta: keys.positive("rope_theta")?,
            rms_norm_eps: keys.positive("rms_norm_eps")?,
            max_sequence_length: keys.size("max_sequence_length")?,
            mask_token_id: 0,
            eos_token_ids: vec![],
            tied_head: keys.switch("weight_tying")?,
        },
        ["n_heads", "n_kv_heads"],
    )
}

fn dream(keys: &Keys) -> Result<Config> {
    keys.only("hidden_act", &["silu".into()])?;
    keys.only("use_sliding_window", &[false.into()])?;
    if let Some(scaling) = keys.get("rope_scaling") {
        return Err(keys.error("rope_scaling", "null", scaling));
    }
    let num_heads = keys.size("num_attention_heads")?;
    finish(
        keys,
        Config {
            family: Family::Dream,
            d_model: keys.size("hidden_size")?,
            num_layers: keys.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads: keys.size_or("num_key_value_heads", num_heads)?,
            head_dim: 0,
            mlp_hidden_size: keys.size("intermediate_size")?,
            vocab_size: keys.size("vocab_size")?,
            rope_theta: keys.positive("rope_theta")?,
            rms_norm_eps: keys.positive("rms_norm_eps")?,
            max_sequence_length: keys.size("max_position_embeddings")?,
            mask_token_id: 0,
            eos_token_ids: vec![],
            tied_head: keys.switch("tie_word_embeddings")?,
        },
        ["num_attention_heads", "num_key_value_heads"],
    )
}

/// The checks that both families share, and the values that follow from others.
fn finish(keys: &Keys, mut config: Config, [heads, kv_heads]: [&str; 2]) -> Result<Config> {
    if !config.d_model.is_multiple_of(config.num_heads) {
        return Err(keys.error(heads, format!("a divisor of the width {}", config.d_model), config.num_heads));
    }
    config.head_dim = config.d_model / config.num_heads;
    if !HEAD_DIMS.contains(&config.head_dim) {
        return Err(keys.error(heads, format!("heads of width {HEAD_DIMS:?}"), format!("width {}", config.head_dim)));
    }
    if !config.num_heads.is_multiple_of(config.num_kv_heads) {
        return Err(keys.error(kv_heads, format!("a divisor of {} heads", config.num_heads), config.num_kv_heads));
    }
    config.mask_token_id = match keys.tokens("mask_token_id", config.vocab_size)?[..] {
        [id] => id,
        _ => return Err(keys.error("mask_token_id", "one token id", keys.found("mask_token_id"))),
    };
    config.eos_token_ids = keys.tokens("eos_token_id", config.vocab_size)?;
    Ok(config)
}
