//! Flags that commands share, and what they mean to the library.

use crate::presets::preset;
use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, ValueEnum};
use dllm_kernels::decode::presets::Preset;
use dllm_kernels::{CacheMode, Confidence, Error, Family, Options, Policy, Result};
use std::path::{Path, PathBuf};

/// The checkpoint that comes with the program.
const SHIPPED: &str = "models/tiny-math";

/// An argument that is out of its range.
pub fn argument(name: &'static str, expected: impl Into<String>, found: impl ToString) -> Error {
    Error::Argument { name, expected: expected.into(), found: found.to_string() }
}

/// What `--threads` takes.
pub fn threads() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=4096)
}

/// What a length that cannot be 0 takes.
pub fn length() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// What `--cache` takes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Cache {
    /// Every forward runs everything
    None,
    /// Keep keys and values before the block
    Prefix,
    /// Keep keys and values before and after the block
    Dual,
    /// dLLM-Cache: keep every layer's outputs too, of all positions, and renew some of them at a time
    Adaptive,
}

impl Cache {
    pub fn mode(self) -> CacheMode {
        match self {
            Cache::None => CacheMode::None,
            Cache::Prefix => CacheMode::Prefix,
            Cache::Dual => CacheMode::Dual,
            Cache::Adaptive => CacheMode::Adaptive,
        }
    }
}

/// What `--policy` takes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum PolicyName {
    /// As many tokens per step as the schedule says
    Fixed,
    /// Every token that is at least --threshold confident, and always the best one
    Threshold,
    /// Fast-dLLM's factor rule
    Factor,
}

/// What `--confidence` takes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum ConfidenceName {
    /// Of the token itself
    Probability,
    /// Lead over the second-best token
    Margin,
    /// Negative entropy of the row
    Entropy,
    /// Drawn
    Random,
}

/// How to decode. Every flag is optional here, so that a setting of `eval` can be laid over the command line's.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Decoding")]
pub struct Decoding {
    /// A published setting of the adaptive cache, for what other flags do not say; `dllm presets` lists them
    #[arg(long, value_name = "NAME", value_parser = preset)]
    pub preset: Option<&'static Preset>,
    /// Tokens to generate [default: 128]
    #[arg(long, value_name = "N")]
    pub gen_length: Option<usize>,
    /// Tokens decoded together, left to right; divides gen-length [default: 32, at most gen-length]
    #[arg(long, value_name = "N")]
    pub block_length: Option<usize>,
    /// Steps over all blocks; shapes the fixed policy, and Dream's threshold without blocks [default: gen-length]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// What is kept between the forwards of a block [default: dual]
    #[arg(long, value_name = "MODE", hide_possible_values = true, help = CACHE_HELP)]
    pub cache: Option<Cache>,
    /// Which tokens a step commits: fixed, threshold or factor [default: threshold]
    #[arg(long, value_name = "RULE", hide_possible_values = true)]
    pub policy: Option<PolicyName>,
    /// Confidence that policy threshold asks for, in (0, 1] [default: 0.9]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub threshold: Option<f64>,
    /// Factor of policy factor, above 0: higher commits more [default: 1.0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub factor: Option<f64>,
    /// What ranks tokens: probability, margin, entropy or random [default: probability; entropy for Dream in blocks with
    /// policy fixed]
    #[arg(long, value_name = "KIND", hide_possible_values = true)]
    pub confidence: Option<ConfidenceName>,
    /// End a sequence at its first end-of-text token [default: off]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(hide_possible_values = true)]
    pub early_stop: Option<bool>,

    /// Sample from softmax(logits / T); 0 takes the best token [default: 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    pub temperature: Option<f64>,
    /// Policy fixed: draw the positions too, from softmax(confidence / T) [default: 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    pub alg_temp: Option<f64>,
    /// Nucleus sampling, in (0, 1] [default: off]
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub top_p: Option<f64>,
    /// Sample among the K best tokens [default: off]
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Classifier-free guidance; doubles the work [default: 0]
    #[arg(long, value_name = "S", allow_negative_numbers = true, help_heading = "Sampling")]
    pub cfg_scale: Option<f64>,
    /// End of Dream's timesteps [default: 0.001]
    #[arg(long, value_name = "E", allow_negative_numbers = true, help_heading = "Sampling")]
    pub eps: Option<f64>,
    /// Seed of every random number; equal prompts of a batch draw equal ones, so vary it for other answers [default: 0]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub seed: Option<u64>,

