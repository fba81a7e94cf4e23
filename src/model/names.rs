//! Tensor names of each model family's checkpoints.

use super::family::Family;

/// Tensor names of a checkpoint. From `attn_norm` on they are relative to the prefix of a layer. `q`, `k` and `v` lack the
/// suffix `.weight` or `.bias`.
pub(crate) struct Names {
    pub embedding: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
    prefix: &'static str,
    pub attn_norm: &'static str,
    pub mlp_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub attn_out: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

const LLADA: Names = Names {
    embedding: "model.transformer.wte.weight",
    final_norm: "model.transformer.ln_f.weight",
    head: "model.transformer.ff_out.weight",
    prefix: "model.transformer.blocks",
    attn_norm: "attn_norm.weight",
    mlp_norm: "ff_norm.weight",
    q: "q_proj",
    k: "k_proj",
    v: "v_proj",
    attn_out: "attn_out.weight",
    gate: "ff_proj.weight",
    up: "up_proj.weight",
    down: "ff_out.weight",
};

const DREAM: Names = Names {
    embedding: "model.embed_tokens.weight",
    final_norm: "model.norm.weight",
    head: "lm_head.weight",
    prefix: "model.layers",
    attn_norm: "input_layernorm.weight",
    mlp_norm: "post_attention_layernorm.weight",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    attn_out: "self_attn.o_proj.weight",
    gate: "mlp.gate_proj.weight",
    up: "mlp.up_proj.weight",
    down: "mlp.down_proj.weight",
};

impl Names {
    /// Returns the names of a family.
    pub fn of(family: Family) -> &'static Names {
        match family {
            Family::Llada => &LLADA,
            Family::Dream => &DREAM,
        }
    }

    /// Returns the full name of the tensor `name` of a layer.
    pub fn layer(&self, layer: usize, name: &str) -> String {
        format!("{}.{layer}.{name}", self.prefix)
    }
}
