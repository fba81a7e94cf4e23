//! The advance op, with LLaDA's schedule; and with Dream's threshold without blocks, end-of-text tokens, a failed sequence
//! and an inactive one. Also the conversion of the reference's states to the structs on the device.

use super::unmask::{MASK, TEXT};
use super::{Case, Entry, ErrorBound, HostDevice, Output, Random, Rows, pick};
use crate::abi::{
    DLLM_NONE_FAILED, DLLM_SCHEDULE_CARRY_OVER, DLLM_SCHEDULE_DREAM, DLLM_SCHEDULE_LLADA, DLLM_SCHEDULE_NONE,
    dllm_advance_control, dllm_advance_params, dllm_advance_sequence, dllm_progress,
};
use crate::error::Result;
use crate::gpu::{Buffer, Pinned, Stream};
use crate::ops::advance;
use crate::reference::advance::{Failure, Sequence, State};
use crate::sampling::QuotaSchedule;

/// An end-of-text token.
const END: i32 = 7;
/// Contents of memory that no launch has written: all bits are ones.
const UNWRITTEN: i32 = -1;
/// Words of the progress counters that a launch writes.
const PROGRESS_WORDS: usize = 6;

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let sequences = pick(small, 16, 4);
    let schedule = QuotaSchedule::Llada { steps: 8 };
    let real = Shape { sequences, length: 256, block: 128, schedule, end_tokens: vec![], odd: false };
    let odd = Shape {
        sequences: 5,
        length: 77,
        block: 39,
        schedule: QuotaSchedule::CarryOver,
        end_tokens: vec![TEXT + 1, END],
        odd: true,
    };
    vec![
        Entry::with_dtype("advance", format!("{sequences} sequences of 256, LLaDA's schedule"), "i32", move |stream| {
            Passes::new(stream, real.clone())
        }),
        Entry::with_dtype("advance", "5 of 77, carry-over, ends and a failure".into(), "i32", move |stream| {
            Passes::new(stream, odd.clone())
        }),
    ]
}

/// Shape of a case, and its schedule.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of sequences.
    pub sequences: usize,
    /// Positions of a sequence; the second half is generated.
    pub length: usize,
    /// Positions at the end of a sequence that are the block.
    pub block: usize,
    /// Schedule of the quotas.
    pub schedule: QuotaSchedule,
    /// Tokens that end a text.
    pub end_tokens: Vec<i32>,
    /// Whether every other sequence ends in its block, the third has failed and the fourth is inactive.
    pub odd: bool,
}

/// State of a batch as the device has it.
#[derive(Clone, Debug, PartialEq)]
pub struct OnDevice {
    /// State of the batch.
    pub control: dllm_advance_control,
    /// State of each sequence.
    pub sequences: Vec<dllm_advance_sequence>,
    /// Quota of each sequence; 0 when it is inactive.
    pub quota: Vec<i32>,
    /// First position of each sequence that the next pass may not commit; the lowest number when it is inactive.
    pub commit_before: Vec<i32>,
    /// Passes in which each sequence was active.
    pub steps: Vec<i32>,
    /// Counters for the host.
    pub progress: dllm_progress,
}

/// Saturating cast to i32: on the device, `i32::MAX` means no limit.
pub fn saturating_i32(x: usize) -> i32 {
    x.try_into().unwrap_or(i32::MAX)
}

