//! advance compared with the reference and with the loops of the host, through the launch code of the library. All numbers are
//! integers but the shares of Dream's schedule, which are one product each: everything must be equal.
#![cfg(feature = "cuda")]

mod common;

use common::{Random, device, on_device, poison, stream};
use dllm_kernels::abi::{
    DLLM_INDEX_FAILED, DLLM_NONE_FAILED, DLLM_SCHEDULE_CARRY_OVER, DLLM_SCHEDULE_DREAM, DLLM_SCHEDULE_LLADA,
    DLLM_SCHEDULE_NONE, dllm_advance_control, dllm_advance_params, dllm_advance_sequence, dllm_progress,
};
use dllm_kernels::decode::{Algorithm, decode};
use dllm_kernels::engine::{DecodeEngine, Pass};
use dllm_kernels::gpu::{Buffer, Pinned, Stream};
use dllm_kernels::ops::advance;
use dllm_kernels::ops::unmask::{self, Outcome, Row, RowTable, Unmask};
use dllm_kernels::reference::advance::{Failure, QuotaSchedule, Sequence, State};
use dllm_kernels::sampling::{CommitRule, Confidence, Prediction};
use dllm_kernels::sampling::{DreamSchedule, llada_quota};
use dllm_kernels::{CacheMode, Config, Family, Options, Policy, Result};
use std::ops::Range;

on_device! {
    equals_the_reference,
    masks_and_ends_at_every_position,
    schedules_are_those_of_the_loops,
    failures,
    lies_do_no_harm,
    numbers_that_cannot_be,
    replays,
    follows_the_loops,
    unmasks_by_itself,
}

const MASK: i32 = 3;
/// Tokens that may end a text.
const ENDS: [i32; 2] = [5, 7];

/// A number of the host as the device has it: what is more than any counts as the most.
fn number(x: usize) -> i32 {
    x.try_into().unwrap_or(i32::MAX)
}

/// Outputs of a launch.
#[derive(Clone, Debug, PartialEq)]
struct Left {
    control: dllm_advance_control,
    sequences: Vec<dllm_advance_sequence>,
    quota: Vec<i32>,
    commit_before: Vec<i32>,
    steps: Vec<i32>,
    progress: dllm_progress,
}

/// Device buffers of advance.
struct Batch {
    stream: Stream,
    control: Buffer<dllm_advance_control>,
    sequences: Buffer<dllm_advance_sequence>,
    tokens: Buffer<i32>,
    outcome: Outcome,
    quota: Buffer<i32>,
    commit_before: Buffer<i32>,
    steps: Buffer<i32>,
    ratios: Buffer<f32>,
    end_tokens: Buffer<i32>,
    progress: Pinned<i32>,
}

impl Batch {
    /// With poison where the host writes nothing.
    fn new(tokens: &[i32], output: &Left, ratios: &[f32], end_tokens: &[i32]) -> Batch {
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

    /// The host's work before the first pass of a block.
    fn begin(&mut self, output: &Left) {
        self.control.write(&[output.control]).unwrap();
        self.sequences.write(&output.sequences).unwrap();
        self.quota.write(&output.quota).unwrap();
        self.commit_before.write(&output.commit_before).unwrap();
        self.steps.write(&output.steps).unwrap();
    }

    /// Outputs that unmask would have written.
    fn unmasked(&mut self, tokens: &[i32], committed: &[i32], failed: &[i32]) {
        self.tokens.write(tokens).unwrap();
        self.outcome.committed.write(committed).unwrap();
        self.outcome.failed.write(failed).unwrap();
    }

    fn launch(&self) -> Result<()> {
        let given = |buffer: u64, len: usize| if len > 0 { buffer } else { 0 };
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
            ratios: given(self.ratios.address(), self.ratios.len()),
            end_tokens: given(self.end_tokens.address(), self.end_tokens.len()),
            progress: self.progress.address(),
            num_sequences: self.sequences.len() as i32,
            num_tokens: self.tokens.len() as i32,
            mask_token: MASK,
            num_end_tokens: self.end_tokens.len() as i32,
            max_ratios: self.ratios.len() as i32,
            reserved: 0,
        };
        // SAFETY: the buffers are as large as the struct says, and stay until the stream has been waited for.
        unsafe { advance::launch_raw(self.stream.device(), self.stream.raw(), &params) }
    }

    fn read(&self) -> Left {
        let control = self.control.read().unwrap()[0];
        let words: Vec<i32> = (0..self.progress.len()).map(|i| self.progress.get(i)).collect();
        Left {
            control,
            sequences: self.sequences.read().unwrap(),
            quota: self.quota.read().unwrap(),
            commit_before: self.commit_before.read().unwrap(),
            steps: self.steps.read().unwrap(),
            progress: bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words)),
        }
    }

    fn advance(&mut self, tokens: &[i32], committed: &[i32], failed: &[i32]) -> Left {
        self.unmasked(tokens, committed, failed);
        self.launch().unwrap();
        self.read()
    }
}

