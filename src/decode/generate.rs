//! The decoding loops: one function per rule of the originals.

use super::observer::Observer;
use super::options::{Options, Policy, Rule};
use super::schedule::{DreamSchedule, llada_quota};
use super::state::{Sequence, State, Turn};
use crate::cache::{BlockPlan, PassKind};
use crate::error::Result;
use crate::model::{Config, Network, Pass};
use crate::oracle::unmask::{Group, Selection};
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

/// The decoding loop over any [`Network`]. `options` and `prompts` have passed [`Options::validate`].
pub fn decode(
    network: &mut dyn Network,
    config: &Config,
    prompts: &[Vec<u32>],
    options: &Options,
    interrupt: Option<&AtomicBool>,
    observer: &mut dyn Observer,
) -> Result<Decoded> {
    let rule = options.rule(config.family);
    let sequence = |prompt: &Vec<u32>| Sequence { prompt_len: prompt.len(), step: 0, ended: None };
    let mask = config.mask_token_id;
    let state = State {
        options,
        unmask: options.unmask(rule, mask),
        mask,
        end_tokens: end_tokens(config, options),
        tokens: prompts.iter().map(|p| [p.clone(), vec![mask; options.gen_length]].concat()).collect(),
        sequences: prompts.iter().map(sequence).collect(),
        nfe: 0,
    };
    let mut decoder = Decoder { network, state, interrupt, interrupted: false, observer };
    match rule {
        Rule::Llada => decoder.llada()?,
        Rule::FastLlada => decoder.fast_llada()?,
        Rule::Dream => decoder.dream()?,
        Rule::DreamThreshold => decoder.dream_threshold()?,
        Rule::DreamBlock => decoder.dream_block()?,
    }
    decoder.finish()
}

struct Decoder<'a> {
    network: &'a mut dyn Network,
    state: State<'a>,
    interrupt: Option<&'a AtomicBool>,
    interrupted: bool,
    observer: &'a mut dyn Observer,
}