    /// Forwards between refreshes of the prompt [default: 50]
    #[arg(long, value_name = "N", help_heading = ADAPTIVE)]
    pub prompt_interval: Option<usize>,
    /// Forwards between refreshes of the response [default: 7]
    #[arg(long, value_name = "N", help_heading = ADAPTIVE)]
    pub response_interval: Option<usize>,
    /// Share of response rows recomputed in between [default: 0.25]; caches prefix and dual: share of the rows outside
    /// the block that later refreshes recompute [default: 1]
    #[arg(long, value_name = "R", alias = "refresh-rows", allow_negative_numbers = true, help_heading = ADAPTIVE)]
    pub refresh_ratio: Option<f64>,
    /// With --cfg-scale: forwards between two of the unconditional half; the first five run it always [default: 1]
    #[arg(long, value_name = "N", help_heading = ADAPTIVE)]
    pub cfg_interval: Option<usize>,

    /// Renew the prompt in one refresh of N, the first among them [default: 1]
    #[arg(long, value_name = "N", help_heading = BLOCKS)]
    pub refresh_prompt_every: Option<usize>,
    /// Rows on either side of the block that its forwards run too [default: 0]
    #[arg(long, value_name = "W", help_heading = BLOCKS)]
    pub vicinity: Option<usize>,
    /// Positions behind the block that are in view, with any cache but adaptive [default: all]
    #[arg(long, value_name = "W", help_heading = BLOCKS)]
    pub suffix_window: Option<usize>,
}

const ADAPTIVE: &str = "Cache mode adaptive";
const BLOCKS: &str = "Cache modes prefix and dual";
const CACHE_HELP: &str = "What is kept between forwards: none, prefix, dual or adaptive [default: dual]";

/// The flags of a setting, parsed as if they stood on a command line.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Setting {
    #[command(flatten)]
    decoding: Decoding,
}

impl Decoding {
    /// These flags with `setting` (`cache=dual,policy=threshold,threshold=0.9`) laid over them.
    pub fn with_setting(&self, setting: &str) -> Result<Decoding> {
        let flags = setting.split(',').map(str::trim).filter(|f| !f.is_empty()).map(|f| format!("--{f}"));
        let mut parsed = Setting { decoding: self.clone() };
        parsed.try_update_from(flags).map_err(|error| {
            let message = error.to_string();
            let message = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
            let expected = "flags of generate as key=value, with commas between them";
            argument("setting", expected, format!("{setting:?}: {message}"))
        })?;
        Ok(parsed.decoding)
    }

    /// What the library is asked to do. Ranges are the library's to check.
    pub fn options(&self) -> Options {
        let default = match self.preset {
            Some(preset) => preset.options(self.gen_length),
            None => Options::default(),
        };
        Options {
            gen_length: self.gen_length.unwrap_or(default.gen_length),
            block_length: self.block_length.or(default.block_length),
            steps: self.steps.or(default.steps),
            cache: self.cache.map_or(default.cache, Cache::mode),
            prompt_interval: self.prompt_interval.unwrap_or(default.prompt_interval),
            response_interval: self.response_interval.unwrap_or(default.response_interval),
            refresh_ratio: self.refresh_ratio.or(default.refresh_ratio),
            cfg_interval: self.cfg_interval.unwrap_or(default.cfg_interval),
            refresh_prompt_every: self.refresh_prompt_every.unwrap_or(default.refresh_prompt_every),
            vicinity: self.vicinity.unwrap_or(default.vicinity),
            suffix_window: self.suffix_window.or(default.suffix_window),
            policy: match self.policy() {
                PolicyName::Threshold => Policy::Threshold(self.threshold.unwrap_or(0.9)),
                PolicyName::Fixed => Policy::Fixed,
                PolicyName::Factor => Policy::Factor(self.factor.unwrap_or(1.0)),
            },
            confidence: self.confidence.map_or(default.confidence, |name| {
                Some(match name {
                    ConfidenceName::Probability => Confidence::Probability,
                    ConfidenceName::Margin => Confidence::Margin,
                    ConfidenceName::Entropy => Confidence::Entropy,
                    ConfidenceName::Random => Confidence::Random,
                })
            }),
            temperature: self.temperature.unwrap_or(default.temperature),
            alg_temp: self.alg_temp.unwrap_or(default.alg_temp),
            top_p: self.top_p.or(default.top_p),
            top_k: self.top_k.or(default.top_k),
            cfg_scale: self.cfg_scale.unwrap_or(default.cfg_scale),
            eps: self.eps.unwrap_or(default.eps),
            seed: self.seed.unwrap_or(default.seed),
            early_stop: self.early_stop.unwrap_or(default.early_stop),
            end_tokens: vec![],
        }
    }