/// A state of the reference in the device's format. `commit_before` is the one of each sequence while it is active.
fn left_of(state: &State, commit_before: &[i32]) -> Left {
    let failure = state.failure;
    let [failed_sequence, failed_position, failed_step] = match failure {
        Some(Failure { sequence, position, step }) => [number(sequence), position, number(step)],
        None => [DLLM_NONE_FAILED; 3],
    };
    let (schedule, steps, num_ratios) = match &state.schedule {
        QuotaSchedule::Unlimited => (DLLM_SCHEDULE_NONE, 0, 0),
        QuotaSchedule::Llada(steps) => (DLLM_SCHEDULE_LLADA, *steps, 0),
        QuotaSchedule::Dream(ratios) => (DLLM_SCHEDULE_DREAM, 0, ratios.len()),
        QuotaSchedule::CarryOver => (DLLM_SCHEDULE_CARRY_OVER, 0, 0),
    };
    let (passes, nfe) = (number(state.passes), number(state.nfe));
    let of = |(sequence, commit_before): (&Sequence, &i32)| dllm_advance_sequence {
        first_token: number(sequence.tokens.start),
        length: number(sequence.tokens.len()),
        generated: number(sequence.generated),
        active_start: number(sequence.active_range.start),
        active_end: number(sequence.active_range.end),
        quota_start: number(sequence.quota_range.start),
        quota_end: number(sequence.quota_range.end),
        commit_before: *commit_before,
        initial_masks: number(sequence.initial_masks),
        per_step: number(sequence.per_step),
        deficit: number(sequence.deficit),
        max_passes: number(sequence.max_passes),
        forwards: number(sequence.forwards),
        active: sequence.quota.is_some().into(),
        ended: sequence.ended.into(),
        reserved: 0,
    };
    let before = |(sequence, before): (&Sequence, &i32)| if sequence.quota.is_some() { *before } else { i32::MIN };
    Left {
        control: dllm_advance_control {
            schedule: schedule as i32,
            steps: number(steps),
            pass: number(state.pass),
            num_ratios: number(num_ratios),
            passes,
            nfe,
            failed_sequence,
            failed_position,
            failed_step,
            reserved: [0; 3],
        },
        sequences: state.sequences.iter().zip(commit_before).map(of).collect(),
        quota: state.sequences.iter().map(|sequence| sequence.quota.map_or(0, number)).collect(),
        commit_before: state.sequences.iter().zip(commit_before).map(before).collect(),
        steps: state.sequences.iter().map(|sequence| number(sequence.forwards)).collect(),
        progress: dllm_progress {
            passes,
            nfe,
            active: number(state.active()),
            failed_sequence,
            failed_position,
            failed_step,
            reserved: [poison(); 2],
        },
    }
}

fn ratios(schedule: &QuotaSchedule) -> &[f32] {
    if let QuotaSchedule::Dream(ratios) = schedule { ratios } else { &[] }
}

fn range(random: &mut Random, len: usize) -> Range<usize> {
    let (a, b) = (random.below(len + 1), random.below(len + 1));
    a.min(b)..a.max(b)
}

/// Any state, and tokens for it.
fn any_state(random: &mut Random) -> (State, Vec<i32>) {
    let mut tokens = vec![];
    let pass = random.below(6);
    let most = [4, 4, 40][random.below(3)];
    let sequences = (0..1 + random.below(most)).map(|_| {
        tokens.resize(tokens.len() + random.below(3), MASK); // between the sequences
        let start = tokens.len();
        let longest = [7, 40, 300][random.below(3)];
        let length = random.below(longest);
        let (masks, ends) = ([0, 1, 30, 90][random.below(4)], [0, 1, 20][random.below(3)]);
        tokens.extend((0..length).map(|_| match random.below(100) {
            p if p < masks => MASK,
            p if p < masks + ends => ENDS[p % 2],
            p => [0, 1, 2, 4][p % 4],
        }));
        let active = random.below(8) > 0;
        Sequence {
            tokens: start..start + length,
            generated: random.below(length + 1),
            active_range: range(random, length),
            quota_range: range(random, length),
            initial_masks: random.below(60),
            per_step: random.below(5),
            deficit: random.below(5),
            max_passes: [pass + 1, pass + 2, usize::MAX, usize::MAX][random.below(4)],
            forwards: random.below(100),
            quota: active.then(|| [random.below(9), i32::MAX as usize][random.below(9) / 8]),
            ended: !active && random.below(2) > 0,
        }
    });
    let sequences = sequences.collect();
    let schedule = match random.below(4) {
        0 => QuotaSchedule::Unlimited,
        1 => QuotaSchedule::Llada(random.below(10)),
        2 => QuotaSchedule::Dream((0..random.below(10)).map(|_| random.number().abs()).collect()),
        _ => QuotaSchedule::CarryOver,
    };
    tokens.push(MASK);
    let failure = Failure { sequence: random.below(9), position: random.below(99) as i32, step: random.below(9) };
    let state = State {
        schedule,
        pass,
        passes: random.below(1000),
        nfe: random.below(1000),
        failure: (random.below(5) == 0).then_some(failure),
        sequences,
        mask: MASK,
        end_tokens: ENDS[..random.below(3)].to_vec(),
    };
    (state, tokens)
}

/// Several launches one after the other, between which tokens are committed at random.
fn equals_the_reference() {
    let random = &mut Random(1);
    for case in 0..400 {
        let (mut state, mut tokens) = any_state(random);
        let commit_before: Vec<i32> = state.sequences.iter().map(|_| random.below(300) as i32).collect();
        let mut batch =
            Batch::new(&tokens, &left_of(&state, &commit_before), ratios(&state.schedule), &state.end_tokens);
        for pass in 0..3 {
            for token in tokens.iter_mut().filter(|token| **token == MASK) {
                *token = [MASK, MASK, MASK, MASK, 1, ENDS[0]][random.below(6)];
            }
            let some = |sequence: &Sequence| random.below(sequence.quota.unwrap_or(0).min(9) + 1);
            let committed: Vec<usize> = state.sequences.iter().map(some).collect();
            let failed = |_: &Sequence| [Some(7), Some(0), Some(DLLM_INDEX_FAILED)].get(random.below(30)).copied();
            let failed: Vec<Option<i32>> = state.sequences.iter().map(failed).map(Option::flatten).collect();

            let numbers: Vec<i32> = committed.iter().copied().map(number).collect();
            let told: Vec<i32> = failed.iter().map(|failed| failed.unwrap_or(DLLM_NONE_FAILED)).collect();
            let output = batch.advance(&tokens, &numbers, &told);
            state.advance(&tokens, &committed, &failed);
            assert_eq!(output, left_of(&state, &commit_before), "case {case}, pass {pass}");
        }
    }
}

