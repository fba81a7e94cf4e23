//! The shape of a model, read from the `config.json` of a public checkpoint.

pub use super::family::Family;
use super::names::Names;
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

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
    /// Rows of the embedding and of the output head: LLaDA's `embedding_size`, which may exceed the tokens of its tokenizer, else
    /// `vocab_size`.
    pub vocab_size: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f32,
    /// Epsilon of RMSNorm: added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Maximum length of prompt and generated tokens together.
    pub max_sequence_length: usize,
    /// Id of the mask token, from `config.json`: neither `generation_config.json` nor the tokenizer's files override it.
    pub mask_token_id: u32,
    /// Ids of the end-of-text tokens: those of `config.json` and of `generation_config.json` together.
    pub eos_token_ids: Vec<u32>,
    /// Whether the output head is the embedding matrix.
    pub tied_head: bool,
}

/// Values of `head_dim` that the kernels support.
pub const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// Largest accepted size, far above any real model. It keeps products of the sizes of a bad config from overflow.
const SIZE_LIMIT: u64 = 1 << 24;

/// Typed access to the keys of one JSON file; errors name the file and the key.
struct Keys<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Keys<'_> {
    /// Returns the error for `key`, which was expected to be `expected`.
    fn error(&self, key: &str, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Config {
            path: self.path.to_path_buf(),
            key: key.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// Returns the value of `key`; `None` when it is absent or null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// Returns the value of `key` as text for a message.
    fn found(&self, key: &str) -> String {
        self.get(key).map_or("nothing".into(), Value::to_string)
    }

    /// Returns the size `key`, a whole number from 1 to [`SIZE_LIMIT`].
    fn size(&self, key: &str) -> Result<usize> {
        let expected = format!("a whole number from 1 to {SIZE_LIMIT}");
        let value = self.get(key).ok_or_else(|| self.error(key, &expected, "nothing"))?;
        match value.as_u64() {
            Some(n) if (1..=SIZE_LIMIT).contains(&n) => Ok(n as usize),
            _ => Err(self.error(key, expected, value)),
        }
    }

    /// Returns the size `key`, or `default` when absent.
    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key) } else { Ok(default) }
    }

    /// Returns the positive finite number `key`.
    fn positive(&self, key: &str) -> Result<f32> {
        let value = self.get(key).ok_or_else(|| self.error(key, "a positive number", "nothing"))?;
        match value.as_f64().map(|x| x as f32) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(self.error(key, "a positive number", value)),
        }
    }

    /// Returns the token ids of `key`, a single id or a list, each below `vocab_size`. Empty when absent.
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

    /// Returns the boolean `key`, false when absent.
    fn switch(&self, key: &str) -> Result<bool> {
        self.only(key, &[false.into(), true.into()])?;
        Ok(self.get(key) == Some(&Value::Bool(true)))
    }

    /// Checks that `key` is absent or one of `allowed`.
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

/// Reads a JSON file.
fn read_json(path: &Path) -> Result<Value> {
    // Reading a pipe or a link to /dev/zero would not end.
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
    /// Reads `config.json` of a checkpoint directory, and the end-of-text ids of `generation_config.json` if it
    /// exists.
    ///
    /// # Errors
    /// [`Error::Config`] names a key that is missing, out of range, or requires a feature that is not supported (another
    /// architecture, ALiBi, sliding windows, scaled rotary embeddings).
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

    /// Parses the contents of a `config.json`. `path` is used in error messages only.
    pub fn from_json(path: &Path, json: &Value) -> Result<Config> {
        let keys = Keys { path, json };
        match keys.get("model_type").and_then(Value::as_str) {
            Some("llada") => llada(&keys),
            Some(name) if name.eq_ignore_ascii_case("dream") => dream(&keys),
            _ => Err(keys.error("model_type", "\"llada\" or \"Dream\"", keys.found("model_type"))),
        }
    }

    /// Names of the shapes of [`Config::shape`].
    pub const SHAPES: [&'static str; 3] = ["llada-8b", "dream-7b", "mid"];

    /// Returns a shape for benchmarks without a checkpoint: `mid`, `llada-8b` or `dream-7b`.
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

    /// Total width of all key heads, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Head counts and `head_dim`.
    pub fn heads(&self) -> crate::tensor::Heads {
        let Config { num_heads, num_kv_heads, head_dim, .. } = *self;
        crate::tensor::Heads { num_heads, num_kv_heads, head_dim }
    }

    /// Total width of all query heads.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Returns name and shape of every tensor of a checkpoint, under the names of the public checkpoints.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let names = Names::of(self.family);
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

/// Reads the configuration of a LLaDA checkpoint.
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
    // Rows after the vocabulary are ordinary rows, as in LLaDA's own code: they have logits.
    let vocab_size = match keys.size_or("embedding_size", 0)? {
        0 => keys.size("vocab_size")?,
        rows if rows < keys.size_or("vocab_size", 1)? => {
            let expected = format!("at least vocab_size {}", keys.found("vocab_size"));
            return Err(keys.error("embedding_size", expected, rows));
        }
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

/// Reads the configuration of a Dream checkpoint.
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

/// Checks what both families share, and fills in `head_dim` and the token ids. The last argument holds the names of the
/// keys for query and key/value heads.
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
