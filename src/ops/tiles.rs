//! Which key tiles each query tile visits: builders of the lists that [`attention`](super::attention) takes. Host code; only
//! [`TileLists::upload`] knows a device.
//!
//! A *query tile* is [`QUERY_TILE`] query rows of one sequence, a *key tile* [`KEY_TILE`] of its keys: those of the prefix
//! cache, then the live block, then the suffix cache, counted from 0 over all three. A sequence's first query row is taken
//! to stand where its live keys begin, so key and query positions are of one kind.
//!
//! Lists are exact in tiles: a tile of which any key is wanted is visited whole. An empty list is allowed and gives zeros,
//! and a log-sum-exp of minus infinity. Lists depend on lengths: when those change on the device, so must the lists, or the
//! new keys of a list's tiles are visited and those past them are not.
//!
//! ```
//! use dllm_kernels::ops::tiles::{Batch, Sequence, TileLists};
//!
//! // A block of 32 rows behind a prefix of 256 keys, with 400 keys after it: those within 64 of it, then each third tile.
//! let sequences = [Sequence { rows: 32, keys: [256, 32, 400] }];
//! let batch = Batch { sequences: &sequences, max_sequence_rows: 32 };
//! let lists = TileLists::pruned_suffix(&batch, 64, 3)?;
//! assert_eq!(lists.list(0, 0, 0), [0, 1, 2, 3, 4, 5, 8]);
//! # Ok::<(), dllm_kernels::Error>(())
//! ```

use super::attention::{KEY_TILE, QUERY_TILE, Tiles};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Stream};
use std::ops::Range;

/// Keys of a sequence above which the kernels do not read; its rows, at most.
const MOST_KEYS: usize = 1 << 30;
/// Tiles in all lists of a launch, at most.
const MOST_TILES: usize = 1 << 30;
/// Lists of a launch, at most.
const MOST_LISTS: usize = 1 << 30;

/// Rows and keys of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Query rows; the first stands at position `keys[0]`.
    pub rows: usize,
    /// Keys of the prefix cache, the live block and the suffix cache. For a pass over the block and all behind it the builders
    /// may be told where the block ends, whichever segment holds the rest: only the order of the keys counts.
    pub keys: [usize; 3],
}

impl Sequence {
    /// Keys in all three segments.
    pub fn num_keys(&self) -> usize {
        self.keys.iter().fold(0, |sum, keys| sum.saturating_add(*keys))
    }

    /// Key tiles.
    pub fn key_tiles(&self) -> usize {
        self.num_keys().div_ceil(KEY_TILE)
    }

    /// Tiles that have any of these keys.
    fn tiles_of(&self, keys: Range<usize>) -> Range<usize> {
        let end = keys.end.min(self.num_keys());
        if keys.start < end { keys.start / KEY_TILE..end.div_ceil(KEY_TILE) } else { 0..0 }
    }
}

/// The sequences of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// All of them, in the order of `cu_rows`.
    pub sequences: &'a [Sequence],
    /// As the launch is told it: at least the rows of every sequence. It says how many lists a sequence has.
    pub max_sequence_rows: usize,
}

impl Batch<'_> {
    /// Lists that each sequence has, of each head.
    fn query_tiles(&self) -> usize {
        self.max_sequence_rows.div_ceil(QUERY_TILE)
    }

    /// Checks the batch; how many lists it has.
    fn num_lists(&self, per_head: Option<usize>) -> Result<usize> {
        self.check()?;
        if per_head == Some(0) {
            return Err(Error::argument("per_head", "at least 1 head", 0));
        }
        let lists = self.sequences.len().saturating_mul(self.query_tiles()).saturating_mul(per_head.unwrap_or(1));
        match lists <= MOST_LISTS {
            true => Ok(lists),
            false => Err(Error::argument("tile_offsets", format!("at most {MOST_LISTS} lists"), lists)),
        }
    }

    fn check(&self) -> Result<()> {
        if self.max_sequence_rows > MOST_KEYS {
            return Err(Error::argument("max_sequence_rows", format!("at most {MOST_KEYS}"), self.max_sequence_rows));
        }
        for (s, sequence) in self.sequences.iter().enumerate() {
            if sequence.rows > self.max_sequence_rows {
                let expected = format!("at least the rows of sequence {s}, {}", sequence.rows);
                return Err(Error::argument("max_sequence_rows", expected, self.max_sequence_rows));
            }
            if sequence.num_keys() > MOST_KEYS {
                let found = format!("{} in sequence {s}", sequence.num_keys());
                return Err(Error::argument("keys", format!("at most {MOST_KEYS} keys"), found));
            }
        }
        Ok(())
    }
}