fn sequence(tokens: Range<usize>) -> Sequence {
    let len = tokens.len();
    Sequence {
        tokens,
        generated: 0,
        active_range: 0..len,
        quota_range: 0..len,
        initial_masks: len,
        per_step: 0,
        deficit: 0,
        max_passes: usize::MAX,
        forwards: 0,
        quota: Some(0),
        ended: false,
    }
}

fn state(schedule: QuotaSchedule, sequences: Vec<Sequence>) -> State {
    let end_tokens = vec![];
    State { schedule, pass: 0, passes: 0, nfe: 0, failure: None, sequences, mask: MASK, end_tokens }
}

/// Around the 32 positions that a warp takes at once, and the 128 whose loads are under way together.
fn masks_and_ends_at_every_position() {
    let [filler, other] = [1, 2];
    for length in [1, 2, 31, 32, 33, 127, 128, 129, 257] {
        let (mut tokens, mut sequences) = (vec![], vec![]);
        let mut add = |of: &[(usize, i32)], active_range: Range<usize>, generated: usize| {
            let start = tokens.len();
            tokens.extend((0..length).map(|i| [filler, other][i % 2]));
            for (position, token) in of.iter().filter(|(position, _)| *position < length) {
                tokens[start + position] = *token;
            }
            let quota_range = active_range.clone();
            sequences.push(Sequence { active_range, quota_range, generated, ..sequence(start..start + length) });
        };
        for i in 0..length {
            // A mask; end-of-text tokens count after it only.
            for active_range in [0..length, i..i + 1, 0..i, i + 1..length] {
                add(&[(i, MASK)], active_range, i);
            }
            // An end with a mask behind it, before it, far from it.
            for mask in [i + 1, i.wrapping_sub(1), length - 1, 0] {
                add(&[(mask, MASK), (i, ENDS[1])], 0..length, 0);
            }
            add(&[(i, ENDS[0])], 0..length, 0);
            add(&[(i, ENDS[0]), (length - 1, MASK)], 0..length, i + 1);
        }
        let n = sequences.len();
        let mut state = State { end_tokens: ENDS.to_vec(), ..state(QuotaSchedule::Dream(vec![]), sequences) };
        let commit_before = vec![i32::MAX; n];
        let mut batch = Batch::new(&tokens, &left_of(&state, &commit_before), &[], &ENDS);
        let output = batch.advance(&tokens, &vec![0; n], &vec![DLLM_NONE_FAILED; n]);
        state.advance(&tokens, &vec![0; n], &vec![None; n]);
        assert_eq!(output, left_of(&state, &commit_before), "{length} positions");
    }
}

/// Quotas of every pass while nothing is committed, against the functions of the loops.
fn schedules_are_those_of_the_loops() {
    let check = |schedule: QuotaSchedule, masks: Vec<usize>, passes: usize, quota: &dyn Fn(usize, usize) -> usize| {
        let ends: Vec<usize> = masks
            .iter()
            .scan(0, |end, masks| {
                Some({
                    *end += masks;
                    *end
                })
            })
            .collect();
        let sequences = ends.iter().zip(&masks).map(|(end, masks)| sequence(end - masks..*end)).collect();
        let tokens = vec![MASK; *ends.last().unwrap()];
        let n = masks.len();
        let start = left_of(&state(schedule.clone(), sequences), &vec![i32::MAX; n]);
        let mut batch = Batch::new(&tokens, &start, ratios(&schedule), &[]);
        for pass in 1..passes {
            let output = batch.advance(&tokens, &vec![0; n], &vec![DLLM_NONE_FAILED; n]);
            let want: Vec<i32> = masks.iter().map(|masks| number(quota(pass, *masks))).collect();
            assert_eq!(output.quota, want, "{schedule:?}, pass {pass}");
            assert_eq!((output.progress.active, output.progress.passes), (n as i32, pass as i32));
        }
    };
    let masks: Vec<usize> = (1..40).chain([64, 129]).collect();
    for steps in [1, 2, 3, 8, 39, 40] {
        let quota = |pass, masks| if pass < steps { llada_quota(masks, steps, pass) } else { 1 };
        check(QuotaSchedule::Llada(steps), masks.clone(), steps + 3, &quota);
    }
    for (steps, eps) in [(1, 1e-3), (2, 1e-3), (3, 0.5), (8, 1e-3), (32, 1e-3), (32, 0.2)] {
        let schedule = DreamSchedule::new(steps, eps);
        let shares: Vec<f32> = schedule.timesteps().windows(2).map(|t| 1.0 - t[1] / t[0]).collect();
        let masks = (1..100).chain([1000, 4097]).collect();
        check(QuotaSchedule::Dream(shares), masks, steps + 3, &|pass, masks| schedule.quota(pass, masks));
    }
    check(QuotaSchedule::Unlimited, masks, 3, &|_, _| usize::MAX);
}

