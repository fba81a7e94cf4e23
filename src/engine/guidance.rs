//! Classifier-free guidance whose unconditional branch does not run in every pass (dLLM-Cache's interval).
//!
//! Between two unconditional passes, the difference between conditional and unconditional logits is taken from the last one. The
//! host keeps the differences, so this also samples on the host.

use super::pass::{CfgBranch, Pass};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{CachePlan, QueryRows, Session};
use crate::sampling::{Prediction, sample};
use std::collections::HashMap;

/// The differences between conditional and unconditional logits, `[vocab_size]` each, by sequence and position.
#[derive(Default)]
pub(super) struct Guidance {
    deltas: HashMap<(usize, usize), Vec<f32>>,
}

/// Positions of several sequences.
type Positions<'a> = [(usize, &'a [usize])];

impl Guidance {
    /// Runs a pass with [`CfgBranch::Separate`] or [`CfgBranch::Reused`].
    pub fn step<B: Backend>(
        &mut self,
        session: &mut Session<B>,
        tokens: &[Vec<u32>],
        pass: &Pass,
    ) -> Result<Vec<Prediction>> {
        let vocab_size = session.model_config().vocab_size;
        let positions: Vec<_> = pass.candidates.iter().map(|c| (c.sequence, &c.positions[..])).collect();
        let conditional = if let CfgBranch::Separate { plan, query_rows } = pass.cfg {
            self.run_both(session, tokens, pass, (plan, query_rows), &positions)?
        } else {
            session.observe(pass.observed);
            branch_logits(session, tokens, (pass.plan, pass.query_rows), &positions, 0)?
        };
        let mut logits = conditional.clone();
        for (key, row) in keys(&positions).zip(conditional.chunks(vocab_size)) {
            let delta = self.deltas.get(&key).ok_or_else(|| {
                let (sequence, position) = key;
                let found = format!("none for sequence {sequence}, position {position}");
                Error::argument("cfg", "an unconditional pass in which the position was masked", found)
            })?;
            logits.extend(row.iter().zip(delta).map(|(conditional, delta)| conditional - delta));
        }
        sample(&mut logits, vocab_size, pass.candidates, pass.sampling)
    }

    /// Runs both branches for every masked position, stores the differences, and returns the conditional logits of `positions`.
    fn run_both<B: Backend>(
        &mut self,
        session: &mut Session<B>,
        tokens: &[Vec<u32>],
        pass: &Pass,
        unconditional: (&dyn CachePlan, &[QueryRows]),
        positions: &Positions,
    ) -> Result<Vec<f32>> {
        let (vocab_size, mask) = (session.model_config().vocab_size, session.model_config().mask_token_id);
        // Any masked position may be a candidate before the unconditional branch runs again.
        let masks_of = |rows: &QueryRows| -> (usize, Vec<usize>) {
            let is_masked = |p: &usize| tokens[rows.sequence][*p] == mask;
            (rows.sequence, rows.rows.clone().filter(is_masked).collect())
        };
        let masks: Vec<_> = pass.query_rows.iter().map(masks_of).collect();
        let masks: Vec<_> = masks.iter().map(|(sequence, positions)| (*sequence, &positions[..])).collect();
        session.observe(false);
        let unconditional = branch_logits(session, tokens, unconditional, &masks, 1)?;
        session.observe(pass.observed);
        let conditional = branch_logits(session, tokens, (pass.plan, pass.query_rows), &masks, 0)?;
        self.deltas.retain(|(sequence, _), _| masks.iter().all(|(ran, _)| ran != sequence));
        let mut logits = Vec::new();
        let rows = conditional.chunks(vocab_size).zip(unconditional.chunks(vocab_size));
        for (key, (conditional, unconditional)) in keys(&masks).zip(rows) {
            let delta = conditional.iter().zip(unconditional).map(|(c, u)| c - u).collect();
            self.deltas.insert(key, delta);
            if positions.iter().any(|(sequence, positions)| *sequence == key.0 && positions.contains(&key.1)) {
                logits.extend(conditional);
            }
        }
        Ok(logits)
    }
}

/// (sequence, position) of each position, in order.
fn keys<'a>(positions: &'a Positions<'a>) -> impl Iterator<Item = (usize, usize)> + 'a {
    positions.iter().flat_map(|(sequence, positions)| positions.iter().map(|position| (*sequence, *position)))
}

/// Runs one branch (0: conditional, 1: unconditional) and reads the logits that predict `positions`.
fn branch_logits<B: Backend>(
    session: &mut Session<B>,
    tokens: &[Vec<u32>],
    (plan, query_rows): (&dyn CachePlan, &[QueryRows]),
    positions: &Positions,
    branch: usize,
) -> Result<Vec<f32>> {
    session.with_branches(branch..branch + 1, |session| {
        let logit_rows = session.logit_rows(query_rows, positions);
        session.forward(tokens, query_rows, plan, &logit_rows, None)?;
        session.logits(logit_rows.len())
    })
}
