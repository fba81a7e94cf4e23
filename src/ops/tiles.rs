//! Lists of the key tiles that each query tile visits, for the block sparsity of [`attention`](super::attention).
//!
//! This is a helper for engine authors, not an op: it has no kernel, and the runner of this crate does not use it. The
//! builders run on the host; [`TileLists::upload`] copies lists to a device.
//!
//! A *query tile* is [`QUERY_TILE`] query rows of one sequence. A *key tile* is [`KEY_TILE`] of its keys. Keys are numbered
//! from 0 over prefix cache, live block and suffix cache, in this order. The first query row of a sequence is assumed to have
//! the position of its first live key, so that positions of keys and queries can be compared.
//!
//! - Lists are exact to a tile: when any key of a tile is selected, the whole tile is visited.
//! - An empty list is allowed. Its rows get zeros and a log-sum-exp of minus infinity.
//! - Lists depend on the lengths of the segments. When lengths on the device grow without new lists, new keys are visited only
//!   where they fall into listed tiles.
//!
//! ```
//! use dllm_kernels::ops::tiles::{Batch, Sequence, TileLists};
//!
//! // A block of 32 rows between 256 prefix keys and 400 suffix keys: the first 64 suffix keys, then every third tile.
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

/// Maximum number of keys of a sequence, and of its rows. The kernels do not read further keys.
const MAX_KEYS: usize = 1 << 30;
/// Maximum number of tiles in all lists of a launch.
const MAX_TILES: usize = 1 << 30;
/// Maximum number of lists of a launch.
const MAX_LISTS: usize = 1 << 30;

/// Numbers of query rows and keys of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Number of query rows; the first has position `keys[0]`.
    pub rows: usize,
    /// Numbers of keys of the prefix cache, the live block and the suffix cache. The builders use the order of the keys only,
    /// so the end of the block may be given here although one segment holds the block and the keys after it.
    pub keys: [usize; 3],
}

impl Sequence {
    /// Returns the number of keys in all three segments; saturates.
    pub fn num_keys(&self) -> usize {
        self.keys.iter().fold(0, |sum, keys| sum.saturating_add(*keys))
    }

    /// Returns the number of key tiles.
    pub fn key_tiles(&self) -> usize {
        self.num_keys().div_ceil(KEY_TILE)
    }

    /// Returns the tiles that hold any of the given keys.
    fn tiles_of(&self, keys: Range<usize>) -> Range<usize> {
        let end = keys.end.min(self.num_keys());
        if keys.start < end { keys.start / KEY_TILE..end.div_ceil(KEY_TILE) } else { 0..0 }
    }
}

/// Sequences of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// All sequences, in the order of `cu_rows`.
    pub sequences: &'a [Sequence],
    /// The `max_sequence_rows` of the launch: an upper bound of the rows of each sequence. It determines the number of lists per
    /// sequence.
    pub max_sequence_rows: usize,
}

impl Batch<'_> {
    /// Number of lists per sequence, and per head if heads have their own.
    fn query_tiles(&self) -> usize {
        self.max_sequence_rows.div_ceil(QUERY_TILE)
    }

    /// Checks the batch and returns the number of its lists.
    fn num_lists(&self, per_head: Option<usize>) -> Result<usize> {
        self.check()?;
        if per_head == Some(0) {
            return Err(Error::argument("per_head", "at least 1 head", 0));
        }
        let lists = self.sequences.len().saturating_mul(self.query_tiles()).saturating_mul(per_head.unwrap_or(1));
        if lists > MAX_LISTS {
            return Err(Error::argument("tile_offsets", format!("at most {MAX_LISTS} lists"), lists));
        }
        Ok(lists)
    }

    fn check(&self) -> Result<()> {
        if self.max_sequence_rows > MAX_KEYS {
            return Err(Error::argument("max_sequence_rows", format!("at most {MAX_KEYS}"), self.max_sequence_rows));
        }
        for (s, sequence) in self.sequences.iter().enumerate() {
            if sequence.rows > self.max_sequence_rows {
                let expected = format!("at least the rows of sequence {s}, {}", sequence.rows);
                return Err(Error::argument("max_sequence_rows", expected, self.max_sequence_rows));
            }
            if sequence.num_keys() > MAX_KEYS {
                let found = format!("{} in sequence {s}", sequence.num_keys());
                return Err(Error::argument("keys", format!("at most {MAX_KEYS} keys"), found));
            }
        }
        Ok(())
    }
}