/// The lowest sequence of the first launch in which one fails, in whichever warp; until the host takes it back.
fn failures() {
    let n = 40;
    let active = |s: usize| s != 2;
    let sequences = (0..n).map(|s| Sequence { forwards: 10 + s, quota: active(s).then_some(1), ..sequence(s..s + 1) });
    let start = left_of(&state(QuotaSchedule::Unlimited, sequences.collect()), &vec![i32::MAX; n]);
    let tokens = vec![MASK; n];
    let mut batch = Batch::new(&tokens, &start, &[], &[]);
    let mut launch = |failing: &[(usize, i32)], take_back: bool| {
        let mut failed = vec![DLLM_NONE_FAILED; n];
        failing.iter().for_each(|(s, position)| failed[*s] = *position);
        if take_back {
            let none = DLLM_NONE_FAILED;
            let control = dllm_advance_control {
                failed_sequence: none,
                failed_position: none,
                failed_step: none,
                ..batch.read().control
            };
            batch.control.write(&[control]).unwrap();
        }
        let output = batch.advance(&tokens, &vec![0; n], &failed);
        let dllm_progress { active, failed_sequence, failed_position, failed_step, .. } = output.progress;
        (active, failed_sequence, failed_position, failed_step)
    };
    assert_eq!(launch(&[(2, 5)], false), (39, -1, -1, -1), "one that takes no part");
    assert_eq!(launch(&[(39, 4), (18, 0), (35, 9)], false), (36, 18, 0, 29));
    assert_eq!(launch(&[(0, 3), (18, 7)], false), (35, 18, 0, 29), "the first stays");
    assert_eq!(launch(&[(0, 3)], true), (35, -1, -1, -1), "a failure is told once");
    assert_eq!(launch(&[(17, 6), (16, DLLM_INDEX_FAILED)], true), (33, 16, DLLM_INDEX_FAILED, 30));
}

/// Ranges as they count: within the tokens.
fn honest(lying: &dllm_advance_sequence, num_tokens: usize) -> Sequence {
    let within = |x: i32, end: usize| x.clamp(0, number(end)) as usize;
    let start = within(lying.first_token, num_tokens);
    let len = within(lying.length, num_tokens - start);
    let range = |start: i32, end: i32| within(start, len)..within(end, len).max(within(start, len));
    Sequence {
        tokens: start..start + len,
        generated: within(lying.generated, len),
        active_range: range(lying.active_start, lying.active_end),
        quota_range: range(lying.quota_start, lying.quota_end),
        initial_masks: 0,
        per_step: 0,
        deficit: 0,
        max_passes: usize::MAX,
        forwards: 0,
        quota: Some(0),
        ended: false,
    }
}

/// Ranges that leave the tokens are read as far as there are tokens.
fn lies_do_no_harm() {
    let random = &mut Random(3);
    for case in 0..200 {
        let num_tokens = 1 + random.below(200);
        let tokens: Vec<i32> = (0..num_tokens).map(|_| [MASK, 1, 2, ENDS[0]][random.below(4)]).collect();
        let mut any = || {
            let near = num_tokens as i32;
            [0, 1, 2, near / 2, near - 1, near, near + 1, -1, i32::MIN, i32::MAX, i32::MAX - 31][random.below(11)]
        };
        let lying = (0..20).map(|_| dllm_advance_sequence {
            first_token: any(),
            length: any(),
            generated: any(),
            active_start: any(),
            active_end: any(),
            quota_start: any(),
            quota_end: any(),
            commit_before: 1,
            max_passes: i32::MAX,
            active: 1,
            ..Default::default()
        });
        let lying: Vec<dllm_advance_sequence> = lying.collect();
        let sequences = lying.iter().map(|lying| honest(lying, num_tokens)).collect();
        let end_tokens = if case % 2 == 0 { ENDS.to_vec() } else { vec![] };
        let mut state = State { end_tokens, ..state(QuotaSchedule::Dream(vec![]), sequences) };
        let start = Left { sequences: lying, ..left_of(&state, &[1; 20]) };
        let mut batch = Batch::new(&tokens, &start, &[], &state.end_tokens);
        let output = batch.advance(&tokens, &[0; 20], &[DLLM_NONE_FAILED; 20]);
        state.advance(&tokens, &[0; 20], &[None; 20]);
        let want = left_of(&state, &[1; 20]);
        assert_eq!(output.progress, want.progress, "case {case}");
        assert_eq!((output.quota, output.commit_before, output.steps), (want.quota, want.commit_before, want.steps));
    }
}

