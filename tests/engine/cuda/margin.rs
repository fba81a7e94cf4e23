//! The margin rule: which decisions of the device may differ from the CPU's because of bf16.
//!
//! Weights are bf16 on both sides: every checkpoint here stores values that are exact in bf16. But the device rounds each activation
//! to 8 significant bits wherever it stores one, about a dozen times a layer. The mean relative error of one rounding is
//! 2^-9 / sqrt(3), and the rounded values go through attention, whose weights are exponentials. The hidden state that reaches the
//! head has an error of one or two hundredths of its length in a random direction. Each logit is its product with a row of the
//! head, so the error of a logit is random too.
//!
//! The size of the error is not measured on the device. [`super::bf16_reference`] is the CPU backend that rounds where the device
//! rounds: its logits differ from the CPU's as the device's should. Let r be the error of the differences between a row's largest
//! logit and its competitors ([`competitor_error`]), at least the mean of r over the pass.
//! The rule has two numbers. **No difference between two logits of the device is further than [`MARGIN`] r from the same difference
//! on the CPU, and almost none is further than [`DOUBT`] r.** With normal errors and an exact r, r would be the standard deviation of
//! a difference. But r is one sample, inexact in single rows, and a few errors are far larger (12.5 r was observed). The tests print the
//! mean and the largest error that they see, in r. The tests of forwards check the device against [`MARGIN`], and its mean error
//! against that of the bf16 reference.
//!
//! The rest follows from how a decision depends on logits:
//! - A token is *possible* when some logits within the margin would choose it. If only one token is possible, the device must
//!   choose it. If several are, the candidate's *token is in doubt*, and the device must choose one of them.
//! - The confidence of a possible token is between its minimum and its maximum over logits within the margin. A candidate's
//!   confidence is between those of all its possible tokens.
//! - A commit is certain when it is the same for all confidences between these bounds, independently for each candidate. Otherwise
//!   the *commit is in doubt*.
//!
//! Within [`MARGIN`] every decision of the device must be possible. Decisions that are in doubt within [`DOUBT`] are counted, and so
//! are those in which the device differs, and *surprises*: those that differ without being in doubt. The tests bound all shares.

use super::bf16_reference::Selections;
use dllm_kernels::Confidence;
use dllm_kernels::sampling::philox::{Purpose, gumbel};
use dllm_kernels::sampling::{Candidates, CommitRule, Prediction, SamplingParams, min_kept_logit, score_row, select};
use std::collections::BTreeMap;

/// Bound of the error of a difference of two logits, in r.
pub const MARGIN: f64 = 20.0;
/// Almost all errors are below this, in r: decisions that errors up to it could change are in doubt.
const DOUBT: f64 = 4.0;
/// Bound of the share of candidates with a surprise.
const MAX_SURPRISES: f64 = 0.002;

/// Errors due to f32 instead of f64: of a confidence, and of a Gumbel number.
const ROUNDING: f64 = 2e-6;
const NOISE: f64 = 1e-4;

/// Counts of compared decisions, of those in doubt, and of those that differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub passes: usize,
    pub candidates: usize,
    /// Candidates whose token is in doubt, and those of them where the tokens differ.
    pub token_in_doubt: usize,
    pub token_differs: usize,
    /// Candidates whose commit is in doubt, and those of them where it differs.
    pub commit_in_doubt: usize,
    pub commit_differs: usize,
    /// Tokens and commits that differ without being in doubt.
    pub surprises: usize,
    /// Candidates for which it is in doubt what the pass writes: whether they are committed, or, of those that are, which token.
    pub write_in_doubt: usize,
    /// Rows that V-verify selected on the device, those that the bf16 reference would not have selected, and the largest angle by
    /// which a selected row had changed less than one that was not selected, in radians.
    pub selected: usize,
    pub selected_differs: usize,
    pub worst_angle: f64,
    /// Errors of the device's log-odds, in mean errors of the row: their number, the sum of their squares, and the largest.
    pub errors: usize,
    pub squared_error: f64,
    pub worst_error: f64,
}

