//! Metadata of a pass in device memory: tables of 32-bit integers in one buffer, which one copy updates.

use super::{Staging, checked_i32};
use crate::backend::{BatchMetadata, LaunchBucket, SessionLimits, UpdateRanges};
use crate::error::Result;
use crate::gpu::{Buffer, Stream};

/// Metadata of a pass on the device.
///
/// Padded rows, up to the size of the [`LaunchBucket`], belong to no sequence. They are mask tokens at position 0; their
/// results are not read.
pub struct CudaBatch {
    table: Buffer<i32>,
    staging: Staging<i32>,
    layout: Layout,
    bucket: LaunchBucket,
    /// Sequences that the tables have room for; those after the last one of the pass have no rows.
    max_sequences: usize,
    /// For each sequence of the pass, when layers select rows.
    updates: Vec<UpdateRanges>,
}

/// Offsets of the tables, in elements.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tokens: usize,
    positions: usize,
    cache_rows: usize,
    logit_rows: usize,
    cu_rows: usize,
    live_lens: usize,
    prefix: [usize; 2],
    suffix: [usize; 2],
    updates: Option<UpdateTables<usize>>,
    len: usize,
}

/// Tables for layers that select rows, as offsets or as addresses. V-verify writes the selected rows on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct UpdateTables<T> {
    /// Row of the pass, position, and row of the cache of the other rows, sequence after sequence.
    pub others: [T; 3],
    pub cu_others: T,
    /// For each recomputed row its index among the other rows. Rows that are always recomputed come first in their sequence.
    pub indices: T,
    /// Row of the pass, position, and row of the cache of the recomputed rows.
    pub selected: [T; 3],
    pub cu_selected_rows: T,
    /// Index of each sequence's first other row among the recomputed rows.
    pub first_other: T,
    /// Output of V-verify; not read.
    pub cu_selected: T,
    /// For each row of the pass the row of the cache that its value is copied to without a comparison; -1 for none.
    pub value_rows: T,
    /// Start and length of each sequence in the cache.
    pub cached: [T; 2],
}

impl<T: Copy> UpdateTables<T> {
    fn map<U>(self, f: impl Fn(T) -> U) -> UpdateTables<U> {
        UpdateTables {
            others: self.others.map(&f),
            cu_others: f(self.cu_others),
            indices: f(self.indices),
            selected: self.selected.map(&f),
            cu_selected_rows: f(self.cu_selected_rows),
            first_other: f(self.first_other),
            cu_selected: f(self.cu_selected),
            value_rows: f(self.value_rows),
            cached: self.cached.map(&f),
        }
    }
}

impl Layout {
    fn new(limits: &SessionLimits) -> Layout {
        let mut len = 0;
        let mut table = |elements: usize| {
            let at = len;
            len += elements.next_multiple_of(4); // 16 bytes
            at
        };
        let mut layout = Layout {
            tokens: table(limits.rows),
            positions: table(limits.rows),
            cache_rows: table(limits.rows),
            logit_rows: table(limits.logit_rows),
            cu_rows: table(limits.sequences + 1),
            live_lens: table(limits.sequences),
            prefix: [table(limits.sequences), table(limits.sequences)],
            suffix: [table(limits.sequences), table(limits.sequences)],
            updates: limits.selects_rows.then(|| UpdateTables {
                others: [table(limits.rows), table(limits.rows), table(limits.rows)],
                cu_others: table(limits.sequences + 1),
                indices: table(limits.rows),
                selected: [table(limits.rows), table(limits.rows), table(limits.rows)],
                cu_selected_rows: table(limits.sequences + 1),
                first_other: table(limits.sequences),
                cu_selected: table(limits.sequences + 1),
                value_rows: table(limits.rows),
                cached: [table(limits.sequences), table(limits.sequences)],
            }),
            len: 0,
        };
        layout.len = len;
        layout
    }
}

