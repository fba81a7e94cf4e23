//! The kernels of unmask and top_k_top_p against the reference, through the launch code of the crate.
//!
//! Confidences must agree within f32 rounding, tokens exactly. The commits must be those that the reference selects by the
//! confidences that the kernel computed.
#![cfg(feature = "cuda")]

mod common;

use common::{Float, Random, assert_nothing_reported, device, in_every_order};
use dllm_kernels::Confidence;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::top_k_top_p::{self, TopKTopP};
use dllm_kernels::ops::unmask::{self as op, Outcome, Policy, Row, RowTable, UnmaskConfig};
use dllm_kernels::reference::top_k_top_p::min_kept_logit;
use dllm_kernels::reference::unmask::{guide, rank, score_row, select};
use dllm_kernels::sampling::philox::{Purpose, gumbel};
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use half::{bf16, f16};

/// Relative error of a probability or margin: sums of up to 152,064 terms in f32, a tree of at most 19 levels, and
/// exponentials good to 2 units in the last place.
const RELATIVE: f64 = 4e-6;
/// Absolute error of an entropy: what the kernel leaves out of p ln(p + 1e-10) is at most 152,064 * 1e-10.
const ENTROPY: f64 = 2e-5;

/// Mostly tame, with an outlier now and then: softmax of anything tamer is nearly uniform.
fn logit(random: &mut Random) -> f32 {
    let scale = if random.below(100) == 0 { 6.0 } else { 1.5 };
    random.normal() * scale
}

fn unit(random: &mut Random) -> f32 {
    random.number() / 2.0 + 0.5
}

const MASK: i32 = 3;
const TEXT: i32 = 5;

/// A batch and what to do with it. Logits stand row for row, sequence after sequence.
#[derive(Clone)]
struct Case<T> {
    vocab: usize,
    stride: usize,
    /// Per sequence, which positions are masked.
    masked: Vec<Vec<bool>>,
    logits: Vec<T>,
    uncond: Option<Vec<T>>,
    mask_token: i32,
    unmask: SamplingParams,
    selection: Vec<CommitRule>,
    commit_before: Option<Vec<usize>>,
    steps: Vec<usize>,
    /// Each row is predicted by the logits of the row before (the first by its own).
    shift: bool,
}

fn plain() -> SamplingParams {
    let (seed, mask_token) = (0x1234_5678_9abc, Some(MASK as u32));
    SamplingParams { f32_confidence: true, seed, mask_token, ..SamplingParams::default() }
}

fn stride_of<T>(vocab: usize) -> usize {
    vocab.next_multiple_of(16 / size_of::<T>())
}

/// Random logits; what lies between the rows is NaN, and must not be looked at.
fn random_logits<T: Float>(random: &mut Random, rows: usize, vocab: usize) -> Vec<T> {
    let stride = stride_of::<T>(vocab);
    let logit = |i: usize, random: &mut Random| if i % stride < vocab { logit(random) } else { f32::NAN };
    (0..rows * stride).map(|i| T::of(logit(i, random))).collect()
}

impl<T: Float> Case<T> {
    /// Sequences of these lengths, two of three positions masked.
    fn new(random: &mut Random, vocab: usize, lengths: &[usize]) -> Case<T> {
        let masked: Vec<Vec<bool>> = lengths.iter().map(|n| (0..*n).map(|_| random.below(3) > 0).collect()).collect();
        let rows = lengths.iter().sum();
        Case {
            vocab,
            stride: stride_of::<T>(vocab),
            logits: random_logits(random, rows, vocab),
            uncond: None,
            mask_token: MASK,
            unmask: plain(),
            selection: vec![CommitRule::Threshold(0.5); masked.len()],
            commit_before: None,
            steps: (0..masked.len()).map(|s| 7 * s + 2).collect(),
            shift: false,
            masked,
        }
    }

    fn first_row(&self, sequence: usize) -> usize {
        self.masked[..sequence].iter().map(Vec::len).sum()
    }

    fn logits_row(&self, sequence: usize, position: usize) -> usize {
        self.first_row(sequence) + position.saturating_sub(self.shift as usize)
    }

    fn table(&self, stream: &Stream) -> RowTable {
        let row = |s: usize, position: usize| Row {
            token: self.first_row(s) + position,
            logits_row: self.logits_row(s, position),
            position,
        };
        let sequences: Vec<Vec<Row>> =
            (0..self.masked.len()).map(|s| (0..self.masked[s].len()).map(|p| row(s, p)).collect()).collect();
        RowTable::new(stream, &sequences).unwrap()
    }

    fn tokens(&self) -> Vec<i32> {
        self.masked.iter().flatten().map(|m| if *m { self.mask_token } else { TEXT }).collect()
    }

    /// One sequence of the batch, alone.
    fn only(&self, sequence: usize) -> Case<T> {
        let rows = self.first_row(sequence) * self.stride..self.first_row(sequence + 1) * self.stride;
        Case {
            masked: vec![self.masked[sequence].clone()],
            logits: self.logits[rows.clone()].to_vec(),
            uncond: self.uncond.as_ref().map(|u| u[rows].to_vec()),
            selection: vec![self.selection[sequence]],
            commit_before: self.commit_before.as_ref().map(|b| vec![b[sequence]]),
            steps: vec![self.steps[sequence]],
            ..self.clone()
        }
    }
}

/// Outputs of the kernel for a case.
#[derive(Clone, Debug)]
struct Got {
    tokens: Vec<i32>,
    masks_left: Vec<i32>,
    committed: Vec<i32>,
    failed: Vec<i32>,
    predicted: Vec<i32>,
    confidence: Vec<f32>,
}