/// Converts a state of the reference to that of the device. `commit_before` is the value of each sequence while it is active.
pub fn on_device(state: &State, commit_before: &[i32]) -> OnDevice {
    let [failed_sequence, failed_position, failed_step] = match state.failure {
        Some(Failure { sequence, position, step }) => [saturating_i32(sequence), position, saturating_i32(step)],
        None => [DLLM_NONE_FAILED; 3],
    };
    let (schedule, steps) = match &state.schedule {
        QuotaSchedule::Unlimited => (DLLM_SCHEDULE_NONE, 0),
        QuotaSchedule::Llada { steps } => (DLLM_SCHEDULE_LLADA, *steps),
        QuotaSchedule::Dream(_) => (DLLM_SCHEDULE_DREAM, 0),
        QuotaSchedule::CarryOver => (DLLM_SCHEDULE_CARRY_OVER, 0),
    };
    let (passes, nfe) = (saturating_i32(state.passes), saturating_i32(state.nfe));
    let before = |(sequence, before): (&Sequence, &i32)| if sequence.quota.is_some() { *before } else { i32::MIN };
    OnDevice {
        control: dllm_advance_control {
            schedule: schedule as i32,
            steps: saturating_i32(steps),
            pass: saturating_i32(state.pass),
            num_ratios: saturating_i32(ratios(&state.schedule).len()),
            passes,
            nfe,
            failed_sequence,
            failed_position,
            failed_step,
            reserved: [0; 3],
        },
        sequences: state.sequences.iter().zip(commit_before).map(sequence_on_device).collect(),
        quota: state.sequences.iter().map(|sequence| sequence.quota.map_or(0, saturating_i32)).collect(),
        commit_before: state.sequences.iter().zip(commit_before).map(before).collect(),
        steps: state.sequences.iter().map(|sequence| saturating_i32(sequence.forwards)).collect(),
        progress: dllm_progress {
            passes,
            nfe,
            active: saturating_i32(state.active()),
            failed_sequence,
            failed_position,
            failed_step,
            reserved: [UNWRITTEN; 2],
        },
    }
}

fn sequence_on_device((sequence, commit_before): (&Sequence, &i32)) -> dllm_advance_sequence {
    dllm_advance_sequence {
        first_token: saturating_i32(sequence.tokens.start),
        length: saturating_i32(sequence.tokens.len()),
        generated: saturating_i32(sequence.generated),
        active_start: saturating_i32(sequence.active_range.start),
        active_end: saturating_i32(sequence.active_range.end),
        quota_start: saturating_i32(sequence.quota_range.start),
        quota_end: saturating_i32(sequence.quota_range.end),
        commit_before: *commit_before,
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

/// Returns the ratios of Dream's schedule; those of other schedules are empty.
pub fn ratios(schedule: &QuotaSchedule) -> &[f32] {
    if let QuotaSchedule::Dream(ratios) = schedule { ratios } else { &[] }
}

/// A batch after a pass.
pub struct Passes {
    stream: Stream,
    shape: Shape,
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
    ratios: Buffer<f32>,
    end_tokens: Buffer<i32>,
    progress: Pinned<i32>,
}

impl Passes {
    /// Uploads sequences with masks in two thirds of their blocks.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Passes> {
        let Shape { sequences: count, length, block, ref schedule, ref end_tokens, odd } = shape;
        let mut random = Random(12);
        let active = length - block..length;
        let mut tokens = vec![TEXT; count * length];
        let mut sequences = Vec::new();
        for s in 0..count {
            let own = &mut tokens[s * length..(s + 1) * length];
            own[active.clone()].iter_mut().filter(|_| random.below(3) > 0).for_each(|token| *token = MASK);
            if odd && s % 2 == 0 {
                own[active.start..active.start + 3].copy_from_slice(&[TEXT, END, MASK]);
            }
            sequences.push(Sequence {
                tokens: s * length..(s + 1) * length,
                generated: length / 2,
                active_range: active.clone(),
                quota_range: active.start..length - 1,
                initial_masks: block,
                per_step: 3,
                deficit: 1,
                max_passes: 3 + s,
                forwards: 5 + s,
                quota: (!odd || s != 3).then_some(4),
                ended: false,
            });
        }
        let end_tokens = end_tokens.clone();
        let state = State { pass: 2, passes: 9, nfe: 8, end_tokens, ..State::new(schedule.clone(), sequences, MASK) };
        let before = on_device(&state, &vec![saturating_i32(length); count]);
        let committed = (0..count).map(|s| saturating_i32(s % 4)).collect();
        let failed = (0..count).map(|s| if odd && s == 2 { 41 } else { DLLM_NONE_FAILED }).collect();
        let mut progress = Pinned::new(stream.device(), size_of::<dllm_progress>() / size_of::<i32>())?;
        progress.write(0, &vec![UNWRITTEN; progress.len()]);
        Ok(Passes {
            stream: stream.clone(),
            control: HostDevice::new(stream, vec![before.control])?,
            sequences: HostDevice::new(stream, before.sequences)?,
            tokens: HostDevice::new(stream, tokens)?,
            committed: HostDevice::new(stream, committed)?,
            failed: HostDevice::new(stream, failed)?,
            quota: HostDevice::new(stream, before.quota)?,
            commit_before: stream.alloc(count)?,
            steps: stream.alloc(count)?,
            ratios: stream.upload(ratios(schedule))?,
            end_tokens: stream.upload(&state.end_tokens)?,
            progress,
            state,
            shape,
        })
    }

    /// Returns what the last launch wrote.
    fn read(&self) -> Result<OnDevice> {
        // The host reads pinned memory directly.
        self.stream.synchronize()?;
        let mut progress = dllm_progress::default();
        let words: &mut [i32] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut progress));
        (0..).zip(words).for_each(|(i, word)| *word = self.progress.get(i));
        Ok(OnDevice {
            control: self.control.device.read()?[0],
            sequences: self.sequences.device.read()?,
            quota: self.quota.device.read()?,
            commit_before: self.commit_before.read()?,
            steps: self.steps.read()?,
            progress,
        })
    }
}

