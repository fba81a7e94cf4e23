//! Unmask: the token and confidence of a masked row, and the rows of a sequence that a step commits.
//!
//! The confidences and commit rules are those of LLaDA (low-confidence remasking), Dream (margin, entropy, top-p, top-k)
//! and Fast-dLLM, sections 3.2 and 3.3 (threshold, factor).

use super::top_k_top_p::min_kept_logit;
use crate::sampling::philox::{Purpose, gumbel, uniform};
use crate::sampling::{CommitRule, Confidence, SamplingParams};

/// Returns the guided logits `u + (scale + 1) (c - u)`, every operation rounded to f32. Both rows are `[vocab_size]`.
pub fn guide(conditional: &[f32], unconditional: &[f32], scale: f32) -> Vec<f32> {
    conditional.iter().zip(unconditional).map(|(c, u)| u + (scale + 1.0) * (c - u)).collect()
}

/// Returns the token and the confidence of one row of guided logits, `[vocab_size]`; `None` when no token can be chosen.
///
/// 1. A NaN logit counts as minus infinity, plus infinity as `f32::MAX`.
/// 2. When the mask token has the largest logit, its logit becomes minus infinity.
/// 3. Top-p, then top-k, set the logits that they reject to minus infinity. Both read `softmax(logits / temperature)`.
/// 4. The token is the argmax; with a temperature, the argmax of `logit + temperature * Gumbel noise` over all tokens but
///    the mask token. Ties go to the lowest token.
/// 5. The confidence is computed from the softmax of the filtered logits, with `tempered_confidence` divided by the
///    temperature.
pub fn score_row(row: &[f32], params: &SamplingParams, step: usize, position: usize) -> Option<(u32, f64)> {
    let mut logits: Vec<f32> =
        row.iter().map(|l| if l.is_nan() { f32::NEG_INFINITY } else { l.min(f32::MAX) }).collect();
    let mask = params.mask_token.map(|token| token as usize);
    if let Some(best) = argmax(&widen(&logits)).filter(|best| Some(*best) == mask) {
        logits[best] = f32::NEG_INFINITY;
    }
    let best = argmax(&widen(&logits))?;

    let temperature = if params.temperature > 0.0 { params.temperature } else { 1.0 };
    let smallest = min_kept_logit(&logits, temperature, params.top_p, params.top_k);
    logits.iter_mut().filter(|l| **l < smallest).for_each(|l| *l = f32::NEG_INFINITY);

    let mut token = best;
    if params.temperature > 0.0 {
        let noise = |token| gumbel(params.seed, Purpose::Token, step, position, token);
        let mut noised = widen(&logits);
        noised.iter_mut().enumerate().for_each(|(token, l)| *l += temperature * noise(token));
        if let Some(mask) = mask.filter(|mask| *mask < noised.len()) {
            noised[mask] = f64::NEG_INFINITY;
        }
        token = argmax(&noised)?;
    }

    let probabilities = softmax(&logits, if params.tempered_confidence { temperature } else { 1.0 });
    let confidence = match params.confidence {
        Confidence::Probability => probabilities[token],
        Confidence::Margin => {
            let mut sorted = probabilities;
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted[0] - sorted.get(1).unwrap_or(&0.0)
        }
        Confidence::Entropy => probabilities.iter().map(|p| p * (p + 1e-10).ln()).sum(),
        Confidence::Random => uniform(params.seed, Purpose::Confidence, step, position, 0),
    };
    Some((token as u32, if params.f32_confidence { f64::from(confidence as f32) } else { confidence }))
}

fn widen(logits: &[f32]) -> Vec<f64> {
    logits.iter().map(|l| f64::from(*l)).collect()
}

/// Returns the index of the largest value, the lowest one on ties; `None` when all are minus infinity.
fn argmax(values: &[f64]) -> Option<usize> {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.iter().position(|v| *v == max && max > f64::NEG_INFINITY)
}

fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weights: Vec<f64> = logits.iter().map(|l| ((f64::from(*l) - max) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// Returns the rank of a candidate: its confidence, or with `alg_temp` `confidence / alg_temp + Gumbel noise`.
pub fn rank(confidence: f64, params: &SamplingParams, step: usize, position: usize) -> f64 {
    if params.alg_temp > 0.0 {
        confidence / params.alg_temp + gumbel(params.seed, Purpose::Rank, step, position, 0)
    } else {
        confidence
    }
}

/// Returns the indices of the candidates that `rule` commits, highest rank first. Ties go to the lower index, and so to the
/// lower position when candidates are in ascending order. `confidences` and `ranks` are `[candidates]`.
pub fn select(confidences: &[f64], ranks: &[f64], rule: CommitRule) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_by(|a, b| ranks[*b].total_cmp(&ranks[*a]).then(a.cmp(b)));
    let (among, threshold) = match rule {
        CommitRule::Quota(count) => (count, f64::NEG_INFINITY),
        CommitRule::Threshold(threshold) => (order.len(), threshold),
        CommitRule::ThresholdTopN { threshold, top_n } => (top_n, threshold),
        CommitRule::Factor(factor) => {
            // The loop of Fast-dLLM: n stops at the first candidate below its bound or at the last candidate. The
            // first candidate is always committed, and the last one even when it is below its bound.
            let mut n = 0;
            while n + 1 < order.len() && (n == 0 || confidences[order[n]] >= 1.0 - factor / (n as f64 + 2.0)) {
                n += 1;
            }
            (if n == 0 || n + 1 == order.len() { n + 1 } else { n }, f64::NEG_INFINITY)
        }
    };
    order.truncate(among);
    let best = order.first().copied();
    order.retain(|i| Some(*i) == best || confidences[*i] >= threshold);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling;
    use proptest::prelude::*;

    const NONE: f32 = f32::NEG_INFINITY;

    fn close(got: Option<(u32, f64)>, token: u32, confidence: f64) {
        let (got_token, got) = got.unwrap();
        assert_eq!(got_token, token);
        assert!((got - confidence).abs() < 1e-12, "{got}, expected {confidence}");
    }

    #[test]
    fn confidences_of_a_known_row() {
        // Probabilities 1/2, 1/4 and 1/4; at temperature 0.5 they are 2/3, 1/6 and 1/6.
        let row = [0.0, 2f32.ln(), 0.0];
        let half = (2f32.ln() as f64).exp() / (2.0 + (2f32.ln() as f64).exp());
        let score = |confidence, tempered| {
            let temperature = if tempered { 1e-3 } else { 0.0 };
            let params =
                SamplingParams { confidence, temperature, tempered_confidence: tempered, ..Default::default() };
            score_row(&row, &params, 0, 0)
        };
        let rest = (1.0 - half) / 2.0;
        close(score(Confidence::Probability, false), 1, half);
        close(score(Confidence::Margin, false), 1, half - rest);
        close(score(Confidence::Entropy, false), 1, half * (half + 1e-10).ln() + 2.0 * rest * (rest + 1e-10).ln());
        close(score(Confidence::Random, false), 1, uniform(0, Purpose::Confidence, 0, 0, 0));
        close(score(Confidence::Probability, true), 1, 1.0);
        let params = SamplingParams { f32_confidence: true, ..Default::default() };
        assert_eq!(score_row(&row, &params, 0, 0), Some((1, f64::from(half as f32))));
    }

    #[test]
    fn special_logits_and_the_mask_token() {
        let params = SamplingParams { mask_token: Some(1), ..Default::default() };
        close(score_row(&[f32::NAN, 3.0, f32::INFINITY, 0.0], &params, 0, 0), 2, 1.0);
        close(score_row(&[2.0, 3.0, 2.0], &params, 0, 0), 0, 0.5);
        close(score_row(&[2.0, 2.0], &params, 0, 0), 0, 0.5);
        assert_eq!(score_row(&[f32::NAN, 3.0, NONE], &params, 0, 0), None);
        assert_eq!(score_row(&[NONE; 3], &params, 0, 0), None);
        assert_eq!(guide(&[1.0, 2.0], &[0.5, 3.0], 1.0), [1.5, 1.0]);
    }

    #[test]
    fn commits_by_each_rule() {
        let c = [0.5, 0.9, 0.2, 0.9];
        let commits = |rule| select(&c, &c, rule);
        assert_eq!(commits(CommitRule::Quota(3)), [1, 3, 0]);
        assert_eq!(commits(CommitRule::Threshold(0.5)), [1, 3, 0]);
        assert_eq!(commits(CommitRule::Threshold(0.95)), [1]);
        assert_eq!(commits(CommitRule::ThresholdTopN { threshold: 0.1, top_n: 2 }), [1, 3]);
        assert!(commits(CommitRule::ThresholdTopN { threshold: 0.1, top_n: 0 }).is_empty());
        // Bounds of the second and third candidate: 1 - f / 3 and 1 - f / 4.
        assert_eq!(commits(CommitRule::Factor(0.2)), [1]);
        assert_eq!(commits(CommitRule::Factor(0.5)), [1, 3]);
        assert_eq!(commits(CommitRule::Factor(2.0)), [1, 3, 0, 2], "the last candidate is below its bound");
        assert_eq!(select(&[0.1, 0.9], &[2.0, 1.0], CommitRule::Threshold(0.5)), [0, 1], "the rank decides the first");
        assert!(select(&[], &[], CommitRule::Factor(1.0)).is_empty());
    }

    /// Rows of up to 12 tokens with ties and special values.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        let special = prop::sample::select(vec![f32::NAN, f32::INFINITY, NONE, f32::MAX, f32::MIN, -0.0, 60.0]);
        let logit = prop_oneof![4 => -8f32..8.0, 3 => (-2i8..3).prop_map(f32::from), 1 => special];
        prop::collection::vec(logit, 1..13)
    }

    fn params() -> impl Strategy<Value = SamplingParams> {
        let kinds = [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random];
        let temperature = prop_oneof![Just(0.0), 0.01..3.0];
        let filters = (prop::option::of(0.01..1.1), prop::option::of(0usize..14));
        let mask_token = prop::option::of(0u32..14);
        let flags = (any::<bool>(), any::<bool>(), any::<u64>(), prop_oneof![Just(0.0), 0.1..2.0]);
        (prop::sample::select(kinds.to_vec()), temperature, filters, mask_token, flags).prop_map(
            |(
                confidence,
                temperature,
                (top_p, top_k),
                mask_token,
                (tempered_confidence, f32_confidence, seed, alg_temp),
            )| {
                SamplingParams {
                    confidence,
                    temperature,
                    tempered_confidence,
                    f32_confidence,
                    top_p,
                    top_k,
                    cfg_scale: 0.0,
                    alg_temp,
                    seed,
                    mask_token,
                }
            },
        )
    }

    fn commit_rules() -> impl Strategy<Value = CommitRule> {
        prop_oneof![
            (0usize..8).prop_map(CommitRule::Quota),
            (0u8..5).prop_map(|n| CommitRule::Threshold(f64::from(n) / 4.0)),
            (0u8..5, 0usize..8)
                .prop_map(|(n, top_n)| CommitRule::ThresholdTopN { threshold: f64::from(n) / 4.0, top_n }),
            (0.05..4.0).prop_map(CommitRule::Factor),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_sampler_agrees_on_rows(row in rows(), params in params(), step in 0usize..9, position in 0usize..99) {
            let got = sampling::score_row(&mut row.clone(), &params, step, position);
            let want = score_row(&row, &params, step, position);
            prop_assert_eq!(got.map(|(token, _)| token), want.map(|(token, _)| token));
            if let (Some((_, got)), Some((_, want))) = (got, want) {
                prop_assert!((got - want).abs() <= 1e-12 || got as f32 == want as f32, "{} {}", got, want);
            }
        }

        #[test]
        fn the_sampler_agrees_on_filters(row in rows(), params in params()) {
            let row: Vec<f32> = row.iter().map(|l| if l.is_nan() { NONE } else { l.min(f32::MAX) }).collect();
            let (temperature, top_p, top_k) = (params.temperature.max(0.01), params.top_p, params.top_k);
            let got = sampling::min_kept_logit(&row, temperature, top_p, top_k);
            prop_assert_eq!(got, min_kept_logit(&row, temperature, top_p, top_k));
        }

        #[test]
        fn the_sampler_agrees_on_commits(
            grid in prop::collection::vec((0u8..9, 0u8..9), 0..9),
            ranked in any::<bool>(),
            rule in commit_rules(),
        ) {
            let confidences: Vec<f64> = grid.iter().map(|(c, _)| f64::from(*c) / 8.0).collect();
            let others: Vec<f64> = grid.iter().map(|(_, rank)| f64::from(*rank)).collect();
            let ranks = if ranked { &others } else { &confidences };
            prop_assert_eq!(sampling::select(&confidences, ranks, rule), select(&confidences, ranks, rule));
        }

        #[test]
        fn the_sampler_agrees_on_sequences(
            logits in prop::collection::vec(-6f32..6.0, 2 * 6 * 5),
            params in params(),
            scale in 0f32..2.0,
            before in 0usize..9,
            rule in commit_rules(),
        ) {
            let params = SamplingParams { cfg_scale: scale, mask_token: Some(4), ..params };
            let (step, positions) = (3, vec![1, 2, 3, 5, 7, 8]);
            let candidates =
                sampling::Candidates { sequence: 0, step, positions: positions.clone(), commit_before: before, commit_rule: rule };
            let got = sampling::sample(&mut logits.clone(), 5, &[candidates], &params).unwrap();

            let rows = logits[..30].chunks(5).zip(logits[30..].chunks(5)).zip(&positions);
            let scores: Vec<(u32, f64)> = rows
                .map(|((c, u), position)| {
                    let guided = if scale > 0.0 { guide(c, u, scale) } else { c.to_vec() };
                    score_row(&guided, &params, step, *position).unwrap()
                })
                .collect();
            let eligible = positions.iter().filter(|position| **position < before).count();
            let confidences: Vec<f64> = scores[..eligible].iter().map(|(_, confidence)| *confidence).collect();
            let ranks: Vec<f64> =
                confidences.iter().zip(&positions).map(|(c, position)| rank(*c, &params, step, *position)).collect();
            let committed = select(&confidences, &ranks, rule);
            for (i, prediction) in got.iter().enumerate() {
                prop_assert_eq!(prediction.token, scores[i].0);
                prop_assert_eq!(prediction.commit, committed.contains(&i));
            }
        }
    }
}
