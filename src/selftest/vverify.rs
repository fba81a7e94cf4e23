//! V-verify: selection of the value rows that changed most; and with a map of cached rows that are overwritten.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, pick};
use crate::abi::DLLM_NONE_FAILED;
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::Workspace;
use crate::ops::vverify::{self, VVerify};
use crate::reference::vverify::{cosine, lowest};
use half::{bf16, f16};

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 4096), (3, 4096));
    vec![
        Entry::new::<bf16, _>("vverify", format!("4x{rows}x{width}, a quarter"), move |stream| {
            Values::<bf16>::new(stream, Shape { lengths: vec![rows; 4], width, ratio: 0.25, update: false })
        }),
        Entry::new::<f16, _>("vverify", "13, 0 and 24 rows of 40, mapped, updated".into(), |stream| {
            Values::<f16>::new(stream, Shape { lengths: vec![13, 0, 24], width: 40, ratio: 0.33, update: true })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Rows of each sequence.
    pub lengths: Vec<usize>,
    /// Elements of a row.
    pub width: usize,
    /// Share of the rows that is selected.
    pub ratio: f64,
    /// Whether the cached rows, in reverse order, are overwritten.
    pub update: bool,
}

/// Fresh and cached values, and the selected rows.
pub struct Values<T> {
    stream: Stream,
    shape: Shape,
    fresh: HostDevice<T>,
    cached: HostDevice<T>,
    cached_row: Option<HostDevice<i32>>,
    cu_rows: HostDevice<i32>,
    indices: Buffer<i32>,
    cu_selected: Buffer<i32>,
    similarity: Buffer<f32>,
    failed: Buffer<i32>,
    workspace: Workspace,
}

impl<T: Float> Values<T> {
    /// Uploads random rows, and cached rows that have the same values with noise, of its own amount for each row.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Values<T>> {
        let Shape { lengths, width, update, .. } = &shape;
        let mut random = Random(6);
        let rows = lengths.iter().sum::<usize>();
        let mut cu_rows = vec![0];
        for length in lengths {
            cu_rows.push(cu_rows[cu_rows.len() - 1] + *length as i32);
        }
        let fresh: Vec<T> = random.values(rows * width, 1.0);
        let cached_row: Option<Vec<i32>> = update.then(|| (0..rows as i32).rev().collect());
        let mut cached = fresh.clone();
        for row in 0..rows {
            let amount = random.number();
            let to = cached_row.as_ref().map_or(row, |map| map[row] as usize);
            for i in 0..*width {
                cached[to * width + i] = T::of(fresh[row * width + i].f32() + amount * random.number());
            }
        }
        Ok(Values {
            stream: stream.clone(),
            fresh: HostDevice::new(stream, fresh)?,
            cached: HostDevice::new(stream, cached)?,
            cached_row: cached_row.map(|map| HostDevice::new(stream, map)).transpose()?,
            cu_rows: HostDevice::new(stream, cu_rows)?,
            indices: stream.alloc(rows)?,
            cu_selected: stream.alloc(lengths.len() + 1)?,
            similarity: stream.alloc(rows)?,
            failed: stream.upload(&[DLLM_NONE_FAILED])?,
            workspace: vverify::workspace(stream, rows, lengths.len())?,
            shape,
        })
    }

    /// Returns the cached row of a row.
    fn cached_row(&self, row: usize) -> usize {
        self.cached_row.as_ref().map_or(row, |map| map.host[row] as usize)
    }

    /// Returns the selected rows of all sequences, and their sums, as the reference selects them by these cosines.
    fn selected(&self, cosines: &[f32]) -> (Vec<i32>, Vec<i32>) {
        let (mut indices, mut cu_selected) = (Vec::new(), vec![0]);
        for rows in self.cu_rows.host.windows(2).map(|pair| pair[0] as usize..pair[1] as usize) {
            let similarities: Vec<f64> = cosines[rows.clone()].iter().map(|c| f64::from(*c)).collect();
            indices.extend(lowest(&similarities, self.shape.ratio).iter().map(|i| (rows.start + i) as i32));
            cu_selected.push(indices.len() as i32);
        }
        (indices, cu_selected)
    }
}

impl<T: Float> Case for Values<T> {
    fn bytes(&self) -> usize {
        (2 + usize::from(self.shape.update)) * self.fresh.host.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let args = VVerify {
            width: self.shape.width,
            ratio: self.shape.ratio,
            fresh: &self.fresh.device,
            fresh_row: None,
            cached: &mut self.cached.device,
            cached_row: self.cached_row.as_ref().map(|map| &map.device),
            update_cached: self.shape.update,
            cu_rows: &self.cu_rows.device,
            indices: &mut self.indices,
            tables: Default::default(),
            first_selected: None,
            cu_selected: &mut self.cu_selected,
            similarity: Some(&mut self.similarity),
            failed: Some(&mut self.failed),
            workspace: &mut self.workspace,
        };
        vverify::launch(&self.stream, args)
    }

    /// Compares the cosines and the cached rows; and, of all rows, the selection with that of the reference for the cosines of
    /// the kernel.
    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let width = self.shape.width;
        let (got, cached) = (self.similarity.read()?, self.cached.device.read()?);
        let row_of = |matrix: &[T], row: usize| matrix[row * width..(row + 1) * width].to_vec();
        let narrow = |row: Vec<T>| -> Vec<f32> { row.iter().map(|x| x.f32()).collect() };
        let (mut cosines, mut got_cached, mut want_cached) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows.of(got.len()) {
            let (fresh, to) = (row_of(&self.fresh.host, row), self.cached_row(row));
            let before = row_of(&self.cached.host, to);
            got_cached.extend(row_of(&cached, to));
            want_cached.extend_from_slice(if self.shape.update { &fresh } else { &before });
            cosines.push((f64::from(got[row]), cosine(&narrow(fresh), &narrow(before)), 1.0));
        }
        let (indices, cu_selected) = self.selected(&got);
        let selected = self.indices.read()?;
        Ok(vec![
            ErrorBound::within("cosines", cosines, 1e-6),
            ErrorBound::bits("selected rows that differ", &selected[..indices.len()], &indices),
            ErrorBound::bits("counts of selected rows that differ", &self.cu_selected.read()?, &cu_selected),
            ErrorBound::bits("cached elements that differ", &got_cached, &want_cached),
            ErrorBound::bits("failure codes that differ", &self.failed.read()?, &[DLLM_NONE_FAILED]),
        ])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        // As many rows as the ratio selects, of whatever cosines.
        let selected = self.selected(&vec![0.0; self.similarity.len()]).0.len();
        vec![
            Output::new("cosines", &mut self.similarity),
            Output { words: selected, ..Output::new("selected rows", &mut self.indices) },
            Output::new("counts", &mut self.cu_selected),
            Output::new("cached rows", &mut self.cached.device),
            Output::new("failure code", &mut self.failed),
        ]
    }
}
