//! Gather and scatter of rows by an index list.

/// `target[i] = source[index[i]]` for every row of `width` elements. A row whose index is out of range is left as it was;
/// whether there was none.
pub fn gather<T: Copy>(source: &[T], width: usize, index: &[i32], target: &mut [T]) -> bool {
    let mut all_known = true;
    for (index, to) in index.iter().zip(target.chunks_exact_mut(width)) {
        match usize::try_from(*index).ok().and_then(|row| source.chunks_exact(width).nth(row)) {
            Some(from) => to.copy_from_slice(from),
            None => all_known = false,
        }
    }
    all_known
}

/// `target[index[i]] = source[i]` for every row of `width` elements. A row whose index is out of range goes nowhere;
/// whether there was none.
pub fn scatter<T: Copy>(source: &[T], width: usize, index: &[i32], target: &mut [T]) -> bool {
    let mut all_known = true;
    for (index, from) in index.iter().zip(source.chunks_exact(width)) {
        match usize::try_from(*index).ok().and_then(|row| target.chunks_exact_mut(width).nth(row)) {
            Some(to) => to.copy_from_slice(from),
            None => all_known = false,
        }
    }
    all_known
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
