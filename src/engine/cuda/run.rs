//! Runs without the host, and single observed steps.

use super::super::pass::{CfgBranch, DecodeEngine, KernelCounts, Pass};
use super::super::run::{DecodeRun, DeviceLoop, RunOutcome, StepTemplate};
use super::CudaEngine;
use super::graphs::GraphPart;
use crate::backend::cuda::SamplingKey;
use crate::error::{Error, Result};
use crate::model::SelectedRows;
use crate::sampling::{Candidates, CommitRule, Prediction, QuotaSchedule, SequenceState};
use std::time::Instant;

impl DeviceLoop for CudaEngine<'_> {
    fn run(&mut self, tokens: &mut [Vec<u32>], run: &DecodeRun, go_on: &dyn Fn() -> bool) -> Result<RunOutcome> {
        let sampling = SamplingKey::new(run.commit_rule, run.sampling);
        let template_of = |pass: usize| {
            let template = (run.template_of)(pass);
            match run.templates.get(template) {
                Some(Some(_)) => Ok(template),
                _ => Err(Error::argument("template_of", "a template that the run has", template)),
            }
        };
        self.session.observe(false);
        // The run goes on while this many sequences are active.
        let needed = if run.ends_with_first { run.sequences.iter().filter(|s| s.active).count() } else { 1 };
        let mut start = Instant::now();
        self.begin(tokens, run)?;
        let mut enqueued = self.launch(template_of(0)?, GraphPart::FirstLayer, run.sampling, sampling)?;
        enqueued += self.launch(template_of(0)?, GraphPart::Remainder, run.sampling, sampling)?;
        let mut interrupted = false;
        let (mut seconds, mut macs) = (Vec::new(), Vec::new());
        for pass in 1.. {
            let template = template_of(pass)?;
            macs.push(enqueued);
            enqueued = self.launch(template, GraphPart::FirstLayer, run.sampling, sampling)?;
            self.wait()?;
            seconds.push(start.elapsed().as_secs_f64());
            start = Instant::now();
            if self.state.num_active()? < needed {
                break;
            }
            interrupted = !go_on();
            if interrupted {
                break;
            }
            enqueued += self.launch(template, GraphPart::Remainder, run.sampling, sampling)?;
        }
        self.read_tokens(tokens)?;
        let sequences = self.state.read_sequences(run.sequences)?;
        Ok(RunOutcome { passes: self.state.nfe(), sequences, interrupted, seconds, macs })
    }
}

impl DecodeEngine for CudaEngine<'_> {
    /// Runs one pass, synchronises and reads back its results. For decodes that observe every step.
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        if !matches!(pass.cfg, CfgBranch::Batched) {
            return self.guidance.step(&mut self.session, tokens, pass);
        }
        let candidates: Vec<_> = pass.candidates.iter().map(|c| (c.sequence, c.positions.clone())).collect();
        let commit_rule = pass.candidates.first().map_or(CommitRule::Quota(0), |c| c.commit_rule);
        let template =
            StepTemplate { plan: pass.plan, query_rows: pass.query_rows, candidates: &candidates, shrinks: false };
        let run = DecodeRun {
            templates: &[Some(template)],
            template_of: &|_| 0,
            first_pass: 0,
            ends_with_first: false,
            schedule: &QuotaSchedule::Unlimited,
            commit_rule,
            sequences: &single_step(tokens, pass.candidates),
            sampling: pass.sampling,
            end_tokens: &[],
        };
        self.begin(tokens, &run)?;
        let sampling = SamplingKey::new(commit_rule, pass.sampling);
        // Selected rows are read back in the middle of a pass, which a graph cannot do.
        let reads_selected = pass.observed && self.tables[0].plan.iter().any(|layer| layer.update().is_some());
        self.session.observe(reads_selected);
        for part in [GraphPart::FirstLayer, GraphPart::Remainder] {
            if reads_selected {
                self.enqueue(0, part, pass.sampling, sampling)?;
                self.count_part(0, part);
            } else {
                self.launch(0, part, pass.sampling, sampling)?;
            }
        }
        self.wait()?;
        self.state.num_active()?;
        let mut after = tokens.to_vec();
        self.read_tokens(&mut after)?;
        self.read_predictions(tokens, &after, pass.candidates)
    }

    /// Differences that guidance reuses are kept by the host, which then runs every pass.
    fn device_loop(&mut self) -> Option<&mut dyn DeviceLoop> {
        if self.session.config().reuses_guidance { None } else { Some(self) }
    }

    fn selected_rows(&self) -> &[SelectedRows] {
        self.session.selected_rows()
    }

    fn macs(&self) -> u64 {
        self.session.macs()
    }

    fn kernel_counts(&self) -> Result<Option<KernelCounts>> {
        if self.num_first_layers() != 1 {
            return Ok(None);
        }
        // One node of the first part is the embedding.
        let counts = self.graphs.smallest_pass()?;
        Ok(counts.map(|[first_layer, pass]| KernelCounts { layer: first_layer.saturating_sub(1), pass }))
    }
}

impl CudaEngine<'_> {
    /// Reads back the predictions of a pass, in the order of its candidates. Synchronises.
    fn read_predictions(
        &self,
        before: &[Vec<u32>],
        after: &[Vec<u32>],
        candidates: &[Candidates],
    ) -> Result<Vec<Prediction>> {
        let (predicted, confidence) = self.state.read_predictions()?;
        // Rows of the table are in the order of the sequences.
        let mut first_row = vec![0; before.len() + 1];
        for candidates in candidates {
            first_row[candidates.sequence + 1] = candidates.positions.len();
        }
        for s in 0..before.len() {
            first_row[s + 1] += first_row[s];
        }
        let predictions = candidates.iter().flat_map(|Candidates { sequence, positions, .. }| {
            let rows = first_row[*sequence]..;
            rows.zip(positions).map(|(row, position)| Prediction {
                token: predicted[row].max(0) as u32,
                confidence: confidence[row].into(),
                commit: after[*sequence][*position] != before[*sequence][*position],
            })
        });
        Ok(predictions.collect())
    }
}

/// States of the sequences for a run of one pass.
fn single_step(tokens: &[Vec<u32>], candidates: &[Candidates]) -> Vec<SequenceState> {
    let inactive = |tokens: &Vec<u32>| SequenceState {
        generated: 0,
        forwards: 0,
        active_range: 0..tokens.len(),
        quota_range: 0..tokens.len(),
        initial_masks: 0,
        per_step: 0,
        deficit: 0,
        max_passes: 1,
        active: false,
        first_quota: 0,
        first_commit_before: 0,
    };
    let mut sequences: Vec<_> = tokens.iter().map(inactive).collect();
    for candidates in candidates {
        let sequence = &mut sequences[candidates.sequence];
        (sequence.active, sequence.forwards) = (true, candidates.step);
        sequence.first_commit_before = candidates.commit_before;
        sequence.first_quota = match candidates.commit_rule {
            CommitRule::Quota(count) | CommitRule::ThresholdTopN { top_n: count, .. } => count,
            CommitRule::Threshold(_) | CommitRule::Factor(_) => usize::MAX,
        };
    }
    sequences
}
