//! Gate of SwiGLU; and the same with a row count on the device.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, count_or};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::gpu::Stream;
use dllm_kernels::ops::swiglu::{self, Swiglu};
use dllm_kernels::reference::swiglu::{silu, swiglu_rounded};
use half::{bf16, f16};

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 12_288), (2, 12_288));
    vec![
        Entry::new::<bf16, _>("swiglu", format!("{rows}x{width}"), move |stream| {
            Gate::<bf16>::new(stream, rows, width, None)
        }),
        Entry::new::<f16, _>("swiglu", "3 of 5x1000".into(), |stream| Gate::<f16>::new(stream, 5, 1000, Some(3))),
    ]
}

struct Gate<T> {
    stream: Stream,
    rows: usize,
    width: usize,
    count: Option<HostDevice<i32>>,
    gate_up: HostDevice<T>,
    out: HostDevice<T>,
}

impl<T: Float> Gate<T> {
    fn new(stream: &Stream, rows: usize, width: usize, count: Option<i32>) -> Result<Gate<T>> {
        let mut rng = Rng::new(4);
        Ok(Gate {
            stream: stream.clone(),
            rows,
            width,
            count: HostDevice::optional(stream, count)?,
            gate_up: HostDevice::new(stream, rng.values(rows * 2 * width, 6.0))?,
            out: HostDevice::new(stream, rng.values(rows * width, 1.0))?,
        })
    }
}

impl<T: Float> Case for Gate<T> {
    fn bytes(&self) -> usize {
        3 * self.out.host.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Gate { rows, count, width, gate_up, out, .. } = self;
        let count = count.as_ref().map(|count| &count.device);
        let (gate_up, out) = (&gate_up.device, &mut out.device);
        swiglu::launch(&self.stream, Swiglu { max_rows: *rows, count, width: *width, gate_up, out })
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let mut want = self.out.host.clone();
        let rows = self.gate_up.host.chunks_exact(2 * self.width).zip(want.chunks_exact_mut(self.width));
        // Rows from the count on are unchanged.
        for (row, want) in rows.take(count_or(&self.count, self.rows)) {
            let (gate, up) = row.split_at(self.width);
            for ((want, gate), up) in want.iter_mut().zip(gate).zip(up) {
                *want = T::from_wide(swiglu_rounded(silu(gate.wide()), up.wide(), T::round));
            }
        }
        Ok(ErrorBound::rounded_twice(&self.out.device.read()?, &want).into())
    }
}