/// Counters wrap, nothing divides by zero or leaves the ratios, and quotas stay within the masks.
fn numbers_that_cannot_be() {
    const MIN: i32 = i32::MIN;
    const MAX: i32 = i32::MAX;
    const SHARES: [f32; 6] = [f32::NAN, f32::INFINITY, -1.0, f32::MAX, 0.5, 0.5];
    let tokens = [MASK; 10];
    // One sequence of ten masks; the values in quota, committed and failed; the quota of the next pass.
    let quota = |change: &dyn Fn(&mut dllm_advance_control, &mut dllm_advance_sequence, &mut [i32; 3])| {
        let mut output = left_of(&state(QuotaSchedule::Unlimited, vec![sequence(0..10)]), &[MAX]);
        let mut unmask = [0, 0, DLLM_NONE_FAILED];
        change(&mut output.control, &mut output.sequences[0], &mut unmask);
        output.quota = vec![unmask[0]];
        let before = output.clone();
        let mut batch = Batch::new(&tokens, &output, &SHARES, &[]);
        let output = batch.advance(&tokens, &[unmask[1]], &[unmask[2]]);
        let wraps = |before: i32, after: i32| assert_eq!(before.wrapping_add(1), after);
        wraps(before.control.pass, output.control.pass);
        wraps(before.control.passes, output.progress.passes);
        wraps(before.control.nfe, output.progress.nfe);
        wraps(before.sequences[0].forwards, output.steps[0]);
        (output.sequences[0].active == 1).then_some(output.quota[0])
    };
    for schedule in [MIN, -1, 4, MAX] {
        assert_eq!(quota(&|control, _, _| control.schedule = schedule), Some(MAX));
    }
    for (steps, pass, initial_masks, want) in [
        (0, 0, 7, 1),
        (0, MAX, 7, 1),
        (-1, 0, 7, 1),
        (MIN, MAX, 7, 1),
        (-1, MAX, MIN, 1),
        (4, 0, MIN, 0),
        (4, MAX, 7, 2),
        (4, MAX, MAX, MAX / 4 + 1),
    ] {
        let got = quota(&|control, sequence, _| {
            (control.schedule, control.steps, control.pass) = (DLLM_SCHEDULE_LLADA as i32, steps, pass);
            sequence.initial_masks = initial_masks;
        });
        assert_eq!(got, Some(want), "steps {steps}, pass {pass}, masked {initial_masks}");
    }
    // NaN and what is negative are shares of nothing.
    for (num_ratios, pass, want) in [
        (6, -1, 0),
        (6, 0, 10),
        (6, 1, 0),
        (6, 2, 10),
        (6, 3, 5),
        (6, 4, 10),
        (MAX, 3, 5),
        (MAX, 4, 10),
        (MAX, 5, 10),
        (MAX, MAX - 1, 10),
        (6, MAX, 10),
        (6, -9, 10),
        (MIN, 0, 10),
        (0, -1, 10),
        (1, -1, 10),
    ] {
        let got = quota(&|control, sequence, _| {
            (control.schedule, control.num_ratios, control.pass) = (DLLM_SCHEDULE_DREAM as i32, num_ratios, pass);
            // At the last pass that there is no limit is none.
            sequence.max_passes = MAX;
        });
        assert_eq!(got, if pass == MAX - 1 { None } else { Some(want) }, "{num_ratios} ratios, pass {pass}");
    }
    for (per_step, old, committed, want) in [
        (MAX, MAX, 0, 10),
        (MIN, 5, 2, 3),
        (2, MAX, MIN, 10),
        (2, 5, MAX, 2),
        (2, MIN, 0, 2),
        (4, 5, -1, 9),
        (MIN, MIN, MAX, 0),
    ] {
        let got = quota(&|control, sequence, unmask| {
            control.schedule = DLLM_SCHEDULE_CARRY_OVER as i32;
            sequence.per_step = per_step;
            *unmask = [old, committed, DLLM_NONE_FAILED];
        });
        assert_eq!(got, Some(want), "per step {per_step}, {committed} of {old}");
    }
    assert_eq!(quota(&|_, sequence, _| sequence.max_passes = MIN), None);
    for (forwards, step) in [(MAX, MAX), (MIN, MIN), (-1, -1)] {
        let mut output = left_of(&state(QuotaSchedule::Unlimited, vec![sequence(0..10)]), &[MAX]);
        output.sequences[0].forwards = forwards;
        (output.control.passes, output.control.nfe) = (MAX, MAX);
        let output = Batch::new(&tokens, &output, &[], &[]).advance(&tokens, &[0], &[MIN]);
        let dllm_progress { passes, nfe, failed_position, failed_step, .. } = output.progress;
        assert_eq!((passes, nfe, failed_position, failed_step), (MIN, MIN, MIN, step));
    }
}

/// One capture; each replay follows what unmask left.
fn replays() {
    device().preload().unwrap();
    let random = &mut Random(5);
    let sequences =
        (0..3).map(|s| Sequence { per_step: 2, max_passes: 3, quota: Some(2), ..sequence(s * 6..s * 6 + 6) });
    let mut state = state(QuotaSchedule::CarryOver, sequences.collect());
    let mut tokens = vec![MASK; 18];
    let mut batch = Batch::new(&tokens, &left_of(&state, &[6; 3]), &[], &[]);
    let graph = batch.stream.capture(|| batch.launch()).unwrap();
    let mut passes = 0;
    while state.active() > 0 {
        let mut committed = [0; 3];
        for (s, committed) in committed.iter_mut().enumerate() {
            let Some(quota) = state.sequences[s].quota else { continue };
            let masks = tokens[s * 6..s * 6 + 6].iter_mut().filter(|token| **token == MASK);
            for token in masks.take(random.below(quota.min(6)) + 1) {
                *token = 1;
                *committed += 1;
            }
        }
        batch.unmasked(&tokens, &committed.map(number), &[DLLM_NONE_FAILED; 3]);
        // SAFETY: the buffers are still there, and of this stream.
        unsafe { graph.launch() }.unwrap();
        state.advance(&tokens, &committed, &[None; 3]);
        assert_eq!(batch.read(), left_of(&state, &[6; 3]));
        passes += 1;
    }
    assert!(passes >= 3 && !tokens.contains(&MASK), "{passes} passes: {tokens:?}");
}

