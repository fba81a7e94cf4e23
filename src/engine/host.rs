//! The host engine: one pass at a time, sampled on the CPU.

use super::guidance::Guidance;
use super::pass::{CfgBranch, DecodeEngine, Pass};
use crate::backend::HostLogits;
use crate::error::Result;
use crate::model::{SelectedRows, Session, SessionConfig, Transformer};
use crate::sampling::{Prediction, sample};

/// An engine for backends whose logits are in host memory.
pub struct HostEngine<'m, B: HostLogits> {
    session: Session<'m, B>,
    guidance: Guidance,
}

impl<'m, B: HostLogits> HostEngine<'m, B> {
    /// Allocates the buffers of a decode.
    ///
    /// # Errors
    /// The backend's, when there is no memory.
    pub fn new(transformer: &'m Transformer<B>, backend: B, config: SessionConfig) -> Result<Self> {
        Ok(HostEngine { session: Session::new(transformer, backend, config)?, guidance: Guidance::default() })
    }

    /// The session, to read its caches.
    pub fn session(&self) -> &Session<'m, B> {
        &self.session
    }

    /// The session, to run passes directly.
    pub fn session_mut(&mut self) -> &mut Session<'m, B> {
        &mut self.session
    }
}

impl<B: HostLogits> DecodeEngine for HostEngine<'_, B> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        if !matches!(pass.cfg, CfgBranch::Batched) {
            return self.guidance.step(&mut self.session, tokens, pass);
        }
        let session = &mut self.session;
        let positions: Vec<_> = pass.candidates.iter().map(|c| (c.sequence, &c.positions[..])).collect();
        let logit_rows = session.logit_rows(pass.query_rows, &positions);
        session.observe(pass.observed);
        session.forward(tokens, pass.query_rows, pass.plan, &logit_rows, None)?;
        let vocab_size = session.model_config().vocab_size;
        let logits = &mut B::host_logits(session.logits_buffer_mut())[..logit_rows.len() * vocab_size];
        sample(logits, vocab_size, pass.candidates, pass.sampling)
    }

    fn selected_rows(&self) -> &[SelectedRows] {
        self.session.selected_rows()
    }

    fn macs(&self) -> u64 {
        self.session.macs()
    }
}
