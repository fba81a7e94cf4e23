use super::{BatchMetadata, SessionLimits, Staging, count};
use crate::backend::{LaunchBucket, UpdateRanges};
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
    room: LaunchBucket,
    /// Spans, those that are not there included; they have no rows.
    spans: usize,
    /// Of the spans that are there, where a choice is made.
    parts: Vec<UpdateRanges>,
}

/// Where each table begins, in elements.
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
    choice: Option<ChoiceTables<usize>>,
    len: usize,
}

/// The same of the tables of a choice, or their addresses. What is chosen by V-verify is written on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChoiceTables<T> {
    /// Of the other rows, one span after the other: row of the pass, position, row of the cache.
    pub others: [T; 3],
    pub cu_others: T,
    /// Of the rows that run, one span after the other, those that run in any case first: their number among the others, and
    /// the same.
    pub numbers: T,
    pub selected: [T; 3],
    pub cu_selected_rows: T,
    /// Where the others begin among a span's rows that run.
    pub first_other: T,
    /// Out of V-verify, not read.
    pub cu_selected: T,
    /// For each row of the pass the row of the cache where its value goes when none has to be compared; -1: nowhere.
    pub stored: T,
    /// All that is cached of a span's sequence.
    pub cached: [T; 2],
}

impl<T: Copy> ChoiceTables<T> {
    fn map<U>(self, of: impl Fn(T) -> U) -> ChoiceTables<U> {
        ChoiceTables {
            others: self.others.map(&of),
            cu_others: of(self.cu_others),
            numbers: of(self.numbers),
            selected: self.selected.map(&of),
            cu_selected_rows: of(self.cu_selected_rows),
            first_other: of(self.first_other),
            cu_selected: of(self.cu_selected),
            stored: of(self.stored),
            cached: self.cached.map(&of),
        }
    }
}

impl Layout {
    fn of(needs: &SessionLimits) -> Layout {
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
            logit_rows: table(needs.logit_rows),
            cu_rows: table(needs.spans + 1),
            live_lens: table(needs.spans),
            prefix: [table(needs.spans), table(needs.spans)],
            suffix: [table(needs.spans), table(needs.spans)],
            choice: needs.selects.then(|| ChoiceTables {
                others: [table(needs.rows), table(needs.rows), table(needs.rows)],
                cu_others: table(needs.spans + 1),
                numbers: table(needs.rows),
                selected: [table(needs.rows), table(needs.rows), table(needs.rows)],
                cu_selected_rows: table(needs.spans + 1),
                first_other: table(needs.spans),
                cu_selected: table(needs.spans + 1),
                stored: table(needs.rows),
                cached: [table(needs.spans), table(needs.spans)],
            }),
            len: 0,
        };
        layout.len = len;
        layout
    }
}

impl ChoiceTables<usize> {
    /// Writes the tables of a placement, whose others are written already.
    fn write(self, table: &mut [i32], of: Layout, placement: &BatchMetadata, spans: usize) -> Result<()> {
        table[self.stored..][..placement.room.rows].fill(-1);
        let (mut first, mut other, mut selected) = (0, 0, 0);
        for (s, (span, parts)) in placement.spans.iter().zip(placement.parts).enumerate() {
            let row = |key: usize| first + key - span.start;
            let known = |table: &[i32], row: usize| -> Result<[i32; 3]> {
                Ok([count("rows", row)?, table[of.positions + row], table[of.cache_rows + row]])
            };
            for key in parts.always.clone() {
                let known = known(table, row(key))?;
                table[self.stored + row(key)] = known[2];
                for (list, value) in self.selected.iter().zip(known) {
                    table[list + selected] = value;
                }
                selected += 1;
            }
            table[self.first_other + s] = count("rows", selected)?;
            let all = parts.count() == parts.num_others();
            for number in 0..parts.num_others() {
                let row = row(parts.other(number));
                let known = known(table, row)?;
                for (list, value) in self.others.iter().zip(known) {
                    table[list + other] = value;
                }
                if all {
                    table[self.stored + row] = known[2];
                    table[self.numbers + selected + number] = count("rows", other)?;
                    for (list, value) in self.selected.iter().zip(known) {
                        table[list + selected + number] = value;
                    }
                }
                other += 1;
            }
            selected += parts.count();
            table[self.cu_others + s + 1] = count("rows", other)?;
            table[self.cu_selected_rows + s + 1] = count("rows", selected)?;
            table[self.cached[0] + s] = count("positions", span.cache_base)?;
            table[self.cached[1] + s] = count("positions", span.len)?;
            first += span.rows();
        }
        let last = placement.parts.len();
        let (other, selected) = (count("rows", other)?, count("rows", selected)?);
        table[self.cu_others + last + 1..=self.cu_others + spans].fill(other);
        table[self.cu_selected_rows + last + 1..=self.cu_selected_rows + spans].fill(selected);
        table[self.first_other + last..self.first_other + spans].fill(selected);
        Ok(())
    }
}

