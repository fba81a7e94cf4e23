//! V-verify (dLLM-Cache section 3.3): which response tokens changed most since the previous step.

/// Guards the division for zero vectors.
const EPS: f64 = 1e-8;

/// Cosine similarity of two vectors; 1 for equal ones.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    // One root of the product: the product of two roots is not always what was squared.
    dot(a, b) / (dot(a, a).max(EPS * EPS) * dot(b, b).max(EPS * EPS)).sqrt()
}

/// The `floor(n * ratio)` rows of `fresh` (`[n, width]`) whose cosine with the same row of `cached` is lowest, in
/// position order. Ties go to the lower index; a cosine that is not a number counts as the lowest.
pub fn vverify(fresh: &[f32], cached: &[f32], width: usize, ratio: f64) -> Vec<usize> {
    let rows = fresh.chunks_exact(width).zip(cached.chunks_exact(width));
    let similarity: Vec<f64> = rows.map(|(a, b)| cosine(a, b)).collect();
    lowest(&similarity, ratio)
}

/// The `floor(n * ratio)` lowest of n cosines, as in [`vverify`].
pub fn lowest(similarity: &[f64], ratio: f64) -> Vec<usize> {
    lowest_of(similarity, (similarity.len() as f64 * ratio) as usize)
}

/// The `count` lowest of the cosines, as in [`vverify`].
pub fn lowest_of(similarity: &[f64], count: usize) -> Vec<usize> {
    // 0 is added so that -0 ties with 0.
    let rank = |i: usize| if similarity[i].is_nan() { f64::NEG_INFINITY } else { similarity[i] + 0.0 };
    let mut order: Vec<usize> = (0..similarity.len()).collect();
    order.sort_by(|a, b| rank(*a).total_cmp(&rank(*b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Writes numbers of the selected rows into a list, one after the other from element `first` on; whether all had a place.
pub fn place(selected: &[i32], first: i32, list: &mut [i32]) -> bool {
    let mut all_placed = true;
    for (place, number) in (i64::from(first)..).zip(selected) {
        match usize::try_from(place).ok().and_then(|place| list.get_mut(place)) {
            Some(to) => *to = *number,
            None => all_placed = false,
        }
    }
    all_placed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_have_cosine_one() {
        for i in 1..200 {
            let row = [0.1 * i as f32, -0.37, 1.0 / i as f32];
            assert_eq!(cosine(&row, &row), 1.0, "{row:?}");
        }
        assert_eq!(cosine(&[0.0; 3], &[1.0, 2.0, 3.0]), 0.0);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(lowest(&[1.0, 0.5, 1.0, 0.5, 0.5], 0.4), [1, 3]);
        assert_eq!(lowest(&[0.0, -0.0, 0.0], 0.34), [0]);
        assert_eq!(lowest(&[1.0; 7], 0.5), [0, 1, 2]);
    }

    #[test]
    fn what_is_not_a_number_counts_as_the_lowest() {
        assert_eq!(lowest(&[-1.0, f64::NAN, 0.0, -f64::NAN], 0.5), [1, 3]);
        let (fresh, cached) = ([1.0, 0.0, f32::NAN, 0.0, f32::INFINITY, 0.0], [-1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(vverify(&fresh, &cached, 2, 0.67), [1, 2]);
    }

    #[test]
    fn the_count_is_rounded_down() {
        assert_eq!(lowest(&[0.0; 9], 0.33), [0, 1]);
        assert!(lowest(&[0.0; 9], 0.1).is_empty() && lowest(&[], 1.0).is_empty());
        assert_eq!(lowest(&[0.0; 3], 1.0), [0, 1, 2]);
    }

    #[test]
    fn what_has_no_place_is_left_out() {
        let mut list = [0; 4];
        assert!(place(&[7, 8], 1, &mut list));
        assert_eq!(list, [0, 7, 8, 0]);
        assert!(!place(&[1, 2], 3, &mut list) && !place(&[3, 4], -1, &mut list) && !place(&[5], i32::MAX, &mut list));
        assert_eq!(list, [4, 7, 8, 1]);
    }
}
