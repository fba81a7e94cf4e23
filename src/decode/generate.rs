//! The decoding loops: one function per rule of the originals says which passes there are; `Decoder::run` runs them.

use super::observer::Observer;
use super::options::{Algorithm, Options, Policy};
use super::state::{Plan, SLOTS, Sequence, SequencePass, State};
use super::stretch::{BlockLoop, CandidateStart, PassSpec};
use crate::cache::PassKind;
use crate::cache::adaptive::{AdaptivePlan, CfgPlan};
use crate::engine::{CfgBranch, DecodeEngine, DecodeRun, Pass, StepTemplate};
use crate::error::Result;
use crate::model::{Config, QueryRows};
use crate::sampling::DreamSchedule;
use crate::sampling::{Candidates, CommitRule, QuotaSchedule, SequenceState};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// What [`decode`] leaves.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Generated tokens per sequence, up to the end-of-text token where `early_stop` ended it.
    pub tokens: Vec<Vec<u32>>,
    /// Forward passes.
    pub nfe: usize,
    /// Whether it was interrupted; masks are then left among the tokens.
    pub interrupted: bool,
}

pub(super) fn end_tokens(config: &Config, options: &Options) -> Vec<u32> {
    [&config.eos_token_ids[..], &options.end_tokens[..]].concat()
}

/// The decoding loop over any [`DecodeEngine`]. `options` and `prompts` have passed [`Options::validate`].
pub fn decode(
    engine: &mut dyn DecodeEngine,
    config: &Config,
    prompts: &[Vec<u32>],
    options: &Options,
    interrupt: Option<&AtomicBool>,
    observer: &mut dyn Observer,
) -> Result<Decoded> {
    let rule = options.algorithm(config.family);
    let mask = config.mask_token_id;
    let sequence = |prompt: &Vec<u32>| Sequence::new(config.family, prompt, mask);
    let state = State {
        options,
        unmask: options.unmask(rule, mask),
        mask,
        end_tokens: end_tokens(config, options),
        tokens: prompts.iter().map(|p| [p.clone(), vec![mask; options.gen_length]].concat()).collect(),
        sequences: prompts.iter().map(sequence).collect(),
        nfe: 0,
    };
    let mut decoder = Decoder { engine, state, interrupt, interrupted: false, observer };
    match rule {
        Algorithm::Llada => decoder.llada()?,
        Algorithm::FastLlada => decoder.fast_llada()?,
        Algorithm::Dream => decoder.dream()?,
        Algorithm::DreamThreshold => decoder.dream_threshold()?,
        Algorithm::DreamBlock => decoder.dream_block()?,
    }
    decoder.finish()
}

struct Decoder<'a> {
    engine: &'a mut dyn DecodeEngine,
    state: State<'a>,
    interrupt: Option<&'a AtomicBool>,
    interrupted: bool,
    observer: &'a mut dyn Observer,
}

