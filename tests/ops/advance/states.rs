//! States of a batch, compared with the reference after every launch.

use super::case::{Batch, ENDS, MASK, Output, new_state, output_of, ratios, saturating_i32};
use crate::common::{Random, device, on_device};
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use dllm_kernels::reference::advance::{Failure, Sequence, State};
use dllm_kernels::sampling::{DreamSchedule, QuotaSchedule, llada_quota};
use std::ops::Range;

on_device! {
    equals_the_reference,
    masks_and_ends_at_every_position,
    schedules_equal_the_loops,
    a_failed_row_ends_its_sequence,
    replays,
}

/// Returns a random range within `len`, which may be empty.
fn range(random: &mut Random, len: usize) -> Range<usize> {
    let (a, b) = (random.below(len + 1), random.below(len + 1));
    a.min(b)..a.max(b)
}

/// Returns a random state, and tokens for it.
fn random_state(random: &mut Random) -> (State, Vec<i32>) {
    let mut tokens = vec![];
    let pass = random.below(6);
    let max_sequences = [4, 4, 40][random.below(3)];
    let sequences = (0..1 + random.below(max_sequences)).map(|_| {
        tokens.resize(tokens.len() + random.below(3), MASK); // tokens of no sequence
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
        1 => QuotaSchedule::Llada { steps: random.below(10) },
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

/// Several launches in a row, between which tokens are committed at random.
fn equals_the_reference() {
    let random = &mut Random(1);
    for case in 0..400 {
        let (mut state, mut tokens) = random_state(random);
        let commit_before: Vec<i32> = state.sequences.iter().map(|_| random.below(300) as i32).collect();
        let mut batch =
            Batch::new(&tokens, &output_of(&state, &commit_before), ratios(&state.schedule), &state.end_tokens);
        for pass in 0..3 {
            for token in tokens.iter_mut().filter(|token| **token == MASK) {
                *token = [MASK, MASK, MASK, MASK, 1, ENDS[0]][random.below(6)];
            }
            let some = |sequence: &Sequence| random.below(sequence.quota.unwrap_or(0).min(9) + 1);
            let committed: Vec<usize> = state.sequences.iter().map(some).collect();
            let failed = |_: &Sequence| [Some(7), Some(0), Some(DLLM_INDEX_FAILED)].get(random.below(30)).copied();
            let failed: Vec<Option<i32>> = state.sequences.iter().map(failed).map(Option::flatten).collect();

            let numbers: Vec<i32> = committed.iter().copied().map(saturating_i32).collect();
            let reported: Vec<i32> = failed.iter().map(|failed| failed.unwrap_or(DLLM_NONE_FAILED)).collect();
            let output = batch.advance(&tokens, &numbers, &reported);
            state.advance(&tokens, &committed, &failed);
            assert_eq!(output, output_of(&state, &commit_before), "case {case}, pass {pass}");
        }
    }
}

/// Lengths around the 32 positions that a warp reads at once, and the 128 whose loads are in flight together.
fn masks_and_ends_at_every_position() {
    let [filler, other] = [1, 2];
    for length in [1, 2, 31, 32, 33, 127, 128, 129, 257] {
        let (mut tokens, mut sequences) = (vec![], vec![]);
        let mut add = |special: &[(usize, i32)], active_range: Range<usize>, generated: usize| {
            let start = tokens.len();
            tokens.extend((0..length).map(|i| [filler, other][i % 2]));
            for (position, token) in special.iter().filter(|(position, _)| *position < length) {
                tokens[start + position] = *token;
            }
            let quota_range = active_range.clone();
            sequences.push(Sequence { active_range, quota_range, generated, ..Sequence::new(start..start + length) });
        };
        for i in 0..length {
            // A mask; the generated positions begin at it.
            for active_range in [0..length, i..i + 1, 0..i, i + 1..length] {
                add(&[(i, MASK)], active_range, i);
            }
            // An end-of-text token with a mask after it, before it, and far from it.
            for mask in [i + 1, i.wrapping_sub(1), length - 1, 0] {
                add(&[(mask, MASK), (i, ENDS[1])], 0..length, 0);
            }
            add(&[(i, ENDS[0])], 0..length, 0);
            add(&[(i, ENDS[0]), (length - 1, MASK)], 0..length, i + 1);
        }
        let n = sequences.len();
        let mut state = State { end_tokens: ENDS.to_vec(), ..new_state(QuotaSchedule::Dream(vec![]), sequences) };
        let commit_before = vec![i32::MAX; n];
        let mut batch = Batch::new(&tokens, &output_of(&state, &commit_before), &[], &ENDS);
        let output = batch.advance(&tokens, &vec![0; n], &vec![DLLM_NONE_FAILED; n]);
        state.advance(&tokens, &vec![0; n], &vec![None; n]);
        assert_eq!(output, output_of(&state, &commit_before), "{length} positions");
    }
}

/// Quotas of every pass while nothing is committed, compared with the functions that the loops of the host call.
fn schedules_equal_the_loops() {
    let check = |schedule: QuotaSchedule, masks: Vec<usize>, passes: usize, quota: &dyn Fn(usize, usize) -> usize| {
        let mut ends = vec![];
        masks.iter().for_each(|masks| ends.push(ends.last().unwrap_or(&0) + masks));
        let sequences = ends.iter().zip(&masks).map(|(end, masks)| Sequence::new(end - masks..*end)).collect();
        let tokens = vec![MASK; *ends.last().unwrap()];
        let n = masks.len();
        let start = output_of(&new_state(schedule.clone(), sequences), &vec![i32::MAX; n]);
        let mut batch = Batch::new(&tokens, &start, ratios(&schedule), &[]);
        for pass in 1..passes {
            let output = batch.advance(&tokens, &vec![0; n], &vec![DLLM_NONE_FAILED; n]);
            let want: Vec<i32> = masks.iter().map(|masks| saturating_i32(quota(pass, *masks))).collect();
            assert_eq!(output.quota, want, "{schedule:?}, pass {pass}");
            assert_eq!((output.progress.active, output.progress.passes), (n as i32, pass as i32));
        }
    };
    let masks: Vec<usize> = (1..40).chain([64, 129]).collect();
    for steps in [1, 2, 3, 8, 39, 40] {
        let quota = |pass, masks| if pass < steps { llada_quota(masks, steps, pass) } else { 1 };
        check(QuotaSchedule::Llada { steps }, masks.clone(), steps + 3, &quota);
    }
    for (steps, eps) in [(1, 1e-3), (2, 1e-3), (3, 0.5), (8, 1e-3), (32, 1e-3), (32, 0.2)] {
        let schedule = DreamSchedule::new(steps, eps);
        let ratios = schedule.ratios();
        let masks = (1..100).chain([1000, 4097]).collect();
        check(QuotaSchedule::Dream(ratios), masks, steps + 3, &|pass, masks| schedule.quota(pass, masks));
    }
    check(QuotaSchedule::Unlimited, masks, 3, &|_, _| usize::MAX);
}

/// A sequence for which unmask reports a failure ends; the others go on. The first failure is kept: of several in a launch that of
/// the lowest sequence. Sequences that are not active have none.
fn a_failed_row_ends_its_sequence() {
    const N: usize = 40;
    let sequences = |skipped: Option<usize>| {
        let sequence = |s: usize| {
            let quota = (Some(s) != skipped).then_some(2);
            Sequence { forwards: 10 + s, quota, ..Sequence::new(3 * s..3 * s + 3) }
        };
        (0..N).map(sequence).collect::<Vec<Sequence>>()
    };
    let tokens = vec![MASK; 3 * N];
    // Failures of one launch: sequence and status. One in each of the 16 warps' first and later sequences; two of one warp.
    for (failures, skipped, expected) in [
        (vec![(0, 0)], None, Some((0, 0))),
        (vec![(39, 7)], None, Some((39, 7))),
        (vec![(17, 4_000), (33, 1)], None, Some((17, 4_000))),
        (vec![(38, 5), (21, 6), (30, 0)], None, Some((21, 6))),
        (vec![(5, DLLM_INDEX_FAILED)], None, Some((5, DLLM_INDEX_FAILED))),
        (vec![(5, 9), (8, 3)], Some(5), Some((8, 3))),
        (vec![(5, 9)], Some(5), None),
        (vec![], None, None),
    ] {
        let state = new_state(QuotaSchedule::Unlimited, sequences(skipped));
        let mut batch = Batch::new(&tokens, &output_of(&state, &[50; N]), &[], &[]);
        let mut failed = vec![DLLM_NONE_FAILED; N];
        failures.iter().for_each(|(sequence, status)| failed[*sequence] = *status);
        let output = batch.advance(&tokens, &[1; N], &failed);
        // The step that failed is the number of forwards before it.
        let report = expected.map_or([DLLM_NONE_FAILED; 3], |(s, status)| [s, status, 10 + s]);
        let Output { control, progress, sequences, quota, commit_before, .. } = &output;
        let found = [control.failed_sequence, control.failed_position, control.failed_step];
        assert_eq!(found, report, "{failures:?}");
        assert_eq!([progress.failed_sequence, progress.failed_position, progress.failed_step], report, "{failures:?}");
        let ends = |s: usize| Some(s) == skipped || failed[s] != DLLM_NONE_FAILED;
        assert_eq!(progress.active as usize, (0..N).filter(|s| !ends(*s)).count(), "{failures:?}");
        for s in 0..N {
            let active = (sequences[s].active, quota[s], commit_before[s]);
            let expected = if ends(s) { (0, 0, i32::MIN) } else { (1, i32::MAX, 50) };
            assert_eq!(active, expected, "{failures:?}: sequence {s}");
        }
        // A later failure, of a lower sequence, does not replace the first one.
        if expected.is_some() {
            failed[1] = 2;
            let output = batch.advance(&tokens, &[1; N], &failed);
            let control = output.control;
            assert_eq!([control.failed_sequence, control.failed_position, control.failed_step], report, "later");
            assert_eq!(output.sequences[1].active, 0);
        }
    }
}

/// One capture, whose replays follow the results of unmask.
fn replays() {
    device().preload().unwrap();
    let random = &mut Random(5);
    let sequences =
        (0..3).map(|s| Sequence { per_step: 2, max_passes: 3, quota: Some(2), ..Sequence::new(s * 6..s * 6 + 6) });
    let mut state = new_state(QuotaSchedule::CarryOver, sequences.collect());
    let mut tokens = vec![MASK; 18];
    let mut batch = Batch::new(&tokens, &output_of(&state, &[6; 3]), &[], &[]);
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
        batch.unmasked(&tokens, &committed.map(saturating_i32), &[DLLM_NONE_FAILED; 3]);
        // SAFETY: the buffers live, and belong to this stream.
        unsafe { graph.launch() }.unwrap();
        state.advance(&tokens, &committed, &[None; 3]);
        assert_eq!(batch.read(), output_of(&state, &[6; 3]));
        passes += 1;
    }
    assert!(passes >= 3 && !tokens.contains(&MASK), "{passes} passes: {tokens:?}");
}
