//! Gather, and scatter with a count on the device and an index out of range.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, count_or, pick};
use crate::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED};
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::gather_scatter::{self, Copy, GatherScatter};
use crate::reference::gather_scatter::{gather, scatter};
use half::{bf16, f16};

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 4096), (3, 4096));
    vec![
        Entry::new::<bf16, _>("gather_scatter", format!("gather {rows}x{width}"), move |stream| {
            Copied::<bf16>::new(stream, Shape { copy: Copy::Gather, rows, width, count: None })
        }),
        Entry::new::<f16, _>("gather_scatter", "scatter 29 of 37x24, one out of range".into(), |stream| {
            Copied::<f16>::new(stream, Shape { copy: Copy::Scatter, rows: 37, width: 24, count: Some(29) })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Direction of the copy.
    pub copy: Copy,
    /// Rows of the index list. The matrix that it points to has twice as many.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Row count on the device. With one, there is an index out of range too.
    pub count: Option<i32>,
}

/// Index list, source and target.
pub struct Copied<T> {
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
    /// Uploads random matrices, and distinct indices in random order.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Copied<T>> {
        let Shape { copy, rows, width, count } = shape;
        let mut random = Random(2);
        let mut index = random.distinct(rows, 2 * rows);
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
            source: HostDevice::new(stream, random.values(from * width, 1.0))?,
            target: HostDevice::new(stream, random.values(to * width, 1.0))?,
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

    /// Compares all rows: the reference copies.
    fn check(&self, _: Rows) -> Result<Vec<ErrorBound>> {
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

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![Output::new("target", &mut self.target.device), Output::new("failure code", &mut self.failed)]
    }
}