impl Decoder<'_> {
    /// LLaDA's own loop: every block has `steps / blocks` forwards, fewer where it is complete before.
    fn llada(&mut self) -> Result<()> {
        let steps = self.state.options.steps() / self.state.blocks();
        for block in 0..self.state.blocks() {
            let masked = self.state.each(|d, s| d.masks(s, d.block(s, block)).len());
            for i in 0..steps {
                let quota = |s: usize| Selection::Quota(llada_quota(masked[s], steps, i));
                let turns = self.state.turns(block, |d, s| d.turn(s, block, 0, quota(s)));
                if !self.pass(PassKind::Full, block, turns)? {
                    break;
                }
            }
            self.block_done(block);
        }
        Ok(())
    }

    /// Fast-dLLM's loops for LLaDA: a block goes on until it has no mask. Its first forward runs everything (and fills
    /// the cache), the others what the cache mode asks for.
    fn fast_llada(&mut self) -> Result<()> {
        let steps = self.state.options.steps() / self.state.blocks();
        for block in 0..self.state.blocks() {
            let masked = self.state.each(|d, s| d.masks(s, d.block(s, block)).len());
            let mut pass = PassKind::Full;
            for i in 0.. {
                let turns = self.state.turns(block, |d, s| {
                    // Past its end (masks in the prompt have used some of it up) the schedule goes on by ones.
                    let selection = d.selection(|| if i < steps { llada_quota(masked[s], steps, i) } else { 1 });
                    let start = pass.window(&d.block(s, block), d.tokens[s].len()).start;
                    d.turn(s, block, start, selection)
                });
                if !self.pass(pass, block, turns)? {
                    break;
                }
                pass = self.state.options.cache.block_pass();
            }
            self.block_done(block);
        }
        Ok(())
    }

    /// Dream's own loop: all positions at once.
    fn dream(&mut self) -> Result<()> {
        let schedule = DreamSchedule::new(self.state.options.steps(), self.state.options.eps);
        for i in 0..self.state.options.steps() {
            let turns =
                self.state.turns_anywhere(|d, s, masked| d.turn(s, 0, 0, Selection::Quota(schedule.quota(i, masked))));
            if !self.pass(PassKind::Full, 0, turns)? {
                break;
            }
        }
        self.block_done(0);
        Ok(())
    }

    /// Fast-dLLM's threshold for Dream without blocks: each step looks at `masks / steps` positions and at those that
    /// earlier steps rejected; what is left after the last step gets further steps.
    fn dream_threshold(&mut self) -> Result<()> {
        struct Deficit {
            steps: usize,
            per_step: usize,
            left: usize,
        }
        let Policy::Threshold(threshold) = self.state.options.policy else { return Ok(()) };
        let threshold = f64::from(threshold as f32);
        let mut deficits = self.state.each(|d, s| {
            let masked = d.masks(s, 0..d.tokens[s].len()).len();
            let steps = d.options.steps.unwrap_or(masked);
            Deficit { steps, per_step: masked / steps, left: 0 }
        });
        for i in 0.. {
            let before: Vec<usize> = self.state.each(|d, s| d.masks(s, 0..d.tokens[s].len()).len());
            let among: Vec<usize> =
                deficits.iter().zip(&before).map(|(d, masked)| (d.per_step + d.left).min(*masked)).collect();
            let turns = self.state.turns_anywhere(|d, s, _| {
                let selection = Selection::ThresholdAmong { threshold, among: among[s] };
                (i < deficits[s].steps).then(|| d.turn(s, 0, 0, selection)).flatten()
            });
            if !self.pass(PassKind::Full, 0, turns)? {
                break;
            }
            for (s, deficit) in deficits.iter_mut().enumerate() {
                let committed = before[s] - self.state.masks(s, 0..self.state.tokens[s].len()).len();
                deficit.left = among[s] - committed;
                if i + 1 >= deficit.steps && deficit.left > 0 {
                    deficit.steps += 1;
                    deficit.per_step = 0;
                }
            }
        }
        self.block_done(0);
        Ok(())
    }

    /// Fast-dLLM's block loop for Dream. A window has no logits for its own first position (they stand one before it),
    /// so the first forward of a block commits that position, and nothing else.
    fn dream_block(&mut self) -> Result<()> {
        let steps = self.state.options.steps() / self.state.blocks();
        let schedule = DreamSchedule::new(steps.max(1), self.state.options.eps);
        for block in 0..self.state.blocks() {
            let observed = self.observer.wants_steps();
            let turns = self.state.turns(block, |d, s| {
                let range = d.block(s, block);
                let first = range.start + 1;
                let candidates = if observed { range.clone() } else { range.start..first };
                let selection = Selection::Quota(1);
                Some(Turn { sequence: s, block: range, candidates, commit_before: first, selection })
            });
            self.pass(PassKind::Full, block, turns)?;
            let pass = self.state.options.cache.block_pass();
            for i in 1.. {
                let turns = self.state.turns(block, |d, s| {
                    let masked = d.masks(s, d.block(s, block)).len();
                    let selection = d.selection(|| schedule.quota(i, masked));
                    d.turn(s, block, d.block(s, block).start, selection)
                });
                if !self.pass(pass, block, turns)? {
                    break;
                }
            }
            self.block_done(block);
        }
        Ok(())
    }

    /// One forward, and what it commits. False when there was nothing to do, or the decode is interrupted.
    fn pass(&mut self, kind: PassKind, block: usize, turns: Vec<Turn>) -> Result<bool> {
        self.interrupted |= self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed));
        if turns.is_empty() || self.interrupted {
            return Ok(false);
        }
        let state = &self.state;
        let window = |t: &Turn| (t.sequence, kind.window(&t.block, state.tokens[t.sequence].len()));
        let windows: Vec<_> = turns.iter().map(window).collect();
        let group = |t: &Turn| Group {
            sequence: t.sequence,
            step: state.sequences[t.sequence].step,
            positions: state.masks(t.sequence, t.candidates.clone()),
            commit_before: t.commit_before,
            selection: t.selection,
        };
        let groups: Vec<Group> = turns.iter().map(group).collect();
        let plan = BlockPlan { mode: state.options.cache, pass: kind };
        let pass = Pass { plan: &plan, windows: &windows, groups: &groups, unmask: &state.unmask };
        let verdicts = self.network.step(&state.tokens, &pass)?;
        let state = &mut self.state;
        state.nfe += 1;
        let mut rest = &verdicts[..];
        for group in &groups {
            let (own, others) = rest.split_at(group.positions.len());
            rest = others;
            for (position, verdict) in group.positions.iter().zip(own) {
                if verdict.commit {
                    state.tokens[group.sequence][*position] = verdict.token;
                }
            }
            state.sequences[group.sequence].step += 1;
            state.check_end(group.sequence);
        }
        if self.observer.wants_steps() {
            self.observer.step(&self.state.describe(kind, block, &windows, &groups, &verdicts));
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
            self.observer.decided(s, &tokens[..settled]);
        }
    }

    fn finish(self) -> Result<Decoded> {
        let tokens = self.state.each(|d, s| d.generated(s).to_vec());
        Ok(Decoded { tokens, nfe: self.state.nfe, interrupted: self.interrupted })
    }
}
