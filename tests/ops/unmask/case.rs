//! A batch of an unmask test, and its launch.

use crate::common::{Float, Random, assert_nothing_reported, device};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::Workspace;
use dllm_kernels::ops::top_k_top_p::{self, TopKTopP};
use dllm_kernels::ops::unmask::{self as op, Outcome, Policy, Row, RowTable, UnmaskConfig};
use dllm_kernels::sampling::{CommitRule, SamplingParams};

/// Returns a normal logit; one in a hundred has a larger variance, so that softmax is not nearly uniform.
fn logit(random: &mut Random) -> f32 {
    let scale = if random.below(100) == 0 { 6.0 } else { 1.5 };
    random.normal() * scale
}

/// Returns a uniform number in [0, 1).
pub fn unit(random: &mut Random) -> f32 {
    random.number() / 2.0 + 0.5
}

pub const MASK: i32 = 3;
pub const TEXT: i32 = 5;

/// A batch and its parameters. Logits are `[rows, stride]`, sequence after sequence.
#[derive(Clone)]
pub struct Case<T> {
    pub vocab: usize,
    pub stride: usize,
    /// Per sequence, which positions are masked.
    pub masked: Vec<Vec<bool>>,
    pub logits: Vec<T>,
    pub uncond: Option<Vec<T>>,
    pub mask_token: i32,
    pub params: SamplingParams,
    pub commit_rule: Vec<CommitRule>,
    pub commit_before: Option<Vec<usize>>,
    pub steps: Vec<usize>,
    /// Whether each row takes the logits of the row before it; the first row takes its own.
    pub shift: bool,
}

/// Returns parameters for argmax and probability in f32.
pub fn plain() -> SamplingParams {
    let (seed, mask_token) = (0x1234_5678_9abc, Some(MASK as u32));
    SamplingParams { f32_confidence: true, seed, mask_token, ..SamplingParams::default() }
}

fn stride_of<T>(vocab: usize) -> usize {
    vocab.next_multiple_of(16 / size_of::<T>())
}

/// Returns random logits `[rows, stride]`. The padding after each row is NaN; the kernel must not read it.
pub fn random_logits<T: Float>(random: &mut Random, rows: usize, vocab: usize) -> Vec<T> {
    let stride = stride_of::<T>(vocab);
    let logit = |i: usize, random: &mut Random| if i % stride < vocab { logit(random) } else { f32::NAN };
    (0..rows * stride).map(|i| T::of(logit(i, random))).collect()
}

impl<T: Float> Case<T> {
    /// Makes sequences of the given lengths. Two thirds of the positions are masked.
    pub fn new(random: &mut Random, vocab: usize, lengths: &[usize]) -> Case<T> {
        let masked: Vec<Vec<bool>> = lengths.iter().map(|n| (0..*n).map(|_| random.below(3) > 0).collect()).collect();
        let rows = lengths.iter().sum();
        Case {
            vocab,
            stride: stride_of::<T>(vocab),
            logits: random_logits(random, rows, vocab),
            uncond: None,
            mask_token: MASK,
            params: plain(),
            commit_rule: vec![CommitRule::Threshold(0.5); masked.len()],
            commit_before: None,
            steps: (0..masked.len()).map(|s| 7 * s + 2).collect(),
            shift: false,
            masked,
        }
    }

    pub fn first_row(&self, sequence: usize) -> usize {
        self.masked[..sequence].iter().map(Vec::len).sum()
    }

    pub fn logits_row(&self, sequence: usize, position: usize) -> usize {
        self.first_row(sequence) + position.saturating_sub(self.shift as usize)
    }

    pub fn table(&self, stream: &Stream) -> RowTable {
        let row = |s: usize, position: usize| Row {
            token: self.first_row(s) + position,
            logits_row: self.logits_row(s, position),
            position,
        };
        let sequences: Vec<Vec<Row>> =
            (0..self.masked.len()).map(|s| (0..self.masked[s].len()).map(|p| row(s, p)).collect()).collect();
        RowTable::new(stream, &sequences).unwrap()
    }

    pub fn tokens(&self) -> Vec<i32> {
        self.masked.iter().flatten().map(|m| if *m { self.mask_token } else { TEXT }).collect()
    }

    /// Returns a batch of one of the sequences.
    pub fn only(&self, sequence: usize) -> Case<T> {
        let rows = self.first_row(sequence) * self.stride..self.first_row(sequence + 1) * self.stride;
        Case {
            masked: vec![self.masked[sequence].clone()],
            logits: self.logits[rows.clone()].to_vec(),
            uncond: self.uncond.as_ref().map(|u| u[rows].to_vec()),
            commit_rule: vec![self.commit_rule[sequence]],
            commit_before: self.commit_before.as_ref().map(|b| vec![b[sequence]]),
            steps: vec![self.steps[sequence]],
            ..self.clone()
        }
    }
}

