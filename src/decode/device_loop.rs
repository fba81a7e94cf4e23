//! The loop on the device: an engine with a [`DeviceLoop`](crate::engine::DeviceLoop) runs the passes of a block without the
//! host.

use super::block_loop::{BlockLoop, PassSpec};
use super::decoder::Decoder;
use super::state::{DecodeState, SequencePass};
use crate::cache::{PassKind, PassPlan};
use crate::engine::{DecodeRun, StepTemplate};
use crate::error::Result;
use crate::model::QueryRows;
use crate::sampling::SequenceState;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// The passes of a run, from pass `first_pass` of the block loop on. All sequences have the plans of `sequence`.
struct RunPasses<'a> {
    state: &'a DecodeState<'a>,
    block_loop: &'a BlockLoop,
    first_pass: usize,
    sequence: &'a SequencePass,
}

/// Owned parts of a [`StepTemplate`].
struct Template {
    plan: PassPlan,
    query_rows: Vec<QueryRows>,
    candidates: Vec<(usize, Vec<usize>)>,
    shrinks: bool,
}

impl Decoder<'_> {
    /// Runs the passes of a block on the device. Sequences whose plans depend on different numbers of forwards cannot share
    /// a pass: they run one group after the other.
    pub(super) fn run_block_on_device(&mut self, block_loop: &BlockLoop) -> Result<()> {
        let state = &self.state;
        let passes = block_loop.sequence_passes(state, &block_loop.sequence_states(state), 0, false);
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for SequencePass { sequence, .. } in passes {
            let step = if state.cache.depends_on_step() { state.sequences[sequence].step } else { 0 };
            groups.entry(step).or_default().push(sequence);
        }
        let mut nfe = 0;
        for group in groups.into_values() {
            nfe = nfe.max(self.run_group(block_loop, &group)?);
            if self.interrupted {
                break;
            }
        }
        self.state.nfe += nfe;
        Ok(())
    }

    /// Runs the passes of a block for a group of sequences. Returns the number of passes.
    fn run_group(&mut self, block_loop: &BlockLoop, group: &[usize]) -> Result<usize> {
        let mut sequences = block_loop.sequence_states(&self.state);
        let mut first_pass = 0;
        // A pass would change the cache of an inactive sequence: the run ends, and a new one begins without it.
        let ends_with_first = self.state.cache.depends_on_step();
        loop {
            let state = &self.state;
            let mut passes = block_loop.sequence_passes(state, &sequences, first_pass, false);
            passes.retain(|pass| group.contains(&pass.sequence));
            let Some(sequence) = passes.first() else { return Ok(first_pass) };
            activate(block_loop, state, &passes, first_pass, &mut sequences);
            let run_passes = RunPasses { state, block_loop, first_pass, sequence };
            let templates = run_passes.templates(&passes, &sequences);
            let templates = templates.each_ref().map(|template| template.as_ref().map(Template::borrow));
            let template_of = |pass: usize| run_passes.template_index(pass);
            let run = DecodeRun {
                templates: &templates,
                template_of: &template_of,
                first_pass,
                ends_with_first,
                schedule: &block_loop.schedule,
                commit_rule: state.commit_rule(0),
                sequences: &sequences,
                sampling: &state.sampling,
                end_tokens: if state.options.early_stop { &state.end_tokens } else { &[] },
            };
            let go_on = || !self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed));
            let Some(device_loop) = self.engine.device_loop() else { return Ok(first_pass) };
            let mut tokens = state.tokens.clone();
            let outcome = device_loop.run(&mut tokens, &run, &go_on)?;
            self.state.tokens = tokens;
            for (s, sequence) in outcome.sequences.iter().enumerate() {
                self.state.sequences[s].step = sequence.forwards;
                self.state.check_end(s);
            }
            first_pass += outcome.passes;
            sequences = outcome.sequences;
            self.interrupted |= outcome.interrupted;
            if outcome.interrupted || !ends_with_first {
                return Ok(first_pass);
            }
        }
    }
}

/// Sets which sequences are active in the first pass of a run, and their quotas.
fn activate(
    block_loop: &BlockLoop,
    state: &DecodeState,
    passes: &[SequencePass],
    first_pass: usize,
    sequences: &mut [SequenceState],
) {
    for sequence in &mut *sequences {
        sequence.active = false;
    }
    for pass in passes {
        let quota = block_loop.quota(state, pass.sequence, &sequences[pass.sequence], first_pass);
        let sequence = &mut sequences[pass.sequence];
        sequence.active = true;
        sequence.first_commit_before = pass.commit_before;
        sequence.first_quota = if block_loop.spec(first_pass).first_position_only { 1 } else { quota };
    }
}

impl RunPasses<'_> {
    /// Returns pass `pass` of the run.
    fn spec(&self, pass: usize) -> PassSpec {
        self.block_loop.spec(self.first_pass + pass)
    }

    /// Returns the forward of the sequences that pass `pass` of the run is.
    fn step(&self, pass: usize) -> usize {
        self.state.sequences[self.sequence.sequence].step + pass
    }

    /// Returns the template of pass `pass` of the run. Template 0 is for passes that only begin a block. The indices of all
    /// other kinds are the same in every run of a decode.
    fn template_index(&self, pass: usize) -> usize {
        let spec = self.spec(pass);
        if spec != self.block_loop.passes[1] {
            return 0;
        }
        self.state.plan(spec.kind, self.sequence, self.step(pass)).0.template_index()
    }

    /// Returns the templates that occur in the run.
    fn templates(
        &self,
        passes: &[SequencePass],
        sequences: &[SequenceState],
    ) -> [Option<Template>; PassPlan::NUM_TEMPLATES] {
        let mut templates = [const { None }; PassPlan::NUM_TEMPLATES];
        for pass in 0..self.max_distinct_passes(passes) {
            let template = &mut templates[self.template_index(pass)];
            if template.is_none() {
                *template = Some(self.template(pass, passes, sequences));
            }
        }
        templates
    }

    /// Returns a number of passes among which every kind of the run occurs. Each pass commits a token or is a step of the
    /// schedule, which bounds the passes of the run; kinds repeat after the cache's period.
    fn max_distinct_passes(&self, passes: &[SequencePass]) -> usize {
        let masks =
            |pass: &SequencePass| self.state.num_masks(pass.sequence, &(0..self.state.tokens[pass.sequence].len()));
        let masks: usize = passes.iter().map(masks).sum();
        let max_passes = masks.saturating_add(self.state.options.steps());
        self.state.cache.period().min(max_passes).saturating_add(2)
    }

    fn template(&self, pass: usize, passes: &[SequencePass], sequences: &[SequenceState]) -> Template {
        let (state, spec) = (self.state, self.spec(pass));
        let plan = |pass_of: &SequencePass| state.plan(spec.kind, pass_of, self.step(pass));
        let candidates = |pass_of: &SequencePass| {
            let sequence = pass_of.sequence;
            let range = spec.candidates(state, sequence, &sequences[sequence].active_range, false);
            (sequence, state.masks(sequence, range))
        };
        Template {
            plan: plan(self.sequence).0,
            query_rows: passes.iter().map(|pass_of| plan(pass_of).1).collect(),
            candidates: passes.iter().map(candidates).collect(),
            shrinks: spec.kind == PassKind::Suffix,
        }
    }
}

impl Template {
    fn borrow(&self) -> StepTemplate<'_> {
        StepTemplate {
            plan: &self.plan,
            query_rows: &self.query_rows,
            candidates: &self.candidates,
            shrinks: self.shrinks,
        }
    }
}