impl Got {
    fn bits(&self) -> ([Vec<i32>; 5], Vec<u32>) {
        let confidence = self.confidence.iter().map(|c| c.to_bits()).collect();
        ([&self.tokens, &self.masks_left, &self.committed, &self.failed, &self.predicted].map(Vec::clone), confidence)
    }
}

/// A case on the device, to be launched any number of times.
struct OnDevice<T> {
    table: RowTable,
    logits: Buffer<T>,
    uncond: Option<Buffer<T>>,
    tokens: Buffer<i32>,
    quota: Option<Buffer<i32>>,
    before: Option<Buffer<i32>>,
    steps: Buffer<i32>,
    min_logit: Option<Buffer<f32>>,
    outcome: Outcome,
    workspace: dllm_kernels::ops::Workspace,
}

impl<T: Float> OnDevice<T> {
    fn new(stream: &Stream, case: &Case<T>) -> OnDevice<T> {
        let table = case.table(stream);
        let filters = case.unmask.top_p.is_some() || case.unmask.top_k.is_some();
        let quota: Vec<i32> = case
            .selection
            .iter()
            .filter_map(|selection| match selection {
                CommitRule::Quota(n) | CommitRule::ThresholdTopN { top_n: n, .. } => Some(*n as i32),
                _ => None,
            })
            .collect();
        let numbers = |values: &[usize]| values.iter().map(|v| *v as i32).collect::<Vec<i32>>();
        // As a launch before may have left it.
        let mut outcome = Outcome::new(stream, &table).unwrap();
        for counts in [&mut outcome.masks_left, &mut outcome.committed, &mut outcome.failed] {
            counts.write(&vec![77; case.masked.len()]).unwrap();
        }
        OnDevice {
            logits: stream.upload(&case.logits).unwrap(),
            uncond: case.uncond.as_ref().map(|u| stream.upload(u).unwrap()),
            tokens: stream.upload(&case.tokens()).unwrap(),
            quota: (!quota.is_empty()).then(|| stream.upload(&quota).unwrap()),
            before: case.commit_before.as_ref().map(|b| stream.upload(&numbers(b)).unwrap()),
            steps: stream.upload(&numbers(&case.steps)).unwrap(),
            min_logit: filters.then(|| stream.alloc(table.len()).unwrap()),
            outcome,
            workspace: op::workspace(stream, &table, case.vocab).unwrap(),
            table,
        }
    }

    fn launch(&mut self, stream: &Stream, case: &Case<T>) -> dllm_kernels::Result<()> {
        let unmask = &case.unmask;
        if let Some(min_logit) = &mut self.min_logit {
            let args = TopKTopP {
                logits: &self.logits,
                uncond_logits: self.uncond.as_ref(),
                vocab_size: case.vocab,
                logits_stride: case.stride,
                rows: &self.table,
                tokens: &self.tokens,
                top_p: unmask.top_p.map(|p| p as f32),
                top_k: unmask.top_k,
                temperature: unmask.temperature as f32,
                cfg_scale: unmask.cfg_scale,
                mask_token: case.mask_token as u32,
                min_logit,
            };
            top_k_top_p::launch(stream, args)?;
        }
        let policy = match (case.selection.first(), &self.quota) {
            (Some(CommitRule::Quota(_)), Some(quota)) => Policy::Fixed(quota),
            (Some(CommitRule::ThresholdTopN { threshold, .. }), Some(top_n)) => {
                Policy::Threshold { threshold: *threshold as f32, top_n: Some(top_n) }
            }
            (Some(CommitRule::Factor(factor)), _) => Policy::Factor(*factor as f32),
            (Some(CommitRule::Threshold(threshold)), _) => {
                Policy::Threshold { threshold: *threshold as f32, top_n: None }
            }
            _ => Policy::Factor(1.0),
        };
        let args = op::Unmask {
            logits: &self.logits,
            uncond_logits: self.uncond.as_ref(),
            vocab_size: case.vocab,
            logits_stride: case.stride,
            rows: &self.table,
            tokens: &mut self.tokens,
            commit_before: self.before.as_ref(),
            steps: Some(&self.steps),
            min_logit: self.min_logit.as_ref(),
            outcome: &mut self.outcome,
            workspace: &mut self.workspace,
        };
        let rule = UnmaskConfig {
            confidence: unmask.confidence,
            policy,
            temperature: unmask.temperature as f32,
            tempered_confidence: unmask.tempered_confidence,
            cfg_scale: unmask.cfg_scale,
            alg_temp: unmask.alg_temp as f32,
            seed: unmask.seed,
            mask_token: case.mask_token as u32,
        };
        op::launch(stream, args, &rule)
    }

    fn read(&self) -> Got {
        Got {
            tokens: self.tokens.read().unwrap(),
            masks_left: self.outcome.masks_left.read().unwrap(),
            committed: self.outcome.committed.read().unwrap(),
            failed: self.outcome.failed.read().unwrap(),
            predicted: self.outcome.predicted.read().unwrap(),
            confidence: self.outcome.confidence.read().unwrap(),
        }
    }
}

fn run<T: Float>(case: &Case<T>) -> Got {
    let stream = device().stream().unwrap();
    let mut on_device = OnDevice::new(&stream, case);
    on_device.launch(&stream, case).unwrap();
    let got = on_device.read();
    drop(on_device); // buffers are looked at when they are freed
    assert_nothing_reported();
    got
}

