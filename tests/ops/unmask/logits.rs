//! Special logits: ties, the mask token, NaN, infinities, and rows without a finite logit.

use super::case::{Case, MASK, OnDevice, plain, random_logits, run};
use super::check::{POLICIES, check};
use crate::common::{Float, Random, device, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::ops::unmask::{Row, RowTable};
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use half::{bf16, f16};

once_on_device! {
    ties_go_to_the_lowest_token,
    the_mask_token_is_never_chosen,
    nan_and_infinities,
    rows_without_a_finite_logit,
    status_of_failed_rows,
    status_of_long_sequences,
    logits_far_below_zero,
}

/// Duplicates of the largest logit: in one vector, in the vectors of one thread, between threads, between chunks.
fn ties_go_to_the_lowest_token() {
    for tokens in
        [vec![9, 8], vec![2048 + 5, 5], vec![9000, 40], vec![8191, 8192], vec![19_999, 0, 8192], vec![16_383, 16_384]]
    {
        let mut case = Case::<bf16>::new(&mut Random(6), 20_000, &[4]);
        case.masked[0] = vec![true; 4];
        for row in case.logits.chunks_mut(20_000) {
            tokens.iter().for_each(|token| row[*token] = bf16::from_f32(30.0));
        }
        for confidence in [Confidence::Probability, Confidence::Margin] {
            case.params.confidence = confidence;
            let output = run(&case);
            check(&case, &output, &format!("{tokens:?}"));
            assert_eq!(output.predicted, vec![*tokens.iter().min().unwrap() as i32; 4]);
        }
    }
}

fn the_mask_token_is_never_chosen() {
    // In the first chunk, at its end, at the start of the second.
    for mask in [MASK as usize, 8191, 8192] {
        let mut case = Case::<f32>::new(&mut Random(7), 9000, &[6]);
        case.mask_token = mask as i32;
        case.masked[0] = vec![true; 6];
        // Far larger than the others, equal to the best token before or after it, slightly smaller, minus infinity, NaN.
        for (i, row) in case.logits.chunks_mut(9000).enumerate() {
            let best = row.iter().copied().fold(f32::MIN, f32::max);
            row[mask - 2] = if i == 1 { best + 1.0 } else { row[mask - 2] };
            row[mask + 1] = if i == 2 { best + 1.0 } else { row[mask + 1] };
            row[mask] = [50.0, best + 1.0, best + 1.0, best - 0.1, f32::NEG_INFINITY, f32::NAN][i];
        }
        for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy] {
            for temperature in [0.0, 2.0] {
                case.params = SamplingParams { confidence, temperature, mask_token: Some(mask as u32), ..plain() };
                let output = run(&case);
                check(&case, &output, &format!("mask token {mask}, {confidence:?} at {temperature}"));
                assert!(output.predicted.iter().all(|t| *t != mask as i32));
            }
        }
    }
}

fn nan_and_infinities() {
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, -0.0];
    for (confidence, temperature) in [
        (Confidence::Probability, 0.0),
        (Confidence::Probability, 1.0),
        (Confidence::Margin, 0.0),
        (Confidence::Entropy, 0.0),
    ] {
        let mut random = Random(8);
        let mut case = Case::<f32>::new(&mut random, 8200, &[20]);
        case.params = SamplingParams { confidence, temperature, ..plain() };
        for (i, logit) in case.logits.iter_mut().enumerate() {
            if random.below(4) == 0 {
                *logit = special[random.below(special.len())];
            }
            // Rows of one value.
            if i / 8200 < special.len() && i / 8200 != 0 && i / 8200 != 2 {
                *logit = special[i / 8200];
            }
        }
        check(&case, &run(&case), &format!("{confidence:?} at {temperature}"));
    }
}

/// A row without a finite logit fails its sequence, at its first such position, and no other.
fn rows_without_a_finite_logit() {
    for (bad, general) in [(f32::NAN, false), (f32::NEG_INFINITY, false), (f32::NAN, true)] {
        let mut case = Case::<bf16>::new(&mut Random(9), 8200, &[5, 4, 6]);
        case.masked.iter_mut().flatten().for_each(|m| *m = true);
        case.params.confidence = if general { Confidence::Margin } else { Confidence::Probability };
        for row in [7, 8] {
            case.logits[row * case.stride..row * case.stride + 8200].fill(bf16::from_f32(bad));
        }
        // Only the mask token has a finite logit.
        case.logits[7 * case.stride + MASK as usize] = bf16::from_f32(1.0);
        let output = run(&case);
        check(&case, &output, "no finite logit");
        assert_eq!(output.failed, [-1, 2, -1]);
        assert_eq!(output.tokens[5..9], [MASK; 4]);
    }
}

