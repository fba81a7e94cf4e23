//! The margin rule: what bf16 leaves open of a decision, and what it does not.
//!
//! Weights are bf16 on both sides: every checkpoint here stores values that bf16 holds. But the device rounds each activation to
//! 8 significant bits wherever it stores one, a dozen times a layer, by 2^-9 / sqrt(3) of it in the mean, and what is rounded
//! goes through attention, whose weights are exponentials. What reaches the head is a hidden state that is off by a hundredth
//! or two of its length in a direction of its own, and each logit, its product with a row of the head, is off at random.
//!
//! How far is not taken from the device. [`crate::rounded`] is the CPU backend that rounds where the device does: what it makes
//! of a row of logits differs from the CPU's as what the device makes of it should. With r the root of the mean square of these
//! differences the rule has one number: **no difference between two logits of the device is further than [`MARGIN`] r from what
//! it is on the CPU.** Were errors normal and r exact, sqrt(2) r would be the standard deviation of a difference, and 12 r more
//! than 8 of them; but r is one sample, and in single rows off by a factor (9.5 r were seen). The tests of forward passes hold the device
//! to the number, and to the r of the CPU that rounds.
//!
//! Everything else follows from it, by how a decision depends on logits:
//! - A token may be the device's when logits that are that close could make it the one. Where only one token may be, the
//!   device has to choose it; where several may, the candidate's *token is in doubt*, and the device's has to be among them.
//! - A confidence lies between the least and the most that such logits give.
//! - A candidate is committed, or is not, when this is so for all confidences between those bounds, each candidate's on its
//!   own; if not its *commit is in doubt*. Where the token is in doubt the confidence may be anything.
//!
//! What is in doubt is counted, and so is where the device makes use of it; the tests bound how often. All else has to be equal.

use crate::rounded::DeviceSelection;
use dllm_kernels::Confidence;
use dllm_kernels::sampling::philox::{Purpose, gumbel};
use dllm_kernels::sampling::{Candidates, CommitRule, Prediction, SamplingParams, min_kept_logit, score_row, select};

/// Bound of what differences of logits are off by, in mean errors of the row.
pub const MARGIN: f64 = 12.0;

/// f32 in place of f64: of a confidence, and of a Gumbel number.
const ROUNDING: f64 = 2e-6;
const NOISE: f64 = 1e-4;

/// What was compared, and what the rule leaves out.
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
    /// Rows that V-verify chose on the device, those of them that the CPU that rounds would not have chosen, and the largest
    /// angle by which a row had turned less than one that was left.
    pub selected: usize,
    pub chosen_differs: usize,
    pub worst_angle: f64,
}

impl Tally {
    pub fn choices(&mut self, choices: &DeviceSelection) {
        (self.selected, self.chosen_differs, self.worst_angle) = (choices.rows, choices.other_rows, choices.worst);
    }

    pub fn add(&mut self, other: Tally) {
        self.selected += other.selected;
        self.chosen_differs += other.chosen_differs;
        self.worst_angle = self.worst_angle.max(other.worst_angle);
        self.passes += other.passes;
        self.candidates += other.candidates;
        self.token_in_doubt += other.token_in_doubt;
        self.token_differs += other.token_differs;
        self.commit_in_doubt += other.commit_in_doubt;
        self.commit_differs += other.commit_differs;
    }

    /// That of the candidates no more than these shares differ in token and commit, and are in doubt.
    #[track_caller]
    pub fn assert_few(&self, differ: [f64; 2], in_doubt: [f64; 2]) {
        let share = |n: usize| n as f64 / self.candidates as f64;
        for (seen, most) in [self.token_differs, self.commit_differs].into_iter().zip(differ) {
            assert!(share(seen) <= most, "{seen} differ: {self}");
        }
        for (seen, most) in self.in_doubt().into_iter().zip(in_doubt) {
            assert!(seen <= most, "{seen} in doubt: {self}");
        }
    }

    /// Shares of the candidates in doubt, tokens and commits.
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
                "; rows chosen {n}, different {}, by an angle of {:.4}",
                self.chosen_differs, self.worst_angle
            ),
        }
    }
}

/// What a candidate may become, with logits within the margin.
struct Leeway {
    /// Tokens that may be chosen.
    tokens: Vec<u32>,
    /// Least and largest confidence of the CPU's token.
    confidence: [f64; 2],
}

