use super::*;
use proptest::prelude::*;

fn batch(sequences: &[Sequence]) -> Batch<'_> {
    Batch { sequences, max_sequence_rows: sequences.iter().map(|s| s.rows).max().unwrap_or(0) }
}

fn sequence(rows: usize, keys: [usize; 3]) -> Sequence {
    Sequence { rows, keys }
}

/// The tiles with any key for which `wanted` holds, by trying all keys.
fn by_key(sequence: &Sequence, wanted: impl Fn(usize) -> bool) -> Vec<i32> {
    let mut tiles: Vec<i32> =
        (0..sequence.num_keys()).filter(|key| wanted(*key)).map(|key| (key / KEY_TILE) as i32).collect();
    tiles.dedup();
    tiles
}

/// Sequences with lengths around the edges of tiles, or no sequences, and a `max_sequence_rows` of theirs or more.
fn sequences() -> impl Strategy<Value = (Vec<Sequence>, usize)> {
    let length = prop_oneof![Just(0usize), 1usize..4, 60usize..70, 120usize..200, 0usize..500];
    let one =
        (prop_oneof![Just(0usize), 1usize..40, 120usize..140, 0usize..600], [length.clone(), length.clone(), length])
            .prop_map(|(rows, keys)| Sequence { rows, keys });
    (prop::collection::vec(one, 0..4), 0usize..300).prop_map(|(sequences, more)| {
        let longest = sequences.iter().map(|s| s.rows).max().unwrap_or(0);
        (sequences, longest + more)
    })
}

/// Calls `check` for each list with its sequence and query rows; lists without rows must be empty.
fn each_list(batch: &Batch, lists: &TileLists, check: impl Fn(usize, usize, &Sequence, Range<usize>, &[i32])) {
    lists.validate(batch).unwrap();
    assert_eq!(lists.query_tiles, batch.max_sequence_rows.div_ceil(128));
    for (s, sequence) in batch.sequences.iter().enumerate() {
        for query_tile in 0..lists.query_tiles {
            let rows = query_tile * 128..sequence.rows.min(query_tile * 128 + 128);
            let list = lists.list(s, query_tile, 0);
            if rows.is_empty() {
                assert_eq!(list, [0i32; 0]);
            } else {
                check(s, query_tile, sequence, rows, list);
            }
        }
    }
}

