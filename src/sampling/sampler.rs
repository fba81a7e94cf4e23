//! The CPU sampler: from logits to committed tokens.
//!
//! The sampler predicts a token (argmax, or a sample) and a confidence for each candidate. Then each sequence commits some
//! of its candidates. Sources: LLaDA (low-confidence remasking), Fast-dLLM sections 3.2 and 3.3 (threshold, factor), Dream
//! (top-p, top-k, margin, entropy). NaN logits count as minus infinity, plus infinity as the largest finite value.

use super::commit::{Candidates, Prediction, ranks, select};
use super::params::{Confidence, SamplingParams};
use super::philox::{Purpose, gumbel, uniform};
use crate::error::{Error, Result};
use rayon::prelude::*;

/// Predicts a token for each candidate, and applies the commit rule of each sequence. Returns one prediction per candidate, in
/// order.
///
/// `logits` is `[n, vocab_size]` for n candidates; with guidance `[2 n, vocab_size]`, unconditional rows last. It is
/// overwritten.
///
/// # Errors
/// [`Error::NoFiniteLogit`] names the first candidate whose row has no finite logit.
pub fn sample(
    logits: &mut [f32],
    vocab_size: usize,
    candidates: &[Candidates],
    params: &SamplingParams,
) -> Result<Vec<Prediction>> {
    let positions: Vec<(&Candidates, usize)> =
        candidates.iter().flat_map(|g| g.positions.iter().map(move |p| (g, *p))).collect();
    let (rows, rest) = logits.split_at_mut(positions.len() * vocab_size);
    let score = |(i, (row, (group, position))): (usize, (&mut [f32], &(&Candidates, usize)))| {
        if params.cfg_scale > 0.0 {
            guide(row, &rest[i * vocab_size..], params.cfg_scale);
        }
        let (token, confidence) = score_row(row, params, group.step, *position)?;
        Some(Prediction { token, confidence, commit: false })
    };
    let rows = rows.par_chunks_exact_mut(vocab_size).zip(&positions).enumerate();
    let scored: Vec<Option<Prediction>> = rows.map(score).collect();
    // Collecting into a Result in parallel could report any of several failures instead of the first.
    let prediction = |(prediction, (group, position)): (Option<Prediction>, &(&Candidates, usize))| {
        prediction.ok_or(Error::NoFiniteLogit { sequence: group.sequence, position: *position, step: group.step })
    };
    let mut predictions = scored.into_iter().zip(&positions).map(prediction).collect::<Result<Vec<_>>>()?;
    let mut first = 0;
    for group in candidates {
        let eligible = group.positions.partition_point(|p| *p < group.commit_before);
        let slice = &mut predictions[first..first + eligible];
        let confidences: Vec<f64> = slice.iter().map(|v| v.confidence).collect();
        let ranks = ranks(&confidences, &group.positions, params, group.step);
        for i in select(&confidences, &ranks, group.commit_rule) {
            slice[i].commit = true;
        }
        first += group.positions.len();
    }
    Ok(predictions)
}

/// Applies guidance: `c = u + (scale + 1) (c - u)`.
fn guide(conditional: &mut [f32], unconditional: &[f32], scale: f32) {
    for (c, u) in conditional.iter_mut().zip(unconditional) {
        *c = u + (scale + 1.0) * (*c - u);
    }
}

