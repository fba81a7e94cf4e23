//! Unmasking by probability and threshold; and by margin and factor, with NaN, rows that are not masked, a mask token with
//! the largest logit, rows past the commit limit, and a sequence without rows.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng};
use super::pick;
use dllm_kernels::abi::DLLM_NONE_FAILED;
use dllm_kernels::gpu::Stream;
use dllm_kernels::ops::Workspace;
use dllm_kernels::ops::unmask::{self as op, Outcome, Policy, Row, RowTable, UnmaskConfig};
use dllm_kernels::reference::unmask::{score_row, select};
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use dllm_kernels::{Confidence, Result};
use half::{bf16, f16};

pub const MASK: i32 = 3;
pub const TEXT: i32 = 5;
const THRESHOLD: f32 = 0.5;
const FACTOR: f32 = 1.5;
/// Bound of the relative error of a probability or margin: f32 sums over the vocabulary, and exponentials with errors of two
/// units in the last place.
const CONFIDENCE: f64 = 4e-6;

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, vocab_size) = pick(small, (32, 126_464), (2, 126_464));
    vec![
        Entry::new::<bf16, _>("unmask", format!("{rows}x{vocab_size}, threshold"), move |stream| {
            Block::<bf16>::new(stream, &[rows], vocab_size, false)
        }),
        Entry::new::<f16, _>("unmask", "5, 0 and 7 x 1003, margin, factor, NaN".into(), |stream| {
            Block::<f16>::new(stream, &[5, 0, 7], 1003, true)
        }),
    ]
}

/// Converts logits to f32, NaN to minus infinity and plus infinity to the largest finite value.
pub fn clean<T: Float>(logits: &[T]) -> Vec<f32> {
    let clean_logit = |l: f32| if l.is_nan() { f32::NEG_INFINITY } else { l.min(f32::MAX) };
    logits.iter().map(|l| clean_logit(l.wide() as f32)).collect()
}

struct Block<T> {
    stream: Stream,
    odd: bool,
    lengths: Vec<usize>,
    vocab_size: usize,
    stride: usize,
    table: RowTable,
    logits: HostDevice<T>,
    tokens: HostDevice<i32>,
    commit_before: Option<HostDevice<i32>>,
    outcome: Outcome,
    workspace: Workspace,
}

impl<T: Float> Block<T> {
    fn new(stream: &Stream, lengths: &[usize], vocab_size: usize, odd: bool) -> Result<Block<T>> {
        let rows: usize = lengths.iter().sum();
        let stride = vocab_size.next_multiple_of(16 / size_of::<T>());
        let mut logits: Vec<T> = Rng::new(10).logits(rows * stride);
        let mut tokens = vec![MASK; rows];
        if odd {
            tokens[1] = TEXT;
            logits[2 * stride + 17] = T::from_wide(f64::NAN);
            logits[3 * stride + MASK as usize] = T::from_wide(60.0);
        }
        let mut first = 0;
        let mut sequences = Vec::new();
        for length in lengths {
            let row = |position: usize| Row { token: first + position, logits_row: first + position, position };
            sequences.push((0..*length).map(row).collect());
            first += length;
        }
        let table = RowTable::new(stream, &sequences)?;
        // The last row of each sequence is past its commit limit.
        let window: Option<Vec<i32>> = odd.then(|| lengths.iter().map(|length| *length as i32 - 1).collect());
        Ok(Block {
            stream: stream.clone(),
            odd,
            lengths: lengths.to_vec(),
            vocab_size,
            stride,
            logits: HostDevice::new(stream, logits)?,
            tokens: HostDevice::new(stream, tokens)?,
            commit_before: window.map(|window| HostDevice::new(stream, window)).transpose()?,
            outcome: Outcome::new(stream, &table)?,
            workspace: op::workspace(stream, &table, vocab_size)?,
            table,
        })
    }

