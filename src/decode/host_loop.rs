//! The loop on the host: one forward pass at a time, with the commit decision after it.

use super::block_loop::BlockLoop;
use super::decoder::Decoder;
use super::state::{PassInputs, PassResults, SequencePass};
use crate::cache::adaptive::CfgPlan;
use crate::cache::{PassKind, PassPlan};
use crate::engine::{CfgBranch, Pass};
use crate::error::Result;
use crate::model::QueryRows;
use crate::sampling::Candidates;

impl Decoder<'_> {
    /// Runs the passes of a block one at a time.
    pub(super) fn run_block_on_host(&mut self, block: usize, block_loop: &BlockLoop) -> Result<()> {
        let mut sequences = block_loop.sequence_states(&self.state);
        for pass in 0.. {
            let observed = self.observer.wants_steps();
            let state = &self.state;
            let passes = block_loop.sequence_passes(state, &sequences, pass, observed);
            let quotas = state.map_sequences(|s| block_loop.quota(state, s, &sequences[s], pass));
            let masks = state.map_sequences(|s| state.num_masks(s, &sequences[s].quota_range));
            if !self.pass(block_loop.spec(pass).kind, block, &passes)? {
                break;
            }
            for (s, sequence) in sequences.iter_mut().enumerate() {
                let committed = masks[s] - self.state.num_masks(s, &sequence.quota_range);
                block_loop.schedule.update(sequence, pass, quotas[s], committed);
            }
        }
        Ok(())
    }

    /// Runs one forward pass, commits its tokens and reports it to the observer. Returns false, and runs nothing, when no
    /// sequence is active or the decode is interrupted.
    fn pass(&mut self, kind: PassKind, block: usize, passes: &[SequencePass]) -> Result<bool> {
        if self.interrupted() || passes.is_empty() {
            return Ok(false);
        }
        let inputs = self.state.inputs(kind, passes);
        let mut results =
            PassResults { predictions: vec![vec![]; passes.len()], selected_rows: vec![vec![]; passes.len()] };
        // An engine runs one plan at a time. Plans differ between sequences of the adaptive cache when one of them was not
        // active in some pass.
        let mut remaining: Vec<usize> = (0..passes.len()).collect();
        while let Some(first) = remaining.first() {
            let plan = inputs.plans[*first];
            let (same_plan, others): (Vec<usize>, _) = remaining.iter().partition(|i| inputs.plans[**i] == plan);
            remaining = others;
            self.engine_step(plan, &same_plan, &inputs, &mut results)?;
        }
        self.state.commit(&inputs.candidates, &results.predictions);
        if self.observer.wants_steps() {
            self.observer.step(&self.state.describe(kind, block, &inputs, results));
        }
        Ok(true)
    }

    /// Runs the pass of the sequences `indices` of `inputs`, which all have this plan.
    fn engine_step(
        &mut self,
        plan: PassPlan,
        indices: &[usize],
        inputs: &PassInputs,
        results: &mut PassResults,
    ) -> Result<()> {
        let state = &self.state;
        let query_rows: Vec<QueryRows> = indices.iter().map(|i| inputs.query_rows[*i].clone()).collect();
        let candidates: Vec<Candidates> = indices.iter().map(|i| inputs.candidates[*i].clone()).collect();
        let cfg_pass = match &plan {
            PassPlan::Adaptive(_, CfgPlan::Separate(plan)) => {
                let rows = |rows: &QueryRows| plan.query_rows(&state.sequences[rows.sequence].layout);
                Some((plan, query_rows.iter().map(rows).collect::<Vec<_>>()))
            }
            _ => None,
        };
        let cfg = match (&cfg_pass, plan) {
            (Some((plan, query_rows)), _) => CfgBranch::Separate { plan: *plan, query_rows },
            (None, PassPlan::Adaptive(_, CfgPlan::Reused)) => CfgBranch::Reused,
            (None, _) => CfgBranch::Batched,
        };
        let pass = Pass {
            plan: &plan,
            query_rows: &query_rows,
            candidates: &candidates,
            sampling: &state.sampling,
            cfg,
            observed: self.observer.wants_steps() && plan.adaptive().is_some(),
        };
        let predictions = self.engine.step(&state.tokens, &pass)?;
        let mut predictions = predictions.into_iter();
        // Observers get the rows that V-verify selects between two refreshes of the response.
        let verifies = plan.adaptive().is_some_and(|plan| !plan.response);
        for (row, i) in indices.iter().enumerate() {
            let count = inputs.candidates[*i].positions.len();
            results.predictions[*i] = predictions.by_ref().take(count).collect();
            if verifies {
                let selected = self.engine.selected_rows().iter();
                results.selected_rows[*i] = selected.map(|s| (s.layer, s.rows[row].clone())).collect();
            }
        }
        Ok(())
    }
}