/// The place of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    sequence: usize,
    query_tile: usize,
    head: usize,
}

/// Lists of key tiles, as the kernels read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileLists {
    /// `[num_sequences * query_tiles * (per_head or 1) + 1]`, ascending from 0: where each list begins in `indices`, and the
    /// end. Sequence by sequence, in it query tile by query tile, in that head by head.
    pub offsets: Vec<i32>,
    /// Key tiles. The builders' lists ascend, but for those that come from the caller.
    pub indices: Vec<i32>,
    /// Key/value heads, when each has lists of its own.
    pub per_head: Option<usize>,
    /// Lists that a sequence has of each head.
    pub query_tiles: usize,
}

impl TileLists {
    /// All key tiles.
    ///
    /// # Errors
    /// As [`TileLists::from_lists`], but for the lists.
    pub fn dense(batch: &Batch) -> Result<TileLists> {
        TileLists::build(batch, None, |place, list| list.extend(0..batch.sequences[place.sequence].key_tiles() as i32))
    }

    /// The tiles that have a key at most `window` positions from a row of the query tile.
    ///
    /// # Errors
    /// As [`TileLists::from_lists`], but for the lists.
    pub fn sliding_window(batch: &Batch, window: usize) -> Result<TileLists> {
        TileLists::build(batch, None, |place, list| {
            let sequence = &batch.sequences[place.sequence];
            let first = place.query_tile * QUERY_TILE;
            let last = sequence.rows.min(first + QUERY_TILE) - 1;
            let [first, last] = [first, last].map(|row| sequence.keys[0] + row);
            let near = first.saturating_sub(window)..last.saturating_add(window).saturating_add(1);
            list.extend(sequence.tiles_of(near).map(|tile| tile as i32));
        })
    }

    /// The prefix and the live block; of the suffix the tiles that have one of its first `near` keys, and of the others each
    /// `every`-th: the `every`-th, the one `every` after it, and so on; none with 0, all with 1. The same lists for all rows.
    ///
    /// A near window with a thinned rest is what DPad (Chen et al., arXiv:2508.14148) keeps of the suffix; there, what is
    /// kept grows sparser with the distance, and single tokens are kept, not tiles.
    ///
    /// # Errors
    /// As [`TileLists::from_lists`], but for the lists.
    pub fn pruned_suffix(batch: &Batch, near: usize, every: usize) -> Result<TileLists> {
        TileLists::build(batch, None, |place, list| {
            let sequence = &batch.sequences[place.sequence];
            let suffix = sequence.keys[0] + sequence.keys[1];
            let far = sequence.tiles_of(0..suffix.saturating_add(near)).end;
            list.extend(0..far as i32);
            if every > 0 {
                let first = far.saturating_add(every - 1);
                list.extend((first..sequence.key_tiles()).step_by(every).map(|tile| tile as i32));
            }
        })
    }

