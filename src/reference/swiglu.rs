//! SwiGLU: `silu(gate) * up`.

/// Returns `x / (1 + e^-x)`. An exponential beyond f32 is infinite, as in the f32 arithmetic of the reference
/// implementations: below -88.7 the result is minus zero, for minus infinity it is NaN.
pub fn silu(x: f64) -> f64 {
    let exponential = (-x).exp();
    x / (1.0 + if exponential > f64::from(f32::MAX) { f64::INFINITY } else { exponential })
}

/// Returns `round(round(silu) * up)`, where `silu` is the [`silu`] of the gate. The reference implementations round in this
/// order.
pub fn swiglu_rounded(silu: f64, up: f64, round: impl Fn(f64) -> f64) -> f64 {
    round(round(silu) * up)
}

/// Computes `out[i] = silu(gate[i]) * up[i]`, rounded once. All three slices have the same length.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = (silu(f64::from(*gate)) * f64::from(*up)) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn silu_of_known_values() {
        assert_eq!(silu(0.0), 0.0);
        assert!((silu(1.0) - 0.731_058_578_630_004_9).abs() < 1e-15);
        assert!((silu(-2.0) + 0.238_405_844_044_234_4).abs() < 1e-15);
        assert_eq!(silu(200.0), 200.0);
        assert_eq!(silu(f64::INFINITY), f64::INFINITY);
        assert!(silu(-200.0) == 0.0 && silu(-200.0).is_sign_negative());
        assert!(silu(f64::NEG_INFINITY).is_nan() && silu(f64::NAN).is_nan());
    }

    #[test]
    fn rounds_before_the_factor_and_after() {
        let round = |x: f64| f64::from(bf16::from_f64(x));
        assert_eq!(swiglu_rounded(1.0038, 1.5, round), 1.5);
        assert_eq!(round(1.0038 * 1.5), 1.5078125);
    }
}