/// Returns the logits of a row as f32, guided where the case has guidance.
fn reference_row<T: Float>(case: &Case<T>, sequence: usize, position: usize) -> Vec<f32> {
    let start = case.logits_row(sequence, position) * case.stride;
    let row = |logits: &[T]| logits[start..start + case.vocab].iter().map(|l| l.f32()).collect::<Vec<f32>>();
    match case.uncond.as_ref().filter(|_| case.unmask.cfg_scale > 0.0) {
        Some(uncond) => guide(&row(&case.logits), &row(uncond), case.unmask.cfg_scale),
        None => row(&case.logits),
    }
}

fn close(got: f32, want: f64, kind: Confidence) -> bool {
    let error = (got as f64 - want).abs();
    match kind {
        Confidence::Entropy => error <= ENTROPY,
        // A difference: what it cancels is up to a rounding of the exponentials.
        Confidence::Margin => error <= RELATIVE * want.abs() + 5e-7,
        _ => error <= RELATIVE * want.abs() + 1e-30,
    }
}

/// Whether two draws of a row were so close that rounding decides; how close they may be.
fn draws_tie(case_: &SamplingParams, logits: &[f32], step: usize, position: usize, a: usize, b: usize) -> bool {
    let noised = |token: usize| {
        logits[token] as f64 + case_.temperature * gumbel(case_.seed, Purpose::Token, step, position, token)
    };
    (noised(a) - noised(b)).abs() < 1e-5
}

/// Compares every output of the kernel with the reference.
fn check<T: Float>(case: &Case<T>, got: &Got, name: &str) {
    let mut tokens = case.tokens();
    for (s, masked) in case.masked.iter().enumerate() {
        let (first, step) = (case.first_row(s), case.steps[s]);
        let before = case.commit_before.as_ref().map_or(usize::MAX, |b| b[s]);
        let (mut candidates, mut failed) = (Vec::new(), -1);
        for (position, is_masked) in masked.iter().enumerate() {
            let at = first + position;
            let name = format!("{name}: sequence {s} position {position}");
            if !is_masked {
                assert_eq!((got.predicted[at], got.confidence[at]), (-1, 0.0), "{name}");
                continue;
            }
            let logits = reference_row(case, s, position);
            let Some((token, confidence)) = score_row(&logits, &case.unmask, step, position) else {
                assert_eq!(got.predicted[at], -1, "{name}");
                failed = if failed < 0 { position as i32 } else { failed };
                continue;
            };
            let predicted = got.predicted[at] as usize;
            if predicted == token as usize {
                let kind = case.unmask.confidence;
                assert!(close(got.confidence[at], confidence, kind), "{name}: {} {confidence}", got.confidence[at]);
            } else {
                let tie = case.unmask.temperature > 0.0
                    && draws_tie(&case.unmask, &logits, step, position, predicted, token as usize);
                assert!(tie, "{name}: token {predicted}, expected {token}");
            }
            if position < before {
                candidates.push(position);
            }
        }
        let confidences: Vec<f64> = candidates.iter().map(|p| got.confidence[first + p] as f64).collect();
        let ranks: Vec<f64> =
            confidences.iter().zip(&candidates).map(|(c, p)| rank(*c, &case.unmask, step, *p)).collect();
        let selected = if failed < 0 { select(&confidences, &ranks, in_f32(case.selection[s])) } else { Vec::new() };
        for i in &selected {
            tokens[first + candidates[*i]] = got.predicted[first + candidates[*i]];
        }
        let counts = (got.committed[s] as usize, got.masks_left[s] as usize);
        assert_eq!(counts, (selected.len(), candidates.len() - selected.len()), "{name}: sequence {s}");
        assert_eq!(got.failed[s], failed, "{name}: sequence {s}");
    }
    assert_eq!(got.tokens, tokens, "{name}");
}

/// The kernel compares with f32 numbers.
fn in_f32(commit_rule: CommitRule) -> CommitRule {
    match commit_rule {
        CommitRule::Threshold(t) => CommitRule::Threshold(t as f32 as f64),
        CommitRule::ThresholdTopN { threshold, top_n } => {
            CommitRule::ThresholdTopN { threshold: threshold as f32 as f64, top_n }
        }
        CommitRule::Factor(f) => CommitRule::Factor(f as f32 as f64),
        quota => quota,
    }
}

fn check_all_types(
    name: &str,
    make: impl Fn(&mut Random) -> (usize, Vec<usize>),
    change: impl Fn(&mut Any, &mut Random),
) {
    fn one<T: Float>(
        name: &str,
        make: &impl Fn(&mut Random) -> (usize, Vec<usize>),
        change: &impl Fn(&mut Any, &mut Random),
    ) {
        let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ name.len() as u64);
        let (vocab, lengths) = make(&mut random);
        let mut case = Case::<T>::new(&mut random, vocab, &lengths);
        let mut any = Any {
            unmask: case.unmask.clone(),
            selection: case.selection.clone(),
            commit_before: None,
            guided: false,
            shift: false,
        };
        change(&mut any, &mut random);
        case.unmask = any.unmask;
        case.selection = any.selection;
        case.commit_before = any.commit_before;
        case.shift = any.shift;
        if any.guided {
            case.uncond = Some(random_logits(&mut random, lengths.iter().sum(), vocab));
        }
        check(&case, &run(&case), &format!("{name}, {}", std::any::type_name::<T>()));
    }
    one::<bf16>(name, &make, &change);
    one::<f16>(name, &make, &change);
    one::<f32>(name, &make, &change);
}

/// The part of a case that does not depend on its element type.
struct Any {
    unmask: SamplingParams,
    selection: Vec<CommitRule>,
    commit_before: Option<Vec<usize>>,
    guided: bool,
    shift: bool,
}