impl Rows {
    /// Elements of the buffer.
    pub(super) fn len(needs: &SessionLimits) -> usize {
        Layout::of(needs).len
    }

    pub(super) fn new(stream: &Stream, needs: &SessionLimits) -> Result<Rows> {
        let layout = Layout::of(needs);
        let (table, staging) = (stream.alloc(layout.len)?, Staging::new(stream, layout.len)?);
        Ok(Rows { table, staging, layout, room: LaunchBucket::default(), spans: needs.spans, parts: vec![] })
    }

    /// Puts a copy of the placement into the stream. `mask_slot` is the index of a mask token.
    pub(super) fn write(&mut self, placement: &BatchMetadata, mask_slot: usize) -> Result<()> {
        let Layout { tokens, positions, cache_rows, logit_rows, cu_rows, live_lens, prefix, suffix, choice, len } =
            self.layout;
        let mut table = vec![0; len];
        table[tokens..positions].fill(count("tokens", mask_slot)?);
        table[cache_rows..logit_rows].fill(-1);
        for (to, token) in table[tokens..].iter_mut().zip(placement.tokens) {
            *to = count("tokens", *token)?;
        }
        for (to, row) in table[logit_rows..].iter_mut().zip(placement.logit_rows) {
            *to = count("scored", *row)?;
        }
        let mut row = 0;
        for (s, span) in placement.spans.iter().enumerate() {
            for key in span.start..span.end {
                table[positions + row] = count("positions", placement.positions[row])?;
                table[cache_rows + row] = count("positions", span.cache_base + key)?;
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
        if let Some(choice) = choice {
            choice.write(&mut table, self.layout, placement, self.spans)?;
        }
        self.room = placement.room;
        self.parts = placement.parts.to_vec();
        self.staging.write(&mut self.table, &table)
    }

    fn at(&self, element: usize) -> u64 {
        self.table.address() + (element * size_of::<i32>()) as u64
    }

    /// What launches are sized for.
    pub(super) fn room(&self) -> LaunchBucket {
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

    pub(super) fn logit_rows(&self) -> u64 {
        self.at(self.layout.logit_rows)
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

    /// Those of a choice, where there are any.
    pub(super) fn choice(&self) -> Option<ChoiceTables<u64>> {
        self.layout.choice.map(|tables| tables.map(|element| self.at(element)))
    }

    /// The choice among each span's rows.
    pub(super) fn parts(&self) -> &[UpdateRanges] {
        &self.parts
    }

    /// Of each span, the numbers of the others that run. Waits for the device.
    pub(super) fn numbers(&self) -> Result<Vec<Vec<usize>>> {
        let Some(layout) = self.layout.choice else { return Ok(vec![]) };
        let table = self.table.read()?;
        let number = |value: i32| value.max(0) as usize;
        let (mut first, mut others) = (0, 0);
        let of = |parts: &UpdateRanges| {
            let at = layout.numbers + first + parts.always.len();
            let numbers =
                table[at..][..parts.count()].iter().map(|value| number(*value).saturating_sub(others)).collect();
            first += parts.rows();
            others += parts.num_others();
            numbers
        };
        Ok(self.parts.iter().map(of).collect())
    }
}
