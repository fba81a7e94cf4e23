//! What a decode is asked to do, whether that is possible, and which rule it selects.

use crate::cache::adaptive::Adaptive;
use crate::cache::{CacheMode, PassKind};
use crate::error::{Error, Result};
use crate::model::{Config, Family, SessionConfig};
use crate::sampling::{Confidence, SamplingParams};

/// Which masked tokens a step commits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    /// A fixed number per step, by the family's schedule.
    Fixed,
    /// Every token at least this confident, and always the best one. In (0, 1].
    Threshold(f64),
    /// Fast-dLLM's factor, above 0: the best n while (n + 1) (1 - c_n) < factor.
    Factor(f64),
}

/// Every setting of a decode. The names are those of the command line's flags.
#[derive(Clone, Debug)]
pub struct Options {
    /// Positions to generate for each prompt.
    pub gen_length: usize,
    /// Positions decoded together; divides `gen_length`. None: 32, or `gen_length` if that is less.
    pub block_length: Option<usize>,
    /// Steps over all blocks, at most 2^20; shapes `Policy::Fixed` and Dream's threshold rule without blocks. None:
    /// one for each token.
    pub steps: Option<usize>,
    /// What is kept between forwards.
    pub cache: CacheMode,
    /// `CacheMode::Adaptive`: forwards between two refreshes of the prompt, at least 1.
    pub prompt_interval: usize,
    /// `CacheMode::Adaptive`: forwards between two refreshes of the response, at least 1.
    pub response_interval: usize,
    /// Share of rows that V-verify selects for recomputation, in [0, 1]. `CacheMode::Adaptive`: of the response, between
    /// two refreshes; `None` is 0.25. `CacheMode::Prefix` and `Dual`: of the rows outside the block, in every refresh but
    /// the first; `None` is 1, a refresh of all rows.
    pub refresh_ratio: Option<f64>,
    /// `CacheMode::Prefix` and `Dual`: one refresh of so many renews the prompt, the first among them; the others leave it as it
    /// is cached. At least 1.
    pub refresh_prompt_every: usize,
    /// Likewise: rows on either side of the block that its forwards run too, of what is in view.
    pub vicinity: usize,
    /// Positions after the block that queries attend to; `None` means no limit. Not with `CacheMode::Adaptive`, nor with
    /// `CacheMode::Prefix` or `Dual` and a `refresh_ratio` below 1.
    pub suffix_window: Option<usize>,
    /// Which tokens a step commits.
    pub policy: Policy,
    /// What ranks them. None: the probability, but the negative entropy for Dream in blocks with `Policy::Fixed`, as in
    /// the original.
    pub confidence: Option<Confidence>,
    /// 0: argmax. Above: sampling from softmax(logits / temperature).
    pub temperature: f64,
    /// Above 0, with `Policy::Fixed`: positions are drawn from softmax(confidence / alg_temp).
    pub alg_temp: f64,
    /// Nucleus sampling, in (0, 1].
    pub top_p: Option<f64>,
    /// Keep this many largest logits.
    pub top_k: Option<usize>,
    /// Classifier-free guidance; 0 is none.
    pub cfg_scale: f64,
    /// `CacheMode::Adaptive` with guidance: forwards between two of the unconditional twin, at least 1; the first five run it
    /// always. In between guidance goes by how far its logits were.
    pub cfg_interval: usize,
    /// End of Dream's timesteps.
    pub eps: f64,
    /// Seed of every random number. A sequence draws the same numbers alone or in a batch, so equal prompts of a batch
    /// get equal answers: vary the seed for different ones.
    pub seed: u64,
    /// End a sequence once an end-of-text token (the configuration's or one of `end_tokens`) stands with no mask before
    /// it.
    pub early_stop: bool,
    /// More tokens that end a text, besides the configuration's.
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

/// No real decode comes near; schedules hold a number for each step.
const STEPS_LIMIT: usize = 1 << 20;

/// The decoding loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// LLaDA: blocks, a fixed number of steps each.
    Llada,
    /// Fast-dLLM for LLaDA: blocks until they are done, with or without a cache.
    FastLlada,
    /// Dream: all positions at once, `steps` steps.
    Dream,
    /// Fast-dLLM for Dream without blocks: threshold, with the deficit carried over.
    DreamThreshold,
    /// Fast-dLLM for Dream in blocks: the first forward of a block commits its first token.
    DreamBlock,
}

impl Options {
    /// `block_length`, or its default.
    pub fn block_length(&self) -> usize {
        self.block_length.unwrap_or(self.gen_length.min(32))
    }

    /// `steps`, or its default.
    pub fn steps(&self) -> usize {
        self.steps.unwrap_or(self.gen_length)
    }

    /// `confidence`, or the rule's default.
    pub fn confidence(&self, rule: Algorithm) -> Confidence {
        self.confidence.unwrap_or(match (rule, self.policy) {
            (Algorithm::DreamBlock, Policy::Fixed) => Confidence::Entropy,
            _ => Confidence::Probability,
        })
    }

