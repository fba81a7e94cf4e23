//! Parameters of sampling: how a token is drawn, and what ranks the candidates.

use crate::error::Error;
use std::str::FromStr;

/// Confidence that ranks the candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confidence {
    /// Probability of the predicted token.
    Probability,
    /// Difference between the two largest probabilities.
    Margin,
    /// Negative entropy: the sum of `p ln(p + 1e-10)`.
    Entropy,
    /// A uniform random number.
    Random,
}

impl Confidence {
    /// All kinds of confidence, in the order of the command line's help.
    pub const ALL: [Confidence; 4] =
        [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random];

    /// Returns the name on the command line, which [`Display`](std::fmt::Display) writes and [`FromStr`] parses.
    pub fn name(self) -> &'static str {
        match self {
            Confidence::Probability => "probability",
            Confidence::Margin => "margin",
            Confidence::Entropy => "entropy",
            Confidence::Random => "random",
        }
    }
}

impl std::fmt::Display for Confidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Parses the name of a kind of confidence; any other text is an [`Error::Argument`].
impl FromStr for Confidence {
    type Err = Error;

    fn from_str(name: &str) -> Result<Confidence, Error> {
        let found = Confidence::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| Error::argument("confidence", "probability, margin, entropy or random", name))
    }
}

/// Parameters that determine the token and the confidence of each candidate.
#[derive(Clone, Debug)]
pub struct SamplingParams {
    /// Confidence that ranks the candidates.
    pub confidence: Confidence,
    /// 0 predicts the argmax. Above 0, tokens are drawn from `softmax(logits / temperature)` by the Gumbel-max rule.
    pub temperature: f64,
    /// Whether confidences are computed from `logits / temperature` (Dream) or from the logits (LLaDA).
    pub tempered_confidence: bool,
    /// Whether confidences are rounded to f32, as in reference implementations that compute softmax in f32.
    pub f32_confidence: bool,
    /// Nucleus sampling: keeps the fewest most probable tokens whose probabilities sum to more than this.
    pub top_p: Option<f64>,
    /// Keeps the k largest logits, and all that equal the k-th.
    pub top_k: Option<usize>,
    /// Classifier-free guidance w: logits become `u + (w + 1) (c - u)`, with conditional logits c and unconditional logits u. 0
    /// turns guidance off.
    pub cfg_scale: f32,
    /// Above 0, a fixed quota is drawn from `softmax(confidence / alg_temp)`. 0 commits the most confident candidates.
    pub alg_temp: f64,
    /// Seed of all random numbers.
    pub seed: u64,
    /// A token that is never predicted, since a mask must not stay a mask. Where it has the largest logit, it counts as minus
    /// infinity; elsewhere it keeps its probability.
    pub mask_token: Option<u32>,
}

/// The argmax, ranked by its probability. Any token can be predicted.
impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            confidence: Confidence::Probability,
            temperature: 0.0,
            tempered_confidence: false,
            f32_confidence: false,
            top_p: None,
            top_k: None,
            cfg_scale: 0.0,
            alg_temp: 0.0,
            seed: 0,
            mask_token: None,
        }
    }
}
