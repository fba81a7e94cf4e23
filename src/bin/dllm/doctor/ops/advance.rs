//! The advance op, with LLaDA's schedule; and with Dream's threshold without blocks, end-of-text tokens, a failed sequence
//! and an inactive one.

use super::super::case::{Case, Entry, ErrorBound, HostDevice, Rng};
use super::pick;
use super::unmask::{MASK, TEXT};
use dllm_kernels::Result;
use dllm_kernels::abi::{
    DLLM_NONE_FAILED, DLLM_SCHEDULE_CARRY_OVER, DLLM_SCHEDULE_LLADA, dllm_advance_control, dllm_advance_params,
    dllm_advance_sequence,
};
use dllm_kernels::gpu::{Buffer, Pinned, Stream};
use dllm_kernels::ops::advance;
use dllm_kernels::reference::advance::{Sequence, State};
use dllm_kernels::sampling::QuotaSchedule;

const END: i32 = 7;
/// Progress counters for the host: passes, forwards, active, and sequence, position and step of the first failure.
const COUNTERS: usize = 6;

pub fn entries(small: bool) -> Vec<Entry> {
    let sequences = pick(small, 16, 4);
    vec![
        Entry::with_dtype("advance", format!("{sequences} sequences of 256, LLaDA's schedule"), "i32", move |stream| {
            Batch::new(stream, sequences, 256, QuotaSchedule::Llada { steps: 8 }, false)
        }),
        Entry::with_dtype("advance", "5 of 77, carry-over, ends and a failure".into(), "i32", |stream| {
            Batch::new(stream, 5, 77, QuotaSchedule::CarryOver, true)
        }),
    ]
}

struct Batch {
    stream: Stream,
    length: usize,
    /// State before the pass.
    state: State,
    control: HostDevice<dllm_advance_control>,
    sequences: HostDevice<dllm_advance_sequence>,
    tokens: HostDevice<i32>,
    committed: HostDevice<i32>,
    failed: HostDevice<i32>,
    quota: HostDevice<i32>,
    commit_before: Buffer<i32>,
    steps: Buffer<i32>,
    end_tokens: Option<HostDevice<i32>>,
    progress: Pinned<i32>,
}

/// Saturating cast to i32.
fn saturating_i32(x: usize) -> i32 {
    x.try_into().unwrap_or(i32::MAX)
}

/// Converts a sequence to its struct on the device.
fn on_device(sequence: &Sequence) -> dllm_advance_sequence {
    dllm_advance_sequence {
        first_token: saturating_i32(sequence.tokens.start),
        length: saturating_i32(sequence.tokens.len()),
        generated: saturating_i32(sequence.generated),
        active_start: saturating_i32(sequence.active_range.start),
        active_end: saturating_i32(sequence.active_range.end),
        quota_start: saturating_i32(sequence.quota_range.start),
        quota_end: saturating_i32(sequence.quota_range.end),
        commit_before: saturating_i32(sequence.active_range.end),
        initial_masks: saturating_i32(sequence.initial_masks),
        per_step: saturating_i32(sequence.per_step),
        deficit: saturating_i32(sequence.deficit),
        max_passes: saturating_i32(sequence.max_passes),
        forwards: saturating_i32(sequence.forwards),
        active: sequence.quota.is_some().into(),
        ended: sequence.ended.into(),
        reserved: 0,
    }
}

fn control(state: &State) -> dllm_advance_control {
    let (schedule, steps) = match &state.schedule {
        QuotaSchedule::Llada { steps } => (DLLM_SCHEDULE_LLADA, *steps),
        _ => (DLLM_SCHEDULE_CARRY_OVER, 0),
    };
    let failure = state.failure;
    dllm_advance_control {
        schedule: schedule as i32,
        steps: saturating_i32(steps),
        pass: saturating_i32(state.pass),
        passes: saturating_i32(state.passes),
        nfe: saturating_i32(state.nfe),
        failed_sequence: failure.map_or(DLLM_NONE_FAILED, |failure| saturating_i32(failure.sequence)),
        failed_position: failure.map_or(DLLM_NONE_FAILED, |failure| failure.position),
        failed_step: failure.map_or(0, |failure| saturating_i32(failure.step)),
        ..Default::default()
    }
}

