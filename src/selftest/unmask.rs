//! Unmasking by probability and threshold; and by margin and factor, with NaN, rows that are not masked, a mask token with
//! the largest logit, rows past the commit limit, and a sequence without rows.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, pick};
use crate::abi::DLLM_NONE_FAILED;
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::Workspace;
use crate::ops::unmask::{self as op, Outcome, Policy, Row, RowTable, UnmaskConfig};
use crate::reference::unmask::{score_row, select};
use crate::sampling::{CommitRule, Confidence, SamplingParams};
use half::{bf16, f16};

/// Mask token of the cases.
pub const MASK: i32 = 3;
/// A token of text.
pub const TEXT: i32 = 5;
const THRESHOLD: f64 = 0.5;
const FACTOR: f64 = 1.5;
/// Bound of the relative error of a probability or margin: f32 sums over the vocabulary, and exponentials with errors of two
/// units in the last place.
const CONFIDENCE: f64 = 4e-6;
/// Bound of the error of an entropy, absolute and relative: also of the products of logits and probabilities.
const ENTROPY: [f64; 2] = [2e-5, 1e-5];

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, vocab_size) = pick(small, (32, 126_464), (2, 126_464));
    vec![
        Entry::new::<bf16, _>("unmask", format!("{rows}x{vocab_size}, threshold"), move |stream| {
            Block::<bf16>::new(stream, Shape::llada(vec![rows], vocab_size, THRESHOLD))
        }),
        Entry::new::<f16, _>("unmask", "5, 0 and 7 x 1003, margin, factor, NaN".into(), |stream| {
            let shape = Shape {
                confidence: Confidence::Margin,
                rule: CommitRule::Factor(FACTOR),
                odd: true,
                ..Shape::llada(vec![5, 0, 7], 1003, 0.0)
            };
            Block::<f16>::new(stream, shape)
        }),
    ]
}

/// Converts logits to f32, NaN to minus infinity and plus infinity to the largest finite value.
pub fn clean<T: Float>(logits: &[T]) -> Vec<f32> {
    let clean_logit = |l: f32| if l.is_nan() { f32::NEG_INFINITY } else { l.min(f32::MAX) };
    logits.iter().map(|l| clean_logit(l.f32())).collect()
}

/// Shape of a case, and its sampling parameters.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Rows of each sequence.
    pub lengths: Vec<usize>,
    /// Logits of a row.
    pub vocab_size: usize,
    /// Confidence that ranks the rows.
    pub confidence: Confidence,
    /// Temperature of tokens and confidences; 0 predicts the argmax.
    pub temperature: f32,
    /// Rule that selects the rows to commit. Its numbers are exact in f32.
    pub rule: CommitRule,
    /// Whether there are a NaN, a row that is not masked, a mask token with the largest logit, and a row past the commit limit
    /// in each sequence. The first sequence then has at least four rows.
    pub odd: bool,
}

impl Shape {
    /// Returns LLaDA's argmax and probability, committed by a threshold.
    pub fn llada(lengths: Vec<usize>, vocab_size: usize, threshold: f64) -> Shape {
        let (confidence, rule) = (Confidence::Probability, CommitRule::Threshold(threshold));
        Shape { lengths, vocab_size, confidence, temperature: 0.0, rule, odd: false }
    }

    /// Returns the sampling parameters of the reference.
    fn params(&self) -> SamplingParams {
        SamplingParams {
            confidence: self.confidence,
            temperature: self.temperature.into(),
            tempered_confidence: self.temperature > 0.0,
            f32_confidence: true,
            seed: 7,
            mask_token: Some(MASK as u32),
            ..SamplingParams::default()
        }
    }

    /// Returns the unit of a confidence's error, of which [`CONFIDENCE`] are accepted.
    fn unit(&self, score: f64) -> f64 {
        match self.confidence {
            Confidence::Entropy => (ENTROPY[0] + ENTROPY[1] * score.abs()) / CONFIDENCE,
            _ => score.abs().max(1e-3),
        }
    }
}

/// Returns the policy of a launch. `limits` has the number in `rule` for each sequence.
fn policy(rule: CommitRule, limits: &Buffer<i32>) -> Policy<'_> {
    match rule {
        CommitRule::Quota(_) => Policy::Fixed(limits),
        CommitRule::Threshold(threshold) => Policy::Threshold { threshold: threshold as f32, top_n: None },
        CommitRule::ThresholdTopN { threshold, .. } => {
            Policy::Threshold { threshold: threshold as f32, top_n: Some(limits) }
        }
        CommitRule::Factor(factor) => Policy::Factor(factor as f32),
    }
}

/// Logits and tokens of sequences.
pub struct Block<T> {
    stream: Stream,
    shape: Shape,
    stride: usize,
    table: RowTable,
    logits: HostDevice<T>,
    tokens: HostDevice<i32>,
    commit_before: Option<HostDevice<i32>>,
    limits: Buffer<i32>,
    outcome: Outcome,
    workspace: Workspace,
}