    /// Which rule these options select for a family.
    pub fn algorithm(&self, family: Family) -> Algorithm {
        // The adaptive cache goes around the loop that there is without a cache.
        let plain = matches!(self.cache, CacheMode::None | CacheMode::Adaptive);
        let whole = plain && self.block_length() == self.gen_length;
        match (family, self.policy) {
            (Family::Llada, Policy::Fixed) if plain => Algorithm::Llada,
            (Family::Llada, _) => Algorithm::FastLlada,
            (Family::Dream, Policy::Fixed) if whole => Algorithm::Dream,
            (Family::Dream, Policy::Threshold(_)) if whole => Algorithm::DreamThreshold,
            (Family::Dream, _) => Algorithm::DreamBlock,
        }
    }

    /// What the adaptive cache renews when, if it is the cache.
    pub fn adaptive(&self) -> Option<Adaptive> {
        let Options { prompt_interval, response_interval, cfg_interval: guidance_interval, .. } = *self;
        let refresh_ratio = self.effective_refresh_ratio();
        let adaptive = Adaptive { prompt_interval, response_interval, refresh_ratio, guidance_interval };
        (self.cache == CacheMode::Adaptive).then_some(adaptive)
    }

    /// After so many forwards kinds of forwards come again.
    pub(super) fn period(&self) -> usize {
        let (a, b) = (self.prompt_interval, self.response_interval);
        if self.adaptive().is_some() { a.saturating_mul(b) } else { 1 }
    }

    /// `refresh_ratio`, or the cache's default: 0.25 for `CacheMode::Adaptive`, 1 for the others.
    pub fn effective_refresh_ratio(&self) -> f64 {
        self.refresh_ratio.unwrap_or(if self.cache == CacheMode::Adaptive { 0.25 } else { 1.0 })
    }

    /// Whether the first forward of a block refreshes a block cache.
    pub(super) fn refreshes_blocks(&self) -> bool {
        matches!(self.cache, CacheMode::Prefix | CacheMode::Dual)
    }

    /// Whether refreshes keep outputs for later ones.
    pub(super) fn keeps_refreshes(&self) -> bool {
        self.refreshes_blocks() && self.effective_refresh_ratio() < 1.0
    }

    /// What the first pass of a block runs.
    pub(super) fn refresh_pass(&self, block: usize) -> PassKind {
        match self.refreshes_blocks() && !block.is_multiple_of(self.refresh_prompt_every) {
            true => PassKind::Response,
            false => PassKind::Full,
        }
    }

    /// How rows are scored under a rule; `mask` is never chosen.
    pub(super) fn unmask(&self, rule: Algorithm, mask: u32) -> SamplingParams {
        SamplingParams {
            confidence: self.confidence(rule),
            temperature: self.temperature,
            tempered_confidence: !matches!(rule, Algorithm::Llada | Algorithm::FastLlada),
            f32_confidence: rule != Algorithm::FastLlada,
            top_p: self.top_p,
            top_k: self.top_k,
            cfg_scale: self.cfg_scale as f32,
            alg_temp: self.alg_temp,
            seed: self.seed,
            mask_token: Some(mask),
        }
    }

