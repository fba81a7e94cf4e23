//! Flags that several commands share, and their conversion to library options.

use crate::presets::preset;
use clap::builder::{PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser};
use dllm_kernels::decode::presets::Preset;
use dllm_kernels::{CacheMode, Confidence, Error, Family, Options, Policy, Result};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Path of the sample checkpoint in the repository.
const SAMPLE_MODEL: &str = "models/tiny-math";

/// Parser for `--threads`.
pub fn threads() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=4096)
}

/// Parser for a length of at least 1.
pub fn length() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// Parser for a type of the library. Help and errors list `values`, the names that the type parses.
fn named<T>(values: impl IntoIterator<Item = PossibleValue>) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = Error> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(values).try_map(|name| name.parse::<T>())
}

/// Parser for `--cache`.
pub fn cache() -> impl TypedValueParser<Value = CacheMode> {
    named(CacheMode::ALL.map(|mode| {
        PossibleValue::new(mode.name()).help(match mode {
            CacheMode::None => "Every forward computes all positions",
            CacheMode::Prefix => "Cache the keys and values before the block",
            CacheMode::Dual => "Cache the keys and values before and after the block",
            CacheMode::Adaptive => {
                "dLLM-Cache: also cache attention and MLP outputs of all positions, refreshed in part"
            }
            _ => "",
        })
    }))
}

/// Parser for `--policy`. A policy parsed from its name has the default threshold or factor.
fn policy() -> impl TypedValueParser<Value = Policy> {
    named(Policy::NAMES.map(PossibleValue::new))
}

/// Parser for `--confidence`.
fn confidence() -> impl TypedValueParser<Value = Confidence> {
    named(Confidence::ALL.map(|kind| PossibleValue::new(kind.name())))
}

/// Flags of a decode. All are optional, so that a setting of `eval` can override those of the command line.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Decoding")]
pub struct Decoding {
    /// Published setting of the adaptive cache; other flags override it. `dllm presets` lists them
    #[arg(long, value_name = "NAME", value_parser = preset)]
    pub preset: Option<&'static Preset>,
    /// Tokens to generate [default: 128]
    #[arg(long, value_name = "N")]
    pub gen_length: Option<usize>,
    /// Tokens per block, decoded left to right; divides gen-length [default: 32, at most gen-length]
    #[arg(long, value_name = "N")]
    pub block_length: Option<usize>,
    /// Steps over all blocks; for policy fixed, and for Dream's threshold without blocks [default: gen-length]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Cached state between forwards: none, prefix, dual or adaptive [default: dual]
    #[arg(long, value_name = "MODE", value_parser = cache(), hide_possible_values = true)]
    pub cache: Option<CacheMode>,
    /// Rule that selects the tokens of a step: fixed, threshold or factor [default: threshold]
    #[arg(long, value_name = "RULE", value_parser = policy(), hide_possible_values = true)]
    pub policy: Option<Policy>,
    /// Policy threshold: smallest confidence, in (0, 1] [default: 0.9]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub threshold: Option<f64>,
    /// Policy factor: Fast-dLLM's factor, above 0; a higher one commits more tokens [default: 1.0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub factor: Option<f64>,
    /// Ranking of tokens: probability, margin, entropy or random [default: probability; entropy for Dream in blocks with
    /// policy fixed]
    #[arg(long, value_name = "KIND", value_parser = confidence(), hide_possible_values = true)]
    pub confidence: Option<Confidence>,
    /// End a sequence at its first end-of-text token [default: off]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(hide_possible_values = true)]
    pub early_stop: Option<bool>,