impl Case for Passes {
    /// Each sequence is read and written, and five words of unmask's outcome; with carry-over the old quota is read too. Read
    /// are the tokens of the second half.
    fn bytes(&self) -> usize {
        let words = 5 + usize::from(self.shape.schedule == QuotaSchedule::CarryOver) + self.shape.length / 2;
        self.shape.sequences * (2 * size_of::<dllm_advance_sequence>() + words * size_of::<i32>())
    }

    /// Restores the state that a launch advances by a pass.
    fn reset(&mut self) -> Result<()> {
        self.control.device.write(&self.control.host)?;
        self.sequences.device.write(&self.sequences.host)?;
        self.quota.device.write(&self.quota.host)
    }

    fn launch(&mut self) -> Result<()> {
        let optional = |address: u64, len: usize| if len > 0 { address } else { 0 };
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
            ratios: optional(self.ratios.address(), self.ratios.len()),
            end_tokens: optional(self.end_tokens.address(), self.end_tokens.len()),
            progress: self.progress.address(),
            num_sequences: saturating_i32(self.state.sequences.len()),
            num_tokens: saturating_i32(self.tokens.host.len()),
            mask_token: MASK,
            num_end_tokens: saturating_i32(self.end_tokens.len()),
            max_ratios: saturating_i32(self.ratios.len()),
            reserved: 0,
        };
        // SAFETY: the buffers have these sizes, are disjoint and live until the stream is synchronised; the host only reads the
        // progress counters.
        unsafe { advance::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    /// Compares all sequences.
    fn check(&self, _: Rows) -> Result<Vec<ErrorBound>> {
        let mut state = self.state.clone();
        let committed: Vec<usize> = self.committed.host.iter().map(|committed| *committed as usize).collect();
        let failed: Vec<Option<i32>> =
            self.failed.host.iter().map(|code| Some(*code).filter(|code| *code != DLLM_NONE_FAILED)).collect();
        state.advance(&self.tokens.host, &committed, &failed);
        let want = on_device(&state, &vec![saturating_i32(self.shape.length); self.shape.sequences]);
        let got = self.read()?;
        Ok(vec![
            ErrorBound::bits("quotas that differ", &got.quota, &want.quota),
            ErrorBound::bits("commit limits that differ", &got.commit_before, &want.commit_before),
            ErrorBound::bits("steps that differ", &got.steps, &want.steps),
            ErrorBound::bits("sequences that differ", &got.sequences, &want.sequences),
            ErrorBound::bits("counters that differ", &[got.control], &[want.control]),
            ErrorBound::bits("progress counters that differ", &[got.progress], &[want.progress]),
        ])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![
            Output::new("quotas", &mut self.quota.device),
            Output::new("commit limits", &mut self.commit_before),
            Output::new("steps", &mut self.steps),
            Output::new("sequences", &mut self.sequences.device),
            Output::new("counters", &mut self.control.device),
            Output { what: "progress counters", words: PROGRESS_WORDS, memory: &mut self.progress },
        ]
    }
}
