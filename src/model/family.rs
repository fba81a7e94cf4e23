//! Model families that the crate supports.

/// Architecture of a model, which also determines its family of decoding rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
