//! Small checkpoints in the public layouts, written to temporary directories. Tests use and damage them.

use dllm_kernels::model::{Config, Family};
use dllm_kernels::{Confidence, Options, Policy};
use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

pub const VOCAB: usize = 40;
pub const MASK: u32 = 39;
pub const EOS: u32 = 38;
/// Maximum sequence length of the models.
pub const WINDOW: usize = 64;
/// File to which [`Checkpoint::write`] writes the tensors.
pub const FILE: &str = "model.safetensors";
/// Index file of checkpoints in shards.
pub const INDEX: &str = "model.safetensors.index.json";

/// Values of a tensor and the element type in which they are stored.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values.iter();
        Cow::Owned(match self.dtype {
            Dtype::BF16 => values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::F16 => values.flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F64 => values.flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
            Dtype::I64 => values.flat_map(|v| (*v as i64).to_le_bytes()).collect(),
            other => panic!("no {other:?} in these tests"),
        })
    }

    fn data_len(&self) -> usize {
        self.values.len() * self.dtype.bitsize() / 8
    }
}

/// A checkpoint in memory.
#[derive(Clone)]
pub struct Checkpoint {
    pub family: Family,
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Checkpoint of two layers and two heads of width 32 (Dream: one key/value head) with made-up weights. All values are exact
    /// in bf16 and f16. Logits spread over a few units, so that some tokens are certain and some are not.
    pub fn new(family: Family) -> Checkpoint {
        let config = config(family);
        let list = Config::from_json(Path::new("config.json"), &config).unwrap().tensors();
        let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
            let unit = |n: usize| noise(i as u32, n as u32);
            let value = |n: usize| match &name {
                name if name.contains("norm") || name.contains("ln_f") => 1.0 + (4.0 * unit(n)).round() / 16.0,
                // The embedding and the head.
                _ if shape[0] == VOCAB => unit(n),
                _ => unit(n) / 4.0,
            };
            let values = (0..shape.iter().product()).map(value).collect();
            (name, Tensor { dtype: Dtype::BF16, shape, values })
        };
        Checkpoint { family, config, tensors: list.into_iter().enumerate().map(tensor).collect() }
    }

    pub fn llada() -> Checkpoint {
        Checkpoint::new(Family::Llada)
    }

    pub fn dream() -> Checkpoint {
        Checkpoint::new(Family::Dream)
    }

    pub fn embedding(&self) -> &'static str {
        match self.family {
            Family::Llada => "model.transformer.wte.weight",
            Family::Dream => "model.embed_tokens.weight",
        }
    }

    pub fn head(&self) -> &'static str {
        match self.family {
            Family::Llada => "model.transformer.ff_out.weight",
            Family::Dream => "lm_head.weight",
        }
    }

    /// Returns the config with `key` set to `value`, or without the key.
    pub fn config_with(&self, key: &str, value: Option<Value>) -> Value {
        let mut config = self.config.clone();
        let keys = config.as_object_mut().unwrap();
        match value {
            Some(value) => keys.insert(key.into(), value),
            None => keys.remove(key),
        };
        config
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Row `row` of the matrix `name`.
    pub fn row(&mut self, name: &str, row: usize) -> &mut [f32] {
        let tensor = self.tensor(name);
        let width = tensor.shape[1];
        &mut tensor.values[row * width..(row + 1) * width]
    }

    /// Makes the model predict `token` everywhere: every hidden state points along the first channel, in which the token's row of
    /// the head is by far the largest.
    pub fn want(&mut self, token: u32) {
        let (embedding, head) = (self.embedding(), self.head());
        for row in 0..VOCAB {
            self.row(embedding, row)[0] = 64.0;
        }
        self.row(head, token as usize)[0] = 16.0;
    }

    pub fn with_dtype(mut self, dtype: Dtype) -> Checkpoint {
        self.tensors.values_mut().for_each(|t| t.dtype = dtype);
        self
    }

    /// Serialises the tensors that `keep` accepts as a safetensors file.
    pub fn file_of(&self, keep: impl Fn(&str) -> bool) -> Vec<u8> {
        safetensors::serialize(self.tensors.iter().filter(|(name, _)| keep(name)), None).unwrap()
    }

    pub fn file(&self) -> Vec<u8> {
        self.file_of(|_| true)
    }

    /// Writes `config.json` and `model.safetensors` to a new directory.
    pub fn write(&self) -> TempDir {
        write(&self.config.to_string(), &self.file())
    }
}

/// Writes this config and this model file to a new directory.
pub fn write(config: &str, file: &[u8]) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::write(dir.path().join(FILE), file).unwrap();
    dir
}

/// Config with the keys of the public checkpoints, as in `tests/golden/tiny-llada` and `tests/golden/tiny-dream`.
fn config(family: Family) -> Value {
    match family {
        Family::Llada => json!({
            "activation_type": "silu", "alibi": false, "attention_layer_norm": false, "bias_for_layer_norm": false,
            "block_type": "llama", "d_model": 64, "embedding_size": VOCAB, "eos_token_id": EOS, "include_bias": false,
            "include_qkv_bias": false, "input_emb_norm": false, "layer_norm_type": "rms", "mask_token_id": MASK,
            "max_sequence_length": WINDOW, "mlp_hidden_size": 96, "model_type": "llada",
            "multi_query_attention": null, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "rms_norm_eps": 1e-5,
            "rope": true, "rope_theta": 500000.0, "scale_logits": false, "vocab_size": VOCAB, "weight_tying": false,
        }),
        Family::Dream => json!({
            "eos_token_id": EOS, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
            "mask_token_id": MASK, "max_position_embeddings": WINDOW, "model_type": "Dream",
            "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
            "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false,
            "use_sliding_window": false, "vocab_size": VOCAB,
        }),
    }
}

/// Deterministic multiple of 1/128 in (-1, 1).
fn noise(seed: u32, n: u32) -> f32 {
    let mut x = seed.wrapping_mul(0x9e37_79b9) ^ n.wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    ((x >> 16) % 255) as f32 / 128.0 - 127.0 / 128.0
}

/// Returns `base` with every confidence that its policy allows, each with every kind of sampling parameters.
pub fn samplings(base: &Options) -> Vec<Options> {
    let fixed = base.policy == Policy::Fixed;
    let mut list = Vec::new();
    for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random] {
        if confidence == Confidence::Entropy && !fixed {
            continue;
        }
        let base = Options { confidence: Some(confidence), seed: 5, ..base.clone() };
        list.extend([
            base.clone(),
            Options { temperature: 0.8, ..base.clone() },
            Options { temperature: 0.8, top_p: Some(0.9), top_k: Some(7), ..base.clone() },
            Options { cfg_scale: 1.5, ..base.clone() },
            Options { cfg_scale: 1.5, temperature: 0.8, top_p: Some(0.5), ..base.clone() },
        ]);
        if fixed {
            list.push(Options { alg_temp: 0.5, ..base.clone() });
            list.push(Options { steps: Some(4), ..base.clone() });
            list.push(Options { steps: Some(24), ..base });
        }
    }
    list
}

/// Prompts of different lengths (5, 1 and 17 tokens) without masks.
pub fn prompts() -> Vec<Vec<u32>> {
    vec![vec![3, 14, 15, 9, 26], vec![5], (0..17).map(|i| i * 2 % 37).collect()]
}
