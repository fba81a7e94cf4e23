//! Options of a decode, their validation, and the algorithm that they select.

use crate::cache::{AdaptiveCache, BlockCache, CacheConfig, CacheMode};
use crate::engine::EngineRequirements;
use crate::error::{Error, Result};
use crate::model::{Config, Family, SessionConfig};
use crate::sampling::{Confidence, SamplingParams};

/// Policy: the rule by which a step selects the masked tokens that it commits.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Policy {
    /// A fixed number of tokens per step, from the quota schedule of the model's family: the most confident ones.
    Fixed,
    /// Every token whose confidence is at least this threshold, and always the most confident one (Fast-dLLM, section
    /// 3.3). In (0, 1].
    Threshold(f64),
    /// Fast-dLLM's factor f (section 3.3): the n most confident tokens, with the largest n for which
    /// `(n + 1) (1 - c_n) <= f`, where `c_n` is the n-th confidence. At least one token, and all if
    /// only the last fails. Finite and above 0; a larger factor commits more.
    Factor(f64),
}

impl Policy {
    /// Names of the policies on the command line.
    pub const NAMES: [&str; 3] = ["fixed", "threshold", "factor"];

    /// Returns the name of the policy on the command line, without its number.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Fixed => "fixed",
            Policy::Threshold(_) => "threshold",
            Policy::Factor(_) => "factor",
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Parses the name of a policy. Its number is the default: threshold 0.9, factor 1. Any other text is an [`Error::Argument`].
impl std::str::FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Policy> {
        [Policy::Fixed, Policy::Threshold(0.9), Policy::Factor(1.0)]
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| Error::argument("policy", Policy::NAMES.join(", "), name))
    }
}

