//! What the rules do between two passes: by LLaDA's schedule; and Dream's threshold without blocks, with texts that end, a
//! sequence that failed and one that takes no part.

use super::super::case::{Both, Case, Entry, Measure, Numbers};
use super::pick;
use super::unmask::{MASK, TEXT};
use dllm_kernels::Result;
use dllm_kernels::abi::{
    DLLM_NONE_FAILED, DLLM_SCHEDULE_CARRY_OVER, DLLM_SCHEDULE_LLADA, dllm_advance_control, dllm_advance_params,
    dllm_advance_sequence,
};
use dllm_kernels::gpu::{Buffer, Pinned, Stream};
use dllm_kernels::ops::advance;
use dllm_kernels::reference::advance::{QuotaSchedule, Sequence, State};

const END: i32 = 7;
/// Numbers that the host is told: passes, forwards, active, and of the first failure sequence, position and step.
const WORDS: usize = 6;

pub fn entries(small: bool) -> Vec<Entry> {
    let sequences = pick(small, 16, 4);
    vec![
        Entry::of("advance", format!("{sequences} sequences of 256, LLaDA's schedule"), "i32", move |stream| {
            Batch::new(stream, sequences, 256, QuotaSchedule::Llada(8), false)
        }),
        Entry::of("advance", "5 of 77, Dream's among, ends and a failure".into(), "i32", |stream| {
            Batch::new(stream, 5, 77, QuotaSchedule::CarryOver, true)
        }),
    ]
}

struct Batch {
    stream: Stream,
    length: usize,
    /// Before the pass that has just run.
    state: State,
    control: Both<dllm_advance_control>,
    sequences: Both<dllm_advance_sequence>,
    tokens: Both<i32>,
    committed: Both<i32>,
    failed: Both<i32>,
    quota: Both<i32>,
    commit_before: Buffer<i32>,
    steps: Buffer<i32>,
    end_tokens: Option<Both<i32>>,
    progress: Pinned<i32>,
}

/// A number as the device has it: what is more than any counts as the most.
fn number(x: usize) -> i32 {
    x.try_into().unwrap_or(i32::MAX)
}

/// A sequence as the device has it.
fn on_device(sequence: &Sequence) -> dllm_advance_sequence {
    dllm_advance_sequence {
        first_token: number(sequence.tokens.start),
        length: number(sequence.tokens.len()),
        generated: number(sequence.generated),
        active_start: number(sequence.active_range.start),
        active_end: number(sequence.active_range.end),
        quota_start: number(sequence.quota_range.start),
        quota_end: number(sequence.quota_range.end),
        commit_before: number(sequence.active_range.end),
        initial_masks: number(sequence.initial_masks),
        per_step: number(sequence.per_step),
        deficit: number(sequence.deficit),
        max_passes: number(sequence.max_passes),
        forwards: number(sequence.forwards),
        active: sequence.quota.is_some().into(),
        ended: sequence.ended.into(),
        reserved: 0,
    }
}

fn control(state: &State) -> dllm_advance_control {
    let (schedule, steps) = match &state.schedule {
        QuotaSchedule::Llada(steps) => (DLLM_SCHEDULE_LLADA, *steps),
        _ => (DLLM_SCHEDULE_CARRY_OVER, 0),
    };
    let failure = state.failure;
    dllm_advance_control {
        schedule: schedule as i32,
        steps: number(steps),
        pass: number(state.pass),
        passes: number(state.passes),
        nfe: number(state.nfe),
        failed_sequence: failure.map_or(DLLM_NONE_FAILED, |failure| number(failure.sequence)),
        failed_position: failure.map_or(DLLM_NONE_FAILED, |failure| failure.position),
        failed_step: failure.map_or(0, |failure| number(failure.step)),
        ..Default::default()
    }
}