/// Returns the token and the confidence of one row of logits, or `None` when no token but the mask token has a finite
/// logit. The row is overwritten.
pub fn score_row(row: &mut [f32], params: &SamplingParams, step: usize, position: usize) -> Option<(u32, f64)> {
    for l in row.iter_mut() {
        *l = if l.is_nan() { f32::NEG_INFINITY } else { l.min(f32::MAX) };
    }
    let largest = |row: &[f32]| argmax(row.iter().map(|l| *l as f64));
    let is_mask = |token: usize| params.mask_token.is_some_and(|mask| mask as usize == token);
    let (mut best, mut max) = largest(row)?;
    if is_mask(best) {
        row[best] = f32::NEG_INFINITY;
        (best, max) = largest(row)?;
    }
    let tempered = if params.temperature > 0.0 { params.temperature } else { 1.0 };
    if params.top_p.is_some() || params.top_k.is_some() {
        let cut = min_kept_logit(row, tempered, params.top_p, params.top_k);
        row.iter_mut().filter(|l| **l < cut).for_each(|l| *l = f32::NEG_INFINITY);
    }
    let token = if params.temperature > 0.0 {
        // Noise does not change minus infinity: dropped tokens are never drawn, and need no random number.
        let noised = row.iter().enumerate().map(|(token, l)| {
            if is_mask(token) || *l == f32::NEG_INFINITY {
                f64::NEG_INFINITY
            } else {
                *l as f64 + params.temperature * gumbel(params.seed, Purpose::Token, step, position, token)
            }
        });
        argmax(noised)?.0
    } else {
        best
    };
    let scale = if params.tempered_confidence { tempered } else { 1.0 };
    let weight = |l: f32| ((l as f64 - max) / scale).exp();
    let confidence = match params.confidence {
        Confidence::Random => uniform(params.seed, Purpose::Confidence, step, position, 0),
        Confidence::Probability => weight(row[token]) / total(row, max, scale),
        Confidence::Margin => {
            let others = row.iter().enumerate().filter(|(i, _)| *i != best);
            let second = others.map(|(_, l)| *l).fold(f32::NEG_INFINITY, f32::max);
            (weight(row[best]) - weight(second)) / total(row, max, scale)
        }
        Confidence::Entropy => {
            let total = total(row, max, scale);
            row.iter().map(|l| weight(*l) / total).map(|p| p * (p + 1e-10).ln()).sum()
        }
    };
    let confidence = if params.f32_confidence { confidence as f32 as f64 } else { confidence };
    Some((token as u32, confidence))
}

/// Distance below the largest logit, in units of the temperature, beyond which logits are ignored. 2^24 terms of e^-60 are
/// below the rounding of a sum that contains e^0.
const REACH: f64 = 60.0;

/// Returns the sum of `e^((l - max) / scale)` in f64, over the terms that can change its last bit.
fn total(row: &[f32], max: f64, scale: f64) -> f64 {
    let floor = (max - REACH * scale) as f32;
    row.iter().filter(|l| **l >= floor).map(|l| ((*l as f64 - max) / scale).exp()).sum()
}

/// Returns index and value of the largest element, the lowest index on ties, or `None` when all are minus infinity.
fn argmax(values: impl Iterator<Item = f64>) -> Option<(usize, f64)> {
    let mut best = None;
    let mut max = f64::NEG_INFINITY;
    for (i, value) in values.enumerate() {
        if value > max {
            (best, max) = (Some(i), value);
        }
    }
    best.map(|i| (i, max))
}

