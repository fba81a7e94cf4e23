//! The margin rule: which decisions of the device may differ from the CPU's because of bf16.
//!
//! Weights are bf16 on both sides: every checkpoint here stores values that are exact in bf16. But the device rounds each activation
//! to 8 significant bits wherever it stores one, about a dozen times a layer. The mean relative error of one rounding is
//! 2^-9 / sqrt(3), and the rounded values go through attention, whose weights are exponentials. The hidden state that reaches the
//! head has an error of one or two hundredths of its length in a random direction. Each logit is its product with a row of the
//! head, so the error of a logit is random too.
//!
//! The size of the error is not measured on the device. [`super::bf16_reference`] is the CPU backend that rounds where the device
//! rounds: its logits differ from the CPU's as the device's should. Let r be the root mean square of these differences in a row.
//! The rule has one number: **no difference between two logits of the device is further than [`MARGIN`] r from the same difference
//! on the CPU.** With normal errors and an exact r, sqrt(2) r would be the standard deviation of a difference, and 12 r more than 8
//! of them. But r is one sample, and inexact in single rows (9.5 r was observed). The tests of forwards check the device against
//! this number, and its r against that of the bf16 reference.
//!
//! The rest follows from how a decision depends on logits:
//! - A token is *possible* when some logits within the margin would choose it. If only one token is possible, the device must
//!   choose it. If several are, the candidate's *token is in doubt*, and the device must choose one of them.
//! - A confidence is between the minimum and the maximum over logits within the margin.
//! - A commit is certain when it is the same for all confidences between these bounds, independently for each candidate. Otherwise
//!   the *commit is in doubt*. Where the token is in doubt the confidence is unbounded.
//!
//! Decisions in doubt are counted, and so are those in which the device differs; the tests bound both shares. All others must be
//! equal.

use super::bf16_reference::Selections;
use dllm_kernels::Confidence;
use dllm_kernels::sampling::philox::{Purpose, gumbel};
use dllm_kernels::sampling::{Candidates, CommitRule, Prediction, SamplingParams, min_kept_logit, score_row, select};

/// Bound of the error of a difference of two logits, in root mean square errors of the row.
pub const MARGIN: f64 = 12.0;

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
    /// Rows that V-verify selected on the device, those that the bf16 reference would not have selected, and the largest angle by
    /// which a selected row had changed less than one that was not selected, in radians.
    pub selected: usize,
    pub selected_differs: usize,
    pub worst_angle: f64,
}

impl Tally {
    pub fn selections(&mut self, selections: &Selections) {
        (self.selected, self.selected_differs, self.worst_angle) =
            (selections.rows, selections.other_rows, selections.worst);
    }

    pub fn add(&mut self, other: Tally) {
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
        for (seen, max) in self.in_doubt().into_iter().zip(in_doubt) {
            assert!(seen <= max, "{seen} in doubt: {self}");
        }
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

/// Possible decisions about a candidate for logits within the margin.
struct Leeway {
    /// Possible tokens.
    tokens: Vec<u32>,
    /// Minimum and maximum confidence of the CPU's token.
    confidence: [f64; 2],
}

/// Logits of a pass on the CPU and by the bf16 reference: `[candidates, vocab_size]`, with guidance followed by those of the
/// unconditional sequences.
pub struct Logits {
    pub cpu: Vec<f32>,
    pub rounded: Vec<f32>,
    pub vocab_size: usize,
}

impl Logits {
    /// Returns the guided logits of candidate `i` of `candidates`, and the largest error of a difference between two of them.
    fn row(&self, i: usize, candidates: usize, unmask: &SamplingParams) -> (Vec<f32>, f64) {
        let n = self.vocab_size;
        let guided = |logits: &[f32]| -> Vec<f32> {
            let row = &logits[i * n..(i + 1) * n];
            if unmask.cfg_scale == 0.0 {
                return row.to_vec();
            }
            let unconditional = &logits[(candidates + i) * n..(candidates + i + 1) * n];
            row.iter().zip(unconditional).map(|(c, u)| u + (unmask.cfg_scale + 1.0) * (c - u)).collect()
        };
        let row = guided(&self.cpu);
        let gap = MARGIN * mean_error(&guided(&self.rounded), &row);
        (row, gap)
    }
}

/// Root mean square error of logits, without the error that is common to all of them.
pub fn mean_error(got: &[f32], want: &[f32]) -> f64 {
    let n = got.len() as f64;
    let error = || got.iter().zip(want).map(|(g, w)| f64::from(g - w));
    let mean = error().sum::<f64>() / n;
    (error().map(|e| (e - mean).powi(2)).sum::<f64>() / n).sqrt()
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
    let mut first = 0;
    for group in groups {
        let mut ranges = Vec::new();
        for (i, position) in group.positions.iter().enumerate() {
            let n = first + i;
            let (row, gap) = logits.row(n, cpu.len(), unmask);
            let leeway = leeway(&row, gap, unmask, group.step, *position, &cpu[n]);
            let place = || format!("{what}: sequence {}, step {}, position {position}", group.sequence, group.step);
            let (got, want) = (&gpu[n], &cpu[n]);
            tally.candidates += 1;
            tally.token_in_doubt += usize::from(leeway.tokens.len() > 1);
            tally.token_differs += usize::from(got.token != want.token);
            assert!(
                leeway.tokens.contains(&got.token),
                "{}: {got:?}, CPU {want:?}: not of {:?}",
                place(),
                leeway.tokens
            );
            if got.token == want.token {
                let [low, high] = leeway.confidence;
                let fits = low - ROUNDING <= got.confidence && got.confidence <= high + ROUNDING;
                assert!(fits, "{}: {got:?}, CPU {want:?}: not within {low} and {high}", place());
            }
            ranges.push(match leeway.tokens.len() {
                1 => leeway.confidence,
                _ => [f64::NEG_INFINITY, f64::INFINITY],
            });
        }
        let own = first..first + group.positions.len();
        commits(what, group, unmask, &ranges, [&cpu[own.clone()], &gpu[own.clone()]], &mut tally);
        first = own.end;
    }
    assert_eq!(first, cpu.len(), "{what}");
    tally
}

/// Compares the commits of one sequence's candidates.
fn commits(
    what: &str,
    group: &Candidates,
    unmask: &SamplingParams,
    ranges: &[[f64; 2]],
    [cpu, gpu]: [&[Prediction]; 2],
    tally: &mut Tally,
) {
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
        let differs = cpu.commit != gpu.commit;
        tally.commit_in_doubt += usize::from(!surely && !surely_not);
        tally.commit_differs += usize::from(differs);
        let position = group.positions[i];
        assert!(
            !differs || !(surely || surely_not),
            "{what}: sequence {}, step {}, position {position}, {:?}: {gpu:?}, CPU {cpu:?}, between {:?}",
            group.sequence,
            group.step,
            group.commit_rule,
            ranges[i]
        );
    }
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
        leeway.tokens.extend(other.tokens);
        let [[a, b], [c, d]] = [leeway.confidence, other.confidence];
        leeway.confidence = [a.min(c), b.max(d)];
    }
    leeway.tokens.sort_unstable();
    leeway.tokens.dedup();
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
    let confidence = match unmask.confidence {
        Confidence::Random => [prediction.confidence; 2],
        Confidence::Probability => probability(prediction.token as usize),
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
    Leeway { tokens, confidence }
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
