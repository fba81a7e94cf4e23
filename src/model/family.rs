//! Model families that the crate supports.

use crate::error::{Error, Result};

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

/// Parses a family's name, in any case; any other text is an [`Error::Argument`].
impl std::str::FromStr for Family {
    type Err = Error;

    fn from_str(name: &str) -> Result<Family> {
        let named = |family: &Family| family.to_string().eq_ignore_ascii_case(name);
        let found = [Family::Llada, Family::Dream].into_iter().find(named);
        found.ok_or_else(|| Error::argument("family", "LLaDA or Dream", name))
    }
}
