//! V-verify (dLLM-Cache section 3.3): the rows whose values changed most since they were cached.

/// Smallest norm in the denominator: keeps the cosine of a zero vector at 0.
const EPS: f64 = 1e-8;

/// Returns the cosine similarity of two vectors; exactly 1 for equal ones.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    // One root of the product: the product of two roots of `dot(a, a)` may differ from `dot(a, a)`.
    dot(a, b) / (dot(a, a).max(EPS * EPS) * dot(b, b).max(EPS * EPS)).sqrt()
}

/// Returns the `floor(n * ratio)` rows of `fresh` whose cosine with the same row of `cached` is lowest, ascending. Both
/// matrices are `[n, width]`. Ties go to the lower row. NaN counts as the lowest.
pub fn vverify(fresh: &[f32], cached: &[f32], width: usize, ratio: f64) -> Vec<usize> {
    let rows = fresh.chunks_exact(width).zip(cached.chunks_exact(width));
    let similarity: Vec<f64> = rows.map(|(a, b)| cosine(a, b)).collect();
    lowest(&similarity, ratio)
}

/// Returns the indices of the `floor(n * ratio)` lowest of n cosines, by the rules of [`vverify`].
pub fn lowest(similarity: &[f64], ratio: f64) -> Vec<usize> {
    lowest_of(similarity, (similarity.len() as f64 * ratio) as usize)
}

/// Returns the indices of the `count` lowest cosines, by the rules of [`vverify`].
pub fn lowest_of(similarity: &[f64], count: usize) -> Vec<usize> {
    // Adding 0 makes -0 equal to 0.
    let rank = |i: usize| if similarity[i].is_nan() { f64::NEG_INFINITY } else { similarity[i] + 0.0 };
    let mut order: Vec<usize> = (0..similarity.len()).collect();
    order.sort_by(|a, b| rank(*a).total_cmp(&rank(*b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Writes `selected` into `list`, from element `first` on. Elements outside the list are left out. Returns whether there
/// were none.
pub fn write_selected(selected: &[i32], first: i32, list: &mut [i32]) -> bool {
    let mut all_written = true;
    for (index, row) in (i64::from(first)..).zip(selected) {
        match usize::try_from(index).ok().and_then(|index| list.get_mut(index)) {
            Some(element) => *element = *row,
            None => all_written = false,
        }
    }
    all_written
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
    fn nan_counts_as_the_lowest() {
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
    fn elements_outside_the_list_are_left_out() {
        let mut list = [0; 4];
        assert!(write_selected(&[7, 8], 1, &mut list));
        assert_eq!(list, [0, 7, 8, 0]);
        assert!(
            !write_selected(&[1, 2], 3, &mut list)
                && !write_selected(&[3, 4], -1, &mut list)
                && !write_selected(&[5], i32::MAX, &mut list)
        );
        assert_eq!(list, [4, 7, 8, 1]);
    }
}
