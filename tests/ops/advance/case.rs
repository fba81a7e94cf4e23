//! A batch of an advance test, and its launch.

use crate::common::{poison, stream};
use dllm_kernels::Result;
use dllm_kernels::abi::{dllm_advance_control, dllm_advance_params, dllm_advance_sequence, dllm_progress};
use dllm_kernels::gpu::{Buffer, Pinned, Stream};
use dllm_kernels::ops::advance;
use dllm_kernels::ops::unmask::Outcome;
use dllm_kernels::reference::advance::{Sequence, State};
use dllm_kernels::sampling::QuotaSchedule;
/// Everything that a launch reads back: its results, or the state before the first launch.
pub use dllm_kernels::selftest::advance::OnDevice as Output;
pub use dllm_kernels::selftest::advance::{on_device as output_of, ratios, saturating_i32};

pub const MASK: i32 = 3;
/// End-of-text tokens.
pub const ENDS: [i32; 2] = [5, 7];

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

/// Returns the state of a batch before its first pass.
pub fn new_state(schedule: QuotaSchedule, sequences: Vec<Sequence>) -> State {
    State::new(schedule, sequences, MASK)
}
