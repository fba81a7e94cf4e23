//! A backend for the CPU that rounds activations to bf16 wherever the device stores them. It computes what the device computes, but
//! for the order of sums and the attention weights, which the device rounds too. It separates errors of the device from those of
//! bf16.
//!
//! V-verify uses the rows that the device selected, and this backend measures how far they are from its own selection. A second
//! instance, without rounding, serves as the CPU there.

use dllm_kernels::Result;
use dllm_kernels::backend::cpu::linear::Matrix;
use dllm_kernels::backend::cpu::{Cpu, attention};
use dllm_kernels::backend::{
    Backend, BatchMetadata, BufferKind, Heads, HostLogits, QkvRows, Residual, RowSet, SequenceRows, SessionLimits,
    Tensor, UpdateRanges,
};
use dllm_kernels::reference::{rope, vverify};
use half::bf16;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

/// The backend. One per session.
#[derive(Default)]
pub struct Bf16Reference {
    cpu: Cpu,
    angles: rope::Angles,
    tokens: Vec<u32>,
    /// Turns the rounding off.
    exact: bool,
    device: Rc<RefCell<Selections>>,
}

/// The rows that the device selected by V-verify, layer by layer, and how they compare with this backend's selection.
#[derive(Default)]
pub struct Selections {
    pub from_device: VecDeque<Vec<Vec<usize>>>,
    /// Selected rows, and those of them that this backend would not select.
    pub rows: usize,
    pub other_rows: usize,
    /// The largest angle by which a selected row had changed less than one that was not selected.
    pub worst: f64,
}

impl Bf16Reference {
    /// Creates a backend that uses the device's selection.
    pub fn with_device_selection(exact: bool, device: Rc<RefCell<Selections>>) -> Bf16Reference {
        Bf16Reference { exact, device, ..Bf16Reference::default() }
    }

    fn round(&self, x: f32) -> f32 {
        if self.exact { x } else { bf16::from_f32(x).to_f32() }
    }

    fn round_all(&self, list: &mut [f32]) {
        list.iter_mut().for_each(|x| *x = self.round(*x));
    }

    /// Returns the device's selection, after comparing it with this backend's cosines.
    fn follow(&self, similarity: &[f64], from_device: &[usize]) -> Vec<usize> {
        let own = vverify::lowest_of(similarity, from_device.len());
        let mut selection = self.device.borrow_mut();
        selection.rows += own.len();
        selection.other_rows += own.iter().filter(|row| !from_device.contains(row)).count();
        let angle = |row: &usize| similarity[*row].clamp(-1.0, 1.0).acos();
        let least = from_device.iter().map(angle).fold(f64::INFINITY, f64::min);
        let most = (0..similarity.len()).filter(|row| !from_device.contains(row)).map(|row| angle(&row));
        selection.worst = selection.worst.max(most.fold(0.0, f64::max) - least);
        from_device.to_vec()
    }
}

/// Activations, or logits, which stay f32.
pub struct Buffer {
    data: Vec<f32>,
    logits: bool,
}

/// Keys and values `[layers][positions, width]`.
pub struct Cache(Vec<[Vec<f32>; 2]>);

/// Metadata of a pass.
#[derive(Default)]
pub struct Batch {
    sequences: Vec<SequenceRows>,
    positions: Vec<usize>,
    tokens: Vec<usize>,
    logit_rows: Vec<usize>,
    updates: Vec<UpdateRanges>,
    /// For each sequence the rows of the pass that are recomputed.
    selected: Vec<Vec<usize>>,
    /// The place in the cache of each row.
    places: Vec<usize>,
}

impl Batch {
    /// Rows of a set, as indices of the rows of the pass.
    fn rows(&self, set: RowSet) -> Vec<usize> {
        match set {
            RowSet::All => (0..self.places.len()).collect(),
            RowSet::Logits => self.logit_rows.clone(),
            RowSet::Selected => self.selected.concat(),
        }
    }
}

fn qkv_width(heads: Heads, has_values: bool) -> usize {
    heads.q_width() + heads.kv_width() * if has_values { 2 } else { 1 }
}

impl Backend for Bf16Reference {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type KvCache = Cache;
    type Batch = Batch;

    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Matrix> {
        self.cpu.matrix(parts, biases)
    }

