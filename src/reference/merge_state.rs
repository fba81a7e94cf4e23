//! Merge of two attention states: the results of one query over two disjoint sets of keys.

/// Returns the weights of the two states, `e^(a_lse - lse)` and `e^(b_lse - lse)`, and `lse = ln(e^a_lse + e^b_lse)`.
///
/// A state without keys has a log-sum-exp of minus infinity and weight 0. Plus infinity outweighs every finite value. NaN, or
/// plus infinity on both sides, gives NaN.
pub fn merge_weights(a_lse: f64, b_lse: f64) -> ([f64; 2], f64) {
    match (a_lse == f64::NEG_INFINITY, b_lse == f64::NEG_INFINITY) {
        (true, true) => ([0.0, 0.0], f64::NEG_INFINITY),
        (true, false) => ([0.0, 1.0], b_lse),
        (false, true) => ([1.0, 0.0], a_lse),
        (false, false) => {
            let weights = [b_lse - a_lse, a_lse - b_lse].map(|other| 1.0 / (1.0 + other.exp()));
            (weights, a_lse.max(b_lse) + (-(a_lse - b_lse).abs()).exp().ln_1p())
        }
    }
}

/// Returns the merged values `weight_a * a + weight_b * b`, `[head_dim]`, and the merged log-sum-exp. The values of a state
/// without keys are ignored.
pub fn merge((a, a_lse): (&[f64], f64), (b, b_lse): (&[f64], f64)) -> (Vec<f64>, f64) {
    let ([a_weight, b_weight], lse) = merge_weights(a_lse, b_lse);
    let weighted = |weight: f64, lse: f64, x: f64| if lse == f64::NEG_INFINITY { 0.0 } else { weight * x };
    let out = a.iter().zip(b).map(|(a, b)| weighted(a_weight, a_lse, *a) + weighted(b_weight, b_lse, *b)).collect();
    (out, lse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::attention::attend;

    #[test]
    fn parts_merge_to_the_whole() {
        let keys: Vec<[f64; 2]> = (0..7).map(|i| [(i as f64).sin(), (i as f64 * 1.7).cos()]).collect();
        let values: Vec<[f64; 2]> = (0..7).map(|i| [i as f64, -(i as f64).sqrt()]).collect();
        let all: Vec<(&[f64], &[f64])> = keys.iter().zip(&values).map(|(k, v)| (&k[..], &v[..])).collect();
        let (want, want_lse) = attend(&[1.3, -0.4], &all, 0.7);
        for first in 0..=7 {
            let [a, b] = [&all[..first], &all[first..]].map(|part| attend(&[1.3, -0.4], part, 0.7));
            let (out, lse) = merge((&a.0, a.1), (&b.0, b.1));
            assert!((lse - want_lse).abs() < 1e-14, "{lse} {want_lse}");
            assert!(out.iter().zip(&want).all(|(x, y)| (x - y).abs() < 1e-14), "{out:?} {want:?}");
        }
    }

    #[test]
    fn states_without_keys_are_ignored() {
        let (none, nan, x) = (f64::NEG_INFINITY, [f64::NAN; 2], [1.5, -2.0]);
        assert_eq!(merge((&nan, none), (&x, 3.0)), (x.to_vec(), 3.0));
        assert_eq!(merge((&x, 3.0), (&nan, none)), (x.to_vec(), 3.0));
        assert_eq!(merge((&nan, none), (&nan, none)), (vec![0.0; 2], none));
        assert!(merge((&x, f64::NAN), (&x, 3.0)).0[0].is_nan());
        assert_eq!(merge_weights(1000.0, -1000.0), ([1.0, 0.0], 1000.0));
        assert_eq!(merge_weights(3.0, f64::INFINITY), ([0.0, 1.0], f64::INFINITY));
        assert!(merge_weights(f64::INFINITY, f64::INFINITY).1.is_nan());
    }
}