impl Batch {
    /// Makes sequences whose second half is a block. If `odd`, every other sequence ends in it, the third has failed and the
    /// fourth is inactive.
    fn new(stream: &Stream, count: usize, length: usize, schedule: QuotaSchedule, odd: bool) -> Result<Batch> {
        let mut rng = Rng::new(12);
        let half = length / 2;
        let mut tokens: Vec<i32> = (0..count * length).map(|_| TEXT).collect();
        let mut sequences = Vec::new();
        for s in 0..count {
            let block = s * length + half..(s + 1) * length;
            block.clone().filter(|_| rng.below(3) > 0).for_each(|i| tokens[i] = MASK);
            if odd && s % 2 == 0 {
                tokens[block.start..block.start + 3].copy_from_slice(&[TEXT, END, MASK]);
            }
            sequences.push(Sequence {
                tokens: s * length..(s + 1) * length,
                generated: half,
                active_range: half..length,
                quota_range: half..length - 1,
                initial_masks: half,
                per_step: 3,
                deficit: 1,
                max_passes: 3 + s,
                forwards: 5 + s,
                quota: (!odd || s != 3).then_some(4),
                ended: false,
            });
        }
        let mask = MASK;
        let end_tokens = if odd { vec![TEXT + 1, END] } else { Vec::new() };
        let state = State {
            schedule,
            pass: 2,
            passes: 9,
            nfe: 8,
            failure: None,
            sequences,
            mask,
            end_tokens: end_tokens.clone(),
        };
        let committed = (0..count).map(|s| saturating_i32(s % 4)).collect();
        let failed = (0..count).map(|s| if odd && s == 2 { 41 } else { DLLM_NONE_FAILED }).collect();
        let quota = state.sequences.iter().map(|sequence| sequence.quota.map_or(0, saturating_i32)).collect();
        Ok(Batch {
            stream: stream.clone(),
            length,
            control: HostDevice::new(stream, vec![control(&state)])?,
            sequences: HostDevice::new(stream, state.sequences.iter().map(on_device).collect())?,
            tokens: HostDevice::new(stream, tokens)?,
            committed: HostDevice::new(stream, committed)?,
            failed: HostDevice::new(stream, failed)?,
            quota: HostDevice::new(stream, quota)?,
            commit_before: stream.alloc(count)?,
            steps: stream.alloc(count)?,
            end_tokens: odd.then(|| HostDevice::new(stream, end_tokens)).transpose()?,
            progress: Pinned::new(stream.device(), 8)?,
            state,
        })
    }
}

impl Case for Batch {
    fn bytes(&self) -> usize {
        let per_sequence = 2 * size_of::<dllm_advance_sequence>() + (6 + self.length / 2) * size_of::<i32>();
        self.state.sequences.len() * per_sequence
    }

    /// Restores the state that a launch advances by a pass.
    fn reset(&mut self) -> Result<()> {
        self.control.device.write(&self.control.host)?;
        self.sequences.device.write(&self.sequences.host)?;
        self.quota.device.write(&self.quota.host)
    }

    fn launch(&mut self) -> Result<()> {
        let end_tokens = self.end_tokens.as_ref();
        let params = dllm_advance_params {
            size: size_of::<dllm_advance_params>() as u64,
            control: self.control.device.address(),
            sequences: self.sequences.device.address(),
            tokens: self.tokens.device.address(),
            committed: self.committed.device.address(),
            failed: self.failed.device.address(),
            quota: self.quota.device.address(),
            commit_before: self.commit_before.address(),
            steps: self.steps.address(),
            ratios: 0,
            end_tokens: end_tokens.map_or(0, |tokens| tokens.device.address()),
            progress: self.progress.address(),
            num_sequences: saturating_i32(self.state.sequences.len()),
            num_tokens: saturating_i32(self.tokens.host.len()),
            mask_token: MASK,
            num_end_tokens: end_tokens.map_or(0, |tokens| saturating_i32(tokens.host.len())),
            max_ratios: 0,
            reserved: 0,
        };
        // SAFETY: the buffers have these sizes, are disjoint and live until the stream is synchronised; the host only reads the
        // progress counters.
        unsafe { advance::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let mut state = self.state.clone();
        let committed: Vec<usize> = self.committed.host.iter().map(|committed| *committed as usize).collect();
        let failed: Vec<Option<i32>> =
            self.failed.host.iter().map(|code| Some(*code).filter(|code| *code != DLLM_NONE_FAILED)).collect();
        state.advance(&self.tokens.host, &committed, &failed);
        let each = |field: &dyn Fn(&Sequence) -> i32| state.sequences.iter().map(field).collect::<Vec<i32>>();
        let quota = each(&|sequence| sequence.quota.map_or(0, saturating_i32));
        let before = each(&|sequence| {
            if sequence.quota.is_some() { saturating_i32(sequence.active_range.end) } else { i32::MIN }
        });
        let sequences: Vec<_> = state.sequences.iter().map(on_device).collect();
        let want = control(&state);
        let progress: Vec<i32> = (0..COUNTERS).map(|counter| self.progress.get(counter)).collect();
        let failure = [want.failed_sequence, want.failed_position, want.failed_step];
        let want_progress = [&[want.passes, want.nfe, saturating_i32(state.active())][..], &failure].concat();
        Ok(vec![
            ErrorBound::bits("quotas that differ", &self.quota.device.read()?, &quota),
            ErrorBound::bits("commit limits that differ", &self.commit_before.read()?, &before),
            ErrorBound::bits(
                "steps that differ",
                &self.steps.read()?,
                &each(&|sequence| saturating_i32(sequence.forwards)),
            ),
            ErrorBound::bits("sequences that differ", &self.sequences.device.read()?, &sequences),
            ErrorBound::bits("counters that differ", &self.control.device.read()?, &[want]),
            ErrorBound::bits("progress counters that differ", &progress, &want_progress),
        ])
    }
}