impl UpdateTables<usize> {
    /// Fills in the tables of the updates. The tables of all rows are written already.
    fn write(self, table: &mut [i32], layout: Layout, metadata: &BatchMetadata, max_sequences: usize) -> Result<()> {
        table[self.value_rows..][..metadata.bucket.rows].fill(-1);
        let (mut first, mut num_others, mut num_selected) = (0, 0, 0);
        for (s, (sequence, update)) in metadata.sequences.iter().zip(metadata.updates).enumerate() {
            let row_of = |key: usize| first + key - sequence.start;
            let entry = |table: &[i32], row: usize| -> Result<[i32; 3]> {
                Ok([checked_i32("rows", row)?, table[layout.positions + row], table[layout.cache_rows + row]])
            };
            for key in update.always.clone() {
                let values = entry(table, row_of(key))?;
                table[self.value_rows + row_of(key)] = values[2];
                for (list, value) in self.selected.iter().zip(values) {
                    table[list + num_selected] = value;
                }
                num_selected += 1;
            }
            table[self.first_other + s] = checked_i32("rows", num_selected)?;
            let all_selected = update.num_selected() == update.num_others();
            for index in 0..update.num_others() {
                let row = row_of(update.other(index));
                let values = entry(table, row)?;
                for (list, value) in self.others.iter().zip(values) {
                    table[list + num_others] = value;
                }
                if all_selected {
                    table[self.value_rows + row] = values[2];
                    table[self.indices + num_selected + index] = checked_i32("rows", num_others)?;
                    for (list, value) in self.selected.iter().zip(values) {
                        table[list + num_selected + index] = value;
                    }
                }
                num_others += 1;
            }
            num_selected += update.num_selected();
            table[self.cu_others + s + 1] = checked_i32("rows", num_others)?;
            table[self.cu_selected_rows + s + 1] = checked_i32("rows", num_selected)?;
            table[self.cached[0] + s] = checked_i32("positions", sequence.cache_base)?;
            table[self.cached[1] + s] = checked_i32("positions", sequence.num_keys)?;
            first += sequence.rows();
        }
        let last = metadata.updates.len();
        let (num_others, num_selected) = (checked_i32("rows", num_others)?, checked_i32("rows", num_selected)?);
        table[self.cu_others + last + 1..=self.cu_others + max_sequences].fill(num_others);
        table[self.cu_selected_rows + last + 1..=self.cu_selected_rows + max_sequences].fill(num_selected);
        table[self.first_other + last..self.first_other + max_sequences].fill(num_selected);
        Ok(())
    }
}

impl CudaBatch {
    /// Elements of the buffer.
    pub(super) fn len(limits: &SessionLimits) -> usize {
        Layout::new(limits).len
    }

    pub(super) fn new(stream: &Stream, limits: &SessionLimits) -> Result<CudaBatch> {
        let layout = Layout::new(limits);
        let (table, staging) = (stream.alloc(layout.len)?, Staging::new(stream, layout.len)?);
        let (bucket, max_sequences) = (LaunchBucket::default(), limits.sequences);
        Ok(CudaBatch { table, staging, layout, bucket, max_sequences, updates: vec![] })
    }