    /// The `k` tiles of the highest scores, all where there are no more than that; ties go to the lowest tile, and NaN counts
    /// as minus infinity. Lists ascend.
    ///
    /// `scores` is `[num_sequences, query_tiles, per_head or 1, key_tiles]` row-major, with `key_tiles` at least those of every
    /// sequence; scores of tiles and query tiles that a sequence does not have are not looked at. With `per_head` key/value
    /// heads each has lists of its own.
    ///
    /// # Errors
    /// As [`TileLists::from_lists`], but for the lists; [`Error::Argument`] when `key_tiles` or `scores` is too small.
    pub fn top_k(
        batch: &Batch,
        per_head: Option<usize>,
        k: usize,
        scores: &[f32],
        key_tiles: usize,
    ) -> Result<TileLists> {
        let needed = batch.sequences.iter().map(Sequence::key_tiles).max().unwrap_or(0);
        if key_tiles < needed {
            return Err(Error::argument("key_tiles", format!("at least {needed}"), key_tiles));
        }
        let (query_tiles, heads) = (batch.query_tiles(), per_head.unwrap_or(1));
        let lists = batch.num_lists(per_head)?;
        if scores.len() != lists.saturating_mul(key_tiles) {
            return Err(Error::argument("scores", format!("{lists} x {key_tiles} scores"), scores.len()));
        }
        let mut order = Vec::new();
        TileLists::build(batch, per_head, |place, list| {
            let at = ((place.sequence * query_tiles + place.query_tile) * heads + place.head) * key_tiles;
            let scores = &scores[at..at + batch.sequences[place.sequence].key_tiles()];
            // Adding 0 makes one zero of the two.
            let score = |tile: i32| match scores[tile as usize] {
                score if score.is_nan() => f32::NEG_INFINITY,
                score => score + 0.0,
            };
            order.clear();
            order.extend(0..scores.len() as i32);
            if k < order.len() && k > 0 {
                order.select_nth_unstable_by(k - 1, |a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
            }
            order.truncate(k);
            order.sort_unstable();
            list.extend_from_slice(&order);
        })
    }

    /// Lists of the caller: one for each sequence, in it one for each query tile, in that one for each head, if `per_head`.
    /// Their order is kept.
    ///
    /// # Errors
    /// [`Error::Argument`] when a sequence has more rows than `max_sequence_rows` or more keys than the kernels read, 2^30; when
    /// the lists, or the tiles of all of them, are more than 2^30, or `per_head` is 0; and as [`TileLists::validate`].
    pub fn from_lists<L: AsRef<[i32]>>(batch: &Batch, per_head: Option<usize>, lists: &[L]) -> Result<TileLists> {
        let mut made = TileLists::new(batch, per_head)?;
        for list in lists {
            made.push(|indices| indices.extend_from_slice(list.as_ref()))?;
        }
        made.validate(batch)?;
        Ok(made)
    }

    /// Without lists yet.
    fn new(batch: &Batch, per_head: Option<usize>) -> Result<TileLists> {
        batch.num_lists(per_head)?;
        Ok(TileLists { offsets: vec![0], indices: Vec::new(), per_head, query_tiles: batch.query_tiles() })
    }

    /// Appends a list.
    fn push(&mut self, list: impl FnOnce(&mut Vec<i32>)) -> Result<()> {
        list(&mut self.indices);
        if self.indices.len() > MOST_TILES {
            let expected = format!("at most {MOST_TILES} tiles in all lists");
            return Err(Error::argument("tile_indices", expected, self.indices.len()));
        }
        self.offsets.push(self.indices.len() as i32);
        Ok(())
    }

    /// All lists; those of query tiles that a sequence does not have are empty.
    fn build(batch: &Batch, per_head: Option<usize>, mut list: impl FnMut(Region, &mut Vec<i32>)) -> Result<TileLists> {
        let mut lists = TileLists::new(batch, per_head)?;
        for (s, sequence) in batch.sequences.iter().enumerate() {
            for query_tile in 0..batch.query_tiles() {
                for head in 0..per_head.unwrap_or(1) {
                    lists.push(|indices| {
                        if query_tile * QUERY_TILE < sequence.rows {
                            list(Region { sequence: s, query_tile, head }, indices);
                        }
                    })?;
                }
            }
        }
        Ok(lists)
    }

    /// The tiles that a query tile visits, of a key/value head (any, where heads share their lists).
    ///
    /// # Panics
    /// When there is no such list.
    pub fn list(&self, sequence: usize, query_tile: usize, head: usize) -> &[i32] {
        let head = if self.per_head.is_some() { head } else { 0 };
        let heads = self.per_head.unwrap_or(1);
        assert!(query_tile < self.query_tiles && head < heads, "query tile {query_tile}, head {head}");
        let list = (sequence * self.query_tiles + query_tile) * heads + head;
        &self.indices[self.offsets[list] as usize..self.offsets[list + 1] as usize]
    }

    /// Checks what the kernels rely on for a right result: as many lists as the batch has, each tile at most once in a list,
    /// and within the sequence's keys. The order within a list is free. (Whatever stands in lists, the kernels stay within
    /// memory: tiles past the keys count as empty, and a tile listed twice counts twice.)
    ///
    /// # Errors
    /// [`Error::Argument`] with the sequence, the query tile, the head and what was found there.
    pub fn validate(&self, batch: &Batch) -> Result<()> {
        let lists = batch.num_lists(self.per_head)?;
        let (query_tiles, heads) = (batch.query_tiles(), self.per_head.unwrap_or(1));
        if self.query_tiles != query_tiles {
            return Err(Error::argument("query_tiles", query_tiles.to_string(), self.query_tiles));
        }
        if self.offsets.len() != lists + 1 {
            return Err(Error::argument("tile_offsets", format!("{lists} lists and the end"), self.offsets.len()));
        }
        let ascending = self.offsets[0] == 0 && self.offsets.is_sorted();
        if !ascending || usize::try_from(self.offsets[lists]) != Ok(self.indices.len()) {
            let expected = format!("ascending from 0 to the number of indices, {}", self.indices.len());
            let wrong = self.offsets.windows(2).find(|pair| pair[0] > pair[1]);
            let found = match wrong {
                Some(pair) => format!("{} before {}", pair[0], pair[1]),
                None => format!("{} to {}", self.offsets[0], self.offsets[lists]),
            };
            return Err(Error::argument("tile_offsets", expected, found));
        }
        // The last list, plus one, that had a tile.
        let mut seen = Vec::<usize>::new();
        for (i, pair) in self.offsets.windows(2).enumerate() {
            let (sequence, query_tile, head) = (i / heads / query_tiles, i / heads % query_tiles, i % heads);
            let key_tiles = batch.sequences[sequence].key_tiles();
            seen.resize(seen.len().max(key_tiles), 0);
            for tile in &self.indices[pair[0] as usize..pair[1] as usize] {
                let known = usize::try_from(*tile).ok().filter(|tile| *tile < key_tiles);
                let found = match known {
                    None => format!("tile {tile}"),
                    Some(known) if seen[known] == i + 1 => format!("tile {tile} twice"),
                    Some(known) => {
                        seen[known] = i + 1;
                        continue;
                    }
                };
                let expected = format!("each of {key_tiles} key tiles at most once");
                let found = format!("{found} in sequence {sequence}, query tile {query_tile}, head {head}");
                return Err(Error::argument("tile_indices", expected, found));
            }
        }
        Ok(())
    }

    /// Copies the lists to the device.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload(&self, stream: &Stream) -> Result<DeviceTiles> {
        self.upload_with_room(stream, self.indices.len())
    }

