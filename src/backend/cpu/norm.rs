//! Residual add and RMSNorm of one row, in f32.

/// Partial sums of a row. The number is fixed, so that the bits of a row depend on nothing but the row.
const LANES: usize = 16;

/// Computes `x += delta`, element by element.
pub fn add(x: &mut [f32], delta: &[f32]) {
    for (x, delta) in x.iter_mut().zip(delta) {
        *x += delta;
    }
}

/// Computes `out = x / sqrt(mean(x^2) + eps) * weight`, in that order, as the reference implementations do. All three slices are
/// one row of equal length.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut sums = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (s, v) in sums.iter_mut().zip(chunk) {
            *s += v * v;
        }
    }
    let sum = sums.iter().sum::<f32>() + tail.iter().map(|v| v * v).sum::<f32>();
    let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_f64() {
        for len in [1, 15, 16, 33, 256] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 29 % 17) as f32 - 8.0) / 3.0).collect();
            let weight: Vec<f32> = (0..len).map(|i| 1.0 + (i % 5) as f32 / 7.0).collect();
            let mut out = vec![0.0; len];
            rms_norm(&x, &weight, 1e-5, &mut out);
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / len as f64;
            for i in 0..len {
                let expected = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(out[i]) - expected).abs() < 1e-6, "{len} {i}");
            }
        }
    }
}
