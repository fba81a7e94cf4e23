//! The library's front door: a model, options, and prompts in; tokens out.

use super::generate::{decode, end_tokens};
use super::observer::Observer;
use super::options::{Options, Policy};
use crate::cache::CacheMode;
use crate::engine::Model;
use crate::error::Result;
use crate::sampling::Confidence;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// What [`Generator::generate`] gives.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Generated tokens per prompt: `gen_length` of them, or fewer where `early_stop` ended the sequence.
    pub tokens: Vec<Vec<u32>>,
    /// Forward passes over the batch.
    pub nfe: usize,
    /// Time spent decoding, without loading.
    pub elapsed: Duration,
    /// Whether it was interrupted; mask tokens are then left.
    pub interrupted: bool,
    /// Multiply-adds of the matrix products and of attention in these passes (on a CUDA device a first layer in vain now and then
    /// among them).
    pub macs: u64,
    end_tokens: Vec<u32>,
}

impl Generation {
    /// Tokens of a sequence up to its first end-of-text token, which is not included.
    ///
    /// # Panics
    /// When there is no such sequence.
    pub fn text_tokens(&self, sequence: usize) -> &[u32] {
        let tokens = &self.tokens[sequence];
        &tokens[..tokens.iter().position(|t| self.end_tokens.contains(t)).unwrap_or(tokens.len())]
    }

    /// Tokens up to and with the first end-of-text token, all sequences together, per second.
    pub fn tokens_per_second(&self) -> f64 {
        let counted = |s: usize| (self.text_tokens(s).len() + 1).min(self.tokens[s].len());
        let tokens: usize = (0..self.tokens.len()).map(counted).sum();
        tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Generates text with a model.
///
/// ```
/// # fn main() -> dllm_kernels::Result<()> {
/// use dllm_kernels::{CacheMode, Generator, Model, Policy};
/// let model = Model::open("models/tiny-math")?;
/// let prompt = vec![905, 908, 17, 4]; // token ids
/// let output = Generator::new(&model)
///     .gen_length(32)
///     .cache(CacheMode::Dual)
///     .policy(Policy::Threshold(0.9))
///     .generate(&[prompt])?;
/// assert_eq!(output.tokens[0].len(), 32);
/// # Ok(())
/// # }
/// ```
pub struct Generator<'m> {
    model: &'m Model,
    options: Options,
    interrupt: Option<&'m AtomicBool>,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $ty:ty;)*) => {
        $($(#[$doc])*
        pub fn $name(mut self, value: $ty) -> Self {
            self.options.$name = value.into();
            self
        })*
    };
}

impl<'m> Generator<'m> {
    /// A generator with the default [`Options`].
    pub fn new(model: &'m Model) -> Self {
        Generator { model, options: Options::default(), interrupt: None }
    }

    /// Replaces all options, those set before included.
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Ends the decode before the next forward once the flag is set.
    pub fn interrupt(mut self, flag: &'m AtomicBool) -> Self {
        self.interrupt = Some(flag);
        self
    }

    setters! {
        /// See [`Options::gen_length`].
        gen_length: usize;
        /// See [`Options::block_length`].
        block_length: usize;
        /// See [`Options::steps`].
        steps: usize;
        /// See [`Options::cache`].
        cache: CacheMode;
        /// See [`Options::prompt_interval`].
        prompt_interval: usize;
        /// See [`Options::response_interval`].
        response_interval: usize;
        /// See [`Options::refresh_ratio`].
        refresh_ratio: f64;
        /// See [`Options::refresh_prompt_every`].
        refresh_prompt_every: usize;
        /// See [`Options::vicinity`].
        vicinity: usize;
        /// See [`Options::suffix_window`].
        suffix_window: usize;
        /// See [`Options::policy`].
        policy: Policy;
        /// See [`Options::confidence`].
        confidence: Confidence;
        /// See [`Options::temperature`].
        temperature: f64;
        /// See [`Options::alg_temp`].
        alg_temp: f64;
        /// See [`Options::top_p`].
        top_p: f64;
        /// See [`Options::top_k`].
        top_k: usize;
        /// See [`Options::cfg_scale`].
        cfg_scale: f64;
        /// See [`Options::cfg_interval`].
        cfg_interval: usize;
        /// See [`Options::seed`].
        seed: u64;
        /// See [`Options::early_stop`].
        early_stop: bool;
        /// See [`Options::end_tokens`].
        end_tokens: Vec<u32>;
    }

    /// Answers every prompt (token ids); they are decoded together and may differ in length.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] before any work, when options or prompts do not fit the model;
    /// [`crate::Error::Unavailable`] when there is no memory for them;
    /// [`crate::Error::NoFiniteLogit`] when the model's numbers break down.
    pub fn generate(&self, prompts: &[Vec<u32>]) -> Result<Generation> {
        self.generate_observed(prompts, &mut ())
    }

    /// [`Generator::generate`], with an observer that is called after each step.
    pub fn generate_observed(&self, prompts: &[Vec<u32>], observer: &mut dyn Observer) -> Result<Generation> {
        let config = self.model.config();
        self.options.validate(config, prompts)?;
        #[cfg(feature = "cuda")]
        if self.model.device().is_some() {
            self.options.validate_on_device()?;
        }
        let sizes = self.options.sizes(config, prompts);
        let mut engine = self.model.engine(sizes)?;
        let start = Instant::now();
        let decoded = decode(&mut *engine, config, prompts, &self.options, self.interrupt, observer)?;
        Ok(Generation {
            tokens: decoded.tokens,
            nfe: decoded.nfe,
            elapsed: start.elapsed(),
            interrupted: decoded.interrupted,
            macs: engine.macs(),
            end_tokens: end_tokens(config, &self.options),
        })
    }
}
