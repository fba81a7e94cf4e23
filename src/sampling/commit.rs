//! Which candidates a step commits: the rules of LLaDA, Dream and Fast-dLLM (sections 3.2 and 3.3).

use super::params::SamplingParams;
use super::philox::{Purpose, gumbel};

/// Which of a sequence's candidates to commit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CommitRule {
    /// The best this many.
    Quota(usize),
    /// The best, and all others with at least this confidence.
    Threshold(f64),
    /// As `Threshold`, among the best `top_n` only (none when that is 0).
    ThresholdTopN {
        /// Least confidence.
        threshold: f64,
        /// How many candidates are looked at.
        top_n: usize,
    },
    /// Fast-dLLM's factor f: the best n as long as (n + 1) (1 - c_n) < f.
    Factor(f64),
}

/// The candidates of one sequence: masked positions, ascending, and what to do with them.
#[derive(Clone, Debug)]
pub struct Candidates {
    /// Index of the sequence in the batch.
    pub sequence: usize,
    /// Forwards that this sequence has taken part in; keys the random numbers.
    pub step: usize,
    /// Masked positions, ascending. Logits stand in this order, group after group.
    pub positions: Vec<usize>,
    /// Positions from here on are scored for an observer but not committed.
    pub commit_before: usize,
    /// How many of them to commit.
    pub commit_rule: CommitRule,
}

/// What became of one candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// The row's token.
    pub token: u32,
    /// Its confidence.
    pub confidence: f64,
    /// Whether it is to be committed.
    pub commit: bool,
}

/// What the candidates are ordered by: their confidences, or with `alg_temp` Gumbel-perturbed ones.
pub(super) fn ranks(confidences: &[f64], positions: &[usize], unmask: &SamplingParams, step: usize) -> Vec<f64> {
    if unmask.alg_temp <= 0.0 {
        return confidences.to_vec();
    }
    let noise = |position: &usize| gumbel(unmask.seed, Purpose::Rank, step, *position, 0);
    confidences.iter().zip(positions).map(|(c, p)| c / unmask.alg_temp + noise(p)).collect()
}

/// Indices of the candidates to commit, best rank first. Ties go to the lower index.
pub fn select(confidences: &[f64], ranks: &[f64], selection: CommitRule) -> Vec<usize> {
    let mut order: Vec<usize> = (0..confidences.len()).collect();
    order.sort_by(|a, b| ranks[*b].total_cmp(&ranks[*a])); // stable: positions stay ascending
    let confident = |order: &[usize], threshold: f64| {
        order.iter().enumerate().filter(|(n, i)| *n == 0 || confidences[**i] >= threshold).map(|(_, i)| *i).collect()
    };
    match selection {
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
            // The scan of the original, quirk included: when only the last one fails, it is taken all the same.
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
