//! advance, between two forwards: 32 sequences in blocks of 32, and one of 2,048 positions with Dream's schedule; both with early stop.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::abi::{
    DLLM_NONE_FAILED, DLLM_SCHEDULE_DREAM, DLLM_SCHEDULE_LLADA, dllm_advance_control, dllm_advance_params,
    dllm_advance_sequence, dllm_progress, dllm_schedule,
};
use dllm_kernels::gpu::{Buffer, Pinned, Stream};
use dllm_kernels::ops::advance;
use gpu::{Bench, Case, L2, bytes_of};
use std::mem::offset_of;

const MASK: i32 = 9;

struct Passes {
    stream: Stream,
    positions: usize,
    block: usize,
    control: Buffer<dllm_advance_control>,
    sequences: Buffer<dllm_advance_sequence>,
    tokens: Buffer<i32>,
    /// committed, failed, quota, commit_before, steps
    of_unmask: [Buffer<i32>; 5],
    ratios: Buffer<f32>,
    end_tokens: Buffer<i32>,
    progress: Pinned<i32>,
}

impl Passes {
    /// The last `block` positions of each sequence are masked and stay masked, so the block never ends.
    fn new(stream: &Stream, n: usize, positions: usize, block: usize, schedule: dllm_schedule) -> Result<Passes> {
        let token = |i: usize| if i % positions >= positions - block { MASK } else { 1 };
        let active_start = (positions - block) as i32;
        let sequence = |s: usize| dllm_advance_sequence {
            first_token: (s * positions) as i32,
            length: positions as i32,
            generated: positions as i32 / 2,
            active_start,
            active_end: positions as i32,
            quota_start: active_start,
            quota_end: positions as i32,
            commit_before: i32::MAX,
            initial_masks: block as i32,
            max_passes: i32::MAX,
            active: 1,
            ..Default::default()
        };
        let control = dllm_advance_control {
            schedule: schedule as i32,
            steps: block as i32,
            num_ratios: 2,
            failed_sequence: DLLM_NONE_FAILED,
            ..Default::default()
        };
        let sequences: Vec<_> = (0..n).map(sequence).collect();
        let numbers = |number: i32| stream.upload(&vec![number; n]);
        Ok(Passes {
            stream: stream.clone(),
            positions,
            block,
            control: stream.upload(&[control])?,
            sequences: stream.upload(&sequences)?,
            tokens: stream.upload(&(0..n * positions).map(token).collect::<Vec<_>>())?,
            of_unmask: [numbers(0)?, numbers(DLLM_NONE_FAILED)?, numbers(1)?, numbers(0)?, numbers(0)?],
            ratios: stream.upload(&[0.5, 0.5])?,
            end_tokens: stream.upload(&[7, 8])?,
            progress: Pinned::new(stream.device(), size_of::<dllm_progress>() / 4)?,
        })
    }
}

impl Case for Passes {
    /// State and five words of unmask's outcome are read and written per sequence; the second half of the tokens and the block are
    /// read.
    fn bytes(&self) -> usize {
        let words = 2 * size_of::<dllm_advance_sequence>() / 4 + 5 + self.positions / 2;
        bytes_of::<i32>(self.sequences.len(), words)
    }

    fn launch(&mut self) -> Result<()> {
        let [committed, failed, quota, commit_before, steps] = self.of_unmask.each_ref().map(Buffer::address);
        let params = dllm_advance_params {
            size: size_of::<dllm_advance_params>() as u64,
            control: self.control.address(),
            sequences: self.sequences.address(),
            tokens: self.tokens.address(),
            committed,
            failed,
            quota,
            commit_before,
            steps,
            ratios: self.ratios.address(),
            end_tokens: self.end_tokens.address(),
            progress: self.progress.address(),
            num_sequences: self.sequences.len() as i32,
            num_tokens: self.tokens.len() as i32,
            mask_token: MASK,
            num_end_tokens: self.end_tokens.len() as i32,
            max_ratios: self.ratios.len() as i32,
            reserved: 0,
        };
        // SAFETY: the buffers have the sizes of the struct, and the bench synchronises the stream before it drops them.
        unsafe { advance::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn check(&self) -> Result<()> {
        let [.., quota, commit_before, steps] = &self.of_unmask;
        let n = self.sequences.len();
        let dream = self.control.read()?[0].schedule == DLLM_SCHEDULE_DREAM as i32;
        // After the second pass: the last of Dream's two steps, or the second of one step per position of the block.
        assert_eq!(quota.read()?, vec![if dream { self.block as i32 } else { 1 }; n]);
        assert_eq!((commit_before.read()?, steps.read()?), (vec![i32::MAX; n], vec![1; n]));
        assert_eq!(self.progress.get(offset_of!(dllm_progress, active) / 4), n as i32);
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("advance") else { return };
    let (positions, n) = (bench.size(1024, 64), bench.size(32, 4));
    bench.case::<f32, _>("32 sequences", &[L2::Cold, L2::Warm], |stream| {
        Passes::new(stream, n, positions, 32, DLLM_SCHEDULE_LLADA)
    });
    let whole = bench.size(2048, 200);
    bench.case::<f32, _>("2048 positions", &[L2::Cold, L2::Warm], |stream| {
        Passes::new(stream, 1, whole, whole / 2, DLLM_SCHEDULE_DREAM)
    });
}