/// The logits of a pass, by the CPU and by the CPU that rounds: `[candidates, vocab_size]`, with guidance those of the twins
/// behind them.
pub struct Logits {
    pub cpu: Vec<f32>,
    pub rounded: Vec<f32>,
    pub vocab_size: usize,
}

impl Logits {
    /// A candidate's row, guided, and how far differences in it may be off. Of so many candidates.
    fn row(&self, i: usize, candidates: usize, unmask: &SamplingParams) -> (Vec<f32>, f64) {
        let n = self.vocab_size;
        let of = |logits: &[f32]| -> Vec<f32> {
            let row = &logits[i * n..(i + 1) * n];
            if unmask.cfg_scale == 0.0 {
                return row.to_vec();
            }
            let twin = &logits[(candidates + i) * n..(candidates + i + 1) * n];
            row.iter().zip(twin).map(|(c, u)| u + (unmask.cfg_scale + 1.0) * (c - u)).collect()
        };
        let row = of(&self.cpu);
        let gap = MARGIN * mean_error(&of(&self.rounded), &row);
        (row, gap)
    }
}

/// Root of the mean square of what logits are off by. The same for all of them is no error.
pub fn mean_error(got: &[f32], want: &[f32]) -> f64 {
    let n = got.len() as f64;
    let error = || got.iter().zip(want).map(|(g, w)| f64::from(g - w));
    let mean = error().sum::<f64>() / n;
    (error().map(|e| (e - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Of the verdicts of a pass, CPU and device: what is in doubt is counted, all else has to be equal.
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

/// Which candidates of a group are committed.
fn commits(
    what: &str,
    group: &Candidates,
    unmask: &SamplingParams,
    ranges: &[[f64; 2]],
    [cpu, gpu]: [&[Prediction]; 2],
    tally: &mut Tally,
) {
    let eligible = group.positions.partition_point(|p| *p < group.commit_before);
    let ranks = |i: usize, confidence: f64| match unmask.alg_temp > 0.0 {
        true => confidence / unmask.alg_temp + gumbel(unmask.seed, Purpose::Rank, group.step, group.positions[i], 0),
        false => confidence,
    };
    let slack = if unmask.alg_temp > 0.0 { ROUNDING / unmask.alg_temp + NOISE } else { ROUNDING };
    let low = |i: usize| ranks(i, ranges[i][0]) - slack;
    let high = |i: usize| ranks(i, ranges[i][1]) + slack;
    // The device's own confidences, selected from by the oracle, give the device's choice: where rounding cannot change it.
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
        // How many are before it at least, and at most.
        let others = || (0..eligible).filter(|j| *j != i);
        let least = others().filter(|j| low(*j) > high(i)).count();
        let most = others().filter(|j| high(*j) >= low(i)).count();
        let (surely, surely_not) = match group.commit_rule {
            CommitRule::Quota(count) => (most < count, least >= count),
            CommitRule::Threshold(t) => (low(i) >= t || most == 0, high(i) < t && least > 0),
            CommitRule::ThresholdTopN { threshold: t, top_n } => {
                (most < top_n && (low(i) >= t || most == 0), least >= top_n || (high(i) < t && least > 0))
            }
            CommitRule::Factor(_) => (most < sorted(0), least >= sorted(1)),
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
    verdict: &Prediction,
) -> Leeway {
    assert_eq!(score_row(&mut row.to_vec(), unmask, step, position), Some((verdict.token, verdict.confidence)));
    let Some(mask) = unmask.mask_token.map(|mask| mask as usize) else {
        return of_row(row, gap, unmask, step, position, verdict);
    };
    // The largest logit counts as none when it is the mask token's. Where that is in doubt both ways are open.
    let others = row.iter().enumerate().filter(|(t, _)| *t != mask).map(|(_, l)| *l).fold(f32::MIN, f32::max);
    let ahead = f64::from(row[mask]) - f64::from(others);
    let mut without = row.to_vec();
    without[mask] = f32::NEG_INFINITY;
    if ahead > gap {
        return of_row(&without, gap, unmask, step, position, verdict);
    }
    let mut leeway = of_row(row, gap, unmask, step, position, verdict);
    if ahead >= -gap {
        let other = of_row(&without, gap, unmask, step, position, verdict);
        leeway.tokens.extend(other.tokens);
        let [[a, b], [c, d]] = [leeway.confidence, other.confidence];
        leeway.confidence = [a.min(c), b.max(d)];
    }
    leeway.tokens.sort_unstable();
    leeway.tokens.dedup();
    leeway
}

/// The same, once it is settled whether the mask token has a logit.
fn of_row(
    row: &[f32],
    gap: f64,
    unmask: &SamplingParams,
    step: usize,
    position: usize,
    verdict: &Prediction,
) -> Leeway {
    let tempered = if unmask.temperature > 0.0 { unmask.temperature } else { 1.0 };
    let [kept, perhaps] = cuts(row, gap / tempered, unmask, tempered);
    let kept = |l: f32| f64::from(l) >= kept + gap;
    let perhaps = |l: f32| l > f32::NEG_INFINITY && f64::from(l) >= perhaps - gap;
    let is_mask = |t: usize| unmask.mask_token == Some(t as u32);

    // Tokens, by their logits and the noise that both sides add.
    let noise = |t: usize| match unmask.temperature > 0.0 {
        true => unmask.temperature * gumbel(unmask.seed, Purpose::Token, step, position, t),
        false => 0.0,
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
    assert!(tokens.contains(&verdict.token), "the rule contradicts the CPU: {tokens:?}, {verdict:?}");

    // Confidences.
    let scale = if unmask.tempered_confidence { tempered } else { 1.0 };
    let x = gap / scale;
    let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
    let weight = |t: usize| ((f64::from(row[t]) - max) / scale).exp();
    let sum = |of: &dyn Fn(f32) -> bool, but: usize| -> f64 {
        (0..row.len()).filter(|t| *t != but && of(row[*t])).map(weight).sum()
    };
    // Odds change by a factor of e^x at most.
    let probability = |t: usize| {
        let w = weight(t);
        [w / (w + sum(&perhaps, t) * x.exp()), w / (w + sum(&kept, t) * (-x).exp())]
    };
    let confidence = match unmask.confidence {
        Confidence::Random => [verdict.confidence; 2],
        Confidence::Probability => probability(verdict.token as usize),
        Confidence::Margin => {
            let best = (0..row.len()).find(|t| f64::from(row[*t]) == max).unwrap();
            let second = (0..row.len()).filter(|t| *t != best).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            let ([a, b], [c, d]) = (probability(best), probability(second));
            [(a - d).max(0.0), b - if kept(row[second]) { c } else { 0.0 }]
        }
        Confidence::Entropy => {
            let of = |of: &dyn Fn(f32) -> bool| {
                let total = sum(of, usize::MAX);
                let p: Vec<f64> = (0..row.len()).filter(|t| of(row[*t])).map(|t| weight(t) / total).collect();
                let entropy: f64 = p.iter().map(|p| p * (p + 1e-10).ln()).sum();
                // Its derivative by a logit is p (ln p - entropy), and each is off by x / 2 of another: the other half is for what is
                // not linear in them.
                let slope: f64 = p.iter().map(|p| p * ((p + 1e-10).ln() - entropy).abs()).sum();
                [entropy - x * slope, entropy + x * slope]
            };
            // Between what is surely kept and what may be, any token may be the last.
            let (few, many) = (of(&|l| kept(l) || f64::from(l) == max), of(&perhaps));
            [few[0].min(many[0]), few[1].max(many[1])]
        }
    };
    Leeway { tokens, confidence }
}

/// Logits from which on tokens are surely kept, and those that may be, by top-p and top-k: a probability mass p is off by
/// x at most in ln(p / (1 - p)).
fn cuts(row: &[f32], x: f64, unmask: &SamplingParams, tempered: f64) -> [f64; 2] {
    if unmask.top_p.is_none() && unmask.top_k.is_none() {
        return [f64::NEG_INFINITY; 2];
    }
    let shifted = |p: f64, by: f64| match p < 1.0 {
        true => 1.0 / (1.0 + (1.0 - p) / p * (-by).exp()),
        false => p,
    };
    [-x, x].map(|by| f64::from(min_kept_logit(row, tempered, unmask.top_p.map(|p| shifted(p, by)), unmask.top_k)))
}