    fn vector(&self, tensor: Tensor) -> Result<Vec<f32>> {
        self.cpu.vector(tensor)
    }

    fn prepare(&mut self, limits: &SessionLimits, rope_theta: f32) -> Result<()> {
        self.angles.extend(rope_theta, limits.heads.head_dim, limits.longest);
        self.cpu.prepare(limits, rope_theta)
    }

    fn buffer(&self, kind: BufferKind, rows: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { data: self.cpu.buffer(kind, rows, width)?, logits: kind == BufferKind::Logits })
    }

    fn kv_cache(&self, layers: usize, positions: usize, width: usize) -> Result<Cache> {
        Ok(Cache((0..layers).map(|_| [(); 2].map(|()| vec![0.0; positions * width])).collect()))
    }

    fn batch(&self, _limits: &SessionLimits) -> Result<Batch> {
        Ok(Batch::default())
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.tokens = tokens.to_vec();
        Ok(())
    }

    fn set_batch(&mut self, batch: &mut Batch, metadata: &BatchMetadata) -> Result<()> {
        let BatchMetadata { sequences, positions, tokens, logit_rows, updates, .. } = *metadata;
        let places = sequences.iter().flat_map(|rows| (rows.start..rows.end).map(|key| rows.cache_base + key));
        *batch = Batch {
            sequences: sequences.to_vec(),
            positions: positions.to_vec(),
            tokens: tokens.to_vec(),
            logit_rows: logit_rows.to_vec(),
            updates: updates.to_vec(),
            selected: vec![],
            places: places.collect(),
        };
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, batch: &Batch, out: &mut Buffer) -> Result<()> {
        for (index, row) in batch.tokens.iter().zip(out.data.chunks_exact_mut(table.cols())) {
            table.row_into(self.tokens[*index] as usize, row);
        }
        Ok(())
    }

    fn residual_norm(
        &mut self,
        x: &mut Buffer,
        residual: Residual<Bf16Reference>,
        batch: &Batch,
        (weight, eps): (&Vec<f32>, f32),
        out: &mut Buffer,
        rows: usize,
    ) -> Result<()> {
        let width = weight.len();
        for row in 0..rows {
            let range = row * width..(row + 1) * width;
            let x = &mut x.data[range.clone()];
            let delta = match residual {
                Residual::None => None,
                Residual::Rows(delta) => Some(&delta.data[range.clone()]),
                Residual::Features(features, first_row) => {
                    Some(&features.data[(first_row + batch.places[row]) * width..][..width])
                }
            };
            if let Some(delta) = delta {
                x.iter_mut().zip(delta).for_each(|(x, delta)| *x = self.round(*x + delta));
            }
            let mean = x.iter().map(|x| x * x).sum::<f32>() / width as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((out, x), weight) in out.data[range].iter_mut().zip(x).zip(weight) {
                *out = self.round(self.round(*x * scale) * weight);
            }
        }
        Ok(())
    }

    fn linear(
        &mut self,
        x: &Buffer,
        w: &Matrix,
        outputs: Option<Range<usize>>,
        out: &mut Buffer,
        rows: usize,
    ) -> Result<()> {
        self.cpu.linear(&x.data, w, outputs, &mut out.data, rows)?;
        if !out.logits {
            self.round_all(&mut out.data);
        }
        Ok(())
    }

    fn rope(
        &mut self,
        (qkv, QkvRows { rows, has_values }): (&mut Buffer, QkvRows),
        heads: Heads,
        batch: &Batch,
        mut store: Option<(&mut Cache, usize)>,
    ) -> Result<()> {
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let buffer = qkv.data.chunks_exact_mut(qkv_width(heads, has_values));
        for (row_of_pass, row) in batch.rows(rows).into_iter().zip(buffer) {
            rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(batch.positions[row_of_pass]));
            self.round_all(row);
            if let Some((Cache(layers), layer)) = &mut store {
                let first = batch.places[row_of_pass] * kv;
                layers[*layer][0][first..first + kv].copy_from_slice(&row[q..q + kv]);
                if has_values {
                    layers[*layer][1][first..first + kv].copy_from_slice(&row[q + kv..]);
                }
            }
        }
        Ok(())
    }

    fn attention(
        &mut self,
        (qkv, QkvRows { rows, has_values }): (&Buffer, QkvRows),
        heads: Heads,
        batch: &Batch,
        cache: Option<(&Cache, usize)>,
        out: &mut Buffer,
    ) -> Result<()> {
        let cached = cache.map(|(Cache(layers), layer)| (&layers[layer][0][..], &layers[layer][1][..]));
        match (rows, cached) {
            (RowSet::Selected, Some(cached)) => {
                let counts: Vec<usize> = batch.selected.iter().map(Vec::len).collect();
                let stride = qkv_width(heads, has_values);
                let out = &mut out.data;
                attention::attention_cached(&qkv.data, stride, heads, &batch.sequences, &counts, cached, out);
            }
            (_, cached) => attention::attention(&qkv.data, heads, &batch.sequences, cached, &mut out.data),
        }
        self.round_all(&mut out.data);
        Ok(())
    }

    fn swiglu(&mut self, gate_up: &Buffer, width: usize, out: &mut Buffer, rows: usize) -> Result<()> {
        let rows = gate_up.data.chunks_exact(2 * width).zip(out.data.chunks_exact_mut(width)).take(rows);
        for (from, out) in rows {
            let (gate, up) = from.split_at(width);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = self.round(self.round(gate / (1.0 + (-gate).exp())) * up);
            }
        }
        Ok(())
    }

    fn gather(&mut self, x: &Buffer, batch: &Batch, set: RowSet, width: usize, out: &mut Buffer) -> Result<()> {
        for (row, to) in batch.rows(set).into_iter().zip(out.data.chunks_exact_mut(width)) {
            to.copy_from_slice(&x.data[row * width..(row + 1) * width]);
        }
        Ok(())
    }

    fn select_rows(
        &mut self,
        values: Option<&Buffer>,
        heads: Heads,
        batch: &mut Batch,
        (Cache(layers), layer): (&mut Cache, usize),
    ) -> Result<()> {
        let width = heads.kv_width();
        let from_device =
            values.map(|_| self.device.borrow_mut().from_device.pop_front().expect("a selection of the device"));
        batch.selected.clear();
        let mut first = 0;
        for (s, (sequence, update)) in batch.sequences.iter().zip(&batch.updates).enumerate() {
            let mut selected: Vec<usize> = update.always.clone().collect();
            if let (Some(Buffer { data, .. }), Some(from_device)) = (values, &from_device) {
                let fresh = |key: usize| &data[(first + key - sequence.start) * width..][..width];
                let cached = |key: usize| (sequence.cache_base + key) * width..(sequence.cache_base + key + 1) * width;
                let others: Vec<usize> = (0..update.num_others()).map(|index| update.other(index)).collect();
                let cache = &mut layers[layer][1];
                let indices = if update.num_selected() == others.len() {
                    (0..others.len()).collect()
                } else {
                    // The device reports nothing for unconditional sequences.
                    let cosine = |key: &usize| vverify::cosine(fresh(*key), &cache[cached(*key)]);
                    let similarity: Vec<f64> = others.iter().map(cosine).collect();
                    self.follow(&similarity, &from_device[s])
                };
                selected.extend(indices.iter().map(|index| others[*index]));
                for key in update.always.clone().chain(others) {
                    cache[cached(key)].copy_from_slice(fresh(key));
                }
            }
            batch.selected.push(selected.iter().map(|key| first + key - sequence.start).collect());
            first += sequence.rows();
        }
        Ok(())
    }

    fn selected_rows(&self, _batch: &Batch) -> Result<Vec<Vec<usize>>> {
        unreachable!("this backend follows the device's selection")
    }

    fn store_features(
        &mut self,
        (delta, set): (&Buffer, RowSet),
        width: usize,
        batch: &Batch,
        (features, first_row): (&mut Buffer, usize),
    ) -> Result<()> {
        for (row_of_pass, row) in batch.rows(set).into_iter().zip(delta.data.chunks_exact(width)) {
            features.data[(first_row + batch.places[row_of_pass]) * width..][..width].copy_from_slice(row);
        }
        Ok(())
    }

    fn read(&self, buffer: &Buffer, rows: usize, width: usize) -> Result<Vec<f32>> {
        Ok(buffer.data[..rows * width].to_vec())
    }
}

impl HostLogits for Bf16Reference {
    fn host_logits(buffer: &mut Buffer) -> &mut [f32] {
        &mut buffer.data
    }
}
