//! The state of a decode on the device: what unmask and advance read and write between passes.

use super::{Staging, checked_i32};
use crate::abi::*;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Pinned, Stream};
use crate::ops;
use crate::sampling::{QuotaSchedule, SequenceState};

/// Sizes of a [`DecodeState`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeSizes {
    /// Sequences of the batch.
    pub sequences: usize,
    /// Candidates of a pass, over all sequences.
    pub candidates: usize,
    /// Steps of a schedule by shares.
    pub ratios: usize,
    /// Tokens that end a sequence early.
    pub end_tokens: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
}

impl DecodeSizes {
    /// Bytes of device memory of a [`DecodeState`] and of `tables` row tables.
    ///
    /// # Errors
    /// [`Error::Argument`] when a size does not fit 32 bits.
    pub fn device_bytes(self, tables: usize) -> Result<usize> {
        let elements = tables * RowTable::len(self) + Layout::new(self).len + 3 * self.sequences + 3 * self.candidates;
        Ok(size_of::<i32>() * elements + self.unmask_workspace()?)
    }

    fn unmask_workspace(self) -> Result<usize> {
        let params = dllm_unmask_params {
            max_rows: checked_i32("candidates", self.candidates)?,
            num_sequences: checked_i32("sequences", self.sequences)?,
            vocab_size: checked_i32("vocab_size", self.vocab_size)?,
            ..Default::default()
        };
        Ok(ops::unmask::plan(&params).workspace_bytes as usize)
    }
}

/// State of a decode on the device.
pub(crate) struct DecodeState {
    pub(super) sizes: DecodeSizes,
    pub(super) layout: Layout,
    /// Written by one copy when a run begins; advance updates it.
    state: Buffer<i32>,
    staging: Staging<i32>,
    /// `[sequences]` each: masks left, committed, failed.
    pub(super) outcome: [Buffer<i32>; 3],
    pub(super) predicted: Buffer<i32>,
    pub(super) confidence: Buffer<f32>,
    pub(super) min_logit: Buffer<f32>,
    pub(super) workspace: Buffer<u8>,
    pub(super) progress: Pinned<i32>,
    /// Passes enqueued so far.
    passes: i32,
}

/// Offsets of the parts of the state, in elements.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub quota: usize,
    pub commit_before: usize,
    pub steps: usize,
    pub control: usize,
    pub sequences: usize,
    pub end_tokens: usize,
    pub ratios: usize,
    len: usize,
}

/// Elements of an `advance` sequence, and of its control block.
const SEQUENCE_LEN: usize = size_of::<dllm_advance_sequence>() / 4;
const CONTROL_LEN: usize = size_of::<dllm_advance_control>() / 4;

impl Layout {
    fn new(sizes: DecodeSizes) -> Layout {
        let mut len = 0;
        let mut part = |elements: usize| {
            let offset = len;
            len += elements.next_multiple_of(4); // 16 bytes
            offset
        };
        let mut layout = Layout {
            quota: part(sizes.sequences),
            commit_before: part(sizes.sequences),
            steps: part(sizes.sequences),
            control: part(CONTROL_LEN),
            sequences: part(sizes.sequences * SEQUENCE_LEN),
            end_tokens: part(sizes.end_tokens),
            ratios: part(sizes.ratios),
            len: 0,
        };
        layout.len = len;
        layout
    }
}

/// The start of a run, as the host knows it.
pub(crate) struct RunStart<'a> {
    /// State of each sequence.
    pub sequences: &'a [SequenceState],
    /// For each sequence the offset of its tokens and its length.
    pub tokens: &'a [(usize, usize)],
    /// Quotas of the passes.
    pub schedule: &'a QuotaSchedule,
    /// Passes of the schedule before this run.
    pub first_pass: usize,
    /// Tokens that end a sequence early: none, or as many as the state has room for.
    pub end_tokens: &'a [u32],
}

impl DecodeState {
    /// Allocates the state.
    pub fn new(stream: &Stream, sizes: DecodeSizes) -> Result<DecodeState> {
        let layout = Layout::new(sizes);
        let mut workspace = stream.alloc(sizes.unmask_workspace()?)?;
        workspace.fill_zero()?;
        let DecodeSizes { sequences, candidates, .. } = sizes;
        Ok(DecodeState {
            sizes,
            layout,
            state: stream.alloc(layout.len)?,
            staging: Staging::new(stream, layout.len)?,
            outcome: [stream.alloc(sequences)?, stream.alloc(sequences)?, stream.alloc(sequences)?],
            predicted: stream.alloc(candidates)?,
            confidence: stream.alloc(candidates)?,
            min_logit: stream.alloc(candidates)?,
            workspace,
            progress: Pinned::new(stream.device(), size_of::<dllm_progress>() / 4)?,
            passes: 0,
        })
    }

