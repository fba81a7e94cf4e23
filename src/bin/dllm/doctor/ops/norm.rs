//! Residual add and RMSNorm, and with a count on the device.

use super::super::case::{Both, Case, Entry, Float, Measure, Numbers, count_or, widened};
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
    count: Option<Both<i32>>,
    /// Each launch adds the delta once more.
    x: Both<T>,
    delta: Both<T>,
    weight: Both<T>,
    out: Both<T>,
}

impl<T: Float> Residual<T> {
    fn new(stream: &Stream, rows: usize, width: usize, count: Option<i32>) -> Result<Residual<T>> {
        let mut numbers = Numbers::new(1);
        Ok(Residual {
            stream: stream.clone(),
            rows,
            count: Both::of(stream, count)?,
            x: Both::new(stream, numbers.values(rows * width, 2.0))?,
            // Small, so that x stays in range however often it is added.
            delta: Both::new(stream, numbers.values(rows * width, 0.01))?,
            weight: Both::new(stream, numbers.values(width, 1.5))?,
            out: Both::new(stream, numbers.values(rows * width, 1.0))?,
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

    fn check(&self) -> Result<Vec<Measure>> {
        let (delta, weight) = (widened(&self.delta.host), widened(&self.weight.host));
        // Rows past the count stay.
        let (mut want_x, mut want) = (self.x.host.clone(), self.out.host.clone());
        let width = weight.len();
        for row in (0..count_or(&self.count, self.rows)).map(|row| row * width..(row + 1) * width) {
            let mut x = widened(&self.x.host[row.clone()]);
            add_rounded(&mut x, &delta[row.clone()], T::round);
            let out = rms_norm_rounded(&x, &weight, rms_scale(&x, EPS.into()), T::round);
            for ((i, x), out) in row.zip(x).zip(out) {
                (want_x[i], want[i]) = (T::of(x), T::of(out));
            }
        }
        let [near, moved] = Measure::rounded_twice(&self.out.device.read()?, &want);
        Ok(vec![near, moved, Measure::bits("elements of the sum that differ", &self.x.device.read()?, &want_x)])
    }
}
