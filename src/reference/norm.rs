//! Residual add and RMSNorm.

/// Partial sums per row: a fixed number, so that a row's bits depend on nothing but the row.
const LANES: usize = 16;

/// `x += delta`, element by element.
pub fn add(x: &mut [f32], delta: &[f32]) {
    for (x, d) in x.iter_mut().zip(delta) {
        *x += d;
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`: normalised in f32 first, multiplied by the weight after, in the order of
/// the reference implementations. All three are one row of equal length.
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

/// `x += delta`, rounded.
pub fn add_rounded(x: &mut [f64], delta: &[f64], round: impl Fn(f64) -> f64) {
    for (x, d) in x.iter_mut().zip(delta) {
        *x = round(*x + d);
    }
}

/// `1 / sqrt(mean(x^2) + eps)` of one row.
pub fn rms_scale(x: &[f64], eps: f64) -> f64 {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    1.0 / (mean + eps).sqrt()
}

/// One row normalised: `round(round(x * scale) * weight)`, in the order of the reference implementations, with the row's
/// [`rms_scale`].
pub fn rms_norm_rounded(x: &[f64], weight: &[f64], scale: f64, round: impl Fn(f64) -> f64) -> Vec<f64> {
    x.iter().zip(weight).map(|(x, weight)| round(round(x * scale) * weight)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn rounds_before_the_weight_and_after() {
        let round = |x: f64| f64::from(bf16::from_f64(x));
        let mut x = [256.0, 3.0];
        add_rounded(&mut x, &[1.0, 4.0], round);
        assert_eq!(x, [256.0, 7.0], "257 lies between 256 and 258, and goes to the even one");
        assert_eq!(rms_scale(&[3.0, 4.0, 0.0, 0.0], 0.0), 0.4);
        // 1.001 becomes 1; times 1.5 that is 1.5, where 1.0049 * 1.5 would have become 1.5078.
        assert_eq!(rms_norm_rounded(&[1.0025], &[1.5], 1.0, round), [1.5]);
        assert_eq!(round(1.0038 * 1.5), 1.5078125);
        assert_eq!(rms_norm_rounded(&[1.0038], &[1.5], 1.0, round), [1.5]);
    }

    #[test]
    fn equals_f64() {
        for len in [1, 15, 16, 33, 256] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 29 % 17) as f32 - 8.0) / 3.0).collect();
            let w: Vec<f32> = (0..len).map(|i| 1.0 + (i % 5) as f32 / 7.0).collect();
            let mut out = vec![0.0; len];
            rms_norm(&x, &w, 1e-5, &mut out);
            let mean = x.iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / len as f64;
            for i in 0..len {
                let want = x[i] as f64 / (mean + 1e-5).sqrt() * w[i] as f64;
                assert!((out[i] as f64 - want).abs() < 1e-6, "{len} {i}");
            }
        }
    }
}