    pub(super) fn address(&self, element: usize) -> u64 {
        self.state.address() + 4 * element as u64
    }

    /// Enqueues a copy of the state at the start of a run.
    ///
    /// # Errors
    /// [`Error::Argument`] when the run has more ratios or another number of end tokens than the state was made for.
    pub fn begin(&mut self, start: &RunStart) -> Result<()> {
        let mut state = vec![0i32; self.layout.len];
        self.write_sequences(&mut state, start)?;
        self.write_control(&mut state, start)?;
        self.staging.write(&mut self.state, &state)
    }

    fn write_sequences(&self, state: &mut [i32], start: &RunStart) -> Result<()> {
        let Layout { quota, commit_before, steps, sequences, .. } = self.layout;
        let int = |value: usize| checked_i32("sequences", value);
        for (s, (sequence, (first_token, length))) in start.sequences.iter().zip(start.tokens).enumerate() {
            let active = sequence.active;
            state[quota + s] = if active { saturating_i32(sequence.first_quota) } else { 0 };
            state[commit_before + s] = if active { saturating_i32(sequence.first_commit_before) } else { i32::MIN };
            state[steps + s] = int(sequence.forwards)?;
            let sequence = dllm_advance_sequence {
                first_token: int(*first_token)?,
                length: int(*length)?,
                generated: int(sequence.generated)?,
                active_start: int(sequence.active_range.start)?,
                active_end: int(sequence.active_range.end)?,
                quota_start: int(sequence.quota_range.start)?,
                quota_end: int(sequence.quota_range.end)?,
                commit_before: i32::MAX,
                initial_masks: int(sequence.initial_masks)?,
                per_step: int(sequence.per_step)?,
                deficit: int(sequence.deficit)?,
                max_passes: saturating_i32(sequence.max_passes),
                forwards: int(sequence.forwards)?,
                active: active.into(),
                ended: 0,
                reserved: 0,
            };
            let to = &mut state[sequences + s * SEQUENCE_LEN..][..SEQUENCE_LEN];
            to.copy_from_slice(bytemuck::cast_slice(&[sequence]));
        }
        Ok(())
    }

    fn write_control(&self, state: &mut [i32], start: &RunStart) -> Result<()> {
        let Layout { control, end_tokens, ratios, .. } = self.layout;
        let int = |value: usize| checked_i32("schedule", value);
        let (schedule, steps, shares): (_, _, &[f32]) = match start.schedule {
            QuotaSchedule::Unlimited => (DLLM_SCHEDULE_NONE, 0, &[]),
            QuotaSchedule::Llada { steps } => (DLLM_SCHEDULE_LLADA, int(*steps)?, &[]),
            QuotaSchedule::Dream(ratios) => (DLLM_SCHEDULE_DREAM, 0, ratios),
            QuotaSchedule::CarryOver => (DLLM_SCHEDULE_CARRY_OVER, 0, &[]),
        };
        if shares.len() > self.sizes.ratios {
            return Err(Error::argument("schedule", format!("at most {} ratios", self.sizes.ratios), shares.len()));
        }
        if !start.end_tokens.is_empty() && start.end_tokens.len() != self.sizes.end_tokens {
            let expected = format!("none, or {}", self.sizes.end_tokens);
            return Err(Error::argument("end_tokens", expected, start.end_tokens.len()));
        }
        let block = dllm_advance_control {
            schedule: schedule as i32,
            steps,
            pass: int(start.first_pass)?,
            num_ratios: int(shares.len())?,
            passes: self.passes,
            failed_sequence: DLLM_NONE_FAILED,
            failed_position: DLLM_NONE_FAILED,
            ..Default::default()
        };
        state[control..][..CONTROL_LEN].copy_from_slice(bytemuck::cast_slice(&[block]));
        state[end_tokens..][..self.sizes.end_tokens].fill(-1); // no token
        for (to, token) in state[end_tokens..].iter_mut().zip(start.end_tokens) {
            *to = checked_i32("end_tokens", *token as usize)?;
        }
        state[ratios..][..shares.len()].copy_from_slice(bytemuck::cast_slice(shares));
        Ok(())
    }

    /// Counts a pass whose last kernel was enqueued. The device counts it too.
    pub fn count_pass(&mut self) {
        self.passes = self.passes.wrapping_add(1);
    }