    /// Copies the lists to the device, with room for `num_indices` tiles in all lists, so that later lists can be written over
    /// them with [`DeviceTiles::write`] while a captured graph goes on reading the same memory.
    ///
    /// # Errors
    /// [`Error::Argument`] when the lists have more tiles than that; the driver's.
    pub fn upload_with_room(&self, stream: &Stream, num_indices: usize) -> Result<DeviceTiles> {
        let mut tiles = DeviceTiles {
            offsets: stream.alloc(self.offsets.len())?,
            indices: stream.zeros(num_indices)?,
            per_head: self.per_head,
            query_tiles: self.query_tiles,
        };
        tiles.write(self)?;
        Ok(tiles)
    }
}

/// Lists on a device.
#[derive(Debug)]
pub struct DeviceTiles {
    offsets: Buffer<i32>,
    indices: Buffer<i32>,
    per_head: Option<usize>,
    query_tiles: usize,
}

impl DeviceTiles {
    /// What a launch of [`attention`](super::attention) takes. Its `max_sequence_rows` must be that of the lists' batch, and
    /// its key/value heads those of the lists, if each has its own.
    pub fn tiles(&self) -> Tiles<'_> {
        Tiles { offsets: &self.offsets, indices: &self.indices, per_head: self.per_head.is_some() }
    }

    /// Writes other lists over these.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are not as many lists, or there is no room for their tiles; the driver's.
    pub fn write(&mut self, lists: &TileLists) -> Result<()> {
        let shape = |per_head: Option<usize>, query_tiles, offsets: usize| {
            let heads = per_head.map_or("shared by all heads".into(), |heads| format!("for {heads} heads"));
            format!("{} lists, {query_tiles} a sequence, {heads}", offsets.saturating_sub(1))
        };
        let here = (self.per_head, self.query_tiles, self.offsets.len());
        let there = (lists.per_head, lists.query_tiles, lists.offsets.len());
        if here != there {
            return Err(Error::argument(
                "tile_offsets",
                shape(here.0, here.1, here.2),
                shape(there.0, there.1, there.2),
            ));
        }
        if lists.indices.len() > self.indices.len() {
            let expected = format!("at most {} tiles in all lists", self.indices.len());
            return Err(Error::argument("tile_indices", expected, lists.indices.len()));
        }
        self.offsets.write(&lists.offsets)?;
        self.indices.write(&lists.indices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(sequences: &[Sequence]) -> Batch<'_> {
        Batch { sequences, max_sequence_rows: sequences.iter().map(|s| s.rows).max().unwrap_or(0) }
    }

    fn sequence(rows: usize, keys: [usize; 3]) -> Sequence {
        Sequence { rows, keys }
    }

    /// The tiles for which `wanted` holds of any of their keys, by trying all.
    fn by_key(sequence: &Sequence, wanted: impl Fn(usize) -> bool) -> Vec<i32> {
        let mut tiles: Vec<i32> =
            (0..sequence.num_keys()).filter(|key| wanted(*key)).map(|key| (key / KEY_TILE) as i32).collect();
        tiles.dedup();
        tiles
    }

    /// Sequences around the edges of tiles, none among them, and rows that the launch has room for beyond them.
    fn sequences() -> impl Strategy<Value = (Vec<Sequence>, usize)> {
        let length = prop_oneof![Just(0usize), 1usize..4, 60usize..70, 120usize..200, 0usize..500];
        let one = (
            prop_oneof![Just(0usize), 1usize..40, 120usize..140, 0usize..600],
            [length.clone(), length.clone(), length],
        )
            .prop_map(|(rows, keys)| Sequence { rows, keys });
        (prop::collection::vec(one, 0..4), 0usize..300).prop_map(|(sequences, more)| {
            let most = sequences.iter().map(|s| s.rows).max().unwrap_or(0);
            (sequences, most + more)
        })
    }

    /// Each list with its sequence and its query rows, positions of its queries; lists without rows must be empty.
    fn each_list(batch: &Batch, lists: &TileLists, check: impl Fn(usize, usize, &Sequence, Range<usize>, &[i32])) {
        lists.validate(batch).unwrap();
        assert_eq!(lists.query_tiles, batch.max_sequence_rows.div_ceil(128));
        for (s, sequence) in batch.sequences.iter().enumerate() {
            for query_tile in 0..lists.query_tiles {
                let rows = query_tile * 128..sequence.rows.min(query_tile * 128 + 128);
                let list = lists.list(s, query_tile, 0);
                match rows.is_empty() {
                    true => assert_eq!(list, [0i32; 0]),
                    false => check(s, query_tile, sequence, rows, list),
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
        // Rows 0 to 127 stand at 100 to 227, the last two at 228 and 229.
        let window = TileLists::sliding_window(&batch, 28).unwrap();
        assert_eq!((window.list(0, 0, 0), window.list(0, 1, 0)), (&[1, 2, 3][..], &[3, 4][..]));
        let own = TileLists::sliding_window(&batch, 0).unwrap();
        assert_eq!((own.list(0, 1, 0), own.list(1, 0, 0)), (&[3][..], &[0][..]));
    }

    /// Queries that stand behind all keys see nothing through a small window.
    #[test]
    fn queries_beyond_the_keys() {
        let sequences = [sequence(200, [10, 20, 0])];
        let lists = TileLists::sliding_window(&batch(&sequences), 5).unwrap();
        assert_eq!((lists.list(0, 0, 0), lists.list(0, 1, 0)), (&[0][..], &[][..]));
    }

    #[test]
    fn lists_of_the_caller_keep_their_order() {
        let sequences = [sequence(5, [100, 5, 0]), sequence(5, [10, 5, 0])];
        let lists =
            TileLists::from_lists(&batch(&sequences), Some(2), &[vec![1, 0], vec![], vec![0], vec![0]]).unwrap();
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
        refused(
            &[&[0], &[-1], &[], &[]],
            None,
            "tile_indices: expected each of 4 key tiles at most once, found tile -1",
        );
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
}
