//! Which candidates a step commits: the rules of LLaDA, Dream and Fast-dLLM (sections 3.2 and 3.3).

use super::params::SamplingParams;
use super::philox::{Purpose, gumbel};

/// Rule by which a step commits candidates of one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CommitRule {
    /// The most confident candidates, this many.
    Quota(usize),
    /// Every candidate with at least this confidence, and always the most confident one.
    Threshold(f64),
    /// [`CommitRule::Threshold`] applied to the `top_n` most confident candidates. Commits nothing when `top_n` is 0.
    ThresholdTopN {
        /// Least confidence.
        threshold: f64,
        /// Number of candidates that are considered.
        top_n: usize,
    },
    /// Fast-dLLM's factor f: the n most confident candidates with the largest n for which `(n + 1) (1 - c_n) <= f`, where `c_n` is
    /// the confidence of the n-th. At least one; all candidates if only the last one fails.
    Factor(f64),
}

/// The candidates of one sequence: masked positions that a step may commit.
#[derive(Clone, Debug)]
pub struct Candidates {
    /// Index of the sequence in the batch.
    pub sequence: usize,
    /// Forward passes in which this sequence was active. Random numbers are keyed by it.
    pub step: usize,
    /// Masked positions, ascending. Logits are in this order, sequence after sequence.
    pub positions: Vec<usize>,
    /// Positions from this one on are scored, for observers, but not committed.
    pub commit_before: usize,
    /// Rule that picks the candidates to commit.
    pub commit_rule: CommitRule,
}

/// Result of one candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Predicted token.
    pub token: u32,
    /// Confidence of the prediction.
    pub confidence: f64,
    /// Whether the step commits the token.
    pub commit: bool,
}

/// Returns the numbers that rank the candidates: their confidences, or with `alg_temp` Gumbel-perturbed confidences.
pub(super) fn ranks(confidences: &[f64], positions: &[usize], params: &SamplingParams, step: usize) -> Vec<f64> {
    if params.alg_temp <= 0.0 {
        return confidences.to_vec();
    }
    let noise = |position: &usize| gumbel(params.seed, Purpose::Rank, step, *position, 0);
    confidences.iter().zip(positions).map(|(c, p)| c / params.alg_temp + noise(p)).collect()
}

/// Returns the indices of the candidates that `rule` commits, highest rank first. Ties go to the lower index.
pub fn select(confidences: &[f64], ranks: &[f64], rule: CommitRule) -> Vec<usize> {
    let mut order: Vec<usize> = (0..confidences.len()).collect();
    order.sort_by(|a, b| ranks[*b].total_cmp(&ranks[*a])); // stable: positions stay ascending
    let confident = |order: &[usize], threshold: f64| {
        order.iter().enumerate().filter(|(n, i)| *n == 0 || confidences[**i] >= threshold).map(|(_, i)| *i).collect()
    };
    match rule {
        CommitRule::Quota(count) => {
            order.truncate(count);
            order
        }
        CommitRule::Threshold(threshold) => confident(&order, threshold),
        CommitRule::ThresholdTopN { threshold, top_n } => {
            order.truncate(top_n);
            confident(&order, threshold)
        }
        CommitRule::Factor(factor) => {
            // The scan of the reference implementation: when only the last candidate fails, it is committed too.
            let last = order.len().saturating_sub(1);
            let fails = |n: &usize| *n > 0 && confidences[order[*n]] < 1.0 - factor / (*n as f64 + 2.0);
            let mut count = (0..order.len()).find(fails).unwrap_or(last);
            if count == 0 || count == last {
                count += 1;
            }
            order.truncate(count);
            order
        }
    }
}
