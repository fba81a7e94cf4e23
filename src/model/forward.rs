//! The forward pass over a backend: embedding, layers, partial layers and head.

use super::plan::{CachePlan, LayerPlan, SelectedRows};
use super::session::{PassBuffers, Session};
use super::transformer::Transformer;
use crate::backend::{Backend, QkvRows, Residual, RowSet, SequenceRows};
use crate::error::Result;
use std::ops::Range;

/// Hidden states that a caller asked for.
type Hidden<'a> = Option<&'a mut Vec<Vec<f32>>>;

impl<B: Backend> Session<'_, B> {
    /// Embeds the rows of pass `pass`.
    pub(crate) fn embed(&mut self, pass: usize, hidden: Hidden) -> Result<()> {
        let PassBuffers { batch, bucket, .. } = &self.passes[pass];
        self.backend.embed(&self.transformer.embedding, batch, &mut self.buffers.x)?;
        if let Some(hidden) = hidden {
            hidden.push(self.backend.read(&self.buffers.x, bucket.rows, self.transformer.config.d_model)?);
        }
        Ok(())
    }

    /// Runs layer `i` of pass `pass`. The last layer ends after attention if the head can compute the rest of it.
    pub(crate) fn layer(&mut self, pass: usize, plan: &dyn CachePlan, i: usize, hidden: Hidden) -> Result<()> {
        let Transformer { config, layers, .. } = self.transformer;
        self.residual_norm_of(pass, plan, i, &layers[i].attn_norm)?;
        if i > 0
            && let Some(hidden) = hidden
        {
            hidden.push(self.backend.read(&self.buffers.x, self.passes[pass].bucket.rows, config.d_model)?);
        }
        match plan.layer(i) {
            LayerPlan::Full { reuse, store, store_features } => self.full_layer(pass, i, reuse, store, store_features),
            LayerPlan::Partial(_) => self.partial_layer(pass, i),
        }
    }

    /// Adds the output of layer `i - 1` to the residual stream, and norms it for layer `i`, or for the head.
    fn residual_norm_of(&mut self, pass: usize, plan: &dyn CachePlan, i: usize, weight: &B::Vector) -> Result<()> {
        let eps = self.transformer.config.rms_norm_eps;
        let PassBuffers { batch, bucket, .. } = &self.passes[pass];
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        let previous = i.checked_sub(1).map(|previous| plan.layer(previous));
        let residual = match (previous, &b.features) {
            (Some(LayerPlan::Partial(_)), Some(features)) => {
                Residual::Features(&features.mlp, features.first_row(i - 1))
            }
            (Some(_), _) => Residual::Rows(&b.delta),
            (None, _) => Residual::None,
        };
        backend.residual_norm(&mut b.x, residual, batch, (weight, eps), &mut b.normed, bucket.rows)
    }

    /// Layer `i` for every row. Its normed input is in `normed`; its MLP output stays in `delta`.
    fn full_layer(&mut self, pass: usize, i: usize, reuse: bool, store: bool, store_features: bool) -> Result<()> {
        let Transformer { config, layers, .. } = self.transformer;
        let (layer, heads, eps) = (&layers[i], config.heads(), config.rms_norm_eps);
        let PassBuffers { batch, bucket, .. } = &self.passes[pass];
        let (backend, b, rows) = (&mut self.backend, &mut self.buffers, bucket.rows);
        backend.linear(&b.normed, &layer.qkv, None, &mut b.qkv, rows)?;
        let cache = if store { b.kv_cache.as_mut().map(|cache| (cache, i)) } else { None };
        assert!(!store || cache.is_some(), "the session has no key/value cache");
        backend.rope((&mut b.qkv, QkvRows::ALL), heads, batch, cache)?;
        let cache = if reuse { b.kv_cache.as_ref().map(|cache| (cache, i)) } else { None };
        assert!(!reuse || cache.is_some(), "the session has no key/value cache");
        backend.attention((&b.qkv, QkvRows::ALL), heads, batch, cache, &mut b.attn)?;
        if i + 1 == layers.len() && !store_features {
            return Ok(()); // The head computes the rest for the rows that need logits.
        }
        let mut features = if store_features { b.features.as_mut() } else { None };
        assert!(!store_features || features.is_some(), "the session has no feature cache");
        let d = config.d_model;
        backend.linear(&b.attn, &layer.attn_out, None, &mut b.delta, rows)?;
        if let Some(features) = &mut features {
            let first_row = features.first_row(i);
            backend.store_features((&b.delta, RowSet::All), d, batch, (&mut features.attention, first_row))?;
        }
        let residual = Residual::Rows(&b.delta);
        backend.residual_norm(&mut b.x, residual, batch, (&layer.mlp_norm, eps), &mut b.normed, rows)?;
        backend.linear(&b.normed, &layer.gate_up, None, &mut b.gate_up, rows)?;
        backend.swiglu(&b.gate_up, config.mlp_hidden_size, &mut b.act, rows)?;
        backend.linear(&b.act, &layer.down, None, &mut b.delta, rows)?;
        if let Some(features) = &mut features {
            let first_row = features.first_row(i);
            backend.store_features((&b.delta, RowSet::All), d, batch, (&mut features.mlp, first_row))?;
        }
        Ok(())
    }

    /// Layer `i` for the rows of its update. Its normed input is in `normed`; its outputs are stored in the feature cache.
    fn partial_layer(&mut self, pass: usize, i: usize) -> Result<()> {
        let Transformer { config, layers, .. } = self.transformer;
        let (layer, eps, d) = (&layers[i], config.rms_norm_eps, config.d_model);
        let rows = self.passes[pass].bucket.selected;
        if rows > 0 {
            self.partial_attention(pass, i)?;
        }
        let PassBuffers { batch, bucket, .. } = &self.passes[pass];
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        let Some(features) = &mut b.features else { panic!("the session has no feature cache") };
        let first_row = features.first_row(i);
        let residual = Residual::Features(&features.attention, first_row);
        backend.residual_norm(&mut b.x, residual, batch, (&layer.mlp_norm, eps), &mut b.normed, bucket.rows)?;
        if rows > 0 {
            backend.gather(&b.normed, batch, RowSet::Selected, d, &mut b.delta)?;
            backend.linear(&b.delta, &layer.gate_up, None, &mut b.gate_up, rows)?;
            backend.swiglu(&b.gate_up, config.mlp_hidden_size, &mut b.act, rows)?;
            backend.linear(&b.act, &layer.down, None, &mut b.delta, rows)?;
            backend.store_features((&b.delta, RowSet::Selected), d, batch, (&mut features.mlp, first_row))?;
        }
        Ok(())
    }

    /// Selects the rows of layer `i`, and computes attention for them.
    fn partial_attention(&mut self, pass: usize, i: usize) -> Result<()> {
        let Transformer { config, layers, .. } = self.transformer;
        let (layer, heads, d) = (&layers[i], config.heads(), config.d_model);
        let (q, kv) = (config.q_width(), config.kv_width());
        let num_branches = self.num_branches();
        let PassBuffers { batch, bucket, sequences, updates } = &mut self.passes[pass];
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        let (Some(cache), Some(features)) = (&mut b.kv_cache, &mut b.features) else {
            panic!("the session has no feature cache")
        };
        // With V-verify the values of all rows are computed first; without it only those of the recomputed rows.
        let verifies = updates.iter().any(|update| update.ratio.is_some());
        if verifies {
            backend.linear(&b.normed, &layer.qkv, Some(q + kv..q + 2 * kv), &mut b.qkv, bucket.rows)?;
        }
        backend.select_rows(verifies.then_some(&b.qkv), heads, batch, (cache, i))?;
        if let (true, Some(selected)) = (verifies, &mut self.selected) {
            let mut rows = backend.selected_rows(batch)?;
            rows.truncate(sequences.len() / num_branches);
            selected.push(SelectedRows { layer: i, rows });
        }
        let qkv_rows = QkvRows { rows: RowSet::Selected, has_values: !verifies };
        let outputs = 0..if verifies { q + kv } else { q + 2 * kv };
        let rows = bucket.selected;
        backend.gather(&b.normed, batch, RowSet::Selected, d, &mut b.delta)?;
        backend.linear(&b.delta, &layer.qkv, Some(outputs), &mut b.qkv, rows)?;
        backend.rope((&mut b.qkv, qkv_rows), heads, batch, Some((cache, i)))?;
        backend.attention((&b.qkv, qkv_rows), heads, batch, Some((cache, i)), &mut b.attn)?;
        backend.linear(&b.attn, &layer.attn_out, None, &mut b.delta, rows)?;
        let first_row = features.first_row(i);
        backend.store_features((&b.delta, RowSet::Selected), d, batch, (&mut features.attention, first_row))
    }

    /// Computes the logits, and the rest of the last layer where it was left out. Row i of the logits buffer belongs to logit
    /// row i.
    pub(crate) fn head(&mut self, pass: usize, plan: &dyn CachePlan, hidden: Hidden) -> Result<()> {
        let Transformer { config, embedding, layers, final_norm, head } = self.transformer;
        let Some(last) = layers.last() else { return Ok(()) };
        let rows = self.passes[pass].bucket.logit_rows;
        if rows == 0 {
            return Ok(());
        }
        let is_open = plan.layer(layers.len() - 1).is_full_without_features();
        if !is_open {
            self.residual_norm_of(pass, plan, layers.len(), final_norm)?;
        }
        let batch = &self.passes[pass].batch;
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        let head = head.as_ref().unwrap_or(embedding);
        let (d, eps) = (config.d_model, config.rms_norm_eps);
        if !is_open {
            backend.gather(&b.normed, batch, RowSet::Logits, d, &mut b.logit_x)?;
            if let Some(hidden) = hidden {
                hidden.push(backend.read(&b.logit_x, rows, d)?);
            }
            return backend.linear(&b.logit_x, head, None, &mut b.logits, rows);
        }
        backend.gather(&b.x, batch, RowSet::Logits, d, &mut b.logit_x)?;
        backend.gather(&b.attn, batch, RowSet::Logits, config.q_width(), &mut b.logit_attn)?;
        backend.linear(&b.logit_attn, &last.attn_out, None, &mut b.delta, rows)?;
        let residual = Residual::Rows(&b.delta);
        backend.residual_norm(&mut b.logit_x, residual, batch, (&last.mlp_norm, eps), &mut b.normed, rows)?;
        backend.linear(&b.normed, &last.gate_up, None, &mut b.gate_up, rows)?;
        backend.swiglu(&b.gate_up, config.mlp_hidden_size, &mut b.act, rows)?;
        backend.linear(&b.act, &last.down, None, &mut b.delta, rows)?;
        let residual = Residual::Rows(&b.delta);
        backend.residual_norm(&mut b.logit_x, residual, batch, (final_norm, eps), &mut b.normed, rows)?;
        if let Some(hidden) = hidden {
            hidden.push(backend.read(&b.normed, rows, d)?);
        }
        backend.linear(&b.normed, head, None, &mut b.logits, rows)
    }

    /// Returns the multiply-accumulates of matrix products and attention in these layers of pass `pass`, without padded query rows; padded logit rows count.
    /// Index `num_layers` is the head.
    pub(crate) fn pass_macs(&self, pass: usize, plan: &dyn CachePlan, range: Range<usize>) -> u64 {
        let Transformer { config, layers, .. } = self.transformer;
        let PassBuffers { bucket, sequences, updates, .. } = &self.passes[pass];
        let (d, q, kv) = (config.d_model, config.q_width(), config.kv_width());
        let after_attention = |rows: usize| rows * d * (q + 3 * config.mlp_hidden_size);
        let attention = |rows: usize, keys: usize| rows * (d * (q + 2 * kv) + 2 * keys * q);
        let all: usize = sequences.iter().map(SequenceRows::rows).sum();
        // The head computes the rest of the last layer for the logit rows only.
        let is_open = |layer: usize| layer + 1 == layers.len() && plan.layer(layer).is_full_without_features();
        let macs_of = |layer: usize| {
            if layer == layers.len() {
                let rest = if layer > 0 && is_open(layer - 1) { after_attention(bucket.logit_rows) } else { 0 };
                return rest + bucket.logit_rows * d * config.vocab_size;
            }
            match plan.layer(layer) {
                LayerPlan::Full { reuse, .. } => {
                    let attended: usize = sequences.iter().map(|s| attention(s.rows(), s.keys(reuse))).sum();
                    attended + if is_open(layer) { 0 } else { after_attention(all) }
                }
                LayerPlan::Partial(_) if bucket.selected == 0 => 0,
                LayerPlan::Partial(update) => {
                    let pairs = updates.iter().zip(sequences);
                    let attended: usize = pairs.map(|(update, s)| attention(update.rows(), s.num_keys)).sum();
                    let values = if update.others.is_some() { (all - bucket.selected) * d * kv } else { 0 };
                    values + attended + after_attention(bucket.selected)
                }
            }
        };
        range.map(|layer| macs_of(layer) as u64).sum()
    }
}
