//! Matrix products of cuBLASLt, which the CUDA backend uses for a model's weights: into bf16, and into f32.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, widened};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::gpu::blas::{Blas, Shape};
use dllm_kernels::gpu::{Buffer, Stream};
use half::bf16;

/// Maximum number of compared columns of the result: the reference is slow.
const COLUMNS: usize = 64;

pub fn entries(small: bool) -> Vec<Entry> {
    let [rows, out, inner] = pick(small, [32, 4096, 4096], [8, 64, 64]);
    vec![
        Entry::new::<bf16, _>("product", format!("{rows}x{inner} by {inner}x{out}"), move |stream| {
            Product::<bf16>::new(stream, Shape { rows, out, inner, f32_out: false, biased: false })
        }),
        Entry::new::<bf16, _>("product", "5x40 by 40x24 into f32".into(), |stream| {
            Product::<f32>::new(stream, Shape { rows: 5, out: 24, inner: 40, f32_out: true, biased: false })
        }),
    ]
}

struct Product<T> {
    blas: Blas,
    shape: Shape,
    x: HostDevice<bf16>,
    w: HostDevice<bf16>,
    y: Buffer<T>,
}

impl<T: Float> Product<T> {
    fn new(stream: &Stream, shape: Shape) -> Result<Product<T>> {
        let mut rng = Rng::new(8);
        Ok(Product {
            blas: Blas::new(stream)?,
            shape,
            x: HostDevice::new(stream, rng.values(shape.rows * shape.inner, 1.0))?,
            w: HostDevice::new(stream, rng.values(shape.out * shape.inner, 1.0))?,
            y: stream.zeros(shape.rows * shape.out)?,
        })
    }
}

impl<T: Float> Case for Product<T> {
    fn bytes(&self) -> usize {
        (self.x.host.len() + self.w.host.len()) * size_of::<bf16>() + self.y.len() * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let (x, w, y) = (self.x.device.address(), self.w.device.address(), self.y.address());
        // SAFETY: the three buffers have the sizes of the shape and live as long as the handle.
        unsafe { self.blas.launch(self.shape, x, w, 0, y) }
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let Shape { rows, out, inner, .. } = self.shape;
        let (x, w, y) = (widened(&self.x.host), widened(&self.w.host), widened(&self.y.read()?));
        let mut elements = Vec::new();
        for (row, x) in x.chunks_exact(inner).enumerate().take(rows) {
            for column in (0..out).step_by(out.div_ceil(COLUMNS)) {
                let products = || x.iter().zip(&w[column * inner..(column + 1) * inner]).map(|(x, w)| x * w);
                let (want, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                // Errors of f32 sums over all terms, and one rounding to the type.
                let unit = 1e-5 * size + 0.51 * T::EPSILON * want.abs();
                elements.push((y[row * out + column], want, unit));
            }
        }
        Ok(vec![ErrorBound::within("result, relative to the rounding errors", elements.into_iter(), 1.0)])
    }
}