    /// Enqueues a copy of the metadata. `mask_index` is the index of a mask token among the tokens.
    pub(super) fn write(&mut self, metadata: &BatchMetadata, mask_index: usize) -> Result<()> {
        let Layout { tokens, positions, cache_rows, logit_rows, cu_rows, live_lens, prefix, suffix, updates, len } =
            self.layout;
        let mut table = vec![0; len];
        table[tokens..positions].fill(checked_i32("tokens", mask_index)?);
        table[cache_rows..logit_rows].fill(-1);
        for (to, token) in table[tokens..].iter_mut().zip(metadata.tokens) {
            *to = checked_i32("tokens", *token)?;
        }
        for (to, row) in table[logit_rows..].iter_mut().zip(metadata.logit_rows) {
            *to = checked_i32("logit_rows", *row)?;
        }
        let mut row = 0;
        for (s, sequence) in metadata.sequences.iter().enumerate() {
            for key in sequence.start..sequence.end {
                table[positions + row] = checked_i32("positions", metadata.positions[row])?;
                table[cache_rows + row] = checked_i32("positions", sequence.cache_base + key)?;
                row += 1;
            }
            table[cu_rows + s + 1] = checked_i32("rows", row)?;
            table[live_lens + s] = checked_i32("rows", sequence.rows())?;
            for ([start, len], keys) in [(prefix, 0..sequence.start), (suffix, sequence.end..sequence.num_keys)] {
                table[start + s] = checked_i32("positions", sequence.cache_base + keys.start)?;
                table[len + s] = checked_i32("positions", keys.len())?;
            }
        }
        let rows = checked_i32("rows", row)?;
        table[cu_rows + metadata.sequences.len() + 1..=cu_rows + self.max_sequences].fill(rows);
        if let Some(updates) = updates {
            updates.write(&mut table, self.layout, metadata, self.max_sequences)?;
        }
        self.bucket = metadata.bucket;
        self.updates = metadata.updates.to_vec();
        self.staging.write(&mut self.table, &table)
    }

    fn address(&self, element: usize) -> u64 {
        self.table.address() + (element * size_of::<i32>()) as u64
    }

    /// Sizes that launches are padded to.
    pub(super) fn bucket(&self) -> LaunchBucket {
        self.bucket
    }

    pub(super) fn max_sequences(&self) -> usize {
        self.max_sequences
    }

    // Addresses of the tables. Tokens, positions and cache rows: [bucket.rows]. Logit rows: [bucket.logit_rows]. Bounds:
    // [max_sequences + 1]. Lengths, and starts and lengths of the cached keys before and after a sequence's rows:
    // [max_sequences].

    pub(super) fn tokens(&self) -> u64 {
        self.address(self.layout.tokens)
    }

    pub(super) fn positions(&self) -> u64 {
        self.address(self.layout.positions)
    }

    pub(super) fn cache_rows(&self) -> u64 {
        self.address(self.layout.cache_rows)
    }

    pub(super) fn logit_rows(&self) -> u64 {
        self.address(self.layout.logit_rows)
    }

    pub(super) fn cu_rows(&self) -> u64 {
        self.address(self.layout.cu_rows)
    }

    pub(super) fn live_lens(&self) -> u64 {
        self.address(self.layout.live_lens)
    }

    pub(super) fn prefix(&self) -> [u64; 2] {
        self.layout.prefix.map(|element| self.address(element))
    }

    pub(super) fn suffix(&self) -> [u64; 2] {
        self.layout.suffix.map(|element| self.address(element))
    }

    /// Tables for layers that select rows, when the session has such layers.
    pub(super) fn update_tables(&self) -> Option<UpdateTables<u64>> {
        self.layout.updates.map(|tables| tables.map(|element| self.address(element)))
    }

    /// The update of each sequence of the pass.
    pub(super) fn updates(&self) -> &[UpdateRanges] {
        &self.updates
    }

    /// Reads back the selected rows: one ascending list per sequence, as indices of [`UpdateRanges::other`]. Synchronises.
    pub(super) fn read_selected(&self) -> Result<Vec<Vec<usize>>> {
        let Some(tables) = self.layout.updates else { return Ok(vec![]) };
        let table = self.table.read()?;
        let (mut first, mut others) = (0, 0);
        let indices_of = |update: &UpdateRanges| {
            let start = tables.indices + first + update.always.len();
            let indices = &table[start..start + update.num_selected()];
            let indices =
                indices.iter().map(|value| (value.max(&0).unsigned_abs() as usize).saturating_sub(others)).collect();
            first += update.rows();
            others += update.num_others();
            indices
        };
        Ok(self.updates.iter().map(indices_of).collect())
    }
}
