//! Matrix products of cuBLASLt, which the CUDA backend uses for a model's weights: into bf16, and into f32.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, pick, widened};
use crate::error::Result;
use crate::gpu::blas::{self, Blas};
use crate::gpu::{Buffer, Stream};
use crate::ops::Element;
use half::bf16;

/// Maximum number of compared columns of the result: the reference is slow.
const COLUMNS: usize = 64;

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let [rows, out, inner] = pick(small, [32, 4096, 4096], [8, 64, 64]);
    vec![
        Entry::new::<bf16, _>("product", format!("{rows}x{inner} by {inner}x{out}"), move |stream| {
            Product::<bf16>::new(stream, Shape { rows, out, inner })
        }),
        Entry::new::<bf16, _>("product", "5x40 by 40x24 into f32".into(), |stream| {
            Product::<f32>::new(stream, Shape { rows: 5, out: 24, inner: 40 })
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the left factor.
    pub rows: usize,
    /// Columns of the product.
    pub out: usize,
    /// Elements that are summed up.
    pub inner: usize,
}

/// Two factors and their product, of bf16 or f32.
pub struct Product<T> {
    blas: Blas,
    shape: Shape,
    x: HostDevice<bf16>,
    w: HostDevice<bf16>,
    y: Buffer<T>,
}

impl<T: Float> Product<T> {
    /// Uploads random factors.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Product<T>> {
        let mut random = Random(8);
        Ok(Product {
            blas: Blas::new(stream)?,
            shape,
            x: HostDevice::new(stream, random.values(shape.rows * shape.inner, 1.0))?,
            w: HostDevice::new(stream, random.values(shape.out * shape.inner, 1.0))?,
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
        let Shape { rows, out, inner } = self.shape;
        let shape = blas::Shape { rows, out, inner, f32_out: T::DTYPE == f32::DTYPE, biased: false };
        // SAFETY: the three buffers have the sizes of the shape and live as long as the handle.
        unsafe { self.blas.launch(shape, x, w, 0, y) }
    }

    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let Shape { rows: all, out, inner } = self.shape;
        let (x, w, y) = (widened(&self.x.host), widened(&self.w.host), widened(&self.y.read()?));
        let mut elements = Vec::new();
        for row in rows.of(all) {
            let x = &x[row * inner..(row + 1) * inner];
            for column in (0..out).step_by(out.div_ceil(COLUMNS)) {
                let products = || x.iter().zip(&w[column * inner..(column + 1) * inner]).map(|(x, w)| x * w);
                let (want, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                // Errors of f32 sums over all terms, and one rounding to the type.
                let unit = 1e-5 * size + 0.51 * T::EPSILON * want.abs();
                elements.push((y[row * out + column], want, unit));
            }
        }
        Ok(vec![ErrorBound::within("result, relative to the rounding errors", elements, 1.0)])
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        vec![Output::new("product", &mut self.y)]
    }
}
