//! Gather and scatter of rows by an index list.

/// Computes `target[i] = source[index[i]]` for rows of `width` elements. A row of `target` whose index is out of range is left
/// unchanged. Returns whether all indices were in range.
pub fn gather<T: Copy>(source: &[T], width: usize, index: &[i32], target: &mut [T]) -> bool {
    let mut all_in_range = true;
    for (index, to) in index.iter().zip(target.chunks_exact_mut(width)) {
        match usize::try_from(*index).ok().and_then(|row| source.chunks_exact(width).nth(row)) {
            Some(from) => to.copy_from_slice(from),
            None => all_in_range = false,
        }
    }
    all_in_range
}

/// Computes `target[index[i]] = source[i]` for rows of `width` elements. A row of `source` whose index is out of range is not
/// copied. Returns whether all indices were in range.
pub fn scatter<T: Copy>(source: &[T], width: usize, index: &[i32], target: &mut [T]) -> bool {
    let mut all_in_range = true;
    for (index, from) in index.iter().zip(source.chunks_exact(width)) {
        match usize::try_from(*index).ok().and_then(|row| target.chunks_exact_mut(width).nth(row)) {
            Some(to) => to.copy_from_slice(from),
            None => all_in_range = false,
        }
    }
    all_in_range
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathers_and_scatters() {
        let source = [1, 2, 3, 4, 5, 6];
        let mut target = [0; 6];
        assert!(gather(&source, 2, &[2, 0, 2], &mut target));
        assert_eq!(target, [5, 6, 1, 2, 5, 6]);
        assert!(!gather(&source, 2, &[1, 3, -1], &mut target));
        assert_eq!(target, [3, 4, 1, 2, 5, 6]);
        let mut target = [0; 6];
        assert!(scatter(&source, 2, &[2, 0], &mut target));
        assert_eq!(target, [3, 4, 0, 0, 1, 2]);
        assert!(!scatter(&source, 2, &[1, 3, -1], &mut target));
        assert_eq!(target, [3, 4, 1, 2, 1, 2]);
    }
}
