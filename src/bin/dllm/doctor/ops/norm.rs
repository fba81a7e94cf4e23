//! Residual add and RMSNorm; and the same with a row count on the device.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, count_or, widened};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::gpu::Stream;
use dllm_kernels::ops::norm::{self, Norm};
use dllm_kernels::reference::norm::{add_rounded, rms_norm_rounded, rms_scale};
use half::{bf16, f16};

const EPS: f32 = 1e-5;

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, width) = pick(small, (256, 4096), (2, 4096));
    vec![
        Entry::new::<bf16, _>("norm", format!("{rows}x{width}"), move |stream| {
            Residual::<bf16>::new(stream, rows, width, None)
        }),
        Entry::new::<f16, _>("norm", "3 of 5x1000".into(), |stream| Residual::<f16>::new(stream, 5, 1000, Some(3))),
    ]
}

struct Residual<T> {
    stream: Stream,
    rows: usize,
    count: Option<HostDevice<i32>>,
    /// Residual stream. Each launch adds the delta once more.
    x: HostDevice<T>,
    delta: HostDevice<T>,
    weight: HostDevice<T>,
    out: HostDevice<T>,
}

impl<T: Float> Residual<T> {
    fn new(stream: &Stream, rows: usize, width: usize, count: Option<i32>) -> Result<Residual<T>> {
        let mut rng = Rng::new(1);
        Ok(Residual {
            stream: stream.clone(),
            rows,
            count: HostDevice::optional(stream, count)?,
            x: HostDevice::new(stream, rng.values(rows * width, 2.0))?,
            // Small, so that x stays in range after many launches.
            delta: HostDevice::new(stream, rng.values(rows * width, 0.01))?,
            weight: HostDevice::new(stream, rng.values(width, 1.5))?,
            out: HostDevice::new(stream, rng.values(rows * width, 1.0))?,
        })
    }
}

impl<T: Float> Case for Residual<T> {
    fn bytes(&self) -> usize {
        4 * self.x.host.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Residual { rows, count, x, delta, weight, out, .. } = self;
        let norm = Norm {
            max_rows: *rows,
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

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let (delta, weight) = (widened(&self.delta.host), widened(&self.weight.host));
        // Rows from the count on are unchanged.
        let (mut want_x, mut want) = (self.x.host.clone(), self.out.host.clone());
        let width = weight.len();
        for row in (0..count_or(&self.count, self.rows)).map(|row| row * width..(row + 1) * width) {
            let mut x = widened(&self.x.host[row.clone()]);
            add_rounded(&mut x, &delta[row.clone()], T::round);
            let out = rms_norm_rounded(&x, &weight, rms_scale(&x, EPS.into()), T::round);
            for ((i, x), out) in row.zip(x).zip(out) {
                (want_x[i], want[i]) = (T::from_wide(x), T::from_wide(out));
            }
        }
        let [near, moved] = ErrorBound::rounded_twice(&self.out.device.read()?, &want);
        Ok(vec![near, moved, ErrorBound::bits("elements of the sum that differ", &self.x.device.read()?, &want_x)])
    }
}
