//! Residual add and RMSNorm of one row.
//!
//! Both take a `round` function, which rounds to the element type of the tensors. Everything else is f64.

/// Computes `x += delta`, element by element, each sum rounded. Both slices are `[width]`.
pub fn add_rounded(x: &mut [f64], delta: &[f64], round: impl Fn(f64) -> f64) {
    for (x, delta) in x.iter_mut().zip(delta) {
        *x = round(*x + delta);
    }
}

/// Returns `1 / sqrt(mean(x^2) + eps)` of one row.
pub fn rms_scale(x: &[f64], eps: f64) -> f64 {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    1.0 / (mean + eps).sqrt()
}

/// Returns one normalised row, `round(round(x * scale) * weight)`, with the [`rms_scale`] of the row. `x` and `weight` are
/// `[width]`. The reference implementations round in this order.
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
        assert_eq!(x, [256.0, 7.0], "257 is halfway between 256 and 258, and rounds to the even one");
        // 1.0025 rounds to 1. 1.0038 does too, and 1 * 1.5 is 1.5; without the first rounding the result is 1.5078.
        assert_eq!(rms_norm_rounded(&[1.0025], &[1.5], 1.0, round), [1.5]);
        assert_eq!(rms_norm_rounded(&[1.0038], &[1.5], 1.0, round), [1.5]);
        assert_eq!(round(1.0038 * 1.5), 1.5078125);
    }

    #[test]
    fn scales_by_the_root_mean_square() {
        assert_eq!(rms_scale(&[3.0, 4.0, 0.0, 0.0], 0.0), 0.4);
        assert_eq!(rms_scale(&[0.0; 4], 0.25), 2.0);
        let x = [3.0, -4.0, 0.0, 0.0];
        assert_eq!(rms_norm_rounded(&x, &[1.0, 0.5, 2.0, 1.0], 0.5, |x| x), [1.5, -1.0, 0.0, 0.0]);
    }
}
