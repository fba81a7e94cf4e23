//! Merge of two attention states; and in place, with states that have no keys.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, widened};
use super::pick;
use dllm_kernels::gpu::Stream;
use dllm_kernels::ops::merge_state::{self, MergeState, Partial};
use dllm_kernels::reference::merge_state::{merge as reference, merge_weights};
use dllm_kernels::{Error, Result};
use half::{bf16, f16};

pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, num_heads, head_dim) = pick(small, (256, 32, 128), (2, 32, 128));
    vec![
        Entry::new::<bf16, _>("merge_state", format!("{rows}x{num_heads}x{head_dim}"), move |stream| {
            States::<bf16>::new(stream, [rows, num_heads, head_dim], false)
        }),
        Entry::new::<f16, _>("merge_state", "5x3x40 in place, states without keys".into(), |stream| {
            States::<f16>::new(stream, [5, 3, 40], true)
        }),
    ]
}

/// Attention state: output and log-sum-exp.
struct State<T> {
    out: HostDevice<T>,
    lse: HostDevice<f32>,
}

struct States<T> {
    stream: Stream,
    shape: [usize; 3],
    in_place: bool,
    a: State<T>,
    b: State<T>,
    /// Result; in place it starts as `a`.
    merged: State<T>,
}

impl<T: Float> States<T> {
    /// Makes two states. In place, every third row and head has no keys in one of them, or in both.
    fn new(stream: &Stream, shape: [usize; 3], in_place: bool) -> Result<States<T>> {
        let [rows, num_heads, head_dim] = shape;
        let mut rng = Rng::new(5);
        let mut state = |without_keys: &dyn Fn(usize) -> bool| {
            let out = rng.values::<T>(rows * num_heads * head_dim, 1.0);
            let mut lse = rng.values::<f32>(rows * num_heads, 6.0);
            (0..lse.len()).filter(|i| in_place && without_keys(*i)).for_each(|i| lse[i] = f32::NEG_INFINITY);
            Ok::<_, Error>(State { out: HostDevice::new(stream, out)?, lse: HostDevice::new(stream, lse)? })
        };
        let (a, b) = (state(&|i| i % 3 == 0)?, state(&|i| i % 3 == 1 || i % 6 == 0)?);
        let (out, lse) = (a.out.host.clone(), a.lse.host.clone());
        let merged = State { out: HostDevice::new(stream, out)?, lse: HostDevice::new(stream, lse)? };
        Ok(States { stream: stream.clone(), shape, in_place, a, b, merged })
    }
}

impl<T: Float> Case for States<T> {
    fn bytes(&self) -> usize {
        3 * (self.a.out.host.len() * size_of::<T>() + self.a.lse.host.len() * size_of::<f32>())
    }

    fn launch(&mut self) -> Result<()> {
        let States { a, b, merged, .. } = self;
        let [max_rows, num_heads, head_dim] = self.shape;
        let [a, b] = [a, b].map(|state| Partial { out: &state.out.device, lse: &state.lse.device });
        let a = (!self.in_place).then_some(a);
        let (out, lse) = (&mut merged.out.device, &mut merged.lse.device);
        merge_state::launch(&self.stream, MergeState { max_rows, count: None, num_heads, head_dim, a, b, out, lse })
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let head_dim = self.shape[2];
        let (out, lse) = (widened(&self.merged.out.device.read()?), self.merged.lse.device.read()?);
        let States { a, b, .. } = self;
        let (mut elements, mut sums) = (Vec::new(), Vec::new());
        for (i, got) in out.chunks_exact(head_dim).enumerate() {
            let row = i * head_dim..(i + 1) * head_dim;
            let (a_out, b_out) = (widened(&a.out.host[row.clone()]), widened(&b.out.host[row]));
            let (a_lse, b_lse) = (f64::from(a.lse.host[i]), f64::from(b.lse.host[i]));
            let (want, want_lse) = reference((&a_out, a_lse), (&b_out, b_lse));
            let ([a_weight, b_weight], _) = merge_weights(a_lse, b_lse);
            for (((got, want), a), b) in got.iter().zip(want).zip(a_out).zip(b_out) {
                let unit = a_weight * a.abs() + b_weight * b.abs();
                elements.push((*got, want, unit.max(T::MIN_POSITIVE)));
            }
            sums.push((f64::from(lse[i]), want_lse, 1.0 + want_lse.abs() / 10.0));
        }
        // One rounding to the type, of half an epsilon, and the errors of f32.
        Ok(vec![
            ErrorBound::within("result, relative to the weighted states", elements.into_iter(), 0.51 * T::EPSILON),
            ErrorBound::within("log-sum-exp", sums.into_iter(), 1e-5),
        ])
    }
}