impl Tally {
    pub fn selections(&mut self, selections: &Selections) {
        (self.selected, self.selected_differs, self.worst_angle) =
            (selections.rows, selections.other_rows, selections.worst);
    }

    fn error(&mut self, error: f64) {
        self.errors += 1;
        self.squared_error += error * error;
        self.worst_error = self.worst_error.max(error);
    }

    pub fn add(&mut self, other: Tally) {
        self.write_in_doubt += other.write_in_doubt;
        self.surprises += other.surprises;
        self.errors += other.errors;
        self.squared_error += other.squared_error;
        self.worst_error = self.worst_error.max(other.worst_error);
        self.selected += other.selected;
        self.selected_differs += other.selected_differs;
        self.worst_angle = self.worst_angle.max(other.worst_angle);
        self.passes += other.passes;
        self.candidates += other.candidates;
        self.token_in_doubt += other.token_in_doubt;
        self.token_differs += other.token_differs;
        self.commit_in_doubt += other.commit_in_doubt;
        self.commit_differs += other.commit_differs;
    }

    /// Checks the shares of candidates whose token and commit differ (`differ`) and are in doubt (`in_doubt`): `[token, commit]`.
    #[track_caller]
    pub fn assert_few(&self, differ: [f64; 2], in_doubt: [f64; 2]) {
        let share = |n: usize| n as f64 / self.candidates as f64;
        for (seen, max) in [self.token_differs, self.commit_differs].into_iter().zip(differ) {
            assert!(share(seen) <= max, "{seen} differ: {self}");
        }
        assert!(share(self.surprises) <= MAX_SURPRISES, "{} surprises: {self}", self.surprises);
        for (seen, max) in self.in_doubt().into_iter().zip(in_doubt) {
            assert!(seen <= max, "{seen} in doubt: {self}");
        }
    }

    /// Share of the candidates for which it is in doubt what a pass writes.
    pub fn writes_in_doubt(&self) -> f64 {
        self.write_in_doubt as f64 / self.candidates.max(1) as f64
    }

    /// Shares of the candidates whose token and commit are in doubt.
    pub fn in_doubt(&self) -> [f64; 2] {
        [self.token_in_doubt, self.commit_in_doubt].map(|n| n as f64 / self.candidates.max(1) as f64)
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let [token, commit] = self.in_doubt();
        write!(
            f,
            "{} passes, {} candidates; tokens in doubt {} ({:.2} %), different {}; commits in doubt {} ({:.2} %), different {}",
            self.passes,
            self.candidates,
            self.token_in_doubt,
            100.0 * token,
            self.token_differs,
            self.commit_in_doubt,
            100.0 * commit,
            self.commit_differs,
        )?;
        write!(f, "; writes in doubt {:.2} %, {} surprises", 100.0 * self.writes_in_doubt(), self.surprises)?;
        if self.errors > 0 {
            let mean = (self.squared_error / self.errors as f64).sqrt();
            write!(f, "; error of odds in r: mean {mean:.2}, largest {:.2} of {}", self.worst_error, self.errors)?;
        }
        match self.selected {
            0 => Ok(()),
            n => write!(
                f,
                "; rows selected {n}, different {}, by an angle of {:.4}",
                self.selected_differs, self.worst_angle
            ),
        }
    }
}

/// Possible decisions about a candidate for logits within the margin: each possible token with its minimum and maximum confidence.
struct Leeway(BTreeMap<u32, [f64; 2]>);

impl Leeway {
    /// Minimum and maximum confidence, whichever token it is of.
    fn confidence(&self) -> [f64; 2] {
        self.0.values().fold([f64::INFINITY, f64::NEG_INFINITY], |[a, b], [c, d]| [a.min(*c), b.max(*d)])
    }
}

/// Logits of a pass on the CPU and by the bf16 reference: `[candidates, vocab_size]`, with guidance followed by those of the
/// unconditional sequences.
pub struct Logits {
    pub cpu: Vec<f32>,
    pub rounded: Vec<f32>,
    pub vocab_size: usize,
}