    /// Sample from softmax(logits / T); 0 selects the best token [default: 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    pub temperature: Option<f64>,
    /// Policy fixed: sample the positions from softmax(confidence / T) [default: 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    pub alg_temp: Option<f64>,
    /// Nucleus sampling, in (0, 1] [default: off]
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub top_p: Option<f64>,
    /// Sample from the K best tokens [default: off]
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Scale of classifier-free guidance, which doubles the work [default: 0]
    #[arg(long, value_name = "S", allow_negative_numbers = true, help_heading = "Sampling")]
    pub cfg_scale: Option<f64>,
    /// Last of Dream's timesteps [default: 0.001]
    #[arg(long, value_name = "E", allow_negative_numbers = true, help_heading = "Sampling")]
    pub eps: Option<f64>,
    /// Seed of all random numbers; equal prompts of a batch draw equal ones. Vary it for other answers [default: 0]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub seed: Option<u64>,

    /// Forwards between refreshes of the prompt [default: 50]
    #[arg(long, value_name = "N", help_heading = ADAPTIVE)]
    pub prompt_interval: Option<usize>,
    /// Forwards between refreshes of the response [default: 7]
    #[arg(long, value_name = "N", help_heading = ADAPTIVE)]
    pub response_interval: Option<usize>,
    /// With --cfg-scale: forwards between two of the unconditional sequence; the first five run all [default: 1]
    #[arg(long, value_name = "N", help_heading = ADAPTIVE)]
    pub cfg_interval: Option<usize>,

    /// Share of rows that V-verify selects. Adaptive: of the response, between refreshes [default: 0.25]. Prefix and dual:
    /// of the rows outside the block, in refreshes after the first [default: 1]
    #[arg(long, alias = "refresh-rows", value_name = "R", allow_negative_numbers = true, help_heading = CACHES)]
    pub refresh_ratio: Option<f64>,

    /// Refresh the prompt only in every N-th refresh, beginning with the first [default: 1]
    #[arg(long, value_name = "N", help_heading = BLOCKS)]
    pub refresh_prompt_every: Option<usize>,
    /// Rows on either side of the block that block steps compute too [default: 0]
    #[arg(long, value_name = "W", help_heading = BLOCKS)]
    pub vicinity: Option<usize>,
    /// Visible positions after the block; with any cache but adaptive [default: all]
    #[arg(long, value_name = "W", help_heading = BLOCKS)]
    pub suffix_window: Option<usize>,
}

const ADAPTIVE: &str = "Cache mode adaptive";
const BLOCKS: &str = "Cache modes prefix and dual";
const CACHES: &str = "Cache modes adaptive, prefix and dual";

/// Flags of a setting, parsed like those of a command line.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Setting {
    #[command(flatten)]
    decoding: Decoding,
}

impl Decoding {
    /// Returns these flags, overridden by those of `setting` (`cache=dual,policy=threshold,threshold=0.9`).
    ///
    /// # Errors
    /// [`Error::Argument`] when the setting does not parse.
    pub fn with_setting(&self, setting: &str) -> Result<Decoding> {
        let flags = setting.split(',').map(str::trim).filter(|f| !f.is_empty()).map(|f| format!("--{f}"));
        let mut parsed = Setting { decoding: self.clone() };
        parsed.try_update_from(flags).map_err(|error| {
            let message = error.to_string();
            let message = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
            let expected = "flags of generate as key=value, separated by commas";
            Error::argument("setting", expected, format!("{setting:?}: {message}"))
        })?;
        Ok(parsed.decoding)
    }