proptest! {
    #[test]
    fn dense_and_windows_are_what_the_masks_say((sequences, max_sequence_rows) in sequences(), window in prop_oneof![Just(0usize), 0usize..300, Just(usize::MAX)]) {
        let batch = Batch { sequences: &sequences, max_sequence_rows };
        each_list(&batch, &TileLists::dense(&batch).unwrap(), |_, _, sequence, _, list| {
            assert_eq!(list, by_key(sequence, |_| true));
        });
        each_list(&batch, &TileLists::sliding_window(&batch, window).unwrap(), |_, _, sequence, rows, list| {
            let near = |key: usize| rows.clone().any(|row| (sequence.keys[0] + row).abs_diff(key) <= window);
            assert_eq!(list, by_key(sequence, near));
        });
    }

    #[test]
    fn pruned_suffixes_are_what_the_mask_says((sequences, max_sequence_rows) in sequences(), near in prop_oneof![Just(0usize), 0usize..300, Just(usize::MAX)], every in prop_oneof![0usize..6, Just(usize::MAX)]) {
        let batch = Batch { sequences: &sequences, max_sequence_rows };
        each_list(&batch, &TileLists::pruned_suffix(&batch, near, every).unwrap(), |_, _, sequence, _, list| {
            let suffix = sequence.keys[0] + sequence.keys[1];
            let mut want = by_key(sequence, |key| key < suffix || key - suffix < near);
            let mut far = 0;
            for tile in by_key(sequence, |_| true) {
                if want.contains(&tile) {
                    continue;
                }
                far += 1;
                if far == every {
                    want.push(tile);
                    far = 0;
                }
            }
            assert_eq!(list, want);
        });
    }

    #[test]
    fn the_best_are_taken((sequences, max_sequence_rows) in sequences(), k in 0usize..12, heads in 1usize..3, seed: u64) {
        let batch = Batch { sequences: &sequences, max_sequence_rows };
        let key_tiles = sequences.iter().map(Sequence::key_tiles).max().unwrap_or(0) + 1;
        let count = sequences.len() * batch.query_tiles() * heads * key_tiles;
        // Few different scores, so that many are equal.
        let kinds = [0.0, -0.0, 1.0, 2.5, -3.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let mix = |i: usize| (seed ^ i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 61;
        let scores: Vec<f32> = (0..count).map(|i| kinds[mix(i) as usize]).collect();
        let lists = TileLists::top_k(&batch, Some(heads), k, &scores, key_tiles).unwrap();
        lists.validate(&batch).unwrap();
        for (s, sequence) in sequences.iter().enumerate() {
            for query_tile in 0..lists.query_tiles {
                for head in 0..heads {
                    let scores = &scores[((s * lists.query_tiles + query_tile) * heads + head) * key_tiles..];
                    let score = |tile: usize| if scores[tile].is_nan() { f32::NEG_INFINITY } else { scores[tile] };
                    let all = 0..if query_tile * 128 < sequence.rows { sequence.key_tiles() } else { 0 };
                    // A tile is taken if fewer than k come before it.
                    let before = |tile: usize, other: usize| score(other) > score(tile) || score(other) == score(tile) && other < tile;
                    let want: Vec<i32> = all.clone()
                        .filter(|tile| all.clone().filter(|other| before(*tile, *other)).count() < k)
                        .map(|tile| tile as i32)
                        .collect();
                    prop_assert_eq!(lists.list(s, query_tile, head), want);
                }
            }
        }
    }
}

#[test]
fn known_lists() {
    let sequences = [sequence(130, [100, 130, 50]), sequence(1, [0, 1, 0]), sequence(0, [64, 0, 0])];
    let batch = batch(&sequences);
    let dense = TileLists::dense(&batch).unwrap();
    assert_eq!(dense.offsets, [0, 5, 10, 11, 11, 11, 11]);
    assert_eq!(dense.indices, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]);
    // Rows 0 to 127 have positions 100 to 227, the last two 228 and 229.
    let window = TileLists::sliding_window(&batch, 28).unwrap();
    assert_eq!((window.list(0, 0, 0), window.list(0, 1, 0)), (&[1, 2, 3][..], &[3, 4][..]));
    let own = TileLists::sliding_window(&batch, 0).unwrap();
    assert_eq!((own.list(0, 1, 0), own.list(1, 0, 0)), (&[3][..], &[0][..]));
}

/// Queries after all keys see nothing through a small window.
#[test]
fn queries_beyond_the_keys() {
    let sequences = [sequence(200, [10, 20, 0])];
    let lists = TileLists::sliding_window(&batch(&sequences), 5).unwrap();
    assert_eq!((lists.list(0, 0, 0), lists.list(0, 1, 0)), (&[0][..], &[][..]));
}

#[test]
fn lists_of_the_caller_keep_their_order() {
    let sequences = [sequence(5, [100, 5, 0]), sequence(5, [10, 5, 0])];
    let lists = TileLists::from_lists(&batch(&sequences), Some(2), &[vec![1, 0], vec![], vec![0], vec![0]]).unwrap();
    assert_eq!((lists.list(0, 0, 0), lists.list(0, 0, 1), lists.list(1, 0, 1)), (&[1, 0][..], &[][..], &[0][..]));
}

#[test]
fn wrong_lists_are_named() {
    let sequences = [sequence(129, [100, 129, 0]), sequence(5, [10, 5, 0])];
    let batch = batch(&sequences);
    let refused = |lists: &[&[i32]], per_head, says: &str| {
        let error = TileLists::from_lists(&batch, per_head, lists).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(
        &[&[0, 3], &[1, 2, 1], &[], &[]],
        None,
        "at most once, found tile 1 twice in sequence 0, query tile 1, head 0",
    );
    refused(
        &[&[0, 3], &[1], &[1], &[]],
        None,
        "each of 1 key tiles at most once, found tile 1 in sequence 1, query tile 0",
    );
    refused(&[&[0], &[-1], &[], &[]], None, "tile_indices: expected each of 4 key tiles at most once, found tile -1");
    refused(&[&[0], &[4], &[], &[]], None, "found tile 4 in sequence 0, query tile 1");
    refused(&[&[0], &[0], &[0]], None, "tile_offsets: expected 4 lists and the end, found 4");
    refused(&[&[0][..]; 4], Some(2), "tile_offsets: expected 8 lists and the end, found 5");
    refused(&[&[0]], Some(0), "per_head: expected at least 1 head");
    let eight: [&[i32]; 8] = [&[0], &[0], &[0], &[2, 2], &[], &[], &[], &[]];
    refused(&eight, Some(2), "found tile 2 twice in sequence 0, query tile 1, head 1");

    let good = TileLists::dense(&batch).unwrap();
    let wrong = |change: fn(&mut TileLists), says: &str| {
        let mut lists = good.clone();
        change(&mut lists);
        let error = lists.validate(&batch).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    wrong(|l| l.query_tiles = 1, "query_tiles: expected 2, found 1");
    wrong(|l| l.offsets.clear(), "tile_offsets: expected 4 lists and the end, found 0");
    wrong(
        |l| l.offsets[1] = 9,
        "tile_offsets: expected ascending from 0 to the number of indices, 9, found 9 before 8",
    );
    wrong(|l| l.offsets[0] = -1, "found -1 to 9");
    wrong(|l| l.indices.push(0), "to the number of indices, 10, found 0 to 9");
}

#[test]
fn wrong_sizes_are_named() {
    let short = [sequence(5, [0, 5, 0])];
    let says = |result: Result<TileLists>, says: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let few = Batch { sequences: &short, max_sequence_rows: 4 };
    says(TileLists::dense(&few), "max_sequence_rows: expected at least the rows of sequence 0, 5, found 4");
    let many = [sequence(5, [1 << 30, 5, 0])];
    says(TileLists::dense(&batch(&many)), "keys: expected at most 1073741824 keys, found 1073741829 in sequence 0");
    let huge = Batch { sequences: &short, max_sequence_rows: usize::MAX };
    says(TileLists::dense(&huge), "max_sequence_rows: expected at most 1073741824, found");
    let many = [sequence(5, [usize::MAX, 5, 0])];
    says(TileLists::sliding_window(&batch(&many), 3), "keys: expected at most");
    says(TileLists::top_k(&batch(&short), None, 1, &[], 0), "key_tiles: expected at least 1, found 0");
    says(TileLists::top_k(&batch(&short), None, 1, &[0.0; 3], 2), "scores: expected 1 x 2 scores, found 3");
    says(TileLists::top_k(&batch(&short), Some(0), 1, &[], 1), "per_head: expected at least 1 head");
    // Without keys no score is missing; the lists alone would fill all memory.
    let keyless = [sequence(5, [0, 0, 0])];
    says(
        TileLists::top_k(&batch(&keyless), Some(usize::MAX), 1, &[], 0),
        "tile_offsets: expected at most 1073741824 lists",
    );
    let mut no_heads = TileLists::dense(&batch(&[])).unwrap();
    no_heads.per_head = Some(0);
    says(no_heads.validate(&batch(&short)).map(|()| no_heads.clone()), "per_head: expected at least 1 head");
}

#[test]
fn an_empty_batch_has_no_lists() {
    let lists = TileLists::dense(&batch(&[])).unwrap();
    assert_eq!((lists.offsets.as_slice(), lists.query_tiles), (&[0][..], 0));
    lists.validate(&batch(&[])).unwrap();
}