/// Returns the smallest logit that top-p and then top-k keep, for probabilities `softmax(row / temperature)`. Minus infinity
/// keeps all logits.
pub fn min_kept_logit(row: &[f32], temperature: f64, top_p: Option<f64>, top_k: Option<usize>) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let mut cut = f32::NEG_INFINITY;
    if let Some(top_p) = top_p.filter(|p| *p < 1.0) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let total = total(row, max, temperature);
        // Smaller probabilities do not change the sum.
        let floor = (max - REACH * temperature) as f32;
        let mut sorted: Vec<f32> = row.iter().copied().filter(|l| *l >= floor).collect();
        sorted.sort_unstable_by(descending);
        let mut sum = 0.0;
        for l in sorted {
            sum += ((l as f64 - max) / temperature).exp() / total;
            // A token is dropped when the tokens before it sum to more than top_p already.
            if sum > top_p {
                cut = l;
                break;
            }
        }
    }
    if let Some(top_k) = top_k {
        let mut kept: Vec<f32> = row.iter().copied().filter(|l| *l >= cut).collect();
        if (1..kept.len()).contains(&top_k) {
            cut = *kept.select_nth_unstable_by(top_k - 1, descending).1;
        }
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::CommitRule;

    #[test]
    fn ties_go_to_the_lowest_token() {
        let mut row = [1.0, 3.0, 3.0, 3.0];
        let (token, confidence) = score_row(&mut row, &SamplingParams::default(), 0, 0).unwrap();
        assert_eq!(token, 1);
        assert!((confidence - 1.0 / (3.0 + (-2f64).exp())).abs() < 1e-15);
    }

    #[test]
    fn nan_and_infinite_logits() {
        let mut row = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2.0];
        assert_eq!(score_row(&mut row, &SamplingParams::default(), 0, 0), Some((1, 1.0)));
        for all in [f32::NAN, f32::NEG_INFINITY] {
            assert_eq!(score_row(&mut [all; 5], &SamplingParams::default(), 0, 0), None);
        }
        let candidates = Candidates {
            sequence: 3,
            step: 2,
            positions: vec![8, 9],
            commit_before: 10,
            commit_rule: CommitRule::Quota(1),
        };
        let error =
            sample(&mut [1.0, 2.0, f32::NAN, f32::NAN], 2, &[candidates], &SamplingParams::default()).unwrap_err();
        assert!(matches!(error, Error::NoFiniteLogit { sequence: 3, position: 9, step: 2 }), "{error}");
    }

    #[test]
    fn mask_token_is_never_predicted() {
        let params = SamplingParams { mask_token: Some(1), ..SamplingParams::default() };
        assert_eq!(score_row(&mut [1.0, 5.0, 1.0], &params, 0, 0), Some((0, 0.5)));
        // When another token is the argmax, the mask token contributes to the sum as usual.
        assert_eq!(
            score_row(&mut [1.0, 1.0, 0.0], &params, 0, 0),
            score_row(&mut [1.0, 1.0, 0.0], &SamplingParams::default(), 0, 0)
        );
        assert_eq!(score_row(&mut [f32::NAN, 5.0, f32::NEG_INFINITY], &params, 0, 0), None);
        for (top_k, logits) in [(None, [0.0, 9.0, 1.0]), (Some(1), [0.0, 9.0, 1.0]), (Some(2), [0.0, 1.0, 2.0])] {
            let params = SamplingParams { temperature: 5.0, top_k, ..params.clone() };
            for position in 0..1000 {
                assert_ne!(score_row(&mut logits.clone(), &params, 0, position).unwrap().0, 1);
            }
        }
    }

    #[test]
    fn margin_of_a_one_token_vocabulary() {
        let params = SamplingParams { confidence: Confidence::Margin, ..SamplingParams::default() };
        assert_eq!(score_row(&mut [-4.0], &params, 0, 0), Some((0, 1.0)));
    }

    /// Logits of about -200 give the results of the same logits 200 higher: no maximum starts at 0.
    #[test]
    fn logits_far_below_zero() {
        // Multiples of 1/8, so that adding 200 is exact.
        let row: Vec<f32> = (0..50).map(|i| ((i * 37 + 11) % 97) as f32 / 8.0 - 206.0).collect();
        let raised = |row: &[f32]| row.iter().map(|l| l + 200.0).collect::<Vec<f32>>();
        let cut = |row: &[f32]| min_kept_logit(row, 0.7, Some(0.8), Some(30));
        for confidence in Confidence::ALL {
            for (temperature, top_p, top_k) in [(0.0, None, None), (0.7, None, None), (0.7, Some(0.8), Some(5))] {
                let params =
                    SamplingParams { confidence, temperature, top_p, top_k, mask_token: Some(3), ..Default::default() };
                let low = score_row(&mut row.clone(), &params, 1, 2).unwrap();
                let high = score_row(&mut raised(&row), &params, 1, 2).unwrap();
                assert_eq!(low.0, high.0, "{params:?}");
                assert!((low.1 - high.1).abs() < 1e-12 && low.1 != 0.0, "{params:?}: {} {}", low.1, high.1);
                assert_eq!(cut(&row), cut(&raised(&row)) - 200.0);
            }
        }
    }

    /// Tokens, confidences and commits have the same bits in pools of any number of threads.
    #[test]
    fn the_same_bits_with_any_number_of_threads() {
        let vocab_size = 5_003;
        let logit = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 21) as f32 - 4.0;
        let group = |sequence, positions: std::ops::Range<usize>| Candidates {
            sequence,
            step: 3 + sequence,
            positions: positions.collect(),
            commit_before: 30,
            commit_rule: CommitRule::Threshold(0.001),
        };
        let groups = [group(0, 2..9), group(1, 0..1), group(2, 5..34)];
        for confidence in Confidence::ALL {
            for (temperature, top_p, cfg_scale) in [(0.0, None, 0.0), (0.8, Some(0.9), 1.5)] {
                let params =
                    SamplingParams { confidence, temperature, top_p, cfg_scale, seed: 5, ..Default::default() };
                let run = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut logits: Vec<f32> = (0..2 * 37 * vocab_size).map(logit).collect();
                    let predictions = pool.install(|| sample(&mut logits, vocab_size, &groups, &params)).unwrap();
                    let bits = |p: Prediction| (p.token, p.confidence.to_bits(), p.commit);
                    predictions.into_iter().map(bits).collect::<Vec<_>>()
                };
                let one = run(1);
                for threads in [2, 3, 8] {
                    assert_eq!(run(threads), one, "{params:?}: {threads} threads");
                }
            }
        }
    }

    #[test]
    fn commit_rules_select_by_rank() {
        let c = [0.5, 0.9, 0.2, 0.9];
        assert_eq!(select(&c, &c, CommitRule::Quota(3)), [1, 3, 0]);
        assert_eq!(select(&c, &c, CommitRule::Quota(0)), [0usize; 0]);
        assert_eq!(select(&c, &c, CommitRule::Quota(9)), [1, 3, 0, 2]);
        assert_eq!(select(&c, &c, CommitRule::Threshold(0.9)), [1, 3]);
        assert_eq!(select(&c, &c, CommitRule::Threshold(0.95)), [1]);
        assert_eq!(select(&c, &c, CommitRule::ThresholdTopN { threshold: 0.1, top_n: 2 }), [1, 3]);
        assert_eq!(select(&c, &c, CommitRule::ThresholdTopN { threshold: 0.1, top_n: 0 }), [0usize; 0]);
        for rule in [CommitRule::Quota(2), CommitRule::Threshold(0.1), CommitRule::Factor(1.0)] {
            assert_eq!(select(&[], &[], rule), [0usize; 0]);
        }
    }

    /// Compares the number of commits of the factor rule with its definition in the paper.
    #[test]
    fn factor_rule_follows_the_paper() {
        let count = |c: &[f64], f| select(c, c, CommitRule::Factor(f)).len();
        assert_eq!(count(&[0.1], 1.0), 1);
        assert_eq!(count(&[0.9, 0.1], 1.0), 2); // special case n = 2
        assert_eq!(count(&[0.9, 0.7, 0.1], 1.0), 3); // special case: only the lowest fails
        assert_eq!(count(&[0.9, 0.1, 0.1], 1.0), 1);
        assert_eq!(count(&[0.9, 0.7, 0.1, 0.1], 1.0), 2);
        assert_eq!(count(&[0.99; 6], 1.0), 6);
        assert_eq!(count(&[0.9, 1.0 - 1.0 / 3.0, 0.0, 0.0], 1.0), 2); // equality with a bound is accepted
    }

    /// Samples follow softmax(logits / temperature) within five standard deviations, and never are a dropped token.
    #[test]
    fn samples_follow_the_distribution() {
        let logits = [1.0f32, 0.0, 2.0, -1.0];
        let params =
            SamplingParams { temperature: 0.7, top_k: Some(3), tempered_confidence: true, ..SamplingParams::default() };
        let draws = 20_000;
        let mut counts = [0usize; 4];
        let weight = |l: f32| (l as f64 / 0.7).exp();
        let total: f64 = logits[..3].iter().map(|l| weight(*l)).sum();
        for position in 0..draws {
            let (token, confidence) = score_row(&mut logits.clone(), &params, 4, position).unwrap();
            counts[token as usize] += 1;
            assert!((confidence - weight(logits[token as usize]) / total).abs() < 1e-12);
        }
        assert_eq!(counts[3], 0);
        for t in 0..3 {
            let p = weight(logits[t]) / total;
            let sd = (draws as f64 * p * (1.0 - p)).sqrt();
            assert!((counts[t] as f64 - draws as f64 * p).abs() < 5.0 * sd, "{counts:?}");
        }
    }

    /// A quota under `alg_temp` draws positions by softmax(confidence / alg_temp).
    #[test]
    fn alg_temp_draws_positions() {
        let params = SamplingParams { alg_temp: 0.5, ..SamplingParams::default() };
        let confidences = [0.2, 0.8];
        let draws = 20_000;
        let first = (0..draws)
            .filter(|step| {
                let ranks = ranks(&confidences, &[5, 6], &params, *step);
                select(&confidences, &ranks, CommitRule::Quota(1)) == [0]
            })
            .count();
        let p = 1.0 / (1.0 + (0.6f64 / 0.5).exp());
        let sd = (draws as f64 * p * (1.0 - p)).sqrt();
        assert!((first as f64 - draws as f64 * p).abs() < 5.0 * sd);
    }
}