fn masks(tokens: &[u32]) -> usize {
    tokens.iter().filter(|token| **token == MASK as u32).count()
}

/// A network that commits at random, and knows from advance what the loop will ask of it next.
struct Follower<'a> {
    options: &'a Options,
    rule: Algorithm,
    prompt_lens: Vec<usize>,
    random: Random,
    batch: Batch,
    /// Output of the last launch, or the host's state at the start of a block.
    output: Left,
    block: usize,
    next_block: usize,
    steps: usize,
}

impl Follower<'_> {
    fn new<'a>(options: &'a Options, rule: Algorithm, prompts: &[Vec<u32>], seed: u64) -> Follower<'a> {
        let steps = options.steps() / (options.gen_length / options.block_length());
        let schedule = DreamSchedule::new(steps.max(1), options.eps);
        let shares: Vec<f32> = schedule.timesteps().windows(2).map(|t| 1.0 - t[1] / t[0]).collect();
        let fixed = options.policy == Policy::Fixed;
        let schedule = match rule {
            Algorithm::Llada | Algorithm::FastLlada if fixed => QuotaSchedule::Llada(steps),
            Algorithm::Dream | Algorithm::DreamBlock if fixed => QuotaSchedule::Dream(shares.clone()),
            Algorithm::DreamThreshold => QuotaSchedule::CarryOver,
            _ => QuotaSchedule::Unlimited,
        };
        let mut end = 0;
        let sequences = prompts.iter().map(|prompt| {
            let start = end;
            end += prompt.len() + options.gen_length;
            Sequence { generated: prompt.len(), quota: None, ..sequence(start..end) }
        });
        let output = left_of(&state(schedule, sequences.collect()), &vec![i32::MAX; prompts.len()]);
        let end_tokens = if options.early_stop { &ENDS[..] } else { &[] };
        let batch = Batch::new(&vec![0; end], &output, &shares, end_tokens);
        let prompt_lens = prompts.iter().map(Vec::len).collect();
        Follower { options, rule, prompt_lens, random: Random(seed), batch, output, block: 0, next_block: 0, steps }
    }

    fn active_range(&self, s: usize, block: usize) -> Range<usize> {
        let (prompt, size) = (self.prompt_lens[s], self.options.block_length());
        match self.rule {
            Algorithm::Dream | Algorithm::DreamThreshold => 0..prompt + self.options.gen_length,
            _ => prompt + block * size..prompt + (block + 1) * size,
        }
    }

    /// The next block that has something to do, as the host begins it.
    fn begin(&mut self, tokens: &[Vec<u32>]) {
        let sequences = 0..tokens.len();
        let takes_part = |d: &Self, s: usize, block: usize| {
            d.output.sequences[s].ended == 0 && masks(&tokens[s][d.active_range(s, block)]) > 0
        };
        let blocks = self.options.gen_length / self.options.block_length();
        let next = (self.next_block..blocks).find(|block| sequences.clone().any(|s| takes_part(self, s, *block)));
        self.block = next.expect("a block with a mask");
        self.next_block = self.block + 1;
        for s in sequences {
            let (active_range, initial_masks) =
                (self.active_range(s, self.block), masks(&tokens[s][self.active_range(s, self.block)]));
            let max_passes = match self.rule {
                Algorithm::Llada | Algorithm::Dream => self.steps,
                Algorithm::DreamThreshold => self.options.steps.unwrap_or(initial_masks),
                Algorithm::FastLlada | Algorithm::DreamBlock => usize::MAX,
            };
            let schedule = DreamSchedule::new(self.steps.max(1), self.options.eps);
            let quota = match (self.rule, self.options.policy) {
                (Algorithm::DreamBlock, _) => 1,
                (Algorithm::Llada | Algorithm::FastLlada, Policy::Fixed) => llada_quota(initial_masks, self.steps, 0),
                (Algorithm::Dream, _) => schedule.quota(0, initial_masks),
                (Algorithm::DreamThreshold, _) => initial_masks / max_passes,
                _ => usize::MAX,
            };
            let commit_before = if self.rule == Algorithm::DreamBlock { active_range.start + 1 } else { usize::MAX };
            let active = takes_part(self, s, self.block);
            let old = self.output.sequences[s];
            self.output.sequences[s] = dllm_advance_sequence {
                active_start: number(active_range.start),
                active_end: number(active_range.end),
                quota_start: number(active_range.start),
                quota_end: number(active_range.end),
                initial_masks: number(initial_masks),
                per_step: if self.rule == Algorithm::DreamThreshold { number(initial_masks / max_passes) } else { 0 },
                deficit: 0,
                max_passes: number(max_passes),
                active: active.into(),
                ..old
            };
            self.output.quota[s] = if active { number(quota) } else { 0 };
            self.output.commit_before[s] = if active { number(commit_before) } else { i32::MIN };
            self.output.steps[s] = old.forwards;
        }
        self.output.control.pass = 0;
        self.batch.begin(&self.output);
    }
}