/// Results of a launch.
#[derive(Clone, Debug)]
pub struct Output {
    pub tokens: Vec<i32>,
    pub masks_left: Vec<i32>,
    pub committed: Vec<i32>,
    pub failed: Vec<i32>,
    pub predicted: Vec<i32>,
    pub confidence: Vec<f32>,
}

impl Output {
    pub fn bits(&self) -> ([Vec<i32>; 5], Vec<u32>) {
        let confidence = self.confidence.iter().map(|c| c.to_bits()).collect();
        ([&self.tokens, &self.masks_left, &self.committed, &self.failed, &self.predicted].map(Vec::clone), confidence)
    }
}

/// Device buffers of a case, for any number of launches.
pub struct OnDevice<T> {
    pub table: RowTable,
    pub logits: Buffer<T>,
    pub uncond: Option<Buffer<T>>,
    pub tokens: Buffer<i32>,
    pub quota: Option<Buffer<i32>>,
    pub before: Option<Buffer<i32>>,
    pub steps: Buffer<i32>,
    pub min_logit: Option<Buffer<f32>>,
    pub outcome: Outcome,
    pub workspace: Workspace,
}

impl<T: Float> OnDevice<T> {
    pub fn new(stream: &Stream, case: &Case<T>) -> OnDevice<T> {
        let table = case.table(stream);
        let filters = case.params.top_p.is_some() || case.params.top_k.is_some();
        let quota: Vec<i32> = case
            .commit_rule
            .iter()
            .filter_map(|rule| match rule {
                CommitRule::Quota(n) | CommitRule::ThresholdTopN { top_n: n, .. } => Some(*n as i32),
                _ => None,
            })
            .collect();
        let numbers = |values: &[usize]| values.iter().map(|v| *v as i32).collect::<Vec<i32>>();
        // An earlier launch may have left counts.
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

    pub fn launch(&mut self, stream: &Stream, case: &Case<T>) -> dllm_kernels::Result<()> {
        self.launch_filters(stream, case)?;
        let params = &case.params;
        let config = UnmaskConfig {
            confidence: params.confidence,
            policy: policy(case, &self.quota),
            temperature: params.temperature as f32,
            tempered_confidence: params.tempered_confidence,
            cfg_scale: params.cfg_scale,
            alg_temp: params.alg_temp as f32,
            seed: params.seed,
            mask_token: case.mask_token as u32,
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
        op::launch(stream, args, &config)
    }

    /// Launches top_k_top_p when the case has a filter.
    fn launch_filters(&mut self, stream: &Stream, case: &Case<T>) -> dllm_kernels::Result<()> {
        let Some(min_logit) = &mut self.min_logit else { return Ok(()) };
        let args = TopKTopP {
            logits: &self.logits,
            uncond_logits: self.uncond.as_ref(),
            vocab_size: case.vocab,
            logits_stride: case.stride,
            rows: &self.table,
            tokens: &self.tokens,
            top_p: case.params.top_p.map(|p| p as f32),
            top_k: case.params.top_k,
            temperature: case.params.temperature as f32,
            cfg_scale: case.params.cfg_scale,
            mask_token: case.mask_token as u32,
            min_logit,
        };
        top_k_top_p::launch(stream, args)
    }

    pub fn read(&self) -> Output {
        Output {
            tokens: self.tokens.read().unwrap(),
            masks_left: self.outcome.masks_left.read().unwrap(),
            committed: self.outcome.committed.read().unwrap(),
            failed: self.outcome.failed.read().unwrap(),
            predicted: self.outcome.predicted.read().unwrap(),
            confidence: self.outcome.confidence.read().unwrap(),
        }
    }
}

/// Returns the policy of the first sequence; the kernel applies one policy to all sequences.
fn policy<'a, T>(case: &Case<T>, quota: &'a Option<Buffer<i32>>) -> Policy<'a> {
    match (case.commit_rule.first(), quota) {
        (Some(CommitRule::Quota(_)), Some(quota)) => Policy::Fixed(quota),
        (Some(CommitRule::ThresholdTopN { threshold, .. }), Some(top_n)) => {
            Policy::Threshold { threshold: *threshold as f32, top_n: Some(top_n) }
        }
        (Some(CommitRule::Factor(factor)), _) => Policy::Factor(*factor as f32),
        (Some(CommitRule::Threshold(threshold)), _) => Policy::Threshold { threshold: *threshold as f32, top_n: None },
        _ => Policy::Factor(1.0),
    }
}

/// Launches a case once and returns its results.
pub fn run<T: Float>(case: &Case<T>) -> Output {
    let stream = device().stream().unwrap();
    let mut on_device = OnDevice::new(&stream, case);
    on_device.launch(&stream, case).unwrap();
    let output = on_device.read();
    drop(on_device); // the emulator checks buffers when they are freed
    assert_nothing_reported();
    output
}
