//! The margin rule: what bf16 leaves open of a decision, and what it does not.
//!
//! Weights are bf16 on both sides: every checkpoint here stores values that bf16 holds. The device rounds each activation to 8
//! significant bits wherever it stores one, a dozen times a layer, by up to 2^-9 of it and 2^-9 / sqrt(3) in the mean; what is
//! rounded goes through attention, whose weights are exponentials. What reaches the head is a hidden state that is off by a
//! hundredth or two of its length in a direction of its own, and a logit, its product with a row of the head, by that part of
//! what the logits of its row are apart. So the rule has one number: **no difference between a row's largest logits is further
//! from the reference's than [`F32`] standard deviations of its row**, where the reference is the CPU backend.
//!
//! That is much, in models whose weights are random. So the device is also compared with [`crate::rounded`], the CPU that
//! rounds where the device does. Then a difference is left only where another order of sums rounds to another side, and from
//! the weights of attention, which the device rounds too: [`ROUNDED`] standard deviations.
//!
//! The tests of forward passes measure both numbers, and hold the device to them. Everything else follows from the number, by
//! how a decision depends on logits:
//! - A token may be the device's when logits that are that close could make it the one. Where only one token may be, the
//!   device has to choose it; where several may, the candidate's *token is in doubt*, and the device's has to be among them.
//! - A confidence lies between the least and the most that such logits give.
//! - A candidate is committed, or is not, when this is so for all confidences between those bounds, each candidate's on its
//!   own; if not its *commit is in doubt*. Where the token is in doubt the confidence may be anything.
//!
//! What is in doubt is counted, and the tests bound how often the device makes use of it. All else has to be equal.

use dllm_kernels::Confidence;
use dllm_kernels::oracle::philox::{Purpose, gumbel};
use dllm_kernels::oracle::unmask::{Group, Selection, Unmask, Verdict, cut_logit, score_row, select};

/// Of differences of logits, in standard deviations of their row: from the CPU's.
pub const F32: f64 = 0.25;
/// From the rounded CPU's.
pub const ROUNDED: f64 = 0.06;
/// How many deviations below the largest a logit may be to count.
pub const REACH: f64 = 3.0;

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
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.passes += other.passes;
        self.candidates += other.candidates;
        self.token_in_doubt += other.token_in_doubt;
        self.token_differs += other.token_differs;
        self.commit_in_doubt += other.commit_in_doubt;
        self.commit_differs += other.commit_differs;
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
        )
    }
}

/// What a candidate may become, with logits within the margin.
struct Leeway {
    /// Tokens that may be chosen.
    tokens: Vec<u32>,
    /// Least and largest confidence of the CPU's token.
    confidence: [f64; 2],
}