    /// Returns the sampling parameters of the reference.
    fn params(&self) -> SamplingParams {
        SamplingParams {
            confidence: if self.odd { Confidence::Margin } else { Confidence::Probability },
            f32_confidence: true,
            seed: 7,
            mask_token: Some(MASK as u32),
            ..SamplingParams::default()
        }
    }
}

impl<T: Float> Case for Block<T> {
    fn bytes(&self) -> usize {
        self.tokens.host.len() * self.vocab_size * size_of::<T>()
    }

    /// Restores the mask tokens: rows without a mask are not read.
    fn reset(&mut self) -> Result<()> {
        self.tokens.device.write(&self.tokens.host)
    }

    fn launch(&mut self) -> Result<()> {
        let reference = self.params();
        let rule = UnmaskConfig {
            confidence: reference.confidence,
            policy: if self.odd {
                Policy::Factor(FACTOR)
            } else {
                Policy::Threshold { threshold: THRESHOLD, top_n: None }
            },
            temperature: 0.0,
            tempered_confidence: false,
            cfg_scale: 0.0,
            alg_temp: 0.0,
            seed: reference.seed,
            mask_token: MASK as u32,
        };
        let args = op::Unmask {
            logits: &self.logits.device,
            uncond_logits: None,
            vocab_size: self.vocab_size,
            logits_stride: self.stride,
            rows: &self.table,
            tokens: &mut self.tokens.device,
            commit_before: self.commit_before.as_ref().map(|window| &window.device),
            steps: None,
            min_logit: None,
            outcome: &mut self.outcome,
            workspace: &mut self.workspace,
        };
        op::launch(&self.stream, args, &rule)
    }

    /// Compares tokens and confidences, and the commits with those of the reference for the confidences of the kernel.
    fn check(&self) -> Result<Vec<ErrorBound>> {
        let (predicted, confidence) = (self.outcome.predicted.read()?, self.outcome.confidence.read()?);
        let is_mask = |row: usize| self.tokens.host[row] == MASK;
        let rule = if self.odd { CommitRule::Factor(FACTOR.into()) } else { CommitRule::Threshold(THRESHOLD.into()) };
        let (mut want_predicted, mut confidences) = (Vec::new(), Vec::new());
        let mut want = self.tokens.host.clone();
        let (mut committed, mut masks_left) = (Vec::new(), Vec::new());
        let mut first = 0;
        for (sequence, length) in self.lengths.iter().enumerate() {
            for position in 0..*length {
                let row = first + position;
                let logits = clean(&self.logits.host[row * self.stride..][..self.vocab_size]);
                let scored = score_row(&logits, &self.params(), 0, position).filter(|_| is_mask(row));
                let (token, score) = scored.map_or((-1, 0.0), |(token, score)| (token as i32, score));
                want_predicted.push(token);
                confidences.push((f64::from(confidence[row]), score, score.abs().max(1e-3)));
            }
            let window = self.commit_before.as_ref().map_or(*length as i32, |window| window.host[sequence]);
            let masked: Vec<usize> = (first..first + window.max(0) as usize).filter(|row| is_mask(*row)).collect();
            let found: Vec<f64> = masked.iter().map(|row| confidence[*row].into()).collect();
            let selected = select(&found, &found, rule);
            selected.iter().for_each(|i| want[masked[*i]] = predicted[masked[*i]]);
            committed.push(selected.len() as i32);
            masks_left.push((masked.len() - selected.len()) as i32);
            first += length;
        }
        let Outcome { masks_left: left, committed: counted, failed, .. } = &self.outcome;
        Ok(vec![
            ErrorBound::within("confidences, relative", confidences.into_iter(), CONFIDENCE),
            ErrorBound::bits("predicted tokens that differ", &predicted, &want_predicted),
            ErrorBound::bits("tokens that differ", &self.tokens.device.read()?, &want),
            ErrorBound::bits("counts of commits that differ", &counted.read()?, &committed),
            ErrorBound::bits("counts of masks left that differ", &left.read()?, &masks_left),
            ErrorBound::bits("failure codes that differ", &failed.read()?, &vec![DLLM_NONE_FAILED; self.lengths.len()]),
        ])
    }
}
