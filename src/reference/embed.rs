//! Embedding: copies the table row of each selected token.

/// Computes `out[i] = table[tokens[index[i]]]` for rows of `width` elements: `table` is `[vocab_size, width]`, `out`
/// `[index.len(), width]`. A row whose index or token is out of range is left unchanged. Returns whether all were in range.
pub fn embed<T: Copy>(table: &[T], width: usize, tokens: &[i32], index: &[i32], out: &mut [T]) -> bool {
    let mut all_in_range = true;
    for (index, out) in index.iter().zip(out.chunks_exact_mut(width)) {
        let token = usize::try_from(*index).ok().and_then(|index| tokens.get(index));
        let token = token.and_then(|token| usize::try_from(*token).ok());
        match token.and_then(|token| table.chunks_exact(width).nth(token)) {
            Some(row) => out.copy_from_slice(row),
            None => all_in_range = false,
        }
    }
    all_in_range
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