    /// Returns the options of the library. [`Options::validate`] checks their ranges.
    pub fn options(&self) -> Options {
        let default = match self.preset {
            Some(preset) => preset.options(self.gen_length),
            None => Options::default(),
        };
        Options {
            gen_length: self.gen_length.unwrap_or(default.gen_length),
            block_length: self.block_length.or(default.block_length),
            steps: self.steps.or(default.steps),
            cache: self.cache.unwrap_or(default.cache),
            prompt_interval: self.prompt_interval.unwrap_or(default.prompt_interval),
            response_interval: self.response_interval.unwrap_or(default.response_interval),
            refresh_ratio: self.refresh_ratio.or(default.refresh_ratio),
            cfg_interval: self.cfg_interval.unwrap_or(default.cfg_interval),
            refresh_prompt_every: self.refresh_prompt_every.unwrap_or(default.refresh_prompt_every),
            vicinity: self.vicinity.unwrap_or(default.vicinity),
            suffix_window: self.suffix_window.or(default.suffix_window),
            policy: match self.policy() {
                Policy::Fixed => Policy::Fixed,
                Policy::Threshold(default) => Policy::Threshold(self.threshold.unwrap_or(default)),
                Policy::Factor(default) => Policy::Factor(self.factor.unwrap_or(default)),
                other => other,
            },
            confidence: self.confidence.or(default.confidence),
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

    /// Returns the policy with its default threshold or factor.
    fn policy(&self) -> Policy {
        let default = self.preset.map_or(Options::default(), |preset| preset.options(None));
        self.policy.unwrap_or(default.policy)
    }

    /// Returns whether a flag of a cache or a policy was given.
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

    /// Checks that the preset is for models of `family`.
    ///
    /// # Errors
    /// [`Error::Argument`] when it is not.
    pub fn check_family(&self, family: Family) -> Result<()> {
        match self.preset {
            Some(preset) if preset.family() != family => Err(Error::argument(
                "preset",
                format!("one for {family}"),
                format!("{}, for {}", preset.name, preset.family()),
            )),
            _ => Ok(()),
        }
    }

    /// Returns the flags that were given but have no effect with the others, each with the flag that decides it.
    pub fn idle_flags(&self) -> Vec<&'static str> {
        let Options { cache, policy, .. } = self.options();
        let adaptive = cache == CacheMode::Adaptive;
        let refreshes = matches!(cache, CacheMode::Prefix | CacheMode::Dual);
        let guided = self.cfg_scale.is_some_and(|scale| scale > 0.0);
        let flags = [
            ("--threshold (see --policy)", self.threshold.is_some() && !matches!(policy, Policy::Threshold(_))),
            ("--factor (see --policy)", self.factor.is_some() && !matches!(policy, Policy::Factor(_))),
            ("--preset (see --cache)", self.preset.is_some() && !adaptive),
            ("--prompt-interval (see --cache)", self.prompt_interval.is_some() && !adaptive),
            ("--response-interval (see --cache)", self.response_interval.is_some() && !adaptive),
            ("--refresh-ratio (see --cache)", self.refresh_ratio.is_some() && cache == CacheMode::None),
            ("--cfg-interval (see --cache, --cfg-scale)", self.cfg_interval.is_some() && !(adaptive && guided)),
            ("--refresh-prompt-every (see --cache)", self.refresh_prompt_every.is_some() && !refreshes),
            ("--vicinity (see --cache)", self.vicinity.is_some() && !refreshes),
        ];
        flags.into_iter().filter(|(_, idle)| *idle).map(|(name, _)| name).collect()
    }
}

/// Returns the checkpoint directory: `given`, or the sample model in the current directory or in a directory above the
/// executable.
///
/// # Errors
/// [`Error::Argument`] when none is given and the sample model is not found.
pub fn model_dir(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.to_path_buf());
    }
    let executable = std::env::current_exe().unwrap_or_default();
    let above = executable.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty());
    let mut candidates = std::iter::once(Path::new("")).chain(above).map(|dir| dir.join(SAMPLE_MODEL));
    candidates.find(|dir| dir.is_dir()).ok_or_else(|| {
        let found = format!(
            "none: no --model, and no {SAMPLE_MODEL} in the current directory or above {}. Clone the repository of \
             dllm-kernels, which has {SAMPLE_MODEL}, or pass --model DIR with a downloaded LLaDA or Dream checkpoint",
            executable.display()
        );
        Error::argument("model", "a checkpoint directory", found)
    })
}

#[cfg(test)]
pub mod tests;