impl<T: Float> Block<T> {
    /// Uploads random logits, and masks.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Block<T>> {
        let Shape { lengths, vocab_size, odd, .. } = &shape;
        let rows: usize = lengths.iter().sum();
        let stride = vocab_size.next_multiple_of(16 / size_of::<T>());
        let mut logits: Vec<T> = Random(10).logits(rows * stride);
        let mut tokens = vec![MASK; rows];
        if *odd {
            tokens[1] = TEXT;
            logits[2 * stride + 17] = T::of(f32::NAN);
            logits[3 * stride + MASK as usize] = T::of(60.0);
        }
        let mut first = 0;
        let mut sequences = Vec::new();
        for length in lengths {
            let row = |position: usize| Row { token: first + position, logits_row: first + position, position };
            sequences.push((0..*length).map(row).collect());
            first += length;
        }
        let table = RowTable::new(stream, &sequences)?;
        let limit = match shape.rule {
            CommitRule::Quota(limit) | CommitRule::ThresholdTopN { top_n: limit, .. } => limit,
            CommitRule::Threshold(_) | CommitRule::Factor(_) => 0,
        };
        // The last row of each sequence is past its commit limit.
        let window: Option<Vec<i32>> = odd.then(|| lengths.iter().map(|length| *length as i32 - 1).collect());
        Ok(Block {
            stream: stream.clone(),
            stride,
            logits: HostDevice::new(stream, logits)?,
            tokens: HostDevice::new(stream, tokens)?,
            commit_before: window.map(|window| HostDevice::new(stream, window)).transpose()?,
            limits: stream.upload(&vec![limit as i32; lengths.len()])?,
            outcome: Outcome::new(stream, &table)?,
            workspace: op::workspace(stream, &table, *vocab_size)?,
            table,
            shape,
        })
    }
}

impl<T: Float> Case for Block<T> {
    fn bytes(&self) -> usize {
        self.tokens.host.len() * self.shape.vocab_size * size_of::<T>()
    }

    /// Restores the mask tokens: rows without a mask are not read.
    fn reset(&mut self) -> Result<()> {
        self.tokens.device.write(&self.tokens.host)
    }

    fn launch(&mut self) -> Result<()> {
        let params = self.shape.params();
        let config = UnmaskConfig {
            confidence: params.confidence,
            policy: policy(self.shape.rule, &self.limits),
            temperature: self.shape.temperature,
            tempered_confidence: params.tempered_confidence,
            cfg_scale: 0.0,
            alg_temp: 0.0,
            seed: params.seed,
            mask_token: MASK as u32,
        };
        let args = op::Unmask {
            logits: &self.logits.device,
            uncond_logits: None,
            vocab_size: self.shape.vocab_size,
            logits_stride: self.stride,
            rows: &self.table,
            tokens: &mut self.tokens.device,
            commit_before: self.commit_before.as_ref().map(|window| &window.device),
            steps: None,
            min_logit: None,
            outcome: &mut self.outcome,
            workspace: &mut self.workspace,
        };
        op::launch(&self.stream, args, &config)
    }

    /// Compares predictions and confidences; and, of all rows, the commits with those of the reference for the predictions and
    /// confidences of the kernel.
    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let Outcome { predicted, confidence, masks_left: left, committed: counted, failed } = &self.outcome;
        let (predicted, confidence) = (predicted.read()?, confidence.read()?);
        let is_mask = |row: usize| self.tokens.host[row] == MASK;
        let compared = rows.of(predicted.len());
        let params = self.shape.params();
        let (mut want_predicted, mut confidences) = (Vec::new(), Vec::new());
        let mut want = self.tokens.host.clone();
        let (mut committed, mut masks_left) = (Vec::new(), Vec::new());
        let mut first = 0;
        for (sequence, length) in self.shape.lengths.iter().enumerate() {
            for row in compared.iter().copied().filter(|row| (first..first + length).contains(row)) {
                let logits = clean(&self.logits.host[row * self.stride..][..self.shape.vocab_size]);
                let scored = score_row(&logits, &params, 0, row - first).filter(|_| is_mask(row));
                let (token, score) = scored.map_or((-1, 0.0), |(token, score)| (token as i32, score));
                want_predicted.push(token);
                confidences.push((f64::from(confidence[row]), score, self.shape.unit(score)));
            }
            let window = self.commit_before.as_ref().map_or(*length as i32, |window| window.host[sequence]);
            let masked: Vec<usize> = (first..first + window.max(0) as usize).filter(|row| is_mask(*row)).collect();
            let found: Vec<f64> = masked.iter().map(|row| confidence[*row].into()).collect();
            let selected = select(&found, &found, self.shape.rule);
            selected.iter().for_each(|i| want[masked[*i]] = predicted[masked[*i]]);
            committed.push(selected.len() as i32);
            masks_left.push((masked.len() - selected.len()) as i32);
            first += length;
        }
        let none_failed = vec![DLLM_NONE_FAILED; committed.len()];
        Ok(vec![
            ErrorBound::within("confidences, relative", confidences, CONFIDENCE),
            ErrorBound::bits("predicted tokens that differ", &rows.pick(&predicted, 1), &want_predicted),
            ErrorBound::bits("tokens that differ", &self.tokens.device.read()?, &want),
            ErrorBound::bits("counts of commits that differ", &counted.read()?, &committed),
            ErrorBound::bits("counts of masks left that differ", &left.read()?, &masks_left),
            ErrorBound::bits("failure codes that differ", &failed.read()?, &none_failed),
        ])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        let Outcome { predicted, confidence, masks_left, committed, failed } = &mut self.outcome;
        vec![
            Output::new("confidences", confidence),
            Output::new("predicted tokens", predicted),
            Output::new("tokens", &mut self.tokens.device),
            Output::new("commits", committed),
            Output::new("masks left", masks_left),
            Output::new("failure codes", failed),
        ]
    }
}
