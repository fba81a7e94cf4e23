//! Gate of SwiGLU; and the same with a row count on the device.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, count_or, pick};
use crate::error::Result;
use crate::gpu::Stream;
use crate::ops::swiglu::{self, Swiglu};
use crate::reference::swiglu::{silu, swiglu_rounded};
use half::{bf16, f16};

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 12_288), (2, 12_288));
    vec![
        Entry::new::<bf16, _>("swiglu", format!("{rows}x{width}"), move |stream| {
            Gate::<bf16>::new(stream, Shape { rows, width, count: None })
        }),
        Entry::new::<f16, _>("swiglu", "3 of 5x1000".into(), |stream| {
            Gate::<f16>::new(stream, Shape { rows: 5, width: 1000, count: Some(3) })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the matrices.
    pub rows: usize,
    /// Elements of a row of the result.
    pub width: usize,
    /// Row count on the device; `None`: all rows.
    pub count: Option<i32>,
}

/// Gates, and the values that they multiply; and the result.
pub struct Gate<T> {
    stream: Stream,
    shape: Shape,
    count: Option<HostDevice<i32>>,
    gate_up: HostDevice<T>,
    out: HostDevice<T>,
}

impl<T: Float> Gate<T> {
    /// Uploads random inputs.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Gate<T>> {
        let Shape { rows, width, count } = shape;
        let mut random = Random(4);
        Ok(Gate {
            stream: stream.clone(),
            shape,
            count: HostDevice::optional(stream, count)?,
            gate_up: HostDevice::new(stream, random.values(rows * 2 * width, 6.0))?,
            out: HostDevice::new(stream, random.values(rows * width, 1.0))?,
        })
    }
}

impl<T: Float> Case for Gate<T> {
    fn bytes(&self) -> usize {
        3 * self.out.host.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Gate { shape, count, gate_up, out, .. } = self;
        let count = count.as_ref().map(|count| &count.device);
        let (gate_up, out) = (&gate_up.device, &mut out.device);
        swiglu::launch(&self.stream, Swiglu { max_rows: shape.rows, count, width: shape.width, gate_up, out })
    }

    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let width = self.shape.width;
        let count = count_or(&self.count, self.shape.rows);
        let mut want = rows.pick(&self.out.host, width);
        // Rows from the count on are unchanged.
        let computed = rows.of(self.shape.rows).into_iter().filter(|row| *row < count);
        for (row, want) in computed.zip(want.chunks_exact_mut(width)) {
            let (gate, up) = self.gate_up.host[2 * row * width..][..2 * width].split_at(width);
            for ((want, gate), up) in want.iter_mut().zip(gate).zip(up) {
                *want = T::of(swiglu_rounded(silu(gate.f64()), up.f64(), T::round) as f32);
            }
        }
        Ok(ErrorBound::rounded_twice(&rows.pick(&self.out.device.read()?, width), &want).into())
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![Output::new("result", &mut self.out.device)]
    }
}
