//! Failures, and device memory that holds invalid ranges and numbers.

use super::case::{Batch, ENDS, MASK, Output, new_state, output_of, saturating_i32};
use crate::common::{Random, on_device};
use dllm_kernels::abi::{
    DLLM_INDEX_FAILED, DLLM_NONE_FAILED, DLLM_SCHEDULE_CARRY_OVER, DLLM_SCHEDULE_DREAM, DLLM_SCHEDULE_LLADA,
    dllm_advance_control, dllm_advance_sequence, dllm_progress,
};
use dllm_kernels::reference::advance::{Sequence, State};
use dllm_kernels::sampling::QuotaSchedule;

on_device! {
    failures,
    ranges_outside_the_tokens,
    invalid_llada_schedules,
    invalid_dream_schedules,
    invalid_carry_over_schedules,
    counters_wrap,
}

/// The reported failure is that of the lowest sequence in the first launch with a failure, until the host clears it.
fn failures() {
    let n = 40;
    let active = |s: usize| s != 2;
    let sequences =
        (0..n).map(|s| Sequence { forwards: 10 + s, quota: active(s).then_some(1), ..Sequence::new(s..s + 1) });
    let start = output_of(&new_state(QuotaSchedule::Unlimited, sequences.collect()), &vec![i32::MAX; n]);
    let tokens = vec![MASK; n];
    let mut batch = Batch::new(&tokens, &start, &[], &[]);
    let mut launch = |failing: &[(usize, i32)], clear: bool| {
        let mut failed = vec![DLLM_NONE_FAILED; n];
        failing.iter().for_each(|(s, position)| failed[*s] = *position);
        if clear {
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
    assert_eq!(launch(&[(2, 5)], false), (39, -1, -1, -1), "an inactive sequence");
    assert_eq!(launch(&[(39, 4), (18, 0), (35, 9)], false), (36, 18, 0, 29));
    assert_eq!(launch(&[(0, 3), (18, 7)], false), (35, 18, 0, 29), "the first failure stays");
    assert_eq!(launch(&[(0, 3)], true), (35, -1, -1, -1), "a failure is reported once");
    assert_eq!(launch(&[(17, 6), (16, DLLM_INDEX_FAILED)], true), (33, 16, DLLM_INDEX_FAILED, 30));
}

/// Returns the sequence whose ranges are those of `invalid`, clamped to the tokens.
fn clamped(invalid: &dllm_advance_sequence, num_tokens: usize) -> Sequence {
    let within = |x: i32, end: usize| x.clamp(0, saturating_i32(end)) as usize;
    let start = within(invalid.first_token, num_tokens);
    let len = within(invalid.length, num_tokens - start);
    let range = |start: i32, end: i32| within(start, len)..within(end, len).max(within(start, len));
    Sequence {
        generated: within(invalid.generated, len),
        active_range: range(invalid.active_start, invalid.active_end),
        quota_range: range(invalid.quota_start, invalid.quota_end),
        ..Sequence::new(start..start + len)
    }
}

/// Ranges that exceed the tokens are clamped to them.
fn ranges_outside_the_tokens() {
    let random = &mut Random(3);
    for case in 0..200 {
        let num_tokens = 1 + random.below(200);
        let tokens: Vec<i32> = (0..num_tokens).map(|_| [MASK, 1, 2, ENDS[0]][random.below(4)]).collect();
        let mut bound = || {
            let end = num_tokens as i32;
            [0, 1, 2, end / 2, end - 1, end, end + 1, -1, i32::MIN, i32::MAX, i32::MAX - 31][random.below(11)]
        };
        let invalid = (0..20).map(|_| dllm_advance_sequence {
            first_token: bound(),
            length: bound(),
            generated: bound(),
            active_start: bound(),
            active_end: bound(),
            quota_start: bound(),
            quota_end: bound(),
            commit_before: 1,
            max_passes: i32::MAX,
            active: 1,
            ..Default::default()
        });
        let invalid: Vec<dllm_advance_sequence> = invalid.collect();
        let sequences = invalid.iter().map(|invalid| clamped(invalid, num_tokens)).collect();
        let end_tokens = if case % 2 == 0 { ENDS.to_vec() } else { vec![] };
        let mut state = State { end_tokens, ..new_state(QuotaSchedule::Dream(vec![]), sequences) };
        let start = Output { sequences: invalid, ..output_of(&state, &[1; 20]) };
        let mut batch = Batch::new(&tokens, &start, &[], &state.end_tokens);
        let output = batch.advance(&tokens, &[0; 20], &[DLLM_NONE_FAILED; 20]);
        state.advance(&tokens, &[0; 20], &[None; 20]);
        let want = output_of(&state, &[1; 20]);
        assert_eq!(output.progress, want.progress, "case {case}");
        assert_eq!((output.quota, output.commit_before, output.steps), (want.quota, want.commit_before, want.steps));
    }
}

const MIN: i32 = i32::MIN;
const MAX: i32 = i32::MAX;
const RATIOS: [f32; 6] = [f32::NAN, f32::INFINITY, -1.0, f32::MAX, 0.5, 0.5];

/// Returns the next quota of one sequence of ten masks, after a change of control, sequence, and of quota, committed and
/// failed.
fn next_quota(change: impl Fn(&mut dllm_advance_control, &mut dllm_advance_sequence, &mut [i32; 3])) -> Option<i32> {
    let tokens = [MASK; 10];
    let mut output = output_of(&new_state(QuotaSchedule::Unlimited, vec![Sequence::new(0..10)]), &[MAX]);
    let mut unmask = [0, 0, DLLM_NONE_FAILED];
    change(&mut output.control, &mut output.sequences[0], &mut unmask);
    output.quota = vec![unmask[0]];
    let before = output.clone();
    let mut batch = Batch::new(&tokens, &output, &RATIOS, &[]);
    let output = batch.advance(&tokens, &[unmask[1]], &[unmask[2]]);
    let assert_incremented = |before: i32, after: i32| assert_eq!(before.wrapping_add(1), after);
    assert_incremented(before.control.pass, output.control.pass);
    assert_incremented(before.control.passes, output.progress.passes);
    assert_incremented(before.control.nfe, output.progress.nfe);
    assert_incremented(before.sequences[0].forwards, output.steps[0]);
    (output.sequences[0].active == 1).then_some(output.quota[0])
}

/// LLaDA's schedule and unknown schedules: nothing divides by zero.
fn invalid_llada_schedules() {
    for schedule in [MIN, -1, 4, MAX] {
        assert_eq!(next_quota(|control, _, _| control.schedule = schedule), Some(MAX));
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
        let got = next_quota(|control, sequence, _| {
            (control.schedule, control.steps, control.pass) = (DLLM_SCHEDULE_LLADA as i32, steps, pass);
            sequence.initial_masks = initial_masks;
        });
        assert_eq!(got, Some(want), "steps {steps}, pass {pass}, masked {initial_masks}");
    }
}

/// Dream's schedule: nothing is read outside the ratios, and quotas stay within the masks.
fn invalid_dream_schedules() {
    // The quota of a ratio that is NaN or negative is 0.
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
        let got = next_quota(|control, sequence, _| {
            (control.schedule, control.num_ratios, control.pass) = (DLLM_SCHEDULE_DREAM as i32, num_ratios, pass);
            // The number of passes is not limited, but pass i32::MAX - 1 is the last.
            sequence.max_passes = MAX;
        });
        assert_eq!(got, if pass == MAX - 1 { None } else { Some(want) }, "{num_ratios} ratios, pass {pass}");
    }
}

/// The carry-over schedule: quotas stay within the masks.
fn invalid_carry_over_schedules() {
    for (per_step, old, committed, want) in [
        (MAX, MAX, 0, 10),
        (MIN, 5, 2, 3),
        (2, MAX, MIN, 10),
        (2, 5, MAX, 2),
        (2, MIN, 0, 2),
        (4, 5, -1, 9),
        (MIN, MIN, MAX, 0),
    ] {
        let got = next_quota(|control, sequence, unmask| {
            control.schedule = DLLM_SCHEDULE_CARRY_OVER as i32;
            sequence.per_step = per_step;
            *unmask = [old, committed, DLLM_NONE_FAILED];
        });
        assert_eq!(got, Some(want), "per step {per_step}, {committed} of {old}");
    }
    assert_eq!(next_quota(|_, sequence, _| sequence.max_passes = MIN), None);
}

/// Counters wrap.
fn counters_wrap() {
    let tokens = [MASK; 10];
    for (forwards, step) in [(MAX, MAX), (MIN, MIN), (-1, -1)] {
        let mut output = output_of(&new_state(QuotaSchedule::Unlimited, vec![Sequence::new(0..10)]), &[MAX]);
        output.sequences[0].forwards = forwards;
        (output.control.passes, output.control.nfe) = (MAX, MAX);
        let output = Batch::new(&tokens, &output, &[], &[]).advance(&tokens, &[0], &[MIN]);
        let dllm_progress { passes, nfe, failed_position, failed_step, .. } = output.progress;
        assert_eq!((passes, nfe, failed_position, failed_step), (MIN, MIN, MIN, step));
    }
}