/// Position of a list in [`TileLists`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ListPosition {
    sequence: usize,
    query_tile: usize,
    head: usize,
}

/// Lists of key tiles in the layout that the kernels read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileLists {
    /// Begin of each list in `indices`, and the end: `[num_sequences * query_tiles * (per_head or 1) + 1]`, ascending from 0. Lists
    /// are ordered by sequence, then query tile, then head.
    pub offsets: Vec<i32>,
    /// Key tiles of all lists. Lists of the builders ascend, except those of [`TileLists::from_lists`].
    pub indices: Vec<i32>,
    /// Number of key/value heads when each has its own lists; `None` when heads share them.
    pub per_head: Option<usize>,
    /// Number of lists per sequence and head: `max_sequence_rows / QUERY_TILE`, rounded up.
    pub query_tiles: usize,
}

impl TileLists {
    /// Returns lists of all key tiles.
    ///
    /// # Errors
    /// As [`TileLists::from_lists`], but for the lists.
    pub fn dense(batch: &Batch) -> Result<TileLists> {
        TileLists::build(batch, None, |place, list| list.extend(0..batch.sequences[place.sequence].key_tiles() as i32))
    }

    /// Returns lists of the tiles that hold a key at most `window` positions away from a row of the query tile.
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

    /// Returns lists of the prefix, the live block and a part of the suffix; the same lists for all rows.
    ///
    /// Of the suffix, all tiles that hold one of its first `near` keys are listed, and every `every`-th of the tiles after them,
    /// beginning with the `every`-th. With `every == 0` no further tile is listed, with 1 all are.
    ///
    /// DPad (Chen et al., arXiv:2508.14148) prunes the suffix in a similar way: it keeps a near window and a part of the rest.
    /// There, the kept part gets sparser with the distance, and consists of tokens instead of tiles.
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

    /// Returns lists of the `k` tiles with the highest scores, or of all tiles when a sequence has fewer. Ties go to the lowest
    /// tile, and NaN counts as minus infinity. Lists ascend.
    ///
    /// `scores` is `[num_sequences, query_tiles, per_head or 1, key_tiles]`, row-major. `key_tiles` is at least the number of
    /// tiles of each sequence. Scores of tiles and query tiles that a sequence does not have are ignored. With `per_head` each of
    /// that number of key/value heads has its own lists.
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
            // Adding 0 turns minus zero into zero.
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

    /// Returns the given lists, ordered by sequence, then query tile, then head (with `per_head`). The order of tiles in a list
    /// is kept.
    ///
    /// # Errors
    /// As [`TileLists::validate`], and [`Error::Argument`] when
    /// - a sequence has more rows than `max_sequence_rows`, or more than 2^30 keys;
    /// - there are more than 2^30 lists, or more than 2^30 tiles in all of them;
    /// - `per_head` is 0.
    pub fn from_lists<L: AsRef<[i32]>>(batch: &Batch, per_head: Option<usize>, lists: &[L]) -> Result<TileLists> {
        let mut made = TileLists::new(batch, per_head)?;
        for list in lists {
            made.push(|indices| indices.extend_from_slice(list.as_ref()))?;
        }
        made.validate(batch)?;
        Ok(made)
    }

    /// Checks the batch and returns a value without lists.
    fn new(batch: &Batch, per_head: Option<usize>) -> Result<TileLists> {
        batch.num_lists(per_head)?;
        Ok(TileLists { offsets: vec![0], indices: Vec::new(), per_head, query_tiles: batch.query_tiles() })
    }

    /// Appends the list that `list` writes.
    fn push(&mut self, list: impl FnOnce(&mut Vec<i32>)) -> Result<()> {
        list(&mut self.indices);
        if self.indices.len() > MAX_TILES {
            let expected = format!("at most {MAX_TILES} tiles in all lists");
            return Err(Error::argument("tile_indices", expected, self.indices.len()));
        }
        self.offsets.push(self.indices.len() as i32);
        Ok(())
    }

