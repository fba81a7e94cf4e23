//! Gather, and scatter with a count on the device and an index out of range.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, count_or};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::gather_scatter::{self, Copy, GatherScatter};
use dllm_kernels::reference::gather_scatter::{gather, scatter};
use half::{bf16, f16};

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 4096), (3, 4096));
    vec![
        Entry::new::<bf16, _>("gather_scatter", format!("gather {rows}x{width}"), move |stream| {
            Copied::<bf16>::new(stream, Copy::Gather, rows, width, None)
        }),
        Entry::new::<f16, _>("gather_scatter", "scatter 29 of 37x24, one out of range".into(), |stream| {
            Copied::<f16>::new(stream, Copy::Scatter, 37, 24, Some(29))
        }),
    ]
}

struct Copied<T> {
    stream: Stream,
    copy: Copy,
    width: usize,
    count: Option<HostDevice<i32>>,
    index: HostDevice<i32>,
    source: HostDevice<T>,
    target: HostDevice<T>,
    failed: Buffer<i32>,
}

impl<T: Float> Copied<T> {
    /// Makes a copy to or from twice as many rows, with a permutation as the index.
    fn new(stream: &Stream, copy: Copy, rows: usize, width: usize, count: Option<i32>) -> Result<Copied<T>> {
        let mut rng = Rng::new(2);
        let mut index: Vec<i32> = (0..rows).map(|i| ((i * 2 + 1) * 7 % (2 * rows)) as i32).collect();
        if count.is_some() {
            index[rows / 3] = 2 * rows as i32;
        }
        let (from, to) = if copy == Copy::Gather { (2 * rows, rows) } else { (rows, 2 * rows) };
        Ok(Copied {
            stream: stream.clone(),
            copy,
            width,
            count: HostDevice::optional(stream, count)?,
            index: HostDevice::new(stream, index)?,
            source: HostDevice::new(stream, rng.values(from * width, 1.0))?,
            target: HostDevice::new(stream, rng.values(to * width, 1.0))?,
            failed: stream.upload(&[DLLM_NONE_FAILED])?,
        })
    }
}

impl<T: Float> Case for Copied<T> {
    fn bytes(&self) -> usize {
        self.index.host.len() * (2 * self.width * size_of::<T>() + size_of::<i32>())
    }

    fn launch(&mut self) -> Result<()> {
        let Copied { index, count, width, source, target, failed, .. } = self;
        let rows = GatherScatter {
            index: &index.device,
            count: count.as_ref().map(|count| &count.device),
            width: *width,
            source: &source.device,
            target: &mut target.device,
            failed: Some(failed),
        };
        gather_scatter::launch(&self.stream, rows, self.copy)
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let index = &self.index.host[..count_or(&self.count, self.index.host.len())];
        let mut want = self.target.host.clone();
        let reference = if self.copy == Copy::Gather { gather } else { scatter };
        let in_range = reference(&self.source.host, self.width, index, &mut want);
        let failed = if in_range { DLLM_NONE_FAILED } else { DLLM_INDEX_FAILED };
        Ok(vec![
            ErrorBound::bits("elements that differ", &self.target.device.read()?, &want),
            ErrorBound::bits("failure codes that differ", &self.failed.read()?, &[failed]),
        ])
    }
}
