//! Commit rules: quotas, thresholds and factors for any number of candidates.

use super::case::{Case, OnDevice, run, unit};
use super::check::{POLICIES, check, check_all_types};
use crate::common::{Random, device, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::sampling::CommitRule;
use half::bf16;

once_on_device! {
    factors_of_few_rows,
    rows_drawn_by_alg_temp,
    positions_past_the_window_are_scored_and_left,
    sequences_without_rows_or_masks,
    a_long_sequence,
    equal_rows_are_taken_in_order,
    selections_of_every_size,
}

/// One to four candidates, for which the factor rule commits the last candidate too; confidences of every sign.
fn factors_of_few_rows() {
    for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random] {
        for rows in 1..=4 {
            for factor in [0.1, 1.0, 8.0, 40.0] {
                check_all_types(
                    &format!("{confidence:?} of {rows}, factor {factor}"),
                    64,
                    &[rows, rows, rows],
                    |options| {
                        options.commit_rule = vec![CommitRule::Factor(factor); 3];
                        options.params.confidence = confidence;
                    },
                );
            }
        }
    }
}

fn rows_drawn_by_alg_temp() {
    for quota in [1, 2, 5] {
        check_all_types(&format!("alg-temp, {quota}"), 64, &[12, 12], |options| {
            options.params.alg_temp = 0.3;
            options.commit_rule = vec![CommitRule::Quota(quota); 2];
        });
    }
}

fn positions_past_the_window_are_scored_and_left() {
    for commit_rule in POLICIES {
        check_all_types(&format!("window, {commit_rule:?}"), 64, &[10, 6, 3], |options| {
            options.commit_before = Some(vec![4, 0, 3]);
            options.commit_rule = vec![commit_rule; 3];
        });
    }
}

fn sequences_without_rows_or_masks() {
    let mut random = Random(11);
    for lengths in [vec![0, 4, 0, 0, 3, 0], vec![0], vec![0, 0], vec![0, 1], vec![1, 0]] {
        let case = Case::<bf16>::new(&mut random, 64, &lengths);
        check(&case, &run(&case), &format!("{lengths:?}"));
    }
    for all in [true, false] {
        let mut case = Case::<bf16>::new(&mut random, 64, &[5, 2]);
        case.masked.iter_mut().flatten().for_each(|m| *m = all);
        check(&case, &run(&case), &format!("all masked: {all}"));
    }
    // No sequence at all.
    let case = Case::<bf16>::new(&mut random, 64, &[]);
    let stream = device().stream().unwrap();
    OnDevice::new(&stream, &case).launch(&stream, &case).unwrap();
}

/// More rows than there are keys in shared memory.
fn a_long_sequence() {
    let mut random = Random(12);
    for commit_rule in [
        CommitRule::Quota(1),
        CommitRule::Quota(700),
        CommitRule::Quota(5000),
        CommitRule::Threshold(0.3),
        CommitRule::ThresholdTopN { threshold: 0.2, top_n: 300 },
        CommitRule::Factor(1.0),
        CommitRule::Factor(40.0),
    ] {
        let mut case = Case::<bf16>::new(&mut random, 16, &[1500, 40]);
        case.commit_rule = vec![commit_rule; 2];
        check(&case, &run(&case), &format!("{commit_rule:?}"));
    }
}

/// Equal confidences: the first rows are committed, by every form of the selection.
fn equal_rows_are_taken_in_order() {
    for rows in [9, 300, 1100] {
        for commit_rule in [CommitRule::Quota(rows / 3), CommitRule::Threshold(0.99), CommitRule::Factor(3.0)] {
            let mut case = Case::<f32>::new(&mut Random(5), 8, &[rows]);
            for row in case.logits.chunks_mut(8) {
                row.copy_from_slice(&[0.0, 1.0, 0.5, 0.0, -1.0, 0.0, 0.0, 0.0]);
            }
            case.commit_rule = vec![commit_rule];
            check(&case, &run(&case), &format!("{rows} equal rows, {commit_rule:?}"));
        }
    }
}

/// Every number of commits by the factor rule, and thresholds that equal a confidence.
fn selections_of_every_size() {
    let mut random = Random(19);
    for rows in 1..=34 {
        let mut case = Case::<f32>::new(&mut random, 4, &[rows, rows]);
        case.mask_token = 4;
        case.params.mask_token = None;
        for (i, row) in case.logits.chunks_mut(4).enumerate() {
            // Confidences from high to low, so that factors commit any number.
            let best = if i % 2 == 0 { 8.0 } else { 12.0 * unit(&mut random) };
            row.copy_from_slice(&[best, 0.0, 0.0, 0.0]);
        }
        for commit_rule in [
            CommitRule::Factor(0.3 + 2.0 * unit(&mut random) as f64),
            CommitRule::Factor(1e-3),
            CommitRule::Factor(1e3),
        ] {
            case.commit_rule = vec![commit_rule; 2];
            check(&case, &run(&case), &format!("{rows} rows, {commit_rule:?}"));
        }
        let mut confidences = run(&case).confidence;
        confidences.sort_by(f32::total_cmp);
        // The largest confidence and the median, each reached, and missed by an ulp.
        for equal in [confidences[2 * rows - 1], confidences[rows]] {
            for threshold in [equal, equal.next_up()] {
                case.commit_rule = vec![CommitRule::Threshold(threshold as f64); 2];
                check(&case, &run(&case), &format!("{rows} rows, threshold {threshold}"));
            }
        }
    }
}
