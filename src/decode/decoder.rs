//! The decoder: runs an algorithm over an engine, block by block.

use super::block_loop::BlockLoop;
use super::observer::Observer;
use super::options::{Algorithm, Options};
use super::state::DecodeState;
use crate::engine::DecodeEngine;
use crate::error::Result;
use crate::model::Config;
use std::sync::atomic::{AtomicBool, Ordering};

/// Result of [`decode`].
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Generated tokens of each sequence: `gen_length`, or fewer when `early_stop` ended the sequence.
    pub tokens: Vec<Vec<u32>>,
    /// Number of forward passes over the batch.
    pub nfe: usize,
    /// Whether the decode was interrupted. The tokens then contain masks.
    pub interrupted: bool,
}

/// Decodes `prompts` with an engine. `options` and `prompts` must have passed [`Options::validate`]. The decode ends before
/// the next forward when `interrupt` is true.
///
/// # Errors
/// The engine's: [`crate::Error::NoFiniteLogit`], and on a device the driver's.
pub fn decode(
    engine: &mut dyn DecodeEngine,
    config: &Config,
    prompts: &[Vec<u32>],
    options: &Options,
    interrupt: Option<&AtomicBool>,
    observer: &mut dyn Observer,
) -> Result<Decoded> {
    let state = DecodeState::new(config, prompts, options);
    let mut decoder = Decoder { engine, state, interrupt, interrupted: false, observer };
    match options.algorithm(config.family) {
        Algorithm::Llada => decoder.llada()?,
        Algorithm::FastLlada => decoder.fast_llada()?,
        Algorithm::Dream => decoder.dream()?,
        Algorithm::DreamThreshold => decoder.dream_threshold()?,
        Algorithm::DreamBlock => decoder.dream_block()?,
    }
    Ok(decoder.finish())
}

/// A decode that runs.
pub(super) struct Decoder<'a> {
    pub engine: &'a mut dyn DecodeEngine,
    pub state: DecodeState<'a>,
    pub interrupt: Option<&'a AtomicBool>,
    pub interrupted: bool,
    pub observer: &'a mut dyn Observer,
}

impl Decoder<'_> {
    /// Runs the passes of a block, on the device if the engine has a device loop and no observer needs every step.
    pub fn run_block(&mut self, block: usize, block_loop: &BlockLoop) -> Result<()> {
        if !self.interrupted() {
            if !self.observer.wants_steps() && self.engine.device_loop().is_some() {
                self.run_block_on_device(block_loop)?;
            } else {
                self.run_block_on_host(block, block_loop)?;
            }
        }
        self.report_final_tokens(block);
        Ok(())
    }

    /// Whether the decode is, or has just been, interrupted.
    pub fn interrupted(&mut self) -> bool {
        self.interrupted |= self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed));
        self.interrupted
    }

    /// Reports the final tokens to the observer: those up to the end of the block, and before the first mask.
    fn report_final_tokens(&mut self, block: usize) {
        for s in 0..self.state.sequences.len() {
            let end = (block + 1) * self.state.options.block_length();
            let tokens = self.state.generated(s);
            let tokens = &tokens[..end.min(tokens.len())];
            let unmasked = tokens.iter().position(|t| *t == self.state.mask_token).unwrap_or(tokens.len());
            self.observer.finalized(s, &tokens[..unmasked]);
        }
    }

    fn finish(self) -> Decoded {
        let tokens = self.state.map_sequences(|s| self.state.generated(s).to_vec());
        Decoded { tokens, nfe: self.state.nfe, interrupted: self.interrupted }
    }
}
