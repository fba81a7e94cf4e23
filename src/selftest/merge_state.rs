//! Merge of two attention states; and in place, with states that have no keys.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, pick, widened};
use crate::error::{Error, Result};
use crate::gpu::Stream;
use crate::ops::merge_state::{self, MergeState, Partial};
use crate::reference::merge_state::{merge as reference, merge_weights};
use half::{bf16, f16};

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (rows, num_heads, head_dim) = pick(small, (256, 32, 128), (2, 32, 128));
    vec![
        Entry::new::<bf16, _>("merge_state", format!("{rows}x{num_heads}x{head_dim}"), move |stream| {
            States::<bf16>::new(stream, Shape { rows, num_heads, head_dim, in_place: false })
        }),
        Entry::new::<f16, _>("merge_state", "5x3x40 in place, states without keys".into(), |stream| {
            States::<f16>::new(stream, Shape { rows: 5, num_heads: 3, head_dim: 40, in_place: true })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query rows.
    pub rows: usize,
    /// Heads of a row.
    pub num_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Whether the result replaces the first state. Every third row and head then has no keys in one of the states, or in both.
    pub in_place: bool,
}

/// Attention state: output and log-sum-exp.
struct State<T> {
    out: HostDevice<T>,
    lse: HostDevice<f32>,
}

/// Two states and the merged one.
pub struct States<T> {
    stream: Stream,
    shape: Shape,
    a: State<T>,
    b: State<T>,
    /// Result; in place it starts as `a`.
    merged: State<T>,
}

impl<T: Float> States<T> {
    /// Uploads random states.
    pub fn new(stream: &Stream, shape: Shape) -> Result<States<T>> {
        let Shape { rows, num_heads, head_dim, in_place } = shape;
        let mut random = Random(5);
        let mut state = |without_keys: &dyn Fn(usize) -> bool| {
            let out = random.values::<T>(rows * num_heads * head_dim, 1.0);
            let mut lse = random.values::<f32>(rows * num_heads, 6.0);
            (0..lse.len()).filter(|i| in_place && without_keys(*i)).for_each(|i| lse[i] = f32::NEG_INFINITY);
            Ok::<_, Error>(State { out: HostDevice::new(stream, out)?, lse: HostDevice::new(stream, lse)? })
        };
        let (a, b) = (state(&|i| i % 3 == 0)?, state(&|i| i % 3 == 1 || i % 6 == 0)?);
        let (out, lse) = (a.out.host.clone(), a.lse.host.clone());
        let merged = State { out: HostDevice::new(stream, out)?, lse: HostDevice::new(stream, lse)? };
        Ok(States { stream: stream.clone(), shape, a, b, merged })
    }
}

impl<T: Float> Case for States<T> {
    fn bytes(&self) -> usize {
        3 * (self.a.out.host.len() * size_of::<T>() + self.a.lse.host.len() * size_of::<f32>())
    }

    fn launch(&mut self) -> Result<()> {
        let States { a, b, merged, .. } = self;
        let Shape { rows: max_rows, num_heads, head_dim, in_place } = self.shape;
        let [a, b] = [a, b].map(|state| Partial { out: &state.out.device, lse: &state.lse.device });
        let a = (!in_place).then_some(a);
        let (out, lse) = (&mut merged.out.device, &mut merged.lse.device);
        merge_state::launch(&self.stream, MergeState { max_rows, count: None, num_heads, head_dim, a, b, out, lse })
    }

    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let (head_dim, num_heads) = (self.shape.head_dim, self.shape.num_heads);
        let (out, lse) = (self.merged.out.device.read()?, self.merged.lse.device.read()?);
        let States { a, b, .. } = self;
        let (mut elements, mut sums) = (Vec::new(), Vec::new());
        for i in rows.of(self.shape.rows).into_iter().flat_map(|row| row * num_heads..(row + 1) * num_heads) {
            let head = i * head_dim..(i + 1) * head_dim;
            let [got, a_out, b_out] = [&out, &a.out.host, &b.out.host].map(|matrix| widened(&matrix[head.clone()]));
            let (a_lse, b_lse) = (f64::from(a.lse.host[i]), f64::from(b.lse.host[i]));
            let (want, want_lse) = reference((&a_out, a_lse), (&b_out, b_lse));
            let ([a_weight, b_weight], _) = merge_weights(a_lse, b_lse);
            for (((got, want), a), b) in got.into_iter().zip(want).zip(a_out).zip(b_out) {
                let unit = a_weight * a.abs() + b_weight * b.abs();
                elements.push((got, want, unit.max(T::MIN_POSITIVE)));
            }
            sums.push((f64::from(lse[i]), want_lse, 1.0 + want_lse.abs() / 10.0));
        }
        // One rounding to the type, of half an epsilon, and the errors of f32.
        Ok(vec![
            ErrorBound::within("result, relative to the weighted states", elements, 0.51 * T::EPSILON),
            ErrorBound::within("log-sum-exp", sums, 1e-5),
        ])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        let State { out, lse } = &mut self.merged;
        vec![Output::new("result", &mut out.device), Output::new("log-sum-exps", &mut lse.device)]
    }
}
