use super::{Needs, Placement, Staging, count};
use crate::backend::Room;
use crate::error::Result;
use crate::gpu::{Buffer, Stream};

/// Where the rows of a pass stand, on the device: tables of 32-bit integers, one after the other in one buffer, which one
/// copy renews.
///
/// Rows between those that there are and those that launches are sized for belong to no sequence: they are mask tokens at
/// position 0, computed and not looked at.
pub struct Rows {
    table: Buffer<i32>,
    staging: Staging<i32>,
    layout: Layout,
    room: Room,
    /// Spans, those that are not there included; they have no rows.
    spans: usize,
}

/// Where each table begins, in elements.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tokens: usize,
    positions: usize,
    cache_rows: usize,
    scored: usize,
    cu_rows: usize,
    live_lens: usize,
    prefix: [usize; 2],
    suffix: [usize; 2],
    len: usize,
}

impl Layout {
    fn of(needs: &Needs) -> Layout {
        let mut len = 0;
        let mut table = |elements: usize| {
            let at = len;
            len += elements.next_multiple_of(4); // 16 bytes
            at
        };
        let mut layout = Layout {
            tokens: table(needs.rows),
            positions: table(needs.rows),
            cache_rows: table(needs.rows),
            scored: table(needs.scored),
            cu_rows: table(needs.spans + 1),
            live_lens: table(needs.spans),
            prefix: [table(needs.spans), table(needs.spans)],
            suffix: [table(needs.spans), table(needs.spans)],
            len: 0,
        };
        layout.len = len;
        layout
    }
}

impl Rows {
    /// Elements of the buffer.
    pub(super) fn len(needs: &Needs) -> usize {
        Layout::of(needs).len
    }

    pub(super) fn new(stream: &Stream, needs: &Needs) -> Result<Rows> {
        let layout = Layout::of(needs);
        let (table, staging) = (stream.alloc(layout.len)?, Staging::new(stream, layout.len)?);
        Ok(Rows { table, staging, layout, room: Room::default(), spans: needs.spans })
    }

    /// Puts a copy of the placement into the stream. `mask_slot` is the index of a mask token.
    pub(super) fn write(&mut self, placement: &Placement, mask_slot: usize) -> Result<()> {
        let Layout { tokens, positions, cache_rows, scored, cu_rows, live_lens, prefix, suffix, len } = self.layout;
        let mut table = vec![0; len];
        table[tokens..positions].fill(count("tokens", mask_slot)?);
        table[cache_rows..scored].fill(-1);
        for (to, token) in table[tokens..].iter_mut().zip(placement.tokens) {
            *to = count("tokens", *token)?;
        }
        for (to, row) in table[scored..].iter_mut().zip(placement.scored) {
            *to = count("scored", *row)?;
        }
        let mut row = 0;
        for (s, span) in placement.spans.iter().enumerate() {
            for position in span.start..span.end {
                table[positions + row] = count("positions", position)?;
                table[cache_rows + row] = count("positions", span.cache_base + position)?;
                row += 1;
            }
            table[cu_rows + s + 1] = count("rows", row)?;
            table[live_lens + s] = count("rows", span.rows())?;
            let parts = [(prefix, 0..span.start), (suffix, span.end..span.len)];
            for ([start, len], positions) in parts {
                table[start + s] = count("positions", span.cache_base + positions.start)?;
                table[len + s] = count("positions", positions.len())?;
            }
        }
        let rows = count("rows", row)?;
        table[cu_rows + placement.spans.len() + 1..=cu_rows + self.spans].fill(rows);
        self.room = placement.room;
        self.staging.write(&mut self.table, &table)
    }

    fn at(&self, element: usize) -> u64 {
        self.table.address() + (element * size_of::<i32>()) as u64
    }

    /// What launches are sized for.
    pub(super) fn room(&self) -> Room {
        self.room
    }

    pub(super) fn spans(&self) -> usize {
        self.spans
    }

    // Addresses of the tables: [room.rows] indices of tokens, positions, rows of the cache; [room.scored] rows;
    // [spans + 1] bounds; [spans] lengths; and [spans] starts and lengths in the cache of what is before and after a span.

    pub(super) fn tokens(&self) -> u64 {
        self.at(self.layout.tokens)
    }

    pub(super) fn positions(&self) -> u64 {
        self.at(self.layout.positions)
    }

    pub(super) fn cache_rows(&self) -> u64 {
        self.at(self.layout.cache_rows)
    }

    pub(super) fn scored(&self) -> u64 {
        self.at(self.layout.scored)
    }

    pub(super) fn cu_rows(&self) -> u64 {
        self.at(self.layout.cu_rows)
    }

    pub(super) fn live_lens(&self) -> u64 {
        self.at(self.layout.live_lens)
    }

    pub(super) fn prefix(&self) -> [u64; 2] {
        self.layout.prefix.map(|element| self.at(element))
    }

    pub(super) fn suffix(&self) -> [u64; 2] {
        self.layout.suffix.map(|element| self.at(element))
    }
}
