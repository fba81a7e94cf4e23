//! V-verify: selection of the value rows that changed most; and with a map of cached rows that are overwritten.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::abi::DLLM_NONE_FAILED;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::Workspace;
use dllm_kernels::ops::vverify::{self, VVerify};
use dllm_kernels::reference::vverify::{cosine, lowest};
use half::{bf16, f16};

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 4096), (3, 4096));
    let real = [rows; 4];
    vec![
        Entry::new::<bf16, _>("vverify", format!("4x{rows}x{width}, a quarter"), move |stream| {
            Values::<bf16>::new(stream, &real, width, 0.25, false)
        }),
        Entry::new::<f16, _>("vverify", "13, 0 and 24 rows of 40, mapped, updated".into(), |stream| {
            Values::<f16>::new(stream, &[13, 0, 24], 40, 0.33, true)
        }),
    ]
}

struct Values<T> {
    stream: Stream,
    width: usize,
    ratio: f64,
    update: bool,
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
    /// Makes cached rows from the fresh ones, each with its own amount of noise. With `update` they are in reverse order.
    fn new(stream: &Stream, lengths: &[usize], width: usize, ratio: f64, update: bool) -> Result<Values<T>> {
        let mut rng = Rng::new(6);
        let rows = lengths.iter().sum::<usize>();
        let mut cu_rows = vec![0];
        for length in lengths {
            cu_rows.push(cu_rows[cu_rows.len() - 1] + *length as i32);
        }
        let fresh: Vec<T> = rng.values(rows * width, 1.0);
        let cached_row: Option<Vec<i32>> = update.then(|| (0..rows as i32).rev().collect());
        let mut cached = fresh.clone();
        for row in 0..rows {
            let amount = rng.unit();
            let to = cached_row.as_ref().map_or(row, |map| map[row] as usize);
            for i in 0..width {
                let noise = amount * (2.0 * rng.unit() - 1.0);
                cached[to * width + i] = T::from_wide(fresh[row * width + i].wide() + noise);
            }
        }
        Ok(Values {
            stream: stream.clone(),
            width,
            ratio,
            update,
            fresh: HostDevice::new(stream, fresh)?,
            cached: HostDevice::new(stream, cached)?,
            cached_row: cached_row.map(|map| HostDevice::new(stream, map)).transpose()?,
            cu_rows: HostDevice::new(stream, cu_rows)?,
            indices: stream.alloc(rows)?,
            cu_selected: stream.alloc(lengths.len() + 1)?,
            similarity: stream.alloc(rows)?,
            failed: stream.upload(&[DLLM_NONE_FAILED])?,
            workspace: vverify::workspace(stream, rows, lengths.len())?,
        })
    }
}

impl<T: Float> Case for Values<T> {
    fn bytes(&self) -> usize {
        (2 + usize::from(self.update)) * self.fresh.host.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let args = VVerify {
            width: self.width,
            ratio: self.ratio,
            fresh: &self.fresh.device,
            fresh_row: None,
            cached: &mut self.cached.device,
            cached_row: self.cached_row.as_ref().map(|map| &map.device),
            update_cached: self.update,
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

    /// Compares the cosines, and the selection with that of the reference for the cosines of the kernel.
    fn check(&self) -> Result<Vec<ErrorBound>> {
        let (fresh, got) = (&self.fresh.host, self.similarity.read()?);
        let wide = |matrix: &[T], row: usize| -> Vec<f32> {
            matrix[row * self.width..(row + 1) * self.width].iter().map(|x| x.wide() as f32).collect()
        };
        let mut want_cached = self.cached.host.clone();
        let mut cosines = Vec::new();
        for (row, got) in got.iter().enumerate() {
            let cached = self.cached_row.as_ref().map_or(row, |map| map.host[row] as usize);
            let want = cosine(&wide(fresh, row), &wide(&self.cached.host, cached));
            cosines.push((f64::from(*got), want, 1.0));
            if self.update {
                let (from, to) = (row * self.width, cached * self.width);
                want_cached[to..to + self.width].copy_from_slice(&fresh[from..from + self.width]);
            }
        }
        let (mut indices, mut cu_selected) = (Vec::new(), vec![0]);
        for rows in self.cu_rows.host.windows(2).map(|pair| pair[0] as usize..pair[1] as usize) {
            let similarities: Vec<f64> = got[rows.clone()].iter().map(|c| f64::from(*c)).collect();
            indices.extend(lowest(&similarities, self.ratio).iter().map(|i| (rows.start + i) as i32));
            cu_selected.push(indices.len() as i32);
        }
        let selected = self.indices.read()?;
        Ok(vec![
            ErrorBound::within("cosines", cosines.into_iter(), 1e-6),
            ErrorBound::bits("selected rows that differ", &selected[..indices.len()], &indices),
            ErrorBound::bits("counts of selected rows that differ", &self.cu_selected.read()?, &cu_selected),
            ErrorBound::bits("cached elements that differ", &self.cached.device.read()?, &want_cached),
            ErrorBound::bits("failure codes that differ", &self.failed.read()?, &[DLLM_NONE_FAILED]),
        ])
    }
}
