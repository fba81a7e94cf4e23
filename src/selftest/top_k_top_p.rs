//! Thresholds of top-p; and of top-p with top-k at a temperature, with an odd vocabulary size and NaN.

use super::unmask::{MASK, TEXT, clean};
use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, pick};
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::top_k_top_p::{self, TopKTopP};
use crate::ops::unmask::{Row, RowTable};
use crate::reference::top_k_top_p::min_kept_logit;
use half::{bf16, f16};

/// Tolerance of top-p: with sums in f32 a token this near to it may be kept or not.
const TOLERANCE: f64 = 1e-6;

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, vocab_size) = pick(small, (32, 126_464), (2, 126_464));
    let real = Shape { rows, vocab_size, top_p: Some(0.9), top_k: None, temperature: 1.0, odd: false };
    let odd = Shape { rows: 5, vocab_size: 1003, top_p: Some(0.8), top_k: Some(40), temperature: 0.7, odd: true };
    vec![
        Entry::new::<bf16, _>("top_k_top_p", format!("top-p {rows}x{vocab_size}"), move |stream| {
            Thresholds::<bf16>::new(stream, real)
        }),
        Entry::new::<f16, _>("top_k_top_p", "top-p, top-k 5x1003, unmasked row, NaN".into(), move |stream| {
            Thresholds::<f16>::new(stream, odd)
        }),
    ]
}

/// Shape of a case, and its sampling parameters.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of logits.
    pub rows: usize,
    /// Logits of a row.
    pub vocab_size: usize,
    /// Probability mass that is kept.
    pub top_p: Option<f32>,
    /// Number of tokens that are kept.
    pub top_k: Option<usize>,
    /// Temperature of the probabilities.
    pub temperature: f32,
    /// Whether the second row is not masked and the third has a NaN.
    pub odd: bool,
}

/// Logits and the thresholds of their rows.
pub struct Thresholds<T> {
    stream: Stream,
    shape: Shape,
    stride: usize,
    table: RowTable,
    logits: HostDevice<T>,
    tokens: HostDevice<i32>,
    min_logit: Buffer<f32>,
}

impl<T: Float> Thresholds<T> {
    /// Uploads random logits.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Thresholds<T>> {
        let Shape { rows, vocab_size, odd, .. } = shape;
        let stride = vocab_size.next_multiple_of(16 / size_of::<T>());
        let mut logits: Vec<T> = Random(9).logits(rows * stride);
        let mut tokens = vec![MASK; rows];
        if odd {
            tokens[1] = TEXT;
            logits[2 * stride + 17] = T::of(f32::NAN);
        }
        let table: Vec<Row> = (0..rows).map(|row| Row { token: row, logits_row: row, position: row }).collect();
        Ok(Thresholds {
            stream: stream.clone(),
            shape,
            stride,
            table: RowTable::new(stream, &[table])?,
            logits: HostDevice::new(stream, logits)?,
            tokens: HostDevice::new(stream, tokens)?,
            min_logit: stream.alloc(rows)?,
        })
    }
}

impl<T: Float> Case for Thresholds<T> {
    fn bytes(&self) -> usize {
        self.table.len() * self.shape.vocab_size * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Shape { vocab_size, top_p, top_k, temperature, .. } = self.shape;
        let args = TopKTopP {
            logits: &self.logits.device,
            uncond_logits: None,
            vocab_size,
            logits_stride: self.stride,
            rows: &self.table,
            tokens: &self.tokens.device,
            top_p,
            top_k,
            temperature,
            cfg_scale: 0.0,
            mask_token: MASK as u32,
            min_logit: &mut self.min_logit,
        };
        top_k_top_p::launch(&self.stream, args)
    }

    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let Shape { rows: all, vocab_size, top_p, top_k, temperature, .. } = self.shape;
        let min_logit = self.min_logit.read()?;
        let mut wrong = 0;
        for row in rows.of(all) {
            let got = min_logit[row];
            if self.tokens.host[row] != MASK {
                wrong += usize::from(got != f32::NEG_INFINITY);
                continue;
            }
            let mut logits = clean(&self.logits.host[row * self.stride..][..vocab_size]);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if logits.iter().position(|l| *l == largest) == Some(MASK as usize) {
                logits[MASK as usize] = f32::NEG_INFINITY; // the mask token is never selected
            }
            let top_p = |by: f64| top_p.map(|top_p| f64::from(top_p) + by);
            let want = |by: f64| min_kept_logit(&logits, temperature.into(), top_p(by), top_k);
            wrong += usize::from(!(want(TOLERANCE)..=want(-TOLERANCE)).contains(&got));
        }
        Ok(vec![ErrorBound { what: "rows with another threshold", error: wrong as f64, bound: 0.0 }])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![Output::new("thresholds", &mut self.min_logit)]
    }
}
