//! Special logits: ties, the mask token, NaN, infinities, and rows without a finite logit.

use super::case::{Case, MASK, plain, run};
use super::check::check;
use crate::common::{Random, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::sampling::SamplingParams;
use half::bf16;

once_on_device! {
    ties_go_to_the_lowest_token,
    the_mask_token_is_never_chosen,
    nan_and_infinities,
    rows_without_a_finite_logit,
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