/// Mean and standard deviation.
pub fn deviation(row: &[f32]) -> f64 {
    let n = row.len() as f64;
    let mean = row.iter().map(|l| f64::from(*l)).sum::<f64>() / n;
    (row.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Of the verdicts of a pass, CPU and device: what is in doubt is counted, all else has to be equal. `logits` are the CPU's,
/// `[candidates, vocab_size]`, with guidance those of the twins behind them.
pub fn compare(
    what: &str,
    margin: f64,
    logits: &[f32],
    vocab_size: usize,
    groups: &[Group],
    unmask: &Unmask,
    [cpu, gpu]: [&[Verdict]; 2],
) -> Tally {
    let mut tally = Tally { passes: 1, ..Tally::default() };
    assert_eq!(cpu.len(), gpu.len(), "{what}");
    let (rows, twins) = logits.split_at(cpu.len() * vocab_size);
    let mut first = 0;
    for group in groups {
        let mut ranges = Vec::new();
        for (i, position) in group.positions.iter().enumerate() {
            let n = first + i;
            let row = |of: &'_ [f32]| of[n * vocab_size..(n + 1) * vocab_size].to_vec();
            let twin = (!twins.is_empty()).then(|| row(twins));
            let leeway = leeway(margin, row(rows), twin, unmask, group.step, *position, &cpu[n]);
            let place = || format!("{what}: sequence {}, step {}, position {position}", group.sequence, group.step);
            let (got, want) = (&gpu[n], &cpu[n]);
            tally.candidates += 1;
            tally.token_in_doubt += usize::from(leeway.tokens.len() > 1);
            tally.token_differs += usize::from(got.token != want.token);
            assert!(leeway.tokens.contains(&got.token), "{}: token {got:?}, CPU {want:?}", place());
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
    group: &Group,
    unmask: &Unmask,
    ranges: &[[f64; 2]],
    [cpu, gpu]: [&[Verdict]; 2],
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
    let chosen = select(&own, &own, group.selection);
    let same = (0..eligible).all(|i| chosen.contains(&i) == gpu[i].commit);
    let rounded = unmask.alg_temp > 0.0 || matches!(group.selection, Selection::Factor(_));
    assert!(same || rounded, "{what}: {group:?} of {own:?} chose {gpu:?}");

    let sorted = |end: usize| {
        let bounded = |x: f64| x.clamp(-1e9, 1e9);
        let list: Vec<f64> = (0..eligible).map(|i| bounded(if end == 0 { low(i) } else { high(i) })).collect();
        select(&list, &list, group.selection).len()
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
        let (surely, surely_not) = match group.selection {
            Selection::Quota(count) => (most < count, least >= count),
            Selection::Threshold(t) => (low(i) >= t || most == 0, high(i) < t && least > 0),
            Selection::ThresholdAmong { threshold: t, among } => {
                (most < among && (low(i) >= t || most == 0), least >= among || (high(i) < t && least > 0))
            }
            Selection::Factor(_) => (most < sorted(0), least >= sorted(1)),
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
            group.selection,
            ranges[i]
        );
    }
}

fn leeway(
    margin: f64,
    mut row: Vec<f32>,
    twin: Option<Vec<f32>>,
    unmask: &Unmask,
    step: usize,
    position: usize,
    verdict: &Verdict,
) -> Leeway {
    let mut gap = margin * deviation(&row);
    if let Some(twin) = twin {
        // u + (w + 1) (c - u)
        let w = unmask.cfg_scale;
        gap = f64::from(w + 1.0) * gap + f64::from(w) * margin * deviation(&twin);
        row.iter_mut().zip(&twin).for_each(|(c, u)| *c = u + (w + 1.0) * (*c - u));
    }
    assert_eq!(score_row(&mut row.clone(), unmask, step, position), Some((verdict.token, verdict.confidence)));
    let Some(mask) = unmask.mask_token.map(|mask| mask as usize) else {
        return of_row(&row, gap, unmask, step, position, verdict);
    };
    // The largest logit counts as none when it is the mask token's. Where that is in doubt both ways are open.
    let others = row.iter().enumerate().filter(|(t, _)| *t != mask).map(|(_, l)| *l).fold(f32::MIN, f32::max);
    let ahead = f64::from(row[mask]) - f64::from(others);
    let mut without = row.clone();
    without[mask] = f32::NEG_INFINITY;
    if ahead > gap {
        return of_row(&without, gap, unmask, step, position, verdict);
    }
    let mut leeway = of_row(&row, gap, unmask, step, position, verdict);
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
fn of_row(row: &[f32], gap: f64, unmask: &Unmask, step: usize, position: usize, verdict: &Verdict) -> Leeway {
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
fn cuts(row: &[f32], x: f64, unmask: &Unmask, tempered: f64) -> [f64; 2] {
    if unmask.top_p.is_none() && unmask.top_k.is_none() {
        return [f64::NEG_INFINITY; 2];
    }
    let shifted = |p: f64, by: f64| match p < 1.0 {
        true => 1.0 / (1.0 + (1.0 - p) / p * (-by).exp()),
        false => p,
    };
    [-x, x].map(|by| f64::from(cut_logit(row, tempered, unmask.top_p.map(|p| shifted(p, by)), unmask.top_k)))
}