impl Logits {
    /// Returns the guided logits of each candidate, and their errors r.
    fn rows(&self, candidates: usize, unmask: &SamplingParams) -> Vec<(Vec<f32>, f64)> {
        let n = self.vocab_size;
        let guided = |logits: &[f32]| -> Vec<Vec<f32>> {
            let row = |i: usize| &logits[i * n..(i + 1) * n];
            let scale = unmask.cfg_scale;
            let guided = |(c, u): (&f32, &f32)| u + (scale + 1.0) * (c - u);
            let of_candidate = |i: usize| match scale {
                0.0 => row(i).to_vec(),
                _ => row(i).iter().zip(row(candidates + i)).map(guided).collect(),
            };
            (0..candidates).map(of_candidate).collect()
        };
        let exact = guided(&self.cpu);
        let errors = errors_of_rows(&guided(&self.rounded), &exact);
        exact.into_iter().zip(errors).collect()
    }
}

/// Root mean square error of logits, without the error that is common to all of them.
pub fn mean_error(got: &[f32], want: &[f32]) -> f64 {
    let n = got.len() as f64;
    let error = || got.iter().zip(want).map(|(g, w)| f64::from(g - w));
    let mean = error().sum::<f64>() / n;
    (error().map(|e| (e - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Logits that compete with the largest one. With a trained model all others have smaller errors, and no part in any decision.
const COMPETITORS: usize = 16;

/// Root mean square error of the differences between the largest logit and its competitors.
fn competitor_error(got: &[f32], want: &[f32]) -> f64 {
    let mut order: Vec<usize> = (0..want.len()).collect();
    order.sort_by(|a, b| want[*b].total_cmp(&want[*a]));
    let error = |t: usize| f64::from(got[t] - want[t]);
    let competitors = &order[1..=COMPETITORS.min(want.len() - 1)];
    let squares: f64 = competitors.iter().map(|t| (error(*t) - error(order[0])).powi(2)).sum();
    (squares / competitors.len() as f64).sqrt()
}

/// Returns r of each row of a pass: its own error, and at least the mean of the pass. Few rounded values may agree with the exact ones
/// by chance, and the device's need not agree then.
pub fn errors_of_rows(rounded: &[Vec<f32>], exact: &[Vec<f32>]) -> Vec<f64> {
    let errors: Vec<f64> = rounded.iter().zip(exact).map(|(r, e)| competitor_error(r, e)).collect();
    let of_pass = (errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64).sqrt();
    errors.into_iter().map(|error| error.max(of_pass)).collect()
}

/// Compares the predictions of CPU and device for a pass: counts those in doubt, and panics when any other differs.
pub fn compare(
    what: &str,
    logits: &Logits,
    groups: &[Candidates],
    unmask: &SamplingParams,
    [cpu, gpu]: [&[Prediction]; 2],
) -> Tally {
    let mut tally = Tally { passes: 1, ..Tally::default() };
    assert_eq!(cpu.len(), gpu.len(), "{what}");
    let rows = logits.rows(cpu.len(), unmask);
    let mut first = 0;
    for group in groups {
        let (mut ranges, mut tokens_in_doubt) = (Vec::new(), Vec::new());
        for (i, position) in group.positions.iter().enumerate() {
            let n = first + i;
            let (row, error) = &rows[n];
            let within = |margin: f64| leeway(row, margin * error, unmask, group.step, *position, &cpu[n]);
            let (leeway, close) = (within(MARGIN), within(DOUBT));
            let place = || format!("{what}: sequence {}, step {}, position {position}", group.sequence, group.step);
            let (got, want) = (&gpu[n], &cpu[n]);
            tally.candidates += 1;
            tally.token_in_doubt += usize::from(close.0.len() > 1);
            tally.token_differs += usize::from(got.token != want.token);
            tally.surprises += usize::from(!close.0.contains_key(&got.token));
            if let Some(found) = error_of_odds(row, unmask, got, want) {
                tally.error(found / error);
            }
            let Some([low, high]) = leeway.0.get(&got.token) else {
                panic!("{}: {got:?}, CPU {want:?}: not of {:?}", place(), leeway.0.keys())
            };
            let fits = low - ROUNDING <= got.confidence && got.confidence <= high + ROUNDING;
            assert!(fits, "{}: {got:?}, CPU {want:?}: not within {low} and {high}", place());
            ranges.push([leeway.confidence(), close.confidence()]);
            tokens_in_doubt.push(close.0.len() > 1);
        }
        let own = first..first + group.positions.len();
        let both = [&cpu[own.clone()], &gpu[own.clone()]];
        for (differs, surely) in commits(what, group, unmask, &ranges.iter().map(|r| r[0]).collect::<Vec<_>>(), both) {
            let place = || format!("{what}: sequence {}, step {}: {:?}", group.sequence, group.step, group.commit_rule);
            assert!(!(differs && surely), "{}: {both:?}, confidences between {ranges:?}", place());
        }
        let close = commits(what, group, unmask, &ranges.iter().map(|r| r[1]).collect::<Vec<_>>(), both);
        for ((i, (differs, surely)), token_in_doubt) in close.into_iter().enumerate().zip(tokens_in_doubt) {
            tally.commit_in_doubt += usize::from(!surely);
            tally.write_in_doubt += usize::from(!surely || both[0][i].commit && token_in_doubt);
            tally.commit_differs += usize::from(differs);
            tally.surprises += usize::from(differs && surely);
        }
        first = own.end;
    }
    assert_eq!(first, cpu.len(), "{what}");
    tally
}

/// Returns by how much the device's log-odds of its token differ from the CPU's, where the confidence is a probability without
/// temperature and filters: from the difference of the confidences if both chose the same token, or else at least the difference of
/// the tokens' logits. Where a confidence is close to 0 or 1, rounding hides the difference.
fn error_of_odds(row: &[f32], unmask: &SamplingParams, got: &Prediction, want: &Prediction) -> Option<f64> {
    let plain = unmask.confidence == Confidence::Probability && unmask.temperature == 0.0;
    if !plain || unmask.top_p.is_some() || unmask.top_k.is_some() {
        return None;
    }
    if got.token != want.token {
        return Some(f64::from(row[want.token as usize]) - f64::from(row[got.token as usize]));
    }
    let odds = |p: f64| (0.001..0.999).contains(&p).then(|| (p / (1.0 - p)).ln());
    Some((odds(got.confidence)? - odds(want.confidence)?).abs())
}

/// Compares the commits of one sequence's candidates, whose confidences are within `ranges`. Returns of each candidate that may be
/// committed whether the device differs, and whether its commit is the same for all these confidences.
fn commits(
    what: &str,
    group: &Candidates,
    unmask: &SamplingParams,
    ranges: &[[f64; 2]],
    [cpu, gpu]: [&[Prediction]; 2],
) -> Vec<(bool, bool)> {
    let eligible = group.positions.partition_point(|p| *p < group.commit_before);
    let ranks = |i: usize, confidence: f64| {
        if unmask.alg_temp > 0.0 {
            confidence / unmask.alg_temp + gumbel(unmask.seed, Purpose::Rank, group.step, group.positions[i], 0)
        } else {
            confidence
        }
    };
    let slack = if unmask.alg_temp > 0.0 { ROUNDING / unmask.alg_temp + NOISE } else { ROUNDING };
    let low = |i: usize| ranks(i, ranges[i][0]) - slack;
    let high = |i: usize| ranks(i, ranges[i][1]) + slack;
    // `select` on the device's own confidences returns the device's commits, where rounding cannot change them.
    let own: Vec<f64> = gpu[..eligible].iter().map(|v| v.confidence).collect();
    let selected = select(&own, &own, group.commit_rule);
    let same = (0..eligible).all(|i| selected.contains(&i) == gpu[i].commit);
    let rounded = unmask.alg_temp > 0.0 || matches!(group.commit_rule, CommitRule::Factor(_));
    assert!(same || rounded, "{what}: {group:?} of {own:?} chose {gpu:?}");

    let sorted = |end: usize| {
        let bounded = |x: f64| x.clamp(-1e9, 1e9);
        let list: Vec<f64> = (0..eligible).map(|i| bounded(if end == 0 { low(i) } else { high(i) })).collect();
        select(&list, &list, group.commit_rule).len()
    };
    let mut list = Vec::new();
    for (i, (cpu, gpu)) in cpu.iter().zip(gpu).enumerate() {
        if i >= eligible {
            assert!(!cpu.commit && !gpu.commit, "{what}: {group:?}");
            continue;
        }
        // Minimum and maximum number of candidates that rank before it.
        let others = || (0..eligible).filter(|j| *j != i);
        let min_before = others().filter(|j| low(*j) > high(i)).count();
        let max_before = others().filter(|j| high(*j) >= low(i)).count();
        let (surely, surely_not) = match group.commit_rule {
            CommitRule::Quota(count) => (max_before < count, min_before >= count),
            CommitRule::Threshold(t) => (low(i) >= t || max_before == 0, high(i) < t && min_before > 0),
            CommitRule::ThresholdTopN { threshold: t, top_n } => {
                let commits = max_before < top_n && (low(i) >= t || max_before == 0);
                (commits, min_before >= top_n || (high(i) < t && min_before > 0))
            }
            CommitRule::Factor(_) => (max_before < sorted(0), min_before >= sorted(1)),
        };
        assert!(if cpu.commit { !surely_not } else { !surely }, "{what}: {group:?}: the rule contradicts {cpu:?}");
        list.push((cpu.commit != gpu.commit, surely || surely_not));
    }
    list
}

fn leeway(
    row: &[f32],
    gap: f64,
    unmask: &SamplingParams,
    step: usize,
    position: usize,
    prediction: &Prediction,
) -> Leeway {
    assert_eq!(score_row(&mut row.to_vec(), unmask, step, position), Some((prediction.token, prediction.confidence)));
    let Some(mask) = unmask.mask_token.map(|mask| mask as usize) else {
        return leeway_of_row(row, gap, unmask, step, position, prediction);
    };
    // A mask token with the largest logit is ignored. Where that is in doubt, the possible decisions are those of both cases.
    let others = row.iter().enumerate().filter(|(t, _)| *t != mask).map(|(_, l)| *l).fold(f32::MIN, f32::max);
    let ahead = f64::from(row[mask]) - f64::from(others);
    let mut without = row.to_vec();
    without[mask] = f32::NEG_INFINITY;
    if ahead > gap {
        return leeway_of_row(&without, gap, unmask, step, position, prediction);
    }
    let mut leeway = leeway_of_row(row, gap, unmask, step, position, prediction);
    if ahead >= -gap {
        let other = leeway_of_row(&without, gap, unmask, step, position, prediction);
        for (token, [c, d]) in other.0 {
            let range = leeway.0.entry(token).or_insert([c, d]);
            *range = [range[0].min(c), range[1].max(d)];
        }
    }
    leeway
}

/// Returns the possible decisions for a row in which it is settled whether the mask token takes part.
fn leeway_of_row(
    row: &[f32],
    gap: f64,
    unmask: &SamplingParams,
    step: usize,
    position: usize,
    prediction: &Prediction,
) -> Leeway {
    let tempered = if unmask.temperature > 0.0 { unmask.temperature } else { 1.0 };
    let [kept, perhaps] = cuts(row, gap / tempered, unmask, tempered);
    let kept = |l: f32| f64::from(l) >= kept + gap;
    let perhaps = |l: f32| l > f32::NEG_INFINITY && f64::from(l) >= perhaps - gap;
    let is_mask = |t: usize| unmask.mask_token == Some(t as u32);

    // Tokens by logit plus the noise that both sides add.
    let noise = |t: usize| {
        if unmask.temperature > 0.0 {
            unmask.temperature * gumbel(unmask.seed, Purpose::Token, step, position, t)
        } else {
            0.0
        }
    };
    let noised: Vec<f64> = row.iter().enumerate().map(|(t, l)| f64::from(*l) + noise(t)).collect();
    let largest = row.iter().enumerate().filter(|(t, _)| !is_mask(*t)).map(|(_, l)| *l).fold(f32::MIN, f32::max);
    let sure = |t: usize| kept(row[t]) || (row[t] == largest && unmask.temperature == 0.0);
    let reach = gap + if unmask.temperature > 0.0 { unmask.temperature * NOISE } else { 0.0 };
    let least = (0..row.len()).filter(|t| !is_mask(*t) && sure(*t)).map(|t| noised[t]).fold(f64::MIN, f64::max) - reach;
    let tokens: Vec<u32> = (0..row.len())
        .filter(|t| !is_mask(*t) && (perhaps(row[*t]) || row[*t] == largest) && noised[*t] >= least)
        .map(|t| t as u32)
        .collect();
    assert!(tokens.contains(&prediction.token), "the rule contradicts the CPU: {tokens:?}, {prediction:?}");

    // Confidences.
    let scale = if unmask.tempered_confidence { tempered } else { 1.0 };
    let x = gap / scale;
    let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
    let weight = |t: usize| ((f64::from(row[t]) - max) / scale).exp();
    let sum = |kept: &dyn Fn(f32) -> bool, but: usize| -> f64 {
        (0..row.len()).filter(|t| *t != but && kept(row[*t])).map(weight).sum()
    };
    // Odds change by at most a factor of e^x.
    let probability = |t: usize| {
        let w = weight(t);
        [w / (w + sum(&perhaps, t) * x.exp()), w / (w + sum(&kept, t) * (-x).exp())]
    };
    let confidence = |token: u32| match unmask.confidence {
        Confidence::Random => [prediction.confidence; 2],
        Confidence::Probability => probability(token as usize),
        // Also holds where the best two may change places: the bounds of a larger logit are larger.
        Confidence::Margin => {
            let best = (0..row.len()).find(|t| f64::from(row[*t]) == max).unwrap();
            let second = (0..row.len()).filter(|t| *t != best).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            let ([a, b], [c, d]) = (probability(best), probability(second));
            [(a - d).max(0.0), b - if kept(row[second]) { c } else { 0.0 }]
        }
        Confidence::Entropy => {
            let entropies = |kept: &dyn Fn(f32) -> bool| {
                let total = sum(kept, usize::MAX);
                let p: Vec<f64> = (0..row.len()).filter(|t| kept(row[*t])).map(|t| weight(t) / total).collect();
                let entropy: f64 = p.iter().map(|p| p * (p + 1e-10).ln()).sum();
                // The derivative by a logit is p (ln p - entropy), and logits differ by x / 2 at most; the other half of x covers the
                // terms that are not linear.
                let slope: f64 = p.iter().map(|p| p * ((p + 1e-10).ln() - entropy).abs()).sum();
                [entropy - x * slope, entropy + x * slope]
            };
            // Any set of tokens between the surely kept ones and the possibly kept ones is possible.
            let (few, many) = (entropies(&|l| kept(l) || f64::from(l) == max), entropies(&perhaps));
            [few[0].min(many[0]), few[1].max(many[1])]
        }
    };
    Leeway(tokens.iter().map(|token| (*token, confidence(*token))).collect())
}

/// Returns the smallest logits that top-p and top-k surely keep, and possibly keep. A probability mass p has an error of at most x
/// in ln(p / (1 - p)).
fn cuts(row: &[f32], x: f64, unmask: &SamplingParams, tempered: f64) -> [f64; 2] {
    if unmask.top_p.is_none() && unmask.top_k.is_none() {
        return [f64::NEG_INFINITY; 2];
    }
    let shifted = |p: f64, by: f64| if p < 1.0 { 1.0 / (1.0 + (1.0 - p) / p * (-by).exp()) } else { p };
    [-x, x].map(|by| f64::from(min_kept_logit(row, tempered, unmask.top_p.map(|p| shifted(p, by)), unmask.top_k)))
}