/// Options of a decode, named as the flags of the command line.
///
/// [`Options::default`] is DualCache with a confidence threshold of 0.9. New versions may add fields, so set the fields
/// that you need and take the others from the default:
///
/// ```
/// use dllm_kernels::{CacheMode, Options};
/// let options = Options { gen_length: 64, cache: CacheMode::Prefix, ..Options::default() };
/// # assert_eq!(options.block_length(), 32);
/// ```
///
/// [`Options::validate`] checks the ranges. An option of another cache or policy than the selected one must be
/// in range too, and has no effect.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of tokens to generate for each prompt, at least 1. Prompt and generated tokens must fit the model's context.
    /// Default: 128.
    pub gen_length: usize,
    /// Number of tokens per block. Blocks are decoded from left to right. Must divide `gen_length`. `None`: the smaller of
    /// 32 and `gen_length`.
    pub block_length: Option<usize>,
    /// Number of steps over all blocks, 1 to 2^20. Applies to [`Policy::Fixed`], and to [`Policy::Threshold`] with Dream
    /// when there is one block. `None`: `gen_length`, so that each step commits one token.
    ///
    /// With [`Policy::Fixed`] in blocks it must be a multiple of the number of blocks. With Dream's threshold it must
    /// divide the number of masked tokens.
    pub steps: Option<usize>,
    /// Cache of keys, values and features between forwards. Default: [`CacheMode::Dual`].
    pub cache: CacheMode,
    /// Forwards from one refresh of the prompt to the next, at least 1 (dLLM-Cache's Kp, section 3.2). Applies to
    /// [`CacheMode::Adaptive`]. Default: 50.
    pub prompt_interval: usize,
    /// Forwards from one refresh of the response to the next, at least 1 (dLLM-Cache's Kr, section 3.2). Applies to
    /// [`CacheMode::Adaptive`]. Default: 7.
    pub response_interval: usize,
    /// Share of rows that V-verify selects for recomputation, in [0, 1] (dLLM-Cache's rho, section 3.3): the rows whose
    /// values changed most since they were cached.
    ///
    /// - [`CacheMode::Adaptive`]: share of the response rows, in forwards between two refreshes of the response. 0 disables
    ///   V-verify. `None`: 0.25.
    /// - [`CacheMode::Prefix`] and [`CacheMode::Dual`]: share of the rows outside the block, in every refresh but the
    ///   first. Below 1 the decode also stores features (hybrid cache). `None`: 1, which recomputes all rows.
    pub refresh_ratio: Option<f64>,
    /// Every n-th refresh, beginning with the first, includes the prompt; other refreshes reuse its cached keys and values.
    /// There is one refresh per block. At least 1. Applies to [`CacheMode::Prefix`] and [`CacheMode::Dual`]. Default: 1.
    pub refresh_prompt_every: usize,
    /// Rows on each side of the block that forwards between refreshes compute too. Applies to [`CacheMode::Prefix`] and
    /// [`CacheMode::Dual`]. Default: 0.
    pub vicinity: usize,
    /// Largest number of positions after the block that rows attend to. `None`: no limit. Not available with
    /// [`CacheMode::Adaptive`], nor with [`CacheMode::Prefix`] or [`CacheMode::Dual`] and a `refresh_ratio` below 1.
    pub suffix_window: Option<usize>,
    /// Rule by which a step selects the tokens that it commits. Default: [`Policy::Threshold`] with 0.9.
    pub policy: Policy,
    /// Confidence that ranks the masked tokens. `None`: [`Confidence::Probability`], but [`Confidence::Entropy`] with
    /// Dream, blocks and [`Policy::Fixed`], as in Fast-dLLM's implementation. [`Confidence::Entropy`] requires
    /// [`Policy::Fixed`].
    pub confidence: Option<Confidence>,
    /// Temperature of sampling, finite and at least 0. 0 selects the most probable token; otherwise tokens are drawn from
    /// `softmax(logits / temperature)`. Default: 0.
    pub temperature: f64,
    /// Temperature of the order in which tokens are committed, finite and at least 0 (Dream). Above 0 the positions are
    /// drawn from `softmax(confidence / alg_temp)`, which requires [`Policy::Fixed`]. Default: 0.
    pub alg_temp: f64,
    /// Nucleus sampling: keep the fewest most probable tokens whose probabilities sum to more than this, in (0, 1].
    /// `None`: off.
    pub top_p: Option<f64>,
    /// Keep this number of most probable tokens, at least 1. `None`: off.
    pub top_k: Option<usize>,
    /// Scale w of classifier-free guidance: logits become `u + (w + 1) (c - u)`, where `u` are the logits with a masked
    /// prompt and `c` those with the prompt. At least 0 and finite in f32. 0 disables guidance; otherwise each forward
    /// also runs the unconditional sequence. Default: 0.
    pub cfg_scale: f64,
    /// Forwards from one pass of the unconditional sequence to the next, at least 1 (Kc in dLLM-Cache's implementation).
    /// The first five forwards always run it; in between guidance reuses the last difference of the logits. Applies to
    /// [`CacheMode::Adaptive`] with a `cfg_scale` above 0. Default: 1.
    pub cfg_interval: usize,
    /// Last timestep of Dream's schedule, in (0, 1). Applies to Dream with [`Policy::Fixed`]. Default: 0.001.
    pub eps: f64,
    /// Seed of every random number. The random numbers of a sequence do not depend on the batch: equal prompts of a batch
    /// get equal answers, and another seed draws other numbers. Default: 0.
    pub seed: u64,
    /// Whether a sequence ends at its first end-of-text token that has no mask before it. Such tokens are the model's and
    /// `end_tokens`. Default: false.
    pub early_stop: bool,
    /// Token ids that end a text, in addition to the model's end-of-text tokens. Default: none.
    pub end_tokens: Vec<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            gen_length: 128,
            block_length: None,
            steps: None,
            cache: CacheMode::Dual,
            prompt_interval: 50,
            response_interval: 7,
            refresh_ratio: None,
            refresh_prompt_every: 1,
            vicinity: 0,
            suffix_window: None,
            policy: Policy::Threshold(0.9),
            confidence: None,
            temperature: 0.0,
            alg_temp: 0.0,
            top_p: None,
            top_k: None,
            cfg_scale: 0.0,
            cfg_interval: 1,
            eps: 1e-3,
            seed: 0,
            early_stop: false,
            end_tokens: vec![],
        }
    }
}

/// Largest number of steps. Schedules hold one number per step, and no model needs more.
const MAX_STEPS: usize = 1 << 20;