    /// Errs unless the options fit each other, the model and the prompts.
    pub fn validate(&self, config: &Config, prompts: &[Vec<u32>]) -> Result<()> {
        self.validate_lengths()?;
        self.validate_numbers()?;
        let rule = self.algorithm(config.family);
        let blocks = self.gen_length / self.block_length();
        let in_blocks = matches!(rule, Algorithm::Llada | Algorithm::FastLlada | Algorithm::DreamBlock);
        if self.policy == Policy::Fixed && in_blocks && !self.steps().is_multiple_of(blocks) {
            return Err(Error::argument("steps", format!("a multiple of the {blocks} blocks"), self.steps()));
        }
        if self.confidence == Some(Confidence::Entropy) && self.policy != Policy::Fixed {
            let expected = "policy fixed: negative entropies lie below every threshold";
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
            self.validate_prompt(config, rule, prompt).map_err(|e| match e {
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
        if let Some(steps) = self.steps.filter(|steps| *steps > STEPS_LIMIT) {
            return Err(Error::argument("steps", format!("at most {STEPS_LIMIT}"), steps));
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
        let within = |name, value: f64, ok: bool, expected: &str| match ok {
            true => Ok(()),
            false => Err(Error::argument(name, expected, value)),
        };
        match self.policy {
            Policy::Fixed => {}
            Policy::Threshold(t) => within("threshold", t, t > 0.0 && t <= 1.0, "a number in (0, 1]")?,
            Policy::Factor(f) => within("factor", f, f > 0.0 && f.is_finite(), "a number above 0")?,
        }
        for (name, value) in [("temperature", self.temperature), ("alg-temp", self.alg_temp)] {
            within(name, value, value >= 0.0 && value.is_finite(), "0 or a number above")?;
        }
        // Logits are guided in f32.
        let guided = self.cfg_scale >= 0.0 && (self.cfg_scale as f32).is_finite();
        within("cfg-scale", self.cfg_scale, guided, "0 or a number above, finite in f32")?;
        if let Some(p) = self.top_p {
            within("top-p", p, p > 0.0 && p <= 1.0, "a number in (0, 1]")?;
        }
        if self.top_k == Some(0) {
            return Err(Error::argument("top-k", "at least 1", 0));
        }
        let ratio = self.effective_refresh_ratio();
        within("refresh-ratio", ratio, (0.0..=1.0).contains(&ratio), "a number in [0, 1]")?;
        // A feature cache needs rows of every position.
        let found = match self.cache {
            CacheMode::Adaptive => Some("cache adaptive".to_string()),
            _ => self.keeps_refreshes().then(|| format!("refresh-ratio {ratio}")),
        };
        if let (Some(_), Some(found)) = (self.suffix_window, found) {
            return Err(Error::argument("suffix-window", "another cache than adaptive, and refresh-ratio 1", found));
        }
        within("eps", self.eps, self.eps > 0.0 && self.eps < 1.0, "a number in (0, 1)")
    }

    /// What the kernels need besides: their numbers are f32.
    #[cfg(feature = "cuda")]
    pub(super) fn validate_on_device(&self) -> Result<()> {
        for (name, value) in [("temperature", self.temperature), ("alg-temp", self.alg_temp)] {
            if value != 0.0 && !(1e-6..=1e6).contains(&value) {
                return Err(Error::argument(name, "0, or on a CUDA device 1e-6 to 1e6", value));
            }
        }
        match self.policy {
            Policy::Factor(factor) if factor as f32 == 0.0 || !(factor as f32).is_finite() => {
                Err(Error::argument("factor", "on a CUDA device a number above 0 in f32", factor))
            }
            _ => Ok(()),
        }
    }

    fn validate_prompt(&self, config: &Config, rule: Algorithm, prompt: &[u32]) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::argument("prompt", "at least one token", "an empty prompt"));
        }
        if let Some(id) = prompt.iter().find(|id| **id as usize >= config.vocab_size) {
            let expected = format!("token ids below the vocabulary's {}", config.vocab_size);
            return Err(Error::argument("prompt", expected, id));
        }
        // Written so that no sum can overflow.
        let window = config.max_sequence_length;
        if self.gen_length > window || prompt.len() > window - self.gen_length {
            let expected = format!("prompt and gen-length {} within the model's {window} positions", self.gen_length);
            return Err(Error::argument("prompt", expected, format!("{} tokens", prompt.len())));
        }
        if rule == Algorithm::DreamThreshold && self.steps.is_some() {
            let masked = self.gen_length + prompt.iter().filter(|id| **id == config.mask_token_id).count();
            if !masked.is_multiple_of(self.steps()) {
                let expected = format!("a divisor of the {masked} masked tokens");
                return Err(Error::argument("steps", expected, self.steps()));
            }
        }
        Ok(())
    }

    /// The buffers that a decode of these prompts needs.
    pub fn sizes(&self, config: &Config, prompts: &[Vec<u32>]) -> SessionConfig {
        let rule = self.algorithm(config.family);
        let masks = |prompt: &Vec<u32>| prompt.iter().filter(|id| **id == config.mask_token_id).count();
        let adaptive = self.cache == CacheMode::Adaptive;
        let remembered = adaptive && self.cfg_scale > 0.0 && self.cfg_interval > 1;
        let in_reach = |prompt: &Vec<u32>| match rule {
            _ if remembered => self.gen_length,
            Algorithm::Dream | Algorithm::DreamThreshold => self.gen_length,
            // Masks in the prompt compete for the quota, so that a block may stay unfinished behind the next one.
            Algorithm::Llada if masks(prompt) > 0 => self.gen_length,
            Algorithm::Llada | Algorithm::FastLlada | Algorithm::DreamBlock => self.block_length(),
        };
        SessionConfig {
            prompt_lens: prompts.iter().map(Vec::len).collect(),
            gen_length: self.gen_length,
            max_candidates: prompts.iter().map(|p| in_reach(p) + masks(p)).sum(),
            kv_cache: self.cache != CacheMode::None,
            feature_cache: adaptive || self.keeps_refreshes(),
            reuses_guidance: remembered,
            guided: self.cfg_scale > 0.0,
            num_end_tokens: match self.early_stop {
                true => config.eos_token_ids.len() + self.end_tokens.len(),
                false => 0,
            },
            max_ratios: match (rule, self.policy) {
                (Algorithm::Dream, _) => self.steps(),
                (Algorithm::DreamBlock, Policy::Fixed) => {
                    (self.steps() / (self.gen_length / self.block_length())).max(1)
                }
                _ => 0,
            },
        }
    }
}