    /// Returns the lists that `list` writes. Lists of query tiles that a sequence does not have are empty.
    fn build(
        batch: &Batch,
        per_head: Option<usize>,
        mut list: impl FnMut(ListPosition, &mut Vec<i32>),
    ) -> Result<TileLists> {
        let mut lists = TileLists::new(batch, per_head)?;
        for (s, sequence) in batch.sequences.iter().enumerate() {
            for query_tile in 0..batch.query_tiles() {
                for head in 0..per_head.unwrap_or(1) {
                    lists.push(|indices| {
                        if query_tile * QUERY_TILE < sequence.rows {
                            list(ListPosition { sequence: s, query_tile, head }, indices);
                        }
                    })?;
                }
            }
        }
        Ok(lists)
    }

    /// Returns the tiles that a query tile visits for a key/value head. `head` is ignored when heads share their lists.
    ///
    /// # Panics
    /// When there is no such sequence, query tile or head.
    pub fn list(&self, sequence: usize, query_tile: usize, head: usize) -> &[i32] {
        let head = if self.per_head.is_some() { head } else { 0 };
        let heads = self.per_head.unwrap_or(1);
        assert!(query_tile < self.query_tiles && head < heads, "query tile {query_tile}, head {head}");
        let list = (sequence * self.query_tiles + query_tile) * heads + head;
        &self.indices[self.offsets[list] as usize..self.offsets[list + 1] as usize]
    }

    /// Checks the conditions for correct results: the number of lists is that of the batch, each tile occurs at most once in a
    /// list, and all tiles are within the sequence's keys. The order in a list is free.
    ///
    /// Invalid lists do not lead to invalid memory accesses: tiles past the keys count as empty, and a tile that is listed twice
    /// counts twice.
    ///
    /// # Errors
    /// [`Error::Argument`] with the sequence, the query tile, the head and the invalid tile.
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
        // By tile: 1 plus the last list that held it.
        let mut seen = Vec::<usize>::new();
        for (i, pair) in self.offsets.windows(2).enumerate() {
            let (sequence, query_tile, head) = (i / heads / query_tiles, i / heads % query_tiles, i % heads);
            let key_tiles = batch.sequences[sequence].key_tiles();
            seen.resize(seen.len().max(key_tiles), 0);
            for tile in &self.indices[pair[0] as usize..pair[1] as usize] {
                let found = match usize::try_from(*tile).ok().filter(|tile| *tile < key_tiles) {
                    None => format!("tile {tile}"),
                    Some(index) if seen[index] == i + 1 => format!("tile {tile} twice"),
                    Some(index) => {
                        seen[index] = i + 1;
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

    /// Copies the lists to the device of `stream`. Cannot be captured.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload(&self, stream: &Stream) -> Result<DeviceTiles> {
        self.upload_with_room(stream, self.indices.len())
    }

    /// Copies the lists to memory with room for `num_indices` tiles in all lists. [`DeviceTiles::write`] can then replace them
    /// by other lists, and a captured graph reads these from the same memory. Cannot be captured.
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

/// Tile lists in device memory.
#[derive(Debug)]
pub struct DeviceTiles {
    offsets: Buffer<i32>,
    indices: Buffer<i32>,
    per_head: Option<usize>,
    query_tiles: usize,
}

impl DeviceTiles {
    /// Returns the lists for [`Attention`](super::attention::Attention). Its `max_sequence_rows` must be that of the lists'
    /// batch, and its number of key/value heads that of the lists, if heads have their own.
    pub fn tiles(&self) -> Tiles<'_> {
        Tiles { offsets: &self.offsets, indices: &self.indices, per_head: self.per_head.is_some() }
    }

    /// Replaces the lists, in stream order. Cannot be captured.
    ///
    /// # Errors
    /// [`Error::Argument`] when the number of lists differs, or there is no room for their tiles; the driver's.
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
mod tests;
