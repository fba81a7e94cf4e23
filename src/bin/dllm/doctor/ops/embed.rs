//! Embedding of all tokens, and by an index list with a token out of range.

use super::super::case::{Both, Case, Entry, Float, Measure, Numbers, count_or};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::embed::{self, Embed};
use dllm_kernels::reference::embed::embed as reference;
use half::{bf16, f16};

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width, vocab_size) = pick(small, (256, 4096, 4096), (3, 4096, 100));
    vec![
        Entry::new::<bf16, _>("embed", format!("{rows}x{width}"), move |stream| {
            Tokens::<bf16>::new(stream, rows, width, vocab_size, None)
        }),
        Entry::new::<f16, _>("embed", "listed 29 of 37x24, a token out of range".into(), |stream| {
            Tokens::<f16>::new(stream, 37, 24, 50, Some(29))
        }),
    ]
}

struct Tokens<T> {
    stream: Stream,
    width: usize,
    table: Both<T>,
    tokens: Both<i32>,
    index: Option<Both<i32>>,
    count: Option<Both<i32>>,
    out: Both<T>,
    failed: Buffer<i32>,
}

impl<T: Float> Tokens<T> {
    /// With a count there is a list too, of the tokens in reverse.
    fn new(stream: &Stream, rows: usize, width: usize, vocab_size: usize, count: Option<i32>) -> Result<Tokens<T>> {
        let mut numbers = Numbers::new(3);
        let mut tokens: Vec<i32> = (0..rows).map(|_| numbers.below(vocab_size) as i32).collect();
        let index: Option<Vec<i32>> = count.map(|_| (0..rows as i32).rev().collect());
        if index.is_some() {
            tokens[rows / 2] = vocab_size as i32;
        }
        Ok(Tokens {
            stream: stream.clone(),
            width,
            table: Both::new(stream, numbers.values(vocab_size * width, 1.0))?,
            tokens: Both::new(stream, tokens)?,
            index: index.map(|index| Both::new(stream, index)).transpose()?,
            count: Both::of(stream, count)?,
            out: Both::new(stream, numbers.values(rows * width, 1.0))?,
            failed: stream.upload(&[DLLM_NONE_FAILED])?,
        })
    }
}

impl<T: Float> Case for Tokens<T> {
    fn bytes(&self) -> usize {
        self.tokens.host.len() * (2 * self.width * size_of::<T>() + size_of::<i32>())
    }

    fn launch(&mut self) -> Result<()> {
        let Tokens { table, width, tokens, index, count, out, failed, .. } = self;
        let embed = Embed {
            table: &table.device,
            width: *width,
            tokens: &tokens.device,
            index: index.as_ref().map(|index| &index.device),
            count: count.as_ref().map(|count| &count.device),
            out: &mut out.device,
            failed: Some(failed),
        };
        embed::launch(&self.stream, embed)
    }

    fn check(&self) -> Result<Vec<Measure>> {
        let tokens = &self.tokens.host;
        let every = || (0..tokens.len() as i32).collect();
        let index: Vec<i32> = self.index.as_ref().map_or_else(every, |index| index.host.clone());
        let index = &index[..count_or(&self.count, index.len())];
        let mut want = self.out.host.clone();
        let failed = match reference(&self.table.host, self.width, tokens, index, &mut want) {
            true => DLLM_NONE_FAILED,
            false => DLLM_INDEX_FAILED,
        };
        Ok(vec![
            Measure::bits("elements that differ", &self.out.device.read()?, &want),
            Measure::bits("failures told otherwise", &self.failed.read()?, &[failed]),
        ])
    }
}