impl DecodeEngine for Follower<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        if self.output.sequences.iter().all(|sequence| sequence.active == 0) {
            self.begin(tokens);
        }
        for s in 0..tokens.len() {
            let asked = pass.candidates.iter().find(|group| group.sequence == s).map(|group| {
                let quota = match group.commit_rule {
                    CommitRule::Quota(quota) => number(quota),
                    CommitRule::ThresholdTopN { top_n: among, .. } => number(among),
                    CommitRule::Threshold(_) | CommitRule::Factor(_) => i32::MAX,
                };
                let last = group.positions.last().expect("a mask");
                assert!(self.active_range(s, self.block).contains(last), "a pass of another block");
                (quota, number(group.commit_before), number(group.step))
            });
            let known = (self.output.quota[s], self.output.commit_before[s], self.output.steps[s]);
            let Left { control, sequences, .. } = &self.output;
            match asked {
                Some(asked) => assert_eq!((asked, 1), (known, sequences[s].active), "{control:?} {:?}", sequences[s]),
                None => assert_eq!((known.0, known.1, sequences[s].active), (0, i32::MIN, 0), "{control:?}"),
            }
        }

        let mut flat: Vec<i32> = tokens.iter().flatten().map(|token| *token as i32).collect();
        let (mut committed, mut verdicts) = (vec![0; tokens.len()], vec![]);
        for group in pass.candidates {
            let s = group.sequence;
            let eligible = group.positions.partition_point(|position| *position < group.commit_before);
            let most = eligible.min(self.output.quota[s] as usize);
            // A fixed quota is used up; the other policies commit one at least.
            let count = match group.commit_rule {
                CommitRule::Quota(_) => most,
                _ => (1 + self.random.below(most.max(1))).min(most),
            };
            let taken = self.random.distinct(count, eligible);
            for (i, position) in group.positions.iter().enumerate() {
                let token = [1, 1, 2, 2, 4, 4, 6, ENDS[0]][self.random.below(8)];
                let commit = taken.contains(&(i as i32));
                if commit {
                    flat[self.output.sequences[s].first_token as usize + position] = token;
                    committed[s] += 1;
                }
                verdicts.push(Prediction { token: token as u32, confidence: 0.5, commit });
            }
        }
        let passes = self.output.control.passes;
        self.output = self.batch.advance(&flat, &committed, &vec![DLLM_NONE_FAILED; tokens.len()]);
        let progress = self.output.progress;
        let active: i32 = self.output.sequences.iter().map(|sequence| sequence.active).sum();
        assert_eq!((progress.passes, progress.nfe, progress.active), (passes + 1, passes + 1, active));
        Ok(verdicts)
    }
}

fn config(family: Family) -> Config {
    let eos_token_ids = ENDS.iter().map(|token| *token as u32).collect();
    Config { family, mask_token_id: MASK as u32, eos_token_ids, vocab_size: 16, ..Config::shape("mid").unwrap() }
}

/// Every rule, with blocks and without.
fn rules() -> Vec<(Family, Options)> {
    let mut all = vec![];
    let mut add = |family, block_length: usize, steps: Option<usize>, cache, policy| {
        for early_stop in [false, true] {
            let block_length = Some(block_length);
            all.push((
                family,
                Options { gen_length: 12, block_length, steps, cache, policy, early_stop, ..Options::default() },
            ));
        }
    };
    for steps in [3, 6, 15, 24] {
        for cache in [CacheMode::None, CacheMode::Dual] {
            add(Family::Llada, 4, Some(steps), cache, Policy::Fixed);
            add(Family::Dream, 4, Some(steps), cache, Policy::Fixed);
        }
        add(Family::Dream, 12, Some(steps), CacheMode::None, Policy::Fixed);
    }
    for policy in [Policy::Threshold(0.9), Policy::Factor(1.0)] {
        for family in [Family::Llada, Family::Dream] {
            add(family, 6, None, CacheMode::Prefix, policy);
        }
    }
    for steps in [None, Some(1), Some(3), Some(4), Some(12)] {
        add(Family::Dream, 12, steps, CacheMode::None, Policy::Threshold(0.9));
    }
    all
}

/// Whole decodes: what advance leaves is what the host's loop asks for in the next pass.
fn follows_the_loops() {
    let random = &mut Random(7);
    let mut passes = 0;
    for (family, options) in rules() {
        let config = config(family);
        let rule = options.algorithm(family);
        for seed in 1..6 {
            let prompts: Vec<Vec<u32>> = (0..1 + random.below(4))
                .map(|_| (0..1 + random.below(6)).map(|_| [1, 2, 1, 2, MASK as u32, 5][random.below(6)]).collect())
                .collect();
            // Dream's threshold wants its masks to be a multiple of its steps.
            let whole = |prompt: &Vec<u32>| prompt.iter().map(|t| if *t == MASK as u32 { 1 } else { *t }).collect();
            let prompts = match options.validate(&config, &prompts) {
                Ok(()) => prompts,
                Err(_) => prompts.iter().map(whole).collect(),
            };
            options.validate(&config, &prompts).unwrap();
            let mut follower = Follower::new(&options, rule, &prompts, seed);
            let decoded = decode(&mut follower, &config, &prompts, &options, None, &mut ()).unwrap();
            let progress = follower.output.progress;
            assert_eq!((progress.nfe, progress.active), (number(decoded.nfe), 0), "{rule:?} {options:?}");
            passes += decoded.nfe;
        }
    }
    assert!(passes > 1000, "{passes} passes");
}

/// A network whose logits never change, and how the host unmasks with them.
struct Table {
    logits: Vec<Vec<f32>>,
    vocab_size: usize,
}

impl DecodeEngine for Table {
    fn step(&mut self, _: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let row = |s: usize, position: usize| &self.logits[s][position * self.vocab_size..][..self.vocab_size];
        let rows = pass.candidates.iter().flat_map(|group| group.positions.iter().map(|p| row(group.sequence, *p)));
        let mut logits: Vec<f32> = rows.flatten().copied().collect();
        dllm_kernels::sampling::sample(&mut logits, self.vocab_size, pass.candidates, pass.sampling)
    }
}

