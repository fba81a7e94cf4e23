//! Embedding rows of tokens.

/// `out[i] = table[tokens[index[i]]]` for every row of `width` elements. A row whose index or token is out of range is left
/// as it was; whether there was none.
pub fn embed<T: Copy>(table: &[T], width: usize, tokens: &[i32], index: &[i32], out: &mut [T]) -> bool {
    let at = |index: i32| usize::try_from(index).ok();
    let mut all_known = true;
    for (index, to) in index.iter().zip(out.chunks_exact_mut(width)) {
        let token = at(*index).and_then(|index| tokens.get(index));
        match token.and_then(|token| table.chunks_exact(width).nth(at(*token)?)) {
            Some(from) => to.copy_from_slice(from),
            None => all_known = false,
        }
    }
    all_known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeds() {
        let (table, tokens) = ([1, 2, 3, 4, 5, 6], [2, 0, 3, -1]);
        let mut out = [0; 6];
        assert!(embed(&table, 2, &tokens, &[1, 0, 1], &mut out));
        assert_eq!(out, [1, 2, 5, 6, 1, 2]);
        let mut out = [0; 10];
        assert!(!embed(&table, 2, &tokens, &[0, 2, 3, 4, -1], &mut out));
        assert_eq!(out, [5, 6, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
