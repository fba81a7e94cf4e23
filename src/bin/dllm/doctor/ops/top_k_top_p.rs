//! Thresholds of top-p; and of top-p with top-k at a temperature, with an odd vocabulary size and NaN.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng};
use super::pick;
use super::unmask::{MASK, TEXT, clean};
use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::top_k_top_p::{self, TopKTopP};
use dllm_kernels::ops::unmask::{Row, RowTable};
use dllm_kernels::reference::top_k_top_p::min_kept_logit;
use half::{bf16, f16};

/// Tolerance of top-p: with sums in f32 a token this near to it may be kept or not.
const TOLERANCE: f64 = 1e-6;

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, vocab_size) = pick(small, (32, 126_464), (2, 126_464));
    vec![
        Entry::new::<bf16, _>("top_k_top_p", format!("top-p {rows}x{vocab_size}"), move |stream| {
            Rows::<bf16>::new(stream, rows, vocab_size, Params { top_p: 0.9, top_k: None, temperature: 1.0 })
        }),
        Entry::new::<f16, _>("top_k_top_p", "top-p, top-k 5x1003, unmasked row, NaN".into(), |stream| {
            Rows::<f16>::new(stream, 5, 1003, Params { top_p: 0.8, top_k: Some(40), temperature: 0.7 })
        }),
    ]
}

/// Sampling parameters.
#[derive(Clone, Copy)]
struct Params {
    top_p: f32,
    top_k: Option<usize>,
    temperature: f32,
}

struct Rows<T> {
    stream: Stream,
    params: Params,
    vocab_size: usize,
    stride: usize,
    table: RowTable,
    logits: HostDevice<T>,
    tokens: HostDevice<i32>,
    min_logit: Buffer<f32>,
}

impl<T: Float> Rows<T> {
    /// Makes random logits. With top-k, the second row is not masked and the third has a NaN.
    fn new(stream: &Stream, rows: usize, vocab_size: usize, params: Params) -> Result<Rows<T>> {
        let stride = vocab_size.next_multiple_of(16 / size_of::<T>());
        let mut logits: Vec<T> = Rng::new(9).logits(rows * stride);
        let mut tokens = vec![MASK; rows];
        if params.top_k.is_some() {
            tokens[1] = TEXT;
            logits[2 * stride + 17] = T::from_wide(f64::NAN);
        }
        let table: Vec<Row> = (0..rows).map(|row| Row { token: row, logits_row: row, position: row }).collect();
        Ok(Rows {
            stream: stream.clone(),
            params,
            vocab_size,
            stride,
            table: RowTable::new(stream, &[table])?,
            logits: HostDevice::new(stream, logits)?,
            tokens: HostDevice::new(stream, tokens)?,
            min_logit: stream.alloc(rows)?,
        })
    }
}

impl<T: Float> Case for Rows<T> {
    fn bytes(&self) -> usize {
        self.table.len() * self.vocab_size * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let args = TopKTopP {
            logits: &self.logits.device,
            uncond_logits: None,
            vocab_size: self.vocab_size,
            logits_stride: self.stride,
            rows: &self.table,
            tokens: &self.tokens.device,
            top_p: Some(self.params.top_p),
            top_k: self.params.top_k,
            temperature: self.params.temperature,
            cfg_scale: 0.0,
            mask_token: MASK as u32,
            min_logit: &mut self.min_logit,
        };
        top_k_top_p::launch(&self.stream, args)
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let Params { top_p, top_k, temperature } = self.params;
        let mut wrong = 0;
        for (row, got) in self.min_logit.read()?.into_iter().enumerate() {
            if self.tokens.host[row] != MASK {
                wrong += usize::from(got != f32::NEG_INFINITY);
                continue;
            }
            let mut logits = clean(&self.logits.host[row * self.stride..][..self.vocab_size]);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if logits.iter().position(|l| *l == largest) == Some(MASK as usize) {
                logits[MASK as usize] = f32::NEG_INFINITY; // the mask token is never selected
            }
            let want = |by: f64| min_kept_logit(&logits, temperature.into(), Some(f64::from(top_p) + by), top_k);
            wrong += usize::from(!(want(TOLERANCE)..=want(-TOLERANCE)).contains(&got));
        }
        Ok(vec![ErrorBound { what: "rows with another threshold", error: wrong as f64, bound: 0.0 }])
    }
}
