//! Comparison of a launch with the reference.

use super::case::{Case, Output, plain, random_logits, run};
use crate::common::{Float, Random};
use dllm_kernels::Confidence;
use dllm_kernels::reference::unmask::{guide, rank, score_row, select};
use dllm_kernels::sampling::philox::{Purpose, gumbel};
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use half::{bf16, f16};

/// Bound of the relative error of a probability or margin: sums of up to 152,064 terms in f32, a tree of at most 19 levels, and
/// exponentials good to 2 units in the last place.
const RELATIVE: f64 = 4e-6;

/// Bound of the absolute error of an entropy: the kernel computes p ln p, and leaves out at most 152,064 * 1e-10.
const ENTROPY: f64 = 2e-5;

/// Returns the logits of a masked row as the reference takes them: f32, guided.
pub fn guided_row<T: Float>(case: &Case<T>, sequence: usize, position: usize) -> Vec<f32> {
    let start = case.logits_row(sequence, position) * case.stride;
    let row = |logits: &[T]| logits[start..start + case.vocab].iter().map(|l| l.f32()).collect::<Vec<f32>>();
    match &case.uncond {
        Some(uncond) if case.params.cfg_scale > 0.0 => guide(&row(&case.logits), &row(uncond), case.params.cfg_scale),
        _ => row(&case.logits),
    }
}

/// Returns whether a confidence of the kernel is within the error bound of its kind.
pub fn close(got: f32, want: f64, kind: Confidence) -> bool {
    let error = (got as f64 - want).abs();
    match kind {
        Confidence::Entropy => error <= ENTROPY,
        // A difference cancels all but the rounding errors of the exponentials.
        Confidence::Margin => error <= RELATIVE * want.abs() + 5e-7,
        _ => error <= RELATIVE * want.abs() + 1e-30,
    }
}

/// Returns whether two draws of a row are so close that rounding decides between them.
fn draws_tie(params: &SamplingParams, logits: &[f32], step: usize, position: usize, tokens: [usize; 2]) -> bool {
    let noise = |token| gumbel(params.seed, Purpose::Token, step, position, token);
    let [a, b] = tokens.map(|token| f64::from(logits[token]) + params.temperature * noise(token));
    (a - b).abs() < 1e-5
}

/// Compares all results of a case with the reference.
///
/// Tokens must be equal. Confidences must be within f32 rounding of those of the reference. Commits must be those of the
/// reference for the confidences of the kernel.
pub fn check<T: Float>(case: &Case<T>, output: &Output, name: &str) {
    let mut tokens = case.tokens();
    for s in 0..case.masked.len() {
        let name = format!("{name}: sequence {s}");
        let (first, step) = (case.first_row(s), case.steps[s]);
        let before = case.commit_before.as_ref().map_or(usize::MAX, |before| before[s]);
        let (mut candidates, failed) = check_rows(case, output, s, &name);
        candidates.retain(|position| *position < before);
        let confidences: Vec<f64> = candidates.iter().map(|p| output.confidence[first + p].into()).collect();
        let ranks: Vec<f64> =
            confidences.iter().zip(&candidates).map(|(c, p)| rank(*c, &case.params, step, *p)).collect();
        let selected = if failed < 0 { select(&confidences, &ranks, in_f32(case.commit_rule[s])) } else { Vec::new() };
        for i in &selected {
            tokens[first + candidates[*i]] = output.predicted[first + candidates[*i]];
        }
        let counts = (output.committed[s] as usize, output.masks_left[s] as usize);
        assert_eq!(counts, (selected.len(), candidates.len() - selected.len()), "{name}");
        assert_eq!(output.failed[s], failed, "{name}");
    }
    assert_eq!(output.tokens, tokens, "{name}");
}

/// Compares tokens and confidences of one sequence. Returns the positions that have a token, and the first masked position
/// that has none (-1 when all have one).
fn check_rows<T: Float>(case: &Case<T>, output: &Output, s: usize, name: &str) -> (Vec<usize>, i32) {
    let (first, step, params) = (case.first_row(s), case.steps[s], &case.params);
    let (mut scored, mut failed) = (Vec::new(), -1);
    for (position, is_masked) in case.masked[s].iter().enumerate() {
        let row = first + position;
        let name = format!("{name} position {position}");
        if !is_masked {
            assert_eq!((output.predicted[row], output.confidence[row]), (-1, 0.0), "{name}");
            continue;
        }
        let logits = guided_row(case, s, position);
        let Some((token, confidence)) = score_row(&logits, params, step, position) else {
            assert_eq!(output.predicted[row], -1, "{name}");
            failed = if failed < 0 { position as i32 } else { failed };
            continue;
        };
        let (predicted, got) = (output.predicted[row] as usize, output.confidence[row]);
        if predicted == token as usize {
            assert!(close(got, confidence, params.confidence), "{name}: {got}, expected {confidence}");
        } else {
            let tie =
                params.temperature > 0.0 && draws_tie(params, &logits, step, position, [predicted, token as usize]);
            assert!(tie, "{name}: token {predicted}, expected {token}");
        }
        scored.push(position);
    }
    (scored, failed)
}

/// Rounds the numbers of a rule to f32, in which the kernel compares.
fn in_f32(rule: CommitRule) -> CommitRule {
    match rule {
        CommitRule::Threshold(t) => CommitRule::Threshold(t as f32 as f64),
        CommitRule::ThresholdTopN { threshold, top_n } => {
            CommitRule::ThresholdTopN { threshold: threshold as f32 as f64, top_n }
        }
        CommitRule::Factor(f) => CommitRule::Factor(f as f32 as f64),
        quota => quota,
    }
}

/// Parameters of a case that do not depend on its element type.
pub struct CaseOptions {
    pub params: SamplingParams,
    pub commit_rule: Vec<CommitRule>,
    pub commit_before: Option<Vec<usize>>,
    pub guided: bool,
    pub shift: bool,
}

/// Launches and checks a random case of every element type, with a vocabulary of `vocab` tokens and sequences of the given
/// lengths, after `change` has changed its options.
pub fn check_all_types(name: &str, vocab: usize, lengths: &[usize], change: impl Fn(&mut CaseOptions)) {
    check_type::<bf16>(name, vocab, lengths, &change);
    check_type::<f16>(name, vocab, lengths, &change);
    check_type::<f32>(name, vocab, lengths, &change);
}

fn check_type<T: Float>(name: &str, vocab: usize, lengths: &[usize], change: &impl Fn(&mut CaseOptions)) {
    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ name.len() as u64);
    let case = Case::<T>::new(&mut random, vocab, lengths);
    let commit_rule = case.commit_rule.clone();
    let mut options = CaseOptions { params: plain(), commit_rule, commit_before: None, guided: false, shift: false };
    change(&mut options);
    let CaseOptions { params, commit_rule, commit_before, guided, shift } = options;
    let uncond = guided.then(|| random_logits(&mut random, lengths.iter().sum(), vocab));
    let case = Case { params, commit_rule, commit_before, shift, uncond, ..case };
    check(&case, &run(&case), &format!("{name}, {}", T::NAME));
}

pub const POLICIES: [CommitRule; 6] = [
    CommitRule::Quota(3),
    CommitRule::Quota(0),
    CommitRule::Threshold(0.1),
    CommitRule::ThresholdTopN { threshold: 0.02, top_n: 4 },
    CommitRule::Factor(1.0),
    CommitRule::Factor(2.5),
];
