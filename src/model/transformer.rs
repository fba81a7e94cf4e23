//! The weights of a model, as a backend holds them.

use super::config::{Config, Family};
use super::names::Names;
use super::weights::Weights;
use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// Weights of one layer. Q, K and V are stacked, and so are gate and up.
pub(super) struct Layer<B: Backend> {
    pub attn_norm: B::Vector,
    pub qkv: B::Matrix,
    pub attn_out: B::Matrix,
    pub mlp_norm: B::Vector,
    pub gate_up: B::Matrix,
    pub down: B::Matrix,
}

/// The weights of a model on a backend.
pub struct Transformer<B: Backend> {
    pub(super) config: Config,
    pub(super) embedding: B::Matrix,
    pub(super) layers: Vec<Layer<B>>,
    pub(super) final_norm: B::Vector,
    /// `None` when the head is the embedding.
    pub(super) head: Option<B::Matrix>,
}

impl<B: Backend> Transformer<B> {
    /// Sizes and constants of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Loads the tensors that `config` requires from `weights`.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] names the first tensor that is missing or has the wrong shape.
    pub fn load(backend: &B, config: &Config, weights: &Weights) -> Result<Self> {
        let names = Names::of(config.family);
        let (d, vocab_size) = (config.d_model, config.vocab_size);
        let matrix = |name: &str, shape: [usize; 2]| backend.matrix(vec![weights.get(name, &shape)?], vec![]);
        Ok(Transformer {
            embedding: matrix(names.embedding, [vocab_size, d])?,
            layers: (0..config.num_layers).map(|i| load_layer(backend, config, weights, i)).collect::<Result<_>>()?,
            final_norm: backend.vector(weights.get(names.final_norm, &[d])?)?,
            head: if config.tied_head { None } else { Some(matrix(names.head, [vocab_size, d])?) },
            config: config.clone(),
        })
    }
}

fn load_layer<B: Backend>(backend: &B, config: &Config, weights: &Weights, i: usize) -> Result<Layer<B>> {
    let names = Names::of(config.family);
    let (d, mlp) = (config.d_model, config.mlp_hidden_size);
    let get = |name: &str, shape: &[usize]| -> Result<Tensor> { weights.get(&names.layer(i, name), shape) };
    let projections = [(names.q, config.q_width()), (names.k, config.kv_width()), (names.v, config.kv_width())];
    let parts = projections.iter().map(|(name, rows)| get(&format!("{name}.weight"), &[*rows, d]));
    let biases = projections.iter().map(|(name, rows)| get(&format!("{name}.bias"), &[*rows]));
    let biases = match config.family {
        Family::Llada => vec![],
        Family::Dream => biases.collect::<Result<_>>()?,
    };
    Ok(Layer {
        attn_norm: backend.vector(get(names.attn_norm, &[d])?)?,
        qkv: backend.matrix(parts.collect::<Result<_>>()?, biases)?,
        attn_out: backend.matrix(vec![get(names.attn_out, &[d, config.q_width()])?], vec![])?,
        mlp_norm: backend.vector(get(names.mlp_norm, &[d])?)?,
        gate_up: backend.matrix(vec![get(names.gate, &[mlp, d])?, get(names.up, &[mlp, d])?], vec![])?,
        down: backend.matrix(vec![get(names.down, &[d, mlp])?], vec![])?,
    })
}