const POLICIES: [CommitRule; 6] = [
    CommitRule::Quota(3),
    CommitRule::Quota(0),
    CommitRule::Threshold(0.1),
    CommitRule::ThresholdTopN { threshold: 0.02, top_n: 4 },
    CommitRule::Factor(1.0),
    CommitRule::Factor(2.5),
];

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn vocabularies_and_policies() {
    for vocab in [1, 2, 7, 8, 100, 512, 2048, 8191, 8192, 8193, 20_000] {
        for (i, selection) in POLICIES.into_iter().enumerate() {
            let lengths = [5 + i, 1, 16];
            check_all_types(
                &format!("vocabulary {vocab}, {selection:?}"),
                |_| (vocab, lengths.to_vec()),
                |any, _| any.selection = vec![selection; 3],
            );
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn published_vocabularies() {
    for vocab in [126_464, 152_064] {
        check_all_types(&format!("{vocab}"), |_| (vocab, vec![3, 2]), |_, _| {});
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn published_vocabularies_in_the_general_form() {
    for vocab in [126_464, 152_064] {
        for confidence in [Confidence::Entropy, Confidence::Margin] {
            check_all_types(
                &format!("{vocab}, {confidence:?}"),
                |_| (vocab, vec![2]),
                |any, _| {
                    any.unmask =
                        SamplingParams { confidence, top_p: Some(0.9), top_k: Some(50), temperature: 0.5, ..plain() };
                    any.guided = confidence == Confidence::Margin;
                    any.unmask.cfg_scale = if any.guided { 0.5 } else { 0.0 };
                },
            );
        }
    }
}

/// The smallest numbers of candidates, where the factor rule has its quirk, with confidences of every sign.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn factors_of_few_rows() {
    for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random] {
        for rows in 1..=4 {
            for factor in [0.1, 1.0, 8.0, 40.0] {
                check_all_types(
                    &format!("{confidence:?} of {rows}, factor {factor}"),
                    |_| (64, vec![rows, rows, rows]),
                    |any, _| {
                        any.selection = vec![CommitRule::Factor(factor); 3];
                        any.unmask.confidence = confidence;
                    },
                );
            }
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn every_confidence() {
    for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random] {
        for vocab in [1, 64, 9000] {
            for (i, selection) in POLICIES.into_iter().enumerate() {
                check_all_types(
                    &format!("{confidence:?} of {vocab}, {selection:?}"),
                    |_| (vocab, vec![9, 4 + i]),
                    |any, _| {
                        any.selection = vec![selection; 2];
                        any.unmask.confidence = confidence;
                    },
                );
            }
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn draws() {
    for (i, temperature) in [0.2, 0.7, 1.0, 3.0].into_iter().enumerate() {
        for tempered in [false, true] {
            for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy] {
                check_all_types(
                    &format!("temperature {temperature}, {confidence:?}, tempered {tempered}"),
                    |_| ([100, 9000][i % 2], vec![10, 3]),
                    |any, _| {
                        any.unmask.temperature = temperature;
                        any.unmask.tempered_confidence = tempered;
                        any.unmask.confidence = confidence;
                    },
                );
            }
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn guidance() {
    for (scale, temperature) in [(0.0, 0.0), (1.5, 0.0), (0.5, 0.9)] {
        check_all_types(
            &format!("guidance {scale}"),
            |_| (8200, vec![6, 2]),
            |any, _| {
                any.guided = true;
                any.unmask.cfg_scale = scale;
                any.unmask.temperature = temperature;
            },
        );
    }
}

/// Guided logits that differ by their roundings only: the kernel must round as the reference does.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn guidance_rounds_as_the_originals() {
    let mut random = Random(21);
    let mut case = Case::<f32>::new(&mut random, 64, &[12]);
    let uncond: Vec<f32> = random_logits(&mut random, 12, 64);
    case.unmask.cfg_scale = 1.5;
    case.logits = uncond.iter().map(|u| u + (10.0 - u) / 2.5).collect();
    case.uncond = Some(uncond);
    check(&case, &run(&case), "guidance");
}

/// Noise of a u near 1, which decides most draws, is as exact as any: the largest of each row against a logit that just
/// makes up for it, or just does not.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn large_noise_is_exact() {
    let mut case = Case::<f32>::new(&mut Random(22), 30_000, &[6]);
    case.masked[0] = vec![true; 6];
    case.unmask.temperature = 1.0;
    for (position, row) in case.logits.chunks_mut(30_000).enumerate() {
        let noise = |token| gumbel(case.unmask.seed, Purpose::Token, case.steps[0], position, token);
        let largest = (100..30_000).max_by(|a, b| noise(*a).total_cmp(&noise(*b))).unwrap();
        row.fill(-100.0);
        row[largest] = 0.0;
        row[0] = (noise(largest) - noise(0) + if position % 2 == 0 { 1e-4 } else { -1e-4 }) as f32;
    }
    check(&case, &run(&case), "large noise");
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn rows_drawn_by_alg_temp() {
    for quota in [1, 2, 5] {
        check_all_types(
            &format!("alg-temp, {quota}"),
            |_| (64, vec![12, 12]),
            |any, _| {
                any.unmask.alg_temp = 0.3;
                any.selection = vec![CommitRule::Quota(quota); 2];
            },
        );
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn dreams_shift_is_a_row_map() {
    check_all_types("shift", |_| (512, vec![7, 1, 4]), |any, _| any.shift = true);
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn positions_past_the_window_are_scored_and_left() {
    for selection in POLICIES {
        check_all_types(
            &format!("window, {selection:?}"),
            |_| (64, vec![10, 6, 3]),
            |any, _| {
                any.commit_before = Some(vec![4, 0, 3]);
                any.selection = vec![selection; 3];
            },
        );
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn sequences_without_rows_or_masks() {
    let mut random = Random(11);
    for lengths in [vec![0, 4, 0, 0, 3, 0], vec![0], vec![0, 0], vec![0, 1], vec![1, 0]] {
        let case = Case::<bf16>::new(&mut random, 64, &lengths);
        check(&case, &run(&case), &format!("{lengths:?}"));
    }
    for all in [true, false] {
        let mut case = Case::<bf16>::new(&mut random, 64, &[5, 2]);
        case.masked.iter_mut().flatten().for_each(|m| *m = all);
        check(&case, &run(&case), &format!("all masked: {all}"));
    }
    // No sequence at all.
    let case = Case::<bf16>::new(&mut random, 64, &[]);
    let stream = device().stream().unwrap();
    OnDevice::new(&stream, &case).launch(&stream, &case).unwrap();
}

/// More rows than the keys in shared memory have room for.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn a_long_sequence() {
    let mut random = Random(12);
    for selection in [
        CommitRule::Quota(1),
        CommitRule::Quota(700),
        CommitRule::Quota(5000),
        CommitRule::Threshold(0.3),
        CommitRule::ThresholdTopN { threshold: 0.2, top_n: 300 },
        CommitRule::Factor(1.0),
        CommitRule::Factor(40.0),
    ] {
        let mut case = Case::<bf16>::new(&mut random, 16, &[1500, 40]);
        case.selection = vec![selection; 2];
        check(&case, &run(&case), &format!("{selection:?}"));
    }
}

/// Confidences that agree to the bit: the first rows win, whatever the path to the selection.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn equal_rows_are_taken_in_order() {
    for rows in [9, 300, 1100] {
        for selection in [CommitRule::Quota(rows / 3), CommitRule::Threshold(0.99), CommitRule::Factor(3.0)] {
            let mut case = Case::<f32>::new(&mut Random(5), 8, &[rows]);
            for row in case.logits.chunks_mut(8) {
                row.copy_from_slice(&[0.0, 1.0, 0.5, 0.0, -1.0, 0.0, 0.0, 0.0]);
            }
            case.selection = vec![selection];
            check(&case, &run(&case), &format!("{rows} equal rows, {selection:?}"));
        }
    }
}

/// Duplicates of the largest logit: in one vector, in one thread's vectors, between threads, between chunks.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn ties_go_to_the_lowest_token() {
    for places in
        [vec![9, 8], vec![2048 + 5, 5], vec![9000, 40], vec![8191, 8192], vec![19_999, 0, 8192], vec![16_383, 16_384]]
    {
        let mut case = Case::<bf16>::new(&mut Random(6), 20_000, &[4]);
        case.masked[0] = vec![true; 4];
        for row in case.logits.chunks_mut(20_000) {
            places.iter().for_each(|place| row[*place] = bf16::from_f32(30.0));
        }
        for confidence in [Confidence::Probability, Confidence::Margin] {
            case.unmask.confidence = confidence;
            let got = run(&case);
            check(&case, &got, &format!("{places:?}"));
            assert_eq!(got.predicted, vec![*places.iter().min().unwrap() as i32; 4]);
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn the_mask_token_is_never_chosen() {
    // In the first chunk, at its end, at the beginning of the second.
    for mask in [MASK as usize, 8191, 8192] {
        let mut case = Case::<f32>::new(&mut Random(7), 9000, &[6]);
        case.mask_token = mask as i32;
        case.masked[0] = vec![true; 6];
        // Far ahead, equal to the best before and after it, just behind, minus infinity, NaN.
        for (i, row) in case.logits.chunks_mut(9000).enumerate() {
            let best = row.iter().copied().fold(f32::MIN, f32::max);
            row[mask - 2] = if i == 1 { best + 1.0 } else { row[mask - 2] };
            row[mask + 1] = if i == 2 { best + 1.0 } else { row[mask + 1] };
            row[mask] = [50.0, best + 1.0, best + 1.0, best - 0.1, f32::NEG_INFINITY, f32::NAN][i];
        }
        for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy] {
            for temperature in [0.0, 2.0] {
                case.unmask = SamplingParams { confidence, temperature, mask_token: Some(mask as u32), ..plain() };
                let got = run(&case);
                check(&case, &got, &format!("mask token {mask}, {confidence:?} at {temperature}"));
                assert!(got.predicted.iter().all(|t| *t != mask as i32));
            }
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
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
        case.unmask = SamplingParams { confidence, temperature, ..plain() };
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
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn rows_without_a_finite_logit() {
    for (bad, general) in [(f32::NAN, false), (f32::NEG_INFINITY, false), (f32::NAN, true)] {
        let mut case = Case::<bf16>::new(&mut Random(9), 8200, &[5, 4, 6]);
        case.masked.iter_mut().flatten().for_each(|m| *m = true);
        case.unmask.confidence = if general { Confidence::Margin } else { Confidence::Probability };
        for row in [7, 8] {
            case.logits[row * case.stride..row * case.stride + 8200].fill(bf16::from_f32(bad));
        }
        // Only the mask token is left.
        case.logits[7 * case.stride + MASK as usize] = bf16::from_f32(1.0);
        let got = run(&case);
        check(&case, &got, "no finite logit");
        assert_eq!(got.failed, [-1, 2, -1]);
        assert_eq!(got.tokens[5..9], [MASK; 4]);
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn top_p_and_top_k() {
    for (top_p, top_k) in [
        (Some(0.9), None),
        (Some(0.3), None),
        (Some(0.0), None),
        (Some(1.0), None),
        (None, Some(1)),
        (None, Some(5)),
        (None, Some(100_000)),
        (Some(0.95), Some(3)),
        (Some(0.2), Some(50)),
    ] {
        for temperature in [0.0, 0.8] {
            for (vocab, guided) in [(64, false), (9000, true), (1, false)] {
                check_all_types(
                    &format!("top-p {top_p:?}, top-k {top_k:?} at {temperature} of {vocab}"),
                    |_| (vocab, vec![6, 3]),
                    |any, _| {
                        any.unmask = SamplingParams { top_p, top_k, temperature, tempered_confidence: true, ..plain() };
                        any.guided = guided;
                        any.unmask.cfg_scale = if guided { 0.7 } else { 0.0 };
                    },
                );
            }
        }
    }
}

/// The smallest kept logit equals the reference's, except where a token is within f32 rounding of top-p.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn min_logits() {
    let stream = device().stream().unwrap();
    let mut random = Random(14);
    let (mut doubtful, mut rows) = (0, 0);
    for case_number in 0..40 {
        let vocab = [8, 500, 9000, 30_000][case_number % 4];
        let case = Case::<bf16>::new(&mut random, vocab, &[4]);
        let (top_p, top_k) = (unit(&mut random) as f64, random.below(2 * vocab) + 1);
        let temperature = [0.3, 1.0, 2.0][random.below(3)];
        let case =
            Case { unmask: SamplingParams { top_p: Some(top_p), top_k: Some(top_k), temperature, ..plain() }, ..case };
        let mut on_device = OnDevice::new(&stream, &case);
        on_device.launch(&stream, &case).unwrap();
        let min_logits = on_device.min_logit.as_ref().unwrap().read().unwrap();
        for (position, min_logit) in min_logits.iter().enumerate() {
            if !case.masked[0][position] {
                assert_eq!(*min_logit, f32::NEG_INFINITY);
                continue;
            }
            let mut row = reference_row(&case, 0, position);
            let best = (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a))).unwrap();
            if best == MASK as usize {
                row[best] = f32::NEG_INFINITY;
            }
            let want = |p: f64| min_kept_logit(&row, temperature, Some(p), Some(top_k));
            rows += 1;
            // The kernel's top_p is the f32 of it, and its weights are f32.
            let (low, high) = (want(top_p * (1.0 - 1e-6) - 1e-7), want(top_p * (1.0 + 1e-6) + 1e-7));
            doubtful += (low != high) as usize;
            assert!(low >= *min_logit && *min_logit >= high, "{min_logit}, expected {low} to {high}");
        }
    }
    assert!(doubtful * 20 < rows, "{doubtful} of {rows} rows in doubt");
}

/// The same bits in every order of threads and blocks, and again.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn the_same_bits_in_every_order() {
    for (i, confidence) in [Confidence::Probability, Confidence::Entropy].into_iter().enumerate() {
        let mut case = Case::<bf16>::new(&mut Random(15), 30_000, &[8, 3]);
        // Not one of the first thread's tokens.
        case.mask_token = 20_001;
        let (mask_token, top_p) = (Some(20_001), (i == 1).then_some(0.9));
        case.unmask = SamplingParams { confidence, temperature: i as f64, top_p, mask_token, ..plain() };
        in_every_order(|| run(&case).bits());
        check(&case, &run(&case), &format!("{confidence:?}"));
    }
}

/// A sequence alone gives the bits that it gives in a batch.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn alone_as_in_company() {
    for general in [false, true] {
        let mut case = Case::<bf16>::new(&mut Random(16), 20_000, &[6, 0, 17, 1]);
        if general {
            case.unmask = SamplingParams { confidence: Confidence::Entropy, temperature: 0.7, ..plain() };
        }
        let all = run(&case);
        for s in 0..4 {
            let alone = run(&case.only(s));
            let rows = case.first_row(s)..case.first_row(s + 1);
            assert_eq!(alone.tokens, all.tokens[rows.clone()]);
            let bits = |c: &[f32]| c.iter().map(|c| c.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&alone.confidence), bits(&all.confidence[rows]));
            let counts = |got: &Got, s: usize| (got.committed[s], got.masks_left[s], got.failed[s]);
            assert_eq!(counts(&alone, 0), counts(&all, s));
        }
    }
}

/// A captured launch, replayed until nothing is masked: counters and workspace serve every step.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn a_graph_unmasks_everything() {
    let stream = device().stream().unwrap();
    device().preload().unwrap();
    for general in [false, true] {
        let mut case = Case::<bf16>::new(&mut Random(17), 10_000, &[9, 5]);
        case.selection = vec![CommitRule::Quota(2), CommitRule::Quota(1)];
        if general {
            case.unmask.confidence = Confidence::Margin;
        }
        let mut on_device = OnDevice::new(&stream, &case);
        stream.synchronize().unwrap();
        let graph = stream.capture(|| on_device.launch(&stream, &case)).unwrap();
        assert_eq!(on_device.tokens.read().unwrap(), case.tokens(), "capturing runs nothing");
        for step in 0..8 {
            // SAFETY: the buffers live on; nothing else uses them.
            unsafe { graph.launch() }.unwrap();
            let got = on_device.read();
            check(&case, &got, &format!("step {step}"));
            // What was committed is text from here on.
            let mut tokens = got.tokens.iter();
            for masked in case.masked.iter_mut().flatten() {
                *masked = *tokens.next().unwrap() == MASK;
            }
            for (token, masked) in got.tokens.iter().zip(case.masked.iter().flatten()) {
                assert_eq!(*token == MASK, *masked);
            }
            let tokens: Vec<i32> = case.tokens();
            on_device.tokens.write(&tokens).unwrap();
        }
        assert!(case.masked.iter().flatten().all(|m| !m));
    }
}

/// A table that points outside the tokens or logits is reported, and nothing is read there.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn indices_out_of_range() {
    let stream = device().stream().unwrap();
    let case = Case::<bf16>::new(&mut Random(18), 64, &[4, 4]);
    for (token, logits_row) in [(6, 8), (8, 0), (1 << 30, 1 << 30)] {
        let row = |i: usize| Row { token: i, logits_row: i, position: i };
        let mut rows: Vec<Vec<Row>> = vec![(0..4).map(row).collect(), (4..8).map(row).collect()];
        rows[1][2] = Row { token, logits_row, position: 6 };
        let mut on_device = OnDevice::new(&stream, &case);
        on_device.table = RowTable::new(&stream, &rows).unwrap();
        on_device.launch(&stream, &case).unwrap();
        let got = on_device.read();
        assert_eq!((got.failed[0], got.failed[1]), (-1, -2));
        assert_eq!(got.committed[1], 0);
        assert_eq!(got.tokens[4..], case.tokens()[4..]);
    }
}

/// Every count of the factor rule, and thresholds that equal a confidence.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn selections_of_every_size() {
    let mut random = Random(19);
    for rows in 1..=34 {
        let mut case = Case::<f32>::new(&mut random, 4, &[rows, rows]);
        case.mask_token = 4;
        case.unmask.mask_token = None;
        for (i, row) in case.logits.chunks_mut(4).enumerate() {
            // From sure to unsure, so that factors cut everywhere.
            let sure = if i % 2 == 0 { 8.0 } else { 12.0 * unit(&mut random) };
            row.copy_from_slice(&[sure, 0.0, 0.0, 0.0]);
        }
        for selection in [
            CommitRule::Factor(0.3 + 2.0 * unit(&mut random) as f64),
            CommitRule::Factor(1e-3),
            CommitRule::Factor(1e3),
        ] {
            case.selection = vec![selection; 2];
            check(&case, &run(&case), &format!("{rows} rows, {selection:?}"));
        }
        let mut confidences = run(&case).confidence;
        confidences.sort_by(f32::total_cmp);
        // The largest, and one in the middle: reached, and missed by an ulp.
        for equal in [confidences[2 * rows - 1], confidences[rows]] {
            for threshold in [equal, equal.next_up()] {
                case.selection = vec![CommitRule::Threshold(threshold as f64); 2];
                check(&case, &run(&case), &format!("{rows} rows, threshold {threshold}"));
            }
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn wrong_calls_name_the_field() {
    let stream = device().stream().unwrap();
    let case = Case::<bf16>::new(&mut Random(20), 64, &[4]);
    let error = |change: &dyn Fn(&mut OnDevice<bf16>, &mut Case<bf16>)| {
        let mut case = case.clone();
        let mut on_device = OnDevice::new(&stream, &case);
        change(&mut on_device, &mut case);
        on_device.launch(&stream, &case).unwrap_err().to_string()
    };
    let other = device().stream().unwrap();
    assert!(error(&|d, _| d.tokens = other.zeros(4).unwrap()).contains("tokens: expected a buffer of the stream"));
    let row = |token, position| Row { token, logits_row: 0, position };
    let table = |rows: &[Vec<Row>]| RowTable::new(&stream, rows).err().unwrap().to_string();
    assert!(table(&[vec![row(0, 1), row(1, 1)]]).contains("rows: expected ascending positions"));
    assert!(table(&[vec![row(0, 0)], vec![row(0, 0)]]).contains("rows: expected tokens of their own, found 0 twice"));
    assert!(table(&[vec![row(1 << 40, 0)]]).contains("token: expected at most 2147483647"));
    assert!(error(&|_, c| c.selection = vec![CommitRule::Factor(0.0)]).contains("factor: expected a number above 0"));
    assert!(error(&|_, c| c.stride = 60).contains("at least the width, 64"));
    assert!(error(&|_, c| c.stride = 68).contains("logits_stride: expected a multiple of 8 elements (16 bytes)"));
    assert!(error(&|_, c| c.vocab = 0).contains("at least the width, 0"));
    assert!(error(&|d, _| d.steps = stream.alloc(0).unwrap()).contains("steps: expected 1 elements, found 0"));
    assert!(error(&|_, c| c.unmask.temperature = 1e-9).contains("temperature: expected 0, or 1e-6 to 1e6"));
    assert!(error(&|_, c| c.unmask.cfg_scale = 1.0).contains("cfg_scale: expected 0, as there are no uncond_logits"));
    assert!(error(&|_, c| c.unmask.alg_temp = 1.0).contains("alg_temp: expected 0, as the policy is not fixed"));
    assert!(
        error(&|_, c| c.selection = vec![CommitRule::Threshold(f64::NAN)])
            .contains("threshold: expected a finite number")
    );
    assert!(
        error(&|d, c| {
            c.vocab = 9000;
            c.stride = 9000;
            d.logits = stream.zeros(36_000).unwrap();
        })
        .contains("workspace: expected one made for unmask of [1, 4, 9000], found one made for unmask of [1, 4, 64]")
    );
}

/// The recorded samplers of the original implementations (`tests/golden/README.md`), through the kernels.
mod golden {
    use super::*;
    use safetensors::SafeTensors;
    use serde_json::Value;

    struct Golden {
        cases: Vec<Value>,
        tensors: Vec<u8>,
    }

    impl Golden {
        fn open(name: &str) -> Golden {
            let dir = common::golden_dir();
            let read = |end: &str| std::fs::read(dir.join(format!("{name}.{end}"))).unwrap();
            let json: Value = serde_json::from_slice(&read("json")).unwrap();
            Golden { cases: json["cases"].as_array().unwrap().clone(), tensors: read("safetensors") }
        }

        fn of<U: bytemuck::Pod>(&self, name: &str) -> Vec<U> {
            bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&self.tensors).unwrap().tensor(name).unwrap().data())
        }
    }

    /// A mask token outside every recorded vocabulary marks the masked rows.
    const OUTSIDE: i32 = 1 << 20;

    #[test]
    #[cfg_attr(
        not(all(target_os = "linux", target_arch = "x86_64")),
        ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
    )]
    fn llada() {
        let golden = Golden::open("sampler_llada");
        for recorded in &golden.cases {
            let name = recorded["name"].as_str().unwrap();
            let size = |key: &str| recorded[key].as_u64().unwrap() as usize;
            let (batch, length, vocab) = (size("batch"), size("length"), size("vocab"));
            let masked: Vec<u8> = golden.of(&format!("{name}.mask_index"));
            let selection = |row: usize| match (&recorded["threshold"], &recorded["factor"]) {
                (Value::Null, Value::Null) => {
                    CommitRule::Quota(recorded["num_transfer"][row].as_u64().unwrap() as usize)
                }
                (threshold, Value::Null) => CommitRule::Threshold(threshold.as_f64().unwrap()),
                (_, factor) => CommitRule::Factor(factor.as_f64().unwrap()),
            };
            let mut case = Case::<f32>::new(&mut Random(1), vocab, &vec![length; batch]);
            case.mask_token = OUTSIDE;
            case.unmask.mask_token = None;
            case.masked = masked.chunks(length).map(|row| row.iter().map(|m| *m == 1).collect()).collect();
            let logits: Vec<f32> = golden.of(&format!("{name}.logits"));
            for (to, from) in case.logits.chunks_mut(case.stride).zip(logits.chunks(vocab)) {
                to[..vocab].copy_from_slice(from);
            }
            case.selection = (0..batch).map(selection).collect();
            let got = run(&case);
            check(&case, &got, name);
            let (x0, confidence) =
                (golden.of::<i64>(&format!("{name}.x0")), golden.of::<f64>(&format!("{name}.confidence")));
            let transfer: Vec<u8> = golden.of(&format!("{name}.transfer_index"));
            for at in (0..batch * length).filter(|at| masked[*at] == 1) {
                assert_eq!(got.predicted[at] as i64, x0[at], "{name} at {at}");
                assert!(close(got.confidence[at], confidence[at], Confidence::Probability), "{name} at {at}");
                assert_eq!(got.tokens[at] != OUTSIDE, transfer[at] == 1, "{name} at {at}");
            }
        }
    }

    #[test]
    #[cfg_attr(
        not(all(target_os = "linux", target_arch = "x86_64")),
        ignore = "there is no software device for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
    )]
    fn dream() {
        let golden = Golden::open("sampler_dream");
        let mut cases = 0;
        for recorded in golden.cases.iter().filter(|case| case["alg"] != "probs") {
            let name = recorded["name"].as_str().unwrap();
            let (x0, confidence) =
                (golden.of::<i64>(&format!("{name}.x0")), golden.of::<f32>(&format!("{name}.confidence")));
            let (logits, kept) =
                (golden.of::<f32>(&format!("{name}.logits")), golden.of::<u8>(&format!("{name}.kept")));
            let (rows, vocab) = (x0.len(), logits.len() / x0.len());
            let mut case = Case::<f32>::new(&mut Random(1), vocab, &[rows]);
            case.mask_token = OUTSIDE;
            case.masked = vec![vec![true; rows]];
            case.unmask = SamplingParams {
                confidence: match recorded["alg"].as_str().unwrap() {
                    "topk_margin" => Confidence::Margin,
                    "entropy" => Confidence::Entropy,
                    _ => Confidence::Probability,
                },
                temperature: recorded["temperature"].as_f64().unwrap(),
                tempered_confidence: true,
                top_p: recorded["top_p"].as_f64(),
                top_k: recorded["top_k"].as_u64().map(|k| k as usize),
                mask_token: None,
                ..plain()
            };
            for (to, from) in case.logits.chunks_mut(case.stride).zip(logits.chunks(vocab)) {
                to[..vocab].copy_from_slice(from);
            }
            let stream = device().stream().unwrap();
            let mut on_device = OnDevice::new(&stream, &case);
            on_device.launch(&stream, &case).unwrap();
            let got = on_device.read();
            for row in 0..rows {
                assert_eq!(got.predicted[row] as i64, x0[row], "{name} row {row}");
                let (got, want) = (got.confidence[row], confidence[row]);
                assert!((got - want).abs() < 1e-5, "{name} row {row}: {got} {want}");
            }
            if let Some(min_logit) = &on_device.min_logit {
                for (row, min_logit) in min_logit.read().unwrap().iter().enumerate() {
                    let got: Vec<u8> =
                        logits[row * vocab..][..vocab].iter().map(|l| (*l >= *min_logit) as u8).collect();
                    assert_eq!(got, kept[row * vocab..][..vocab], "{name} row {row}");
                }
            }
            cases += 1;
        }
        assert!(cases > 0);
    }
}