impl Batch {
    /// The second half of each sequence is a block. When `odd`, the texts of every other sequence end in it, the third has
    /// failed, and the fourth took no part.
    fn new(stream: &Stream, count: usize, length: usize, schedule: QuotaSchedule, odd: bool) -> Result<Batch> {
        let mut numbers = Numbers::new(12);
        let half = length / 2;
        let mut tokens: Vec<i32> = (0..count * length).map(|_| TEXT).collect();
        let mut sequences = Vec::new();
        for s in 0..count {
            let of_block = s * length + half..(s + 1) * length;
            of_block.clone().filter(|_| numbers.below(3) > 0).for_each(|i| tokens[i] = MASK);
            if odd && s % 2 == 0 {
                tokens[of_block.start..of_block.start + 3].copy_from_slice(&[TEXT, END, MASK]);
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
        let committed = (0..count).map(|s| number(s % 4)).collect();
        let failed = (0..count).map(|s| if odd && s == 2 { 41 } else { DLLM_NONE_FAILED }).collect();
        let quota = state.sequences.iter().map(|sequence| sequence.quota.map_or(0, number)).collect();
        Ok(Batch {
            stream: stream.clone(),
            length,
            control: Both::new(stream, vec![control(&state)])?,
            sequences: Both::new(stream, state.sequences.iter().map(on_device).collect())?,
            tokens: Both::new(stream, tokens)?,
            committed: Both::new(stream, committed)?,
            failed: Both::new(stream, failed)?,
            quota: Both::new(stream, quota)?,
            commit_before: stream.alloc(count)?,
            steps: stream.alloc(count)?,
            end_tokens: odd.then(|| Both::new(stream, end_tokens)).transpose()?,
            progress: Pinned::new(stream.device(), 8)?,
            state,
        })
    }
}

impl Case for Batch {
    fn bytes(&self) -> usize {
        let of_sequence = 2 * size_of::<dllm_advance_sequence>() + (6 + self.length / 2) * size_of::<i32>();
        self.state.sequences.len() * of_sequence
    }

    /// Every launch is a pass.
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
            num_sequences: number(self.state.sequences.len()),
            num_tokens: number(self.tokens.host.len()),
            mask_token: MASK,
            num_end_tokens: end_tokens.map_or(0, |tokens| number(tokens.host.len())),
            max_ratios: 0,
            reserved: 0,
        };
        // SAFETY: buffers of these sizes, distinct, which live until the stream has been waited for; the host only reads what
        // it is told.
        unsafe { advance::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn check(&self) -> Result<Vec<Measure>> {
        let mut state = self.state.clone();
        let committed: Vec<usize> = self.committed.host.iter().map(|committed| *committed as usize).collect();
        let failed: Vec<Option<i32>> =
            self.failed.host.iter().map(|at| Some(*at).filter(|at| *at != DLLM_NONE_FAILED)).collect();
        state.advance(&self.tokens.host, &committed, &failed);
        let each = |of: &dyn Fn(&Sequence) -> i32| state.sequences.iter().map(of).collect::<Vec<i32>>();
        let quota = each(&|sequence| sequence.quota.map_or(0, number));
        let before =
            each(&|sequence| if sequence.quota.is_some() { number(sequence.active_range.end) } else { i32::MIN });
        let sequences: Vec<_> = state.sequences.iter().map(on_device).collect();
        let want = control(&state);
        let told: Vec<i32> = (0..WORDS).map(|word| self.progress.get(word)).collect();
        let failure = [want.failed_sequence, want.failed_position, want.failed_step];
        let word = [&[want.passes, want.nfe, number(state.active())][..], &failure].concat();
        Ok(vec![
            Measure::bits("quotas that differ", &self.quota.device.read()?, &quota),
            Measure::bits("windows that differ", &self.commit_before.read()?, &before),
            Measure::bits("steps that differ", &self.steps.read()?, &each(&|sequence| number(sequence.forwards))),
            Measure::bits("sequences that differ", &self.sequences.device.read()?, &sequences),
            Measure::bits("counters that differ", &self.control.device.read()?, &[want]),
            Measure::bits("words to the host that differ", &told, &word),
        ])
    }
}