impl Decoder<'_> {
    /// LLaDA's own loop: every block has `steps / blocks` forwards, fewer where it is complete before.
    fn llada(&mut self) -> Result<()> {
        let steps = self.state.options.steps() / self.state.blocks();
        let stage = PassSpec { pass: PassKind::Full, from: CandidateStart::Start, first_only: false };
        for block in 0..self.state.blocks() {
            let stretch =
                BlockLoop { block: Some(block), stages: [stage; 2], schedule: QuotaSchedule::Llada { steps }, steps };
            self.run(block, &stretch)?;
        }
        Ok(())
    }

    /// Fast-dLLM's loops for LLaDA: a block goes on until it has no mask. Its first forward runs everything (and fills
    /// the cache), the others what the cache mode asks for.
    fn fast_llada(&mut self) -> Result<()> {
        let steps = self.state.options.steps() / self.state.blocks();
        let schedule = match self.state.options.policy {
            Policy::Fixed => QuotaSchedule::Llada { steps },
            _ => QuotaSchedule::Unlimited,
        };
        let stage = |pass| PassSpec { pass, from: CandidateStart::Window, first_only: false };
        for block in 0..self.state.blocks() {
            let options = self.state.options;
            let stages = [stage(options.refresh_pass(block)), stage(options.cache.block_pass())];
            let schedule = schedule.clone();
            self.run(block, &BlockLoop { block: Some(block), stages, schedule, steps: usize::MAX })?;
        }
        Ok(())
    }

    /// Dream's own loop: all positions at once.
    fn dream(&mut self) -> Result<()> {
        let steps = self.state.options.steps();
        let schedule = QuotaSchedule::Dream(DreamSchedule::new(steps, self.state.options.eps).ratios());
        let stage = PassSpec { pass: PassKind::Full, from: CandidateStart::Start, first_only: false };
        self.run(0, &BlockLoop { block: None, stages: [stage; 2], schedule, steps })
    }

    /// Fast-dLLM's threshold for Dream without blocks: each step looks at `masks / steps` positions and at those that
    /// earlier steps rejected; what is left after the last step gets further steps.
    fn dream_threshold(&mut self) -> Result<()> {
        let stage = PassSpec { pass: PassKind::Full, from: CandidateStart::Start, first_only: false };
        self.run(
            0,
            &BlockLoop { block: None, stages: [stage; 2], schedule: QuotaSchedule::CarryOver, steps: usize::MAX },
        )
    }

    /// Fast-dLLM's block loop for Dream. A window has no logits for its own first position (they stand one before it),
    /// so the first forward of a block commits that position, and nothing else.
    fn dream_block(&mut self) -> Result<()> {
        let steps = self.state.options.steps() / self.state.blocks();
        let schedule = match self.state.options.policy {
            Policy::Fixed => QuotaSchedule::Dream(DreamSchedule::new(steps.max(1), self.state.options.eps).ratios()),
            _ => QuotaSchedule::Unlimited,
        };
        for block in 0..self.state.blocks() {
            let options = self.state.options;
            let first = PassSpec { pass: options.refresh_pass(block), from: CandidateStart::Block, first_only: true };
            let rest = PassSpec { pass: options.cache.block_pass(), from: CandidateStart::Block, first_only: false };
            let schedule = schedule.clone();
            let stretch = BlockLoop { block: Some(block), stages: [first, rest], schedule, steps: usize::MAX };
            self.run(block, &stretch)?;
        }
        Ok(())
    }

    /// Runs the passes of a stretch: on a engine that does so by itself, or pass by pass.
    fn run(&mut self, block: usize, stretch: &BlockLoop) -> Result<()> {
        if self.interrupted() {
            self.block_done(block);
            return Ok(());
        }
        if !self.observer.wants_steps() && self.engine.device_loop().is_some() {
            self.run_on_device(stretch)?;
        } else {
            let mut courses = self.state.each(|d, s| stretch.course(d, s));
            for i in 0.. {
                let stage = stretch.stages[i.min(1)];
                let turns = self.turns(stretch, &courses, i);
                let quotas = self.state.each(|d, s| stretch.quota(d, s, &courses[s], i));
                let masks = self.state.each(|d, s| d.masks(s, courses[s].quota_range.clone()).len());
                if !self.pass(stage.pass, block, turns)? {
                    break;
                }
                for (s, course) in courses.iter_mut().enumerate() {
                    let committed = masks[s] - self.state.masks(s, course.quota_range.clone()).len();
                    stretch.after(course, i, quotas[s], committed);
                }
            }
        }
        self.block_done(block);
        Ok(())
    }

    /// What the sequences that still have something to do in a stretch do in its pass `i`.
    fn turns(&self, stretch: &BlockLoop, courses: &[SequenceState], i: usize) -> Vec<SequencePass> {
        let stage = stretch.stages[i.min(1)];
        let observed = self.observer.wants_steps();
        let turn = |s: usize| {
            let (state, course) = (&self.state, &courses[s]);
            let active_range =
                state.sequences[s].ended.is_none() && !state.masks(s, course.active_range.clone()).is_empty();
            (active_range && i < course.max_passes).then(|| SequencePass {
                sequence: s,
                block: state.block(s, stretch.block.unwrap_or(0)),
                candidates: stage.candidates(state, s, &course.active_range, observed),
                commit_before: stage.commit_before(&course.active_range),
                selection: match stage.first_only {
                    true => CommitRule::Quota(1),
                    false => state.selection(stretch.quota(state, s, course, i)),
                },
            })
        };
        (0..self.state.sequences.len()).filter_map(turn).collect()
    }

    /// The same on a engine that needs to be told only once. Sequences at different places of the adaptive cache's intervals
    /// cannot run together: they run one kind after the other.
    fn run_on_device(&mut self, stretch: &BlockLoop) -> Result<()> {
        let state = &self.state;
        let turns = self.turns(stretch, &state.each(|d, s| stretch.course(d, s)), 0);
        // All that a block's caches run together; by their forwards those of the adaptive cache.
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for SequencePass { sequence, .. } in turns {
            let at = if state.options.adaptive().is_some() { state.sequences[sequence].step } else { 0 };
            groups.entry(at).or_default().push(sequence);
        }
        let mut nfe = 0;
        for alike in groups.into_values() {
            nfe = nfe.max(self.course(stretch, &alike)?);
            if self.interrupted {
                break;
            }
        }
        self.state.nfe += nfe;
        Ok(())
    }

    /// The passes of a stretch over some sequences, all at the same place of the intervals. Returns how many there were.
    fn course(&mut self, stretch: &BlockLoop, alike: &[usize]) -> Result<usize> {
        let mut courses = self.state.each(|d, s| stretch.course(d, s));
        let mut passes = 0;
        let together = self.state.options.adaptive().is_some();
        loop {
            let turns = self.turns(stretch, &courses, passes);
            let turns: Vec<SequencePass> = turns.into_iter().filter(|turn| alike.contains(&turn.sequence)).collect();
            let Some(first) = turns.first() else { return Ok(passes) };
            let state = &self.state;
            for course in &mut courses {
                course.active = false;
            }
            for turn in &turns {
                let quota = stretch.quota(state, turn.sequence, &courses[turn.sequence], passes);
                let course = &mut courses[turn.sequence];
                course.active = true;
                course.first_commit_before = turn.commit_before;
                course.first_quota = if stretch.stages[passes.min(1)].first_only { 1 } else { quota };
            }
            // What the passes run: kinds of them, and which one a pass is of. Each of them commits a token, or is one of the
            // schedule's steps. A kind has the same place in all courses of a decode; the first one is of passes that only begin
            // a stretch.
            let step = state.sequences[first.sequence].step;
            let kind = |i: usize| {
                let stage = stretch.stages[(passes + i).min(1)];
                let slot = state.plan_at(stage.pass, first, step + i).0.slot();
                (stage, if stage == stretch.stages[1] { slot } else { 0 })
            };
            let mut parts = [const { None }; SLOTS];
            let masks: usize =
                turns.iter().map(|t| state.masks(t.sequence, 0..state.tokens[t.sequence].len()).len()).sum();
            for i in 0..state.options.period().min(masks.saturating_add(state.options.steps())).saturating_add(2) {
                let (stage, slot) = kind(i);
                parts[slot].get_or_insert_with(|| {
                    let (plans, windows): (Vec<_>, Vec<_>) =
                        turns.iter().map(|turn| state.plan_at(stage.pass, turn, step + i)).unzip();
                    let candidates = |t: &SequencePass| {
                        let range = stage.candidates(state, t.sequence, &courses[t.sequence].active_range, false);
                        (t.sequence, state.masks(t.sequence, range))
                    };
                    (plans, windows, turns.iter().map(candidates).collect::<Vec<_>>(), stage.pass)
                });
            }
            let stage = |i: usize| kind(i).1;
            let stages = parts.each_ref().map(|part| {
                part.as_ref().map(|(plans, windows, candidates, pass)| StepTemplate {
                    plan: &plans[0],
                    query_rows: windows,
                    candidates,
                    shrinks: *pass == PassKind::Suffix,
                })
            });
            let course = DecodeRun {
                templates: &stages,
                template_of: &stage,
                first_pass: passes,
                ends_with_first: together,
                schedule: &stretch.schedule,
                commit_rule: state.selection(0),
                sequences: &courses,
                sampling: &state.unmask,
                end_tokens: if state.options.early_stop { &state.end_tokens } else { &[] },
            };
            let go_on = || !self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed));
            let Some(engine) = self.engine.device_loop() else { return Ok(passes) };
            let mut tokens = state.tokens.clone();
            let ran = engine.run(&mut tokens, &course, &go_on)?;
            let state = &mut self.state;
            state.tokens = tokens;
            passes += ran.passes;
            for (s, course) in ran.sequences.iter().enumerate() {
                state.sequences[s].step = course.forwards;
                state.check_end(s);
            }
            courses = ran.sequences;
            self.interrupted |= ran.interrupted;
            if ran.interrupted || !together {
                return Ok(passes);
            }
        }
    }

    fn interrupted(&mut self) -> bool {
        self.interrupted |= self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed));
        self.interrupted
    }

    /// One forward, and what it commits. False when there was nothing to do, or the decode is interrupted.
    fn pass(&mut self, kind: PassKind, block: usize, turns: Vec<SequencePass>) -> Result<bool> {
        if self.interrupted() || turns.is_empty() {
            return Ok(false);
        }
        let state = &self.state;
        let (plans, windows): (Vec<Plan>, Vec<QueryRows>) = turns.iter().map(|turn| state.plan(kind, turn)).unzip();
        let group = |t: &SequencePass| Candidates {
            sequence: t.sequence,
            step: state.sequences[t.sequence].step,
            positions: state.masks(t.sequence, t.candidates.clone()),
            commit_before: t.commit_before,
            commit_rule: t.selection,
        };
        let groups: Vec<Candidates> = turns.iter().map(group).collect();
        let observed = self.observer.wants_steps();
        // Of V-verify's choices those of the adaptive cache are told.
        let selects = observed && state.options.adaptive().is_some();
        let mut verdicts = vec![vec![]; groups.len()];
        let mut selected_rows = vec![vec![]; groups.len()];
        // Sequences whose intervals have come apart, as one had nothing to do while others went on, cannot run together.
        let mut remaining: Vec<usize> = (0..groups.len()).collect();
        while let Some(first) = remaining.first() {
            let plan = plans[*first];
            let (alike, others): (Vec<usize>, _) = remaining.iter().partition(|i| plans[**i] == plan);
            remaining = others;
            let windows: Vec<_> = alike.iter().map(|i| windows[*i].clone()).collect();
            let of: Vec<Candidates> = alike.iter().map(|i| groups[*i].clone()).collect();
            let of_twins = |plan: AdaptivePlan| -> Vec<_> {
                windows.iter().map(|window| state.adaptive_window(plan, window.sequence)).collect()
            };
            let twin =
                if let Plan::Adaptive(_, CfgPlan::Separate(plan)) = plan { Some((plan, of_twins(plan))) } else { None };
            let twins = match (&twin, plan) {
                (Some((plan, windows)), _) => CfgBranch::Separate { plan, query_rows: windows },
                (None, Plan::Adaptive(_, CfgPlan::Reused)) => CfgBranch::Reused,
                (None, _) => CfgBranch::Batched,
            };
            let pass = Pass {
                plan: &plan,
                query_rows: &windows,
                candidates: &of,
                sampling: &state.unmask,
                cfg: twins,
                observed: selects,
            };
            let all = self.engine.step(&state.tokens, &pass)?;
            let mut rest = &all[..];
            for (w, i) in alike.into_iter().enumerate() {
                let (own, others) = rest.split_at(groups[i].positions.len());
                (verdicts[i], rest) = (own.to_vec(), others);
                let rows =
                    self.engine.selected_rows().iter().map(|selected| (selected.layer, selected.rows[w].clone()));
                if matches!(plan, Plan::Adaptive(plan, _) if !plan.response) {
                    selected_rows[i] = rows.collect();
                }
            }
        }
        let state = &mut self.state;
        state.nfe += 1;
        for (group, own) in groups.iter().zip(&verdicts) {
            for (position, verdict) in group.positions.iter().zip(own) {
                if verdict.commit {
                    state.tokens[group.sequence][*position] = verdict.token;
                }
            }
            state.sequences[group.sequence].step += 1;
            state.check_end(group.sequence);
        }
        if observed {
            self.observer.step(&self.state.describe(
                kind,
                block,
                (&plans, &windows),
                &groups,
                &verdicts,
                selected_rows,
            ));
        }
        Ok(true)
    }

    /// Tells the observer what is final: everything up to the end of this block, as far as no mask is left.
    fn block_done(&mut self, block: usize) {
        for s in 0..self.state.sequences.len() {
            let end = (block + 1) * self.state.options.block_length();
            let tokens = self.state.generated(s);
            let tokens = &tokens[..end.min(tokens.len())];
            let settled = tokens.iter().position(|t| *t == self.state.mask).unwrap_or(tokens.len());
            self.observer.finalized(s, &tokens[..settled]);
        }
    }

    fn finish(self) -> Result<Decoded> {
        let tokens = self.state.each(|d, s| d.generated(s).to_vec());
        Ok(Decoded { tokens, nfe: self.state.nfe, interrupted: self.interrupted })
    }
}
