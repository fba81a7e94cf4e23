//! A batch of an advance test, and its launch.

use crate::common::{poison, stream};
use dllm_kernels::Result;
use dllm_kernels::abi::{
    DLLM_NONE_FAILED, DLLM_SCHEDULE_CARRY_OVER, DLLM_SCHEDULE_DREAM, DLLM_SCHEDULE_LLADA, DLLM_SCHEDULE_NONE,
    dllm_advance_control, dllm_advance_params, dllm_advance_sequence, dllm_progress,
};
use dllm_kernels::gpu::{Buffer, Pinned, Stream};
use dllm_kernels::ops::advance;
use dllm_kernels::ops::unmask::Outcome;
use dllm_kernels::reference::advance::{Failure, Sequence, State};
use dllm_kernels::sampling::QuotaSchedule;

pub const MASK: i32 = 3;
/// End-of-text tokens.
pub const ENDS: [i32; 2] = [5, 7];

/// Saturating cast to i32: on the device, `i32::MAX` means no limit.
pub fn saturating_i32(x: usize) -> i32 {
    x.try_into().unwrap_or(i32::MAX)
}

/// Everything that a launch reads back: its results, or the state before the first launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub control: dllm_advance_control,
    pub sequences: Vec<dllm_advance_sequence>,
    pub quota: Vec<i32>,
    pub commit_before: Vec<i32>,
    pub steps: Vec<i32>,
    pub progress: dllm_progress,
}

/// Device buffers of a batch.
pub struct Batch {
    pub stream: Stream,
    pub control: Buffer<dllm_advance_control>,
    pub sequences: Buffer<dllm_advance_sequence>,
    pub tokens: Buffer<i32>,
    pub outcome: Outcome,
    pub quota: Buffer<i32>,
    pub commit_before: Buffer<i32>,
    pub steps: Buffer<i32>,
    pub ratios: Buffer<f32>,
    pub end_tokens: Buffer<i32>,
    pub progress: Pinned<i32>,
}

impl Batch {
    /// Makes a batch in the state `output`. Memory that the host does not write is poisoned.
    pub fn new(tokens: &[i32], output: &Output, ratios: &[f32], end_tokens: &[i32]) -> Batch {
        let stream = stream();
        let n = output.sequences.len();
        let mut progress = Pinned::new(stream.device(), size_of::<dllm_progress>() / 4).unwrap();
        progress.write(0, &[poison(); 8]);
        let poisoned = || stream.upload(&vec![poison(); n]).unwrap();
        let (masks_left, committed, failed) = (poisoned(), poisoned(), poisoned());
        let (predicted, confidence) = (stream.alloc(tokens.len()).unwrap(), stream.alloc(tokens.len()).unwrap());
        let mut batch = Batch {
            control: stream.alloc(1).unwrap(),
            sequences: stream.alloc(n).unwrap(),
            tokens: stream.upload(tokens).unwrap(),
            outcome: Outcome { masks_left, committed, failed, predicted, confidence },
            quota: stream.alloc(n).unwrap(),
            commit_before: stream.alloc(n).unwrap(),
            steps: stream.alloc(n).unwrap(),
            ratios: stream.upload(ratios).unwrap(),
            end_tokens: stream.upload(end_tokens).unwrap(),
            progress,
            stream,
        };
        batch.begin(output);
        batch
    }

    /// Writes the state as the host does before the first pass of a block.
    pub fn begin(&mut self, output: &Output) {
        self.control.write(&[output.control]).unwrap();
        self.sequences.write(&output.sequences).unwrap();
        self.quota.write(&output.quota).unwrap();
        self.commit_before.write(&output.commit_before).unwrap();
        self.steps.write(&output.steps).unwrap();
    }

    /// Writes the results of an unmask launch.
    pub fn unmasked(&mut self, tokens: &[i32], committed: &[i32], failed: &[i32]) {
        self.tokens.write(tokens).unwrap();
        self.outcome.committed.write(committed).unwrap();
        self.outcome.failed.write(failed).unwrap();
    }

    pub fn launch(&self) -> Result<()> {
        let optional = |buffer: u64, len: usize| if len > 0 { buffer } else { 0 };
        let params = dllm_advance_params {
            size: size_of::<dllm_advance_params>() as u64,
            control: self.control.address(),
            sequences: self.sequences.address(),
            tokens: self.tokens.address(),
            committed: self.outcome.committed.address(),
            failed: self.outcome.failed.address(),
            quota: self.quota.address(),
            commit_before: self.commit_before.address(),
            steps: self.steps.address(),
            ratios: optional(self.ratios.address(), self.ratios.len()),
            end_tokens: optional(self.end_tokens.address(), self.end_tokens.len()),
            progress: self.progress.address(),
            num_sequences: self.sequences.len() as i32,
            num_tokens: self.tokens.len() as i32,
            mask_token: MASK,
            num_end_tokens: self.end_tokens.len() as i32,
            max_ratios: self.ratios.len() as i32,
            reserved: 0,
        };
        // SAFETY: the buffers are as large as the struct says, and stay until the stream is synchronised.
        unsafe { advance::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    pub fn read(&self) -> Output {
        let control = self.control.read().unwrap()[0];
        let progress: Vec<i32> = (0..self.progress.len()).map(|i| self.progress.get(i)).collect();
        Output {
            control,
            sequences: self.sequences.read().unwrap(),
            quota: self.quota.read().unwrap(),
            commit_before: self.commit_before.read().unwrap(),
            steps: self.steps.read().unwrap(),
            progress: bytemuck::pod_read_unaligned(bytemuck::cast_slice(&progress)),
        }
    }

    /// Writes the results of an unmask launch, launches advance and reads the results.
    pub fn advance(&mut self, tokens: &[i32], committed: &[i32], failed: &[i32]) -> Output {
        self.unmasked(tokens, committed, failed);
        self.launch().unwrap();
        self.read()
    }
}

/// Converts a state of the reference to that of the device. `commit_before` is the value of each sequence while it is active.
pub fn output_of(state: &State, commit_before: &[i32]) -> Output {
    let failure = state.failure;
    let [failed_sequence, failed_position, failed_step] = match failure {
        Some(Failure { sequence, position, step }) => [saturating_i32(sequence), position, saturating_i32(step)],
        None => [DLLM_NONE_FAILED; 3],
    };
    let (schedule, steps, num_ratios) = match &state.schedule {
        QuotaSchedule::Unlimited => (DLLM_SCHEDULE_NONE, 0, 0),
        QuotaSchedule::Llada { steps } => (DLLM_SCHEDULE_LLADA, *steps, 0),
        QuotaSchedule::Dream(ratios) => (DLLM_SCHEDULE_DREAM, 0, ratios.len()),
        QuotaSchedule::CarryOver => (DLLM_SCHEDULE_CARRY_OVER, 0, 0),
    };
    let (passes, nfe) = (saturating_i32(state.passes), saturating_i32(state.nfe));
    let before = |(sequence, before): (&Sequence, &i32)| if sequence.quota.is_some() { *before } else { i32::MIN };
    Output {
        control: dllm_advance_control {
            schedule: schedule as i32,
            steps: saturating_i32(steps),
            pass: saturating_i32(state.pass),
            num_ratios: saturating_i32(num_ratios),
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
            reserved: [poison(); 2],
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

/// Returns the state of a batch before its first pass.
pub fn new_state(schedule: QuotaSchedule, sequences: Vec<Sequence>) -> State {
    State::new(schedule, sequences, MASK)
}
