//! Embedding of all tokens; and by an index list, with a token out of range.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, count_or, pick};
use crate::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::embed::{self, Embed};
use crate::reference::embed::embed as reference;
use half::{bf16, f16};

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width, vocab_size) = pick(small, (256, 4096, 4096), (3, 4096, 100));
    vec![
        Entry::new::<bf16, _>("embed", format!("{rows}x{width}"), move |stream| {
            Tokens::<bf16>::new(stream, Shape { rows, width, vocab_size, count: None })
        }),
        Entry::new::<f16, _>("embed", "indexed 29 of 37x24, token out of range".into(), |stream| {
            Tokens::<f16>::new(stream, Shape { rows: 37, width: 24, vocab_size: 50, count: Some(29) })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of tokens.
    pub rows: usize,
    /// Elements of an embedding.
    pub width: usize,
    /// Rows of the table.
    pub vocab_size: usize,
    /// Row count on the device. With one, there is an index list in reverse order too, and a token out of range.
    pub count: Option<i32>,
}

/// Tokens, table and result.
pub struct Tokens<T> {
    stream: Stream,
    width: usize,
    table: HostDevice<T>,
    tokens: HostDevice<i32>,
    index: Option<HostDevice<i32>>,
    count: Option<HostDevice<i32>>,
    out: HostDevice<T>,
    failed: Buffer<i32>,
}

impl<T: Float> Tokens<T> {
    /// Uploads a random table and random tokens.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Tokens<T>> {
        let Shape { rows, width, vocab_size, count } = shape;
        let mut random = Random(3);
        let mut tokens: Vec<i32> = (0..rows).map(|_| random.below(vocab_size) as i32).collect();
        let index: Option<Vec<i32>> = count.map(|_| (0..rows as i32).rev().collect());
        if index.is_some() {
            tokens[rows / 2] = vocab_size as i32;
        }
        Ok(Tokens {
            stream: stream.clone(),
            width,
            table: HostDevice::new(stream, random.values(vocab_size * width, 1.0))?,
            tokens: HostDevice::new(stream, tokens)?,
            index: index.map(|index| HostDevice::new(stream, index)).transpose()?,
            count: HostDevice::optional(stream, count)?,
            out: HostDevice::new(stream, random.values(rows * width, 1.0))?,
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

    /// Compares all rows: the reference copies.
    fn check(&self, _: Rows) -> Result<Vec<ErrorBound>> {
        let tokens = &self.tokens.host;
        let all = || (0..tokens.len() as i32).collect();
        let index: Vec<i32> = self.index.as_ref().map_or_else(all, |index| index.host.clone());
        let index = &index[..count_or(&self.count, index.len())];
        let mut want = self.out.host.clone();
        let in_range = reference(&self.table.host, self.width, tokens, index, &mut want);
        let failed = if in_range { DLLM_NONE_FAILED } else { DLLM_INDEX_FAILED };
        Ok(vec![
            ErrorBound::bits("elements that differ", &self.out.device.read()?, &want),
            ErrorBound::bits("failure codes that differ", &self.failed.read()?, &[failed]),
        ])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![Output::new("result", &mut self.out.device), Output::new("failure code", &mut self.failed)]
    }
}
