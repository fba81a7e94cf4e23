//! Top-p and top-k filter: the smallest logit of a row that both filters keep.

/// Returns the smallest logit of `row` that top-p and then top-k keep; minus infinity keeps every token.
///
/// Probabilities are `softmax(row / temperature)`. Top-p keeps the shortest run of most probable tokens whose
/// probabilities sum to more than `top_p`; 1 or more keeps all. Top-k keeps the `top_k` largest of the logits that top-p
/// keeps; 0 keeps all. Tokens whose logit equals the result are kept. The row holds no NaN and no plus infinity.
pub fn min_kept_logit(row: &[f32], temperature: f64, top_p: Option<f64>, top_k: Option<usize>) -> f32 {
    if top_p.is_none() && top_k.is_none() {
        return f32::NEG_INFINITY;
    }
    let mut sorted = row.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let mut smallest = f32::NEG_INFINITY;
    if let Some(top_p) = top_p.filter(|p| *p < 1.0) {
        let weight = |logit: f32| ((f64::from(logit) - f64::from(sorted[0])) / temperature).exp();
        let total: f64 = row.iter().map(|logit| weight(*logit)).sum();
        let mut sum = 0.0;
        let crosses = |logit: &f32| {
            sum += weight(*logit) / total;
            sum > top_p
        };
        smallest = sorted.iter().copied().find(crosses).unwrap_or(smallest);
    }
    if let Some(top_k) = top_k {
        sorted.retain(|logit| *logit >= smallest);
        if 0 < top_k && top_k < sorted.len() {
            smallest = sorted[top_k - 1];
        }
    }
    smallest
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: f32 = f32::NEG_INFINITY;

    #[test]
    fn top_p_keeps_the_token_that_crosses_it() {
        let row = [0.1f32, 0.2, 0.4, 0.3].map(f32::ln);
        let kept = |top_p| min_kept_logit(&row, 1.0, Some(top_p), None);
        assert_eq!([0.0, 0.35].map(kept), [row[2]; 2]);
        assert_eq!([0.45, 0.65].map(kept), [row[3]; 2]);
        assert_eq!([0.75, 0.95].map(kept), [row[1], row[0]]);
        assert_eq!([1.0, 2.0].map(kept), [ALL; 2]);
        // Probabilities at temperature 0.5 are 1, 4, 16 and 9 thirtieths.
        assert_eq!(min_kept_logit(&row, 0.5, Some(0.5), None), row[2]);
        // Exactly half is not more than half.
        assert_eq!(min_kept_logit(&[0.0, 0.0, ALL], 1.0, Some(0.5), None), 0.0);
    }

    #[test]
    fn top_k_counts_among_what_top_p_keeps() {
        let row = [1.0, 3.0, 2.0, 3.0];
        let kept = |top_p, top_k| min_kept_logit(&row, 1.0, top_p, Some(top_k));
        assert_eq!([0, 1, 2, 3, 4, 9].map(|k| kept(None, k)), [ALL, 3.0, 3.0, 2.0, ALL, ALL]);
        assert_eq!([1, 2, 3].map(|k| kept(Some(0.9), k)), [3.0, 3.0, 2.0]);
        assert_eq!(kept(Some(0.5), 3), 3.0);
    }
}