/// Published decoding algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// LLaDA: blocks with a fixed number of steps each.
    Llada,
    /// Fast-dLLM for LLaDA: each block runs until it has no mask, with or without a cache.
    FastLlada,
    /// Dream: all positions at once, in `steps` steps.
    Dream,
    /// Fast-dLLM for Dream without blocks: threshold, with a quota that carries over.
    DreamThreshold,
    /// Fast-dLLM for Dream in blocks: the first forward of a block commits the block's first token.
    DreamBlock,
}

impl Options {
    /// Returns `block_length`, or its default.
    pub fn block_length(&self) -> usize {
        self.block_length.unwrap_or(self.gen_length.min(32))
    }

    /// Returns `steps`, or its default.
    pub fn steps(&self) -> usize {
        self.steps.unwrap_or(self.gen_length)
    }

    /// Returns `refresh_ratio`, or its default: 0.25 for [`CacheMode::Adaptive`], 1 for the other caches.
    pub fn effective_refresh_ratio(&self) -> f64 {
        self.refresh_ratio.unwrap_or(if self.cache == CacheMode::Adaptive { 0.25 } else { 1.0 })
    }

    /// Returns `confidence`, or its default for the algorithm.
    pub fn confidence(&self, algorithm: Algorithm) -> Confidence {
        self.confidence.unwrap_or(match (algorithm, self.policy) {
            (Algorithm::DreamBlock, Policy::Fixed) => Confidence::Entropy,
            _ => Confidence::Probability,
        })
    }

    /// Returns the algorithm that these options select for a model family.
    pub fn algorithm(&self, family: Family) -> Algorithm {
        // The adaptive cache works with the algorithms that need no block cache.
        let no_block_cache = matches!(self.cache, CacheMode::None | CacheMode::Adaptive);
        let one_block = no_block_cache && self.block_length() == self.gen_length;
        match (family, self.policy) {
            (Family::Llada, Policy::Fixed) if no_block_cache => Algorithm::Llada,
            (Family::Llada, _) => Algorithm::FastLlada,
            (Family::Dream, Policy::Fixed) if one_block => Algorithm::Dream,
            (Family::Dream, Policy::Threshold(_)) if one_block => Algorithm::DreamThreshold,
            (Family::Dream, _) => Algorithm::DreamBlock,
        }
    }

    /// Returns the parameters of the adaptive cache, if it is the cache.
    pub fn adaptive(&self) -> Option<AdaptiveCache> {
        let adaptive = AdaptiveCache {
            prompt_interval: self.prompt_interval,
            response_interval: self.response_interval,
            refresh_ratio: self.effective_refresh_ratio(),
            cfg_interval: self.cfg_interval,
        };
        (self.cache == CacheMode::Adaptive).then_some(adaptive)
    }

    /// Returns the cache with its parameters.
    pub(super) fn cache_config(&self) -> CacheConfig {
        if let Some(adaptive) = self.adaptive() {
            // Without guidance there is no unconditional sequence.
            let cfg_interval = if self.cfg_scale > 0.0 { self.cfg_interval } else { 1 };
            return CacheConfig::Adaptive(AdaptiveCache { cfg_interval, ..adaptive });
        }
        CacheConfig::Block(BlockCache {
            mode: self.cache,
            refresh_ratio: self.effective_refresh_ratio(),
            refresh_prompt_every: self.refresh_prompt_every,
            vicinity: self.vicinity,
            suffix_window: self.suffix_window,
        })
    }

    /// Returns the sampling parameters of an algorithm. `mask_token` is never predicted.
    pub(super) fn sampling(&self, algorithm: Algorithm, mask_token: u32) -> SamplingParams {
        SamplingParams {
            confidence: self.confidence(algorithm),
            temperature: self.temperature,
            tempered_confidence: !matches!(algorithm, Algorithm::Llada | Algorithm::FastLlada),
            f32_confidence: algorithm != Algorithm::FastLlada,
            top_p: self.top_p,
            top_k: self.top_k,
            cfg_scale: self.cfg_scale as f32,
            alg_temp: self.alg_temp,
            seed: self.seed,
            mask_token: Some(mask_token),
        }
    }

