//! Residual add and RMSNorm; and the same with a row count on the device.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, count_or, narrowed, pick, widened};
use crate::error::Result;
use crate::gpu::Stream;
use crate::ops::norm::{self, Norm};
use crate::reference::norm::{add_rounded, rms_norm_rounded, rms_scale};
use half::{bf16, f16};

const EPS: f32 = 1e-5;

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 4096), (2, 4096));
    vec![
        Entry::new::<bf16, _>("norm", format!("{rows}x{width}"), move |stream| {
            Residual::<bf16>::new(stream, Shape { rows, width, count: None })
        }),
        Entry::new::<f16, _>("norm", "3 of 5x1000".into(), |stream| {
            Residual::<f16>::new(stream, Shape { rows: 5, width: 1000, count: Some(3) })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the matrices.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Row count on the device; `None`: all rows.
    pub count: Option<i32>,
}

/// Residual stream, delta, weight and result.
pub struct Residual<T> {
    stream: Stream,
    shape: Shape,
    count: Option<HostDevice<i32>>,
    /// Residual stream. Each launch adds the delta once more.
    x: HostDevice<T>,
    delta: HostDevice<T>,
    weight: HostDevice<T>,
    out: HostDevice<T>,
}

impl<T: Float> Residual<T> {
    /// Uploads random inputs.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Residual<T>> {
        let Shape { rows, width, count } = shape;
        let mut random = Random(1);
        Ok(Residual {
            stream: stream.clone(),
            shape,
            count: HostDevice::optional(stream, count)?,
            x: HostDevice::new(stream, random.values(rows * width, 2.0))?,
            // Small, so that x stays in range after many launches.
            delta: HostDevice::new(stream, random.values(rows * width, 0.01))?,
            weight: HostDevice::new(stream, random.values(width, 1.5))?,
            out: HostDevice::new(stream, random.values(rows * width, 1.0))?,
        })
    }
}

impl<T: Float> Case for Residual<T> {
    fn bytes(&self) -> usize {
        4 * self.x.host.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Residual { shape, count, x, delta, weight, out, .. } = self;
        let norm = Norm {
            max_rows: shape.rows,
            count: count.as_ref().map(|count| &count.device),
            x: &mut x.device,
            delta: Some(&delta.device),
            delta_row: None,
            weight: &weight.device,
            eps: EPS,
            out: &mut out.device,
        };
        norm::launch(&self.stream, norm)
    }

    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let Shape { rows: all, width, .. } = self.shape;
        let (count, weight) = (count_or(&self.count, all), widened(&self.weight.host));
        let (mut want_x, mut want) = (Vec::new(), Vec::new());
        for row in rows.of(all) {
            let at = row * width..(row + 1) * width;
            if row >= count {
                // Rows from the count on are unchanged.
                want_x.extend_from_slice(&self.x.host[at.clone()]);
                want.extend_from_slice(&self.out.host[at]);
                continue;
            }
            let mut x = widened(&self.x.host[at.clone()]);
            add_rounded(&mut x, &widened(&self.delta.host[at]), T::round);
            want.extend(narrowed::<T>(&rms_norm_rounded(&x, &weight, rms_scale(&x, EPS.into()), T::round)));
            want_x.extend(narrowed::<T>(&x));
        }
        let [out, x] = [&self.out, &self.x].map(|matrix| matrix.device.read());
        let [near, moved] = ErrorBound::rounded_twice(&rows.pick(&out?, width), &want);
        Ok(vec![near, moved, ErrorBound::bits("elements of the sum that differ", &rows.pick(&x?, width), &want_x)])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![Output::new("result", &mut self.out.device), Output::new("sum", &mut self.x.device)]
    }
}