/// unmask and advance in one graph, replayed until the host reads that the block is done: the tokens and the passes are
/// those of the host's loop. Replays after the end change nothing, whatever the policy.
fn unmasks_by_itself() {
    device().preload().unwrap();
    let random = &mut Random(11);
    let vocab_size = 16;
    let policies = [Policy::Fixed, Policy::Threshold(0.4), Policy::Factor(0.9)];
    let tempered = policies.map(|policy| (policy, 0.7));
    for (policy, temperature) in policies.map(|policy| (policy, 0.0)).into_iter().chain(tempered) {
        for early_stop in [false, true] {
            let (gen_length, block_length, steps, cache) = (12, Some(12), Some(5), CacheMode::None);
            let defaults = Options::default();
            let options = Options {
                gen_length,
                block_length,
                steps,
                cache,
                policy,
                temperature,
                early_stop,
                seed: 3,
                ..defaults
            };
            let config = Config { vocab_size, ..config(Family::Llada) };
            let prompts = [vec![1, 2], vec![4; 5], vec![2]];
            let logits = |prompt: &Vec<u32>| {
                (0..(prompt.len() + gen_length) * vocab_size).map(|_| 2.0 * random.normal()).collect()
            };
            let mut table = Table { logits: prompts.iter().map(logits).collect(), vocab_size };
            options.validate(&config, &prompts).unwrap();
            let want = decode(&mut table, &config, &prompts, &options, None, &mut ()).unwrap();

            let (mut tokens, mut sequences, mut rows) = (vec![], vec![], vec![]);
            for prompt in &prompts {
                let start = tokens.len();
                tokens.extend(prompt.iter().map(|token| *token as i32).chain([MASK; 12]));
                let active_range = prompt.len()..prompt.len() + gen_length;
                let row = |position| Row { token: start + position, logits_row: start + position, position };
                rows.push(active_range.clone().map(row).collect());
                let first = if policy == Policy::Fixed { llada_quota(gen_length, 5, 0) } else { usize::MAX };
                sequences.push(Sequence {
                    generated: active_range.start,
                    initial_masks: gen_length,
                    quota_range: active_range.clone(),
                    active_range,
                    quota: Some(first),
                    max_passes: if policy == Policy::Fixed { 5 } else { usize::MAX },
                    ..sequence(start..tokens.len())
                });
            }
            let schedule = if policy == Policy::Fixed { QuotaSchedule::Llada(5) } else { QuotaSchedule::Unlimited };
            let end_tokens = if early_stop { &ENDS[..] } else { &[] };
            let start = left_of(&state(schedule, sequences), &[i32::MAX; 3]);
            let mut batch = Batch::new(&tokens, &start, &[], end_tokens);
            let stream = batch.stream.clone();
            let table = stream.upload(&table.logits.concat()).unwrap();
            let rows = RowTable::new(&stream, &rows).unwrap();
            let mut workspace = unmask::workspace(&stream, &rows, vocab_size).unwrap();
            let graph = stream.capture(|| {
                let quota = &batch.quota;
                let policy = match policy {
                    Policy::Fixed => unmask::Policy::Fixed(quota),
                    Policy::Threshold(t) => unmask::Policy::Threshold { threshold: t as f32, top_n: Some(quota) },
                    Policy::Factor(factor) => unmask::Policy::Factor(factor as f32),
                    other => panic!("{other:?} has no counterpart"),
                };
                let rule = unmask::UnmaskConfig {
                    confidence: Confidence::Probability,
                    policy,
                    temperature: temperature as f32,
                    tempered_confidence: false,
                    cfg_scale: 0.0,
                    alg_temp: 0.0,
                    seed: 3,
                    mask_token: MASK as u32,
                };
                let pass = Unmask {
                    logits: &table,
                    uncond_logits: None,
                    vocab_size,
                    logits_stride: vocab_size,
                    rows: &rows,
                    tokens: &mut batch.tokens,
                    commit_before: Some(&batch.commit_before),
                    steps: Some(&batch.steps),
                    min_logit: None,
                    outcome: &mut batch.outcome,
                    workspace: &mut workspace,
                };
                unmask::launch(&stream, pass, &rule)?;
                batch.launch()
            });
            let graph = graph.unwrap();
            let replay = || {
                // SAFETY: the buffers are still there, and of this stream.
                unsafe { graph.launch() }.unwrap();
                (batch.read().progress, batch.tokens.read().unwrap())
            };
            let (progress, tokens) = loop {
                let (progress, tokens) = replay();
                if progress.active == 0 {
                    break (progress, tokens);
                }
            };
            assert_eq!(number(want.nfe), progress.nfe, "{policy:?} {temperature} {early_stop}");
            assert_eq!((progress.passes, progress.failed_sequence), (progress.nfe, DLLM_NONE_FAILED));
            for (sequence, (want, prompt)) in batch.read().sequences.iter().zip(want.tokens.iter().zip(&prompts)) {
                let got = &tokens[sequence.first_token as usize + prompt.len()..][..want.len()];
                assert!(got.iter().zip(want).all(|(got, want)| *got == *want as i32), "{policy:?}: {got:?} {want:?}");
                assert!(want.len() == gen_length || sequence.ended == 1, "{policy:?}: {want:?}");
            }
            let (after, same) = replay();
            assert_eq!((after.nfe, after.passes, &same), (progress.nfe, progress.passes + 1, &tokens), "{policy:?}");
        }
    }
}