    /// Returns the properties of the decode that an engine may not support.
    pub(super) fn requirements(&self) -> EngineRequirements {
        EngineRequirements {
            temperature: self.temperature,
            alg_temp: self.alg_temp,
            factor: if let Policy::Factor(factor) = self.policy { Some(factor) } else { None },
        }
    }

    /// Checks that the options are in range and fit each other, the model and the prompts.
    ///
    /// # Errors
    /// [`Error::Argument`] names the option as the command line's flag, the expected value and the one found.
    pub fn validate(&self, config: &Config, prompts: &[Vec<u32>]) -> Result<()> {
        self.validate_lengths()?;
        self.validate_numbers()?;
        let algorithm = self.algorithm(config.family);
        let blocks = self.gen_length / self.block_length();
        let in_blocks = matches!(algorithm, Algorithm::Llada | Algorithm::FastLlada | Algorithm::DreamBlock);
        if self.policy == Policy::Fixed && in_blocks && !self.steps().is_multiple_of(blocks) {
            return Err(Error::argument("steps", format!("a multiple of the {blocks} blocks"), self.steps()));
        }
        if self.confidence == Some(Confidence::Entropy) && self.policy != Policy::Fixed {
            let expected = "policy fixed, because negative entropies are below every threshold";
            return Err(Error::argument("confidence", expected, "entropy with another policy"));
        }
        if self.alg_temp > 0.0 && self.policy != Policy::Fixed {
            return Err(Error::argument("alg-temp", "0 unless the policy is fixed", self.alg_temp));
        }
        if let Some(id) = self.end_tokens.iter().find(|id| **id as usize >= config.vocab_size) {
            return Err(Error::argument("end-tokens", format!("ids below {}", config.vocab_size), id));
        }
        if prompts.is_empty() {
            return Err(Error::argument("prompt", "at least one prompt", "none"));
        }
        for (i, prompt) in prompts.iter().enumerate() {
            self.validate_prompt(config, algorithm, prompt).map_err(|e| match e {
                Error::Argument { name, expected, found } if prompts.len() > 1 => {
                    Error::Argument { name, expected, found: format!("{found} (prompt {i})") }
                }
                other => other,
            })?;
        }
        Ok(())
    }

    fn validate_lengths(&self) -> Result<()> {
        if self.gen_length == 0 {
            return Err(Error::argument("gen-length", "at least 1", 0));
        }
        let block = self.block_length();
        if block == 0 || !self.gen_length.is_multiple_of(block) {
            let expected = format!("a divisor of gen-length {}", self.gen_length);
            let found = if self.block_length.is_some() { block.to_string() } else { format!("{block}, the default") };
            return Err(Error::argument("block-length", expected, found));
        }
        if self.steps() == 0 {
            return Err(Error::argument("steps", "at least 1", 0));
        }
        if let Some(steps) = self.steps.filter(|steps| *steps > MAX_STEPS) {
            return Err(Error::argument("steps", format!("at most {MAX_STEPS}"), steps));
        }
        for (name, interval) in [
            ("prompt-interval", self.prompt_interval),
            ("response-interval", self.response_interval),
            ("cfg-interval", self.cfg_interval),
            ("refresh-prompt-every", self.refresh_prompt_every),
        ] {
            if interval == 0 {
                return Err(Error::argument(name, "at least 1", 0));
            }
        }
        Ok(())
    }

