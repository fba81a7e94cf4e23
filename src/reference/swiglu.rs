//! SwiGLU's gate.

/// `out[i] = silu(gate[i]) * up[i]`, `silu(x) = x / (1 + e^-x)`; the shortest slice counts.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + (-g).exp()) * u;
    }
}

/// `x / (1 + e^-x)`. An exponential beyond f32 is infinite, as in f32 arithmetic: below -88.7 the
/// result is minus zero, and that of minus infinity is NaN.
pub fn silu(x: f64) -> f64 {
    let exponential = match (-x).exp() {
        e if e > f64::from(f32::MAX) => f64::INFINITY,
        e => e,
    };
    x / (1.0 + exponential)
}

/// `out = round(round(silu) * up)`, in the order of the reference implementations; `silu` is that of the gate.
pub fn swiglu_rounded(silu: f64, up: f64, round: impl Fn(f64) -> f64) -> f64 {
    round(round(silu) * up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn silu_is_known_at_a_few_places() {
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
