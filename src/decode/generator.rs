//! The generator: a model, options and prompts in, tokens out.

use super::decoder::decode;
use super::observer::Observer;
use super::options::{Options, Policy};
use super::state::end_tokens;
use crate::cache::CacheMode;
use crate::engine::Model;
use crate::error::Result;
use crate::sampling::Confidence;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Result of [`Generator::generate`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Generation {
    /// Generated tokens of each prompt: `gen_length` tokens, or fewer when `early_stop` ended the sequence.
    pub tokens: Vec<Vec<u32>>,
    /// Number of forward passes (NFE) over the batch.
    pub nfe: usize,
    /// Time of the decode, without loading.
    pub elapsed: Duration,
    /// Whether the decode was interrupted. The tokens then contain mask tokens.
    pub interrupted: bool,
    /// Multiply-accumulates (MACs) of matrix products and attention in these passes. On a CUDA device this includes padded
    /// logit rows, and first layers that were enqueued in advance and discarded.
    pub macs: u64,
    end_tokens: Vec<u32>,
}

impl Generation {
    /// Returns the tokens of a sequence before its first end-of-text token.
    ///
    /// # Panics
    /// When there is no such sequence.
    pub fn text_tokens(&self, sequence: usize) -> &[u32] {
        let tokens = &self.tokens[sequence];
        &tokens[..tokens.iter().position(|t| self.end_tokens.contains(t)).unwrap_or(tokens.len())]
    }

    /// Returns the number of tokens per second, over all sequences. Tokens after the first end-of-text token do not count.
    pub fn tokens_per_second(&self) -> f64 {
        let counted = |s: usize| (self.text_tokens(s).len() + 1).min(self.tokens[s].len());
        let tokens: usize = (0..self.tokens.len()).map(counted).sum();
        tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Generates answers with a model. A generator can be used any number of times, and from several threads. The setters of optional
/// settings also accept `None`, the default.
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
#[must_use = "a generator does nothing until `generate` is called"]
#[derive(Clone)]
pub struct Generator<'m> {
    model: &'m Model,
    options: Options,
    interrupt: Option<&'m AtomicBool>,
}

impl fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("options", &self.options).finish_non_exhaustive()
    }
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
    /// Creates a generator with the default [`Options`].
    pub fn new(model: &'m Model) -> Self {
        Generator { model, options: Options::default(), interrupt: None }
    }

    /// Replaces all options, including those that were set before.
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// The options, to change them in place.
    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Sets a flag that interrupts the decode: it ends before the next forward when the flag is true.
    pub fn interrupt(mut self, flag: &'m AtomicBool) -> Self {
        self.interrupt = Some(flag);
        self
    }

    setters! {
        /// See [`Options::gen_length`].
        gen_length: usize;
        /// See [`Options::block_length`].
        block_length: impl Into<Option<usize>>;
        /// See [`Options::steps`].
        steps: impl Into<Option<usize>>;
        /// See [`Options::cache`].
        cache: CacheMode;
        /// See [`Options::prompt_interval`].
        prompt_interval: usize;
        /// See [`Options::response_interval`].
        response_interval: usize;
        /// See [`Options::refresh_ratio`].
        refresh_ratio: impl Into<Option<f64>>;
        /// See [`Options::refresh_prompt_every`].
        refresh_prompt_every: usize;
        /// See [`Options::vicinity`].
        vicinity: usize;
        /// See [`Options::suffix_window`].
        suffix_window: impl Into<Option<usize>>;
        /// See [`Options::policy`].
        policy: Policy;
        /// See [`Options::confidence`].
        confidence: impl Into<Option<Confidence>>;
        /// See [`Options::temperature`].
        temperature: f64;
        /// See [`Options::alg_temp`].
        alg_temp: f64;
        /// See [`Options::top_p`].
        top_p: impl Into<Option<f64>>;
        /// See [`Options::top_k`].
        top_k: impl Into<Option<usize>>;
        /// See [`Options::cfg_scale`].
        cfg_scale: f64;
        /// See [`Options::cfg_interval`].
        cfg_interval: usize;
        /// See [`Options::eps`].
        eps: f64;
        /// See [`Options::seed`].
        seed: u64;
        /// See [`Options::early_stop`].
        early_stop: bool;
        /// See [`Options::end_tokens`].
        end_tokens: Vec<u32>;
    }

    /// Decodes one answer for each prompt. Prompts are token ids; they are decoded as one batch and may differ in length.
    ///
    /// # Errors
    /// - [`crate::Error::Argument`], before any work, when options or prompts do not fit the model.
    /// - [`crate::Error::OutOfMemory`] when there is no memory for the decode.
    /// - [`crate::Error::Unsupported`] when the batch is larger than the CUDA kernels support.
    /// - [`crate::Error::NoFiniteLogit`] when the logits of a candidate are not finite.
    /// - The driver's errors, on a CUDA device.
    pub fn generate(&self, prompts: &[impl AsRef<[u32]>]) -> Result<Generation> {
        self.generate_observed(prompts, &mut ())
    }

    /// Decodes as [`Generator::generate`] does, with an observer.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn generate_observed(&self, prompts: &[impl AsRef<[u32]>], observer: &mut dyn Observer) -> Result<Generation> {
        let config = self.model.config();
        let prompts: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.as_ref().to_vec()).collect();
        self.options.validate(config, &prompts)?;
        self.model.check(&self.options.requirements())?;
        let mut engine = self.model.engine(self.options.sizes(config, &prompts))?;
        let start = Instant::now();
        let decoded = decode(&mut *engine, config, &prompts, &self.options, self.interrupt, observer)?;
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