    fn validate_numbers(&self) -> Result<()> {
        let check = |name, value: f64, ok: bool, expected: &str| {
            if ok { Ok(()) } else { Err(Error::argument(name, expected, value)) }
        };
        match self.policy {
            Policy::Fixed => {}
            Policy::Threshold(t) => check("threshold", t, t > 0.0 && t <= 1.0, "a number in (0, 1]")?,
            Policy::Factor(f) => check("factor", f, f > 0.0 && f.is_finite(), "a number above 0")?,
        }
        for (name, value) in [("temperature", self.temperature), ("alg-temp", self.alg_temp)] {
            check(name, value, value >= 0.0 && value.is_finite(), "0 or a number above")?;
        }
        // Guidance computes in f32.
        let guided = self.cfg_scale >= 0.0 && (self.cfg_scale as f32).is_finite();
        check("cfg-scale", self.cfg_scale, guided, "0 or a number above, finite in f32")?;
        if let Some(p) = self.top_p {
            check("top-p", p, p > 0.0 && p <= 1.0, "a number in (0, 1]")?;
        }
        if self.top_k == Some(0) {
            return Err(Error::argument("top-k", "at least 1", 0));
        }
        let ratio = self.effective_refresh_ratio();
        check("refresh-ratio", ratio, (0.0..=1.0).contains(&ratio), "a number in [0, 1]")?;
        // A feature cache needs rows of every position.
        let found = match self.cache {
            CacheMode::Adaptive => Some("cache adaptive".to_string()),
            _ => self.cache_config().stores_features().then(|| format!("refresh-ratio {ratio}")),
        };
        if let (Some(_), Some(found)) = (self.suffix_window, found) {
            return Err(Error::argument("suffix-window", "another cache than adaptive, and refresh-ratio 1", found));
        }
        check("eps", self.eps, self.eps > 0.0 && self.eps < 1.0, "a number in (0, 1)")
    }

    fn validate_prompt(&self, config: &Config, algorithm: Algorithm, prompt: &[u32]) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::argument("prompt", "at least one token", "an empty prompt"));
        }
        if let Some(id) = prompt.iter().find(|id| **id as usize >= config.vocab_size) {
            let expected = format!("token ids below the vocabulary's {}", config.vocab_size);
            return Err(Error::argument("prompt", expected, id));
        }
        // No sum here can overflow.
        let window = config.max_sequence_length;
        if self.gen_length > window || prompt.len() > window - self.gen_length {
            let expected = format!("prompt and gen-length {} within the model's {window} positions", self.gen_length);
            return Err(Error::argument("prompt", expected, format!("{} tokens", prompt.len())));
        }
        if algorithm == Algorithm::DreamThreshold && self.steps.is_some() {
            let masked = self.gen_length + prompt.iter().filter(|id| **id == config.mask_token_id).count();
            if !masked.is_multiple_of(self.steps()) {
                let expected = format!("a divisor of the {masked} masked tokens");
                return Err(Error::argument("steps", expected, self.steps()));
            }
        }
        Ok(())
    }

    /// Returns the sizes of the buffers that a decode of these prompts needs.
    pub fn sizes(&self, config: &Config, prompts: &[Vec<u32>]) -> SessionConfig {
        let algorithm = self.algorithm(config.family);
        let masks = |prompt: &Vec<u32>| prompt.iter().filter(|id| **id == config.mask_token_id).count();
        let adaptive = self.cache == CacheMode::Adaptive;
        let reuses_guidance = adaptive && self.cfg_scale > 0.0 && self.cfg_interval > 1;
        let generated_candidates = |prompt: &Vec<u32>| match algorithm {
            _ if reuses_guidance => self.gen_length,
            Algorithm::Dream | Algorithm::DreamThreshold => self.gen_length,
            // Masks of the prompt count for the quota, so a block may keep masks when the next one begins.
            Algorithm::Llada if masks(prompt) > 0 => self.gen_length,
            Algorithm::Llada | Algorithm::FastLlada | Algorithm::DreamBlock => self.block_length(),
        };
        SessionConfig {
            prompt_lens: prompts.iter().map(Vec::len).collect(),
            gen_length: self.gen_length,
            max_candidates: prompts.iter().map(|p| generated_candidates(p) + masks(p)).sum(),
            kv_cache: self.cache != CacheMode::None,
            feature_cache: self.cache_config().stores_features(),
            reuses_guidance,
            guided: self.cfg_scale > 0.0,
            num_end_tokens: if self.early_stop { config.eos_token_ids.len() + self.end_tokens.len() } else { 0 },
            max_ratios: match (algorithm, self.policy) {
                (Algorithm::Dream, _) => self.steps(),
                (Algorithm::DreamBlock, Policy::Fixed) => {
                    (self.steps() / (self.gen_length / self.block_length())).max(1)
                }
                _ => 0,
            },
        }
    }
}