    /// Whether the device has finished all passes that were counted.
    pub fn is_finished(&self) -> bool {
        self.progress.get(0) == self.passes
    }

    /// Returns how many sequences are active in the next pass.
    ///
    /// # Errors
    /// [`Error::NoFiniteLogit`] when a candidate had no finite logit.
    pub fn num_active(&self) -> Result<usize> {
        const ACTIVE: usize = std::mem::offset_of!(dllm_progress, active) / 4;
        const FAILED: usize = std::mem::offset_of!(dllm_progress, failed_sequence) / 4;
        let [sequence, position, step] = [FAILED, FAILED + 1, FAILED + 2].map(|i| self.progress.get(i));
        match (sequence, position) {
            (DLLM_NONE_FAILED, _) => Ok(self.progress.get(ACTIVE).max(0) as usize),
            (_, 0..) => Err(Error::NoFiniteLogit {
                sequence: sequence as usize,
                position: position as usize,
                step: step.max(0) as usize,
            }),
            _ => Err(Error::Unavailable(format!("sequence {sequence}: a table on the device is damaged"))),
        }
    }

    /// Returns the passes of the run in which a sequence was active.
    pub fn nfe(&self) -> usize {
        const NFE: usize = std::mem::offset_of!(dllm_progress, nfe) / 4;
        self.progress.get(NFE).max(0) as usize
    }

    /// Reads back the sequences after a run that began with `start`. Synchronises.
    pub fn read_sequences(&self, start: &[SequenceState]) -> Result<Vec<SequenceState>> {
        let state = self.state.read()?;
        let after = |(start, state): (&SequenceState, &[i32])| {
            let state: dllm_advance_sequence = bytemuck::pod_read_unaligned(bytemuck::cast_slice(state));
            let count = |value: i32| value.max(0) as usize;
            SequenceState {
                forwards: count(state.forwards),
                per_step: count(state.per_step),
                deficit: count(state.deficit),
                max_passes: if state.max_passes == i32::MAX { start.max_passes } else { count(state.max_passes) },
                ..start.clone()
            }
        };
        Ok(start.iter().zip(state[self.layout.sequences..].chunks(SEQUENCE_LEN)).map(after).collect())
    }

    /// Reads back the token and the confidence of each row of the last pass. Synchronises.
    pub fn read_predictions(&self) -> Result<(Vec<i32>, Vec<f32>)> {
        Ok((self.predicted.read()?, self.confidence.read()?))
    }
}

fn saturating_i32(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// The candidates of one kind of pass: unmask's table of rows, and the bounds of each sequence.
pub(crate) struct RowTable {
    table: Buffer<i32>,
    staging: Staging<i32>,
    sizes: DecodeSizes,
}

/// A candidate: the row of [`dllm_unmask_row`] without its sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableRow {
    /// Index in the concatenated tokens.
    pub token: usize,
    /// Row of the logits.
    pub logits_row: usize,
    /// Position in its sequence.
    pub position: usize,
}

impl RowTable {
    fn len(sizes: DecodeSizes) -> usize {
        4 * sizes.candidates + sizes.sequences + 1
    }

    /// Allocates a table.
    pub fn new(stream: &Stream, sizes: DecodeSizes) -> Result<RowTable> {
        let len = RowTable::len(sizes);
        Ok(RowTable { table: stream.alloc(len)?, staging: Staging::new(stream, len)?, sizes })
    }

    /// Enqueues a copy of the candidates, one list per sequence of the batch.
    pub fn write(&mut self, rows_of: &[Vec<TableRow>]) -> Result<()> {
        let mut table = vec![0i32; RowTable::len(self.sizes)];
        let (rows, bounds) = table.split_at_mut(4 * self.sizes.candidates);
        let mut rows = rows.chunks_exact_mut(4);
        let mut written = 0;
        let int = |value: usize| checked_i32("candidates", value);
        for (s, candidates) in rows_of.iter().enumerate() {
            for (candidate, row) in candidates.iter().zip(&mut rows) {
                let TableRow { token, logits_row, position } = *candidate;
                row.copy_from_slice(&[int(token)?, int(logits_row)?, int(position)?, int(s)?]);
                written += 1;
            }
            bounds[s + 1] = int(written)?;
        }
        self.staging.write(&mut self.table, &table)
    }

    /// Addresses of the rows, of the bounds, and of the last bound, which is the number of rows.
    pub(super) fn addresses(&self) -> [u64; 3] {
        let rows = self.table.address();
        let bounds = rows + 16 * self.sizes.candidates as u64;
        [rows, bounds, bounds + 4 * self.sizes.sequences as u64]
    }
}