    fn policy(&self) -> PolicyName {
        let default = if self.preset.is_some() { PolicyName::Fixed } else { PolicyName::Threshold };
        self.policy.unwrap_or(default)
    }

    /// Whether anything was asked for that belongs to a cache or a policy.
    pub fn chooses_mode(&self) -> bool {
        self.preset.is_some()
            || self.cache.is_some()
            || self.policy.is_some()
            || self.threshold.is_some()
            || self.factor.is_some()
            || self.prompt_interval.is_some()
            || self.response_interval.is_some()
            || self.refresh_ratio.is_some()
            || self.cfg_interval.is_some()
            || self.refresh_prompt_every.is_some()
            || self.vicinity.is_some()
            || self.suffix_window.is_some()
    }

    /// Errs when the preset is for models of another family.
    pub fn check_family(&self, family: Family) -> Result<()> {
        match self.preset {
            Some(preset) if preset.family() != family => Err(argument(
                "preset",
                format!("one for {family}"),
                format!("{}, for {}", preset.name, preset.family()),
            )),
            _ => Ok(()),
        }
    }

    /// Flags that were given but that the others leave without effect.
    pub fn idle_flags(&self) -> Vec<&'static str> {
        let policy = self.policy();
        let adaptive = self.options().cache == CacheMode::Adaptive;
        let refreshes = matches!(self.options().cache, CacheMode::Prefix | CacheMode::Dual);
        let guided = self.cfg_scale.is_some_and(|scale| scale > 0.0);
        let flags = [
            ("--threshold (see --policy)", self.threshold.is_some() && policy != PolicyName::Threshold),
            ("--factor (see --policy)", self.factor.is_some() && policy != PolicyName::Factor),
            ("--preset (see --cache)", self.preset.is_some() && !adaptive),
            ("--prompt-interval (see --cache)", self.prompt_interval.is_some() && !adaptive),
            ("--response-interval (see --cache)", self.response_interval.is_some() && !adaptive),
            ("--refresh-ratio (see --cache)", self.refresh_ratio.is_some() && !adaptive && !refreshes),
            ("--cfg-interval (see --cache, --cfg-scale)", self.cfg_interval.is_some() && !(adaptive && guided)),
            ("--refresh-prompt-every (see --cache)", self.refresh_prompt_every.is_some() && !refreshes),
            ("--vicinity (see --cache)", self.vicinity.is_some() && !refreshes),
        ];
        flags.into_iter().filter(|(_, idle)| *idle).map(|(name, _)| name).collect()
    }
}

/// The checkpoint directory: the one given, or the one that comes with the program, looked for in the current directory
/// and in those above the executable.
pub fn model_dir(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.to_path_buf());
    }
    let executable = std::env::current_exe().unwrap_or_default();
    let above = executable.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty());
    let mut places = std::iter::once(Path::new("")).chain(above).map(|dir| dir.join(SHIPPED));
    places.find(|dir| dir.is_dir()).ok_or_else(|| {
        let expected = format!("a checkpoint directory, as {SHIPPED} is neither here nor above the program");
        argument("model", expected, "no --model")
    })
}