/// The status of a sequence is the position, not the row, of its first masked row without a finite logit. It commits nothing, with
/// every rule and also where that row could not be committed; the other sequences commit as usual. The status of the next launch
/// is its own.
fn status_of_failed_rows() {
    let stream = device().stream().unwrap();
    for (i, commit_rule) in POLICIES.into_iter().chain([CommitRule::Quota(100)]).enumerate() {
        for confidence in [Confidence::Probability, Confidence::Margin] {
            let mut case = Case::<f32>::new(&mut Random(23), 8200, &[4, 5, 3, 6]);
            case.masked = [vec![true; 4], vec![true; 5], vec![true, false, true], vec![true; 6]].to_vec();
            case.commit_rule = vec![commit_rule; 4];
            case.params.confidence = confidence;
            case.commit_before = (i % 2 == 1).then(|| vec![1_000, 12, 1_000, 1_000]);
            let sound = case.logits.clone();
            // The last two rows of the second sequence; the row of the third that is not masked; all rows of the fourth.
            for row in [7, 8, 10].into_iter().chain(12..18) {
                case.logits[row * case.stride..][..8200].fill(f32::NEG_INFINITY);
            }
            let position = |s: usize, i: usize| 10 * s + 2 * i;
            let rows: Vec<Vec<Row>> = (0..4)
                .map(|s| {
                    let row = |i| Row {
                        token: case.first_row(s) + i,
                        logits_row: case.first_row(s) + i,
                        position: position(s, i),
                    };
                    (0..case.masked[s].len()).map(row).collect()
                })
                .collect();
            let mut on_device = OnDevice::new(&stream, &case);
            on_device.table = RowTable::new(&stream, &rows).unwrap();
            on_device.launch(&stream, &case).unwrap();
            let output = on_device.read();
            let what = format!("{commit_rule:?}, {confidence:?}");
            assert_eq!(output.failed, [-1, position(1, 3) as i32, -1, position(3, 0) as i32], "{what}");
            let tokens = case.tokens();
            for (s, (first, end)) in [(0, 4), (4, 9), (9, 12), (12, 18)].into_iter().enumerate() {
                let written = (first..end).filter(|i| output.tokens[*i] != tokens[*i]).count();
                let committed = if s % 2 == 1 { 0 } else { output.committed[s] as usize };
                assert_eq!((written, output.committed[s] as usize), (committed, committed), "{what}: sequence {s}");
                let expects_some = s.is_multiple_of(2) && commit_rule != CommitRule::Quota(0);
                assert_eq!(committed > 0, expects_some, "{what}: sequence {s}");
            }
            for row in [7, 8].into_iter().chain(12..18) {
                assert_eq!((output.predicted[row], output.confidence[row]), (-1, 0.0), "{what}: row {row}");
            }
            assert!(output.predicted[4..7].iter().all(|token| *token >= 0), "{what}: the sound rows have a prediction");

            case.logits = sound;
            on_device.logits.write(&case.logits).unwrap();
            on_device.tokens.write(&tokens).unwrap();
            on_device.launch(&stream, &case).unwrap();
            let output = on_device.read();
            assert_eq!(output.failed, [-1; 4], "{what}, launched again");
            assert_eq!(output.committed[1] > 0, commit_rule != CommitRule::Quota(0), "{what}, launched again");
        }
    }
}

/// Several failed rows of one thread, of different threads, and in sequences with more rows than keys in shared memory.
fn status_of_long_sequences() {
    for (rows, failed) in [
        (600, &[30, 286, 542, 599][..]),
        (600, &[300, 260, 599]),
        (1_500, &[700, 1_212, 1_499]),
        (257, &[256]),
        (1_025, &[1_024, 1_023]),
    ] {
        let mut case = Case::<bf16>::new(&mut Random(26), 8, &[rows, 3]);
        case.masked.iter_mut().flatten().for_each(|masked| *masked = true);
        for row in failed {
            case.logits[row * case.stride..][..8].fill(bf16::NEG_INFINITY);
        }
        let output = run(&case);
        check(&case, &output, &format!("{failed:?} of {rows} rows"));
        assert_eq!(output.failed, [*failed.iter().min().unwrap() as i32, -1]);
        assert_eq!(output.committed[0], 0);
        assert!(output.tokens[..rows].iter().all(|token| *token == MASK), "{failed:?} of {rows} rows");
        assert!(output.committed[1] > 0);
    }
}

/// Logits of about -200 in every token, in one chunk and in three: maxima that start at 0 would make all weights 0.
fn logits_far_below_zero() {
    fn check_type<T: Float>() {
        let mut random = Random(24);
        for vocab in [5, 100, 20_000] {
            for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy] {
                for (temperature, top_p, top_k, cfg_scale) in [
                    (0.0, None, None, 0.0),
                    (0.7, None, None, 0.0),
                    (0.0, Some(0.9), None, 0.0),
                    (0.7, Some(0.8), Some(3), 0.5),
                ] {
                    let mut case = Case::<T>::new(&mut random, vocab, &[4, 2]);
                    let mut uncond = random_logits::<T>(&mut random, 6, vocab);
                    for logit in case.logits.iter_mut().chain(&mut uncond).filter(|logit| !logit.f32().is_nan()) {
                        *logit = T::of(2.0 * logit.f32() - 200.0);
                    }
                    case.uncond = (cfg_scale > 0.0).then_some(uncond);
                    let base = SamplingParams { tempered_confidence: temperature > 0.0, ..plain() };
                    case.params = SamplingParams { confidence, temperature, top_p, top_k, cfg_scale, ..base };
                    let what = format!("{} {confidence:?} of {vocab}, {temperature} {top_p:?} {top_k:?}", T::NAME);
                    check(&case, &run(&case), &what);
                }
            }
        }
    }
    check_type::<bf16>();
    check_type::<f16>();
    check_type::<f32>();
}
