//! One forward pass, from tokens to logits of the rows that are asked for.

use super::config::{Config, Family};
use super::course::DeviceLoop;
use super::names::Names;
use super::sizes::{SessionConfig, Widths};
use super::weights::Weights;
use super::window::QueryRows;
use crate::backend::{
    Backend, BatchMetadata, HostUnmask, LaunchBucket, RowSet, RowUpdate, SequenceRows, SessionLimits, UpdateRanges,
};
use crate::error::{Error, Result};
use crate::sampling::{Candidates, Prediction, SamplingParams};
use crate::tensor::Tensor;
use serde::Serialize;
use std::collections::HashMap;
use std::ops::Range;

/// What a layer runs of a pass, and what it does with the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerPlan {
    /// Every row of the pass runs.
    Full {
        /// Attend to cached keys and values outside the rows of the pass.
        reuse: bool,
        /// Leave this pass's keys and values in the cache.
        store: bool,
        /// Leave what attention and the MLP add behind, for later passes. Not of the first layer.
        store_features: bool,
    },
    /// Some rows run, attend to what is cached of all positions, and renew what is cached and kept of them; the other rows
    /// add what was kept. Not of the first layer. One choice for all layers that have one.
    Partial(RowUpdate),
}

impl LayerPlan {
    /// The choice that is made, if one is.
    pub fn choice(&self) -> Option<RowUpdate> {
        match self {
            LayerPlan::Full { .. } => None,
            LayerPlan::Partial(choice) => Some(*choice),
        }
    }
}

/// Asked layer by layer: what a pass runs, reuses and leaves behind. Implemented by [`crate::cache`].
pub trait CachePlan {
    /// What layer `layer` does.
    fn layer(&self, layer: usize) -> LayerPlan;
}

/// A plan written down.
impl CachePlan for Vec<LayerPlan> {
    fn layer(&self, layer: usize) -> LayerPlan {
        self[layer]
    }
}

/// One forward pass and the decision that follows it.
pub struct Pass<'a> {
    /// Cache use, layer by layer.
    pub plan: &'a dyn CachePlan,
    /// What runs, at most one entry per sequence.
    pub windows: &'a [QueryRows],
    /// What to decide; candidates lie inside the window of their sequence.
    pub groups: &'a [Candidates],
    /// How to decide it.
    pub unmask: &'a SamplingParams,
    /// With guidance: how the unconditional twins run.
    pub twins: CfgBranch<'a>,
    /// Whether somebody asks for [`DecodeEngine::selected`] afterwards.
    pub observed: bool,
}

/// How the unconditional twins of guided sequences run.
#[derive(Clone, Copy)]
pub enum CfgBranch<'a> {
    /// In the same pass, by the same plan.
    Batched,
    /// By a plan of their own; how far their logits are from the sequences' is remembered for every masked position.
    Separate {
        /// Cache use, layer by layer.
        plan: &'a dyn CachePlan,
        /// What runs, in the order of the pass.
        windows: &'a [QueryRows],
    },
    /// Not at all: their logits are as far from the sequences' as is remembered; an error for positions that were not masked
    /// when they ran.
    Reused,
}

/// The rows that V-verify chose in a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedRows {
    /// The layer.
    pub layer: usize,
    /// For each window of the pass, counted among those that it chose from ([`UpdateRanges::others`]), ascending: with the adaptive
    /// cache from the start of the response.
    pub rows: Vec<Vec<usize>>,
}

/// Something that can run a [`Pass`]: a [`Session`], or in tests a table of logits.
pub trait DecodeEngine {
    /// Runs the pass over `tokens` (one vector per sequence, prompt and generation) and returns a verdict per candidate,
    /// group after group. Tokens are not changed.
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>>;

    /// The same network, if it can run whole courses by itself.
    fn autonomous(&mut self) -> Option<&mut dyn DeviceLoop> {
        None
    }

    /// What a pass is made of, where passes are recorded as graphs and one was: of those recorded the one of fewest rows, a
    /// block's; among passes of as many the one that runs fewest of them in all layers.
    fn launches(&self) -> Result<Option<KernelCounts>> {
        Ok(None)
    }

    /// What the layers of the last pass chose by V-verify, if it was observed.
    fn selected_rows(&self) -> &[SelectedRows] {
        &[]
    }

    /// Multiply-adds of the matrix products and of attention of all passes so far (on a CUDA device a first layer in vain now and
    /// then among them, and logits that fill up a launch).
    fn macs(&self) -> u64 {
        0
    }
}

/// Kernels and products of a recorded pass, as nodes of its graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KernelCounts {
    /// Of the first layer, which runs all rows of the pass; layers that choose among them have others.
    pub layer: usize,
    /// Of everything.
    pub pass: usize,
}

/// Weights of one layer; Q, K and V stacked, gate and up stacked.
struct Layer<B: Backend> {
    attn_norm: B::Vector,
    qkv: B::Matrix,
    attn_out: B::Matrix,
    mlp_norm: B::Vector,
    gate_up: B::Matrix,
    down: B::Matrix,
}

/// The weights of a model as a backend holds them.
pub struct Transformer<B: Backend> {
    config: Config,
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    final_norm: B::Vector,
    /// None when the head is the embedding.
    head: Option<B::Matrix>,
}

impl<B: Backend> Transformer<B> {
    /// Sizes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes the tensors that `config` calls for from `weights`.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] names the first tensor that is missing or has the wrong shape.
    pub fn load(backend: &B, config: &Config, weights: &Weights) -> Result<Self> {
        let names = Names::of(config.family);
        let (d, m, v) = (config.d_model, config.mlp_hidden_size, config.vocab_size);
        let matrix = |name: &str, shape: [usize; 2]| backend.matrix(vec![weights.get(name, &shape)?], vec![]);
        let layer = |i: usize| -> Result<Layer<B>> {
            let get = |name: &str, shape: &[usize]| -> Result<Tensor> { weights.get(&names.layer(i, name), shape) };
            let projections = [(names.q, config.q_width()), (names.k, config.kv_width()), (names.v, config.kv_width())];
            let parts = projections.iter().map(|(name, rows)| get(&format!("{name}.weight"), &[*rows, d]));
            let biases = projections.iter().map(|(name, rows)| get(&format!("{name}.bias"), &[*rows]));
            let biases = match config.family {
                Family::Llada => vec![],
                Family::Dream => biases.collect::<Result<_>>()?,
            };
            Ok(Layer {
                attn_norm: backend.vector(get(names.attn_norm, &[d])?)?,
                qkv: backend.matrix(parts.collect::<Result<_>>()?, biases)?,
                attn_out: backend.matrix(vec![get(names.attn_out, &[d, config.q_width()])?], vec![])?,
                mlp_norm: backend.vector(get(names.mlp_norm, &[d])?)?,
                gate_up: backend.matrix(vec![get(names.gate, &[m, d])?, get(names.up, &[m, d])?], vec![])?,
                down: backend.matrix(vec![get(names.down, &[d, m])?], vec![])?,
            })
        };
        Ok(Transformer {
            embedding: matrix(names.embedding, [v, d])?,
            layers: (0..config.num_layers).map(layer).collect::<Result<_>>()?,
            final_norm: backend.vector(weights.get(names.final_norm, &[d])?)?,
            head: if config.tied_head { None } else { Some(matrix(names.head, [v, d])?) },
            config: config.clone(),
        })
    }
}

/// Activations of a decode, allocated once.
struct Buffers<B: Backend> {
    x: B::Buffer,
    normed: B::Buffer,
    delta: B::Buffer,
    qkv: B::Buffer,
    attn: B::Buffer,
    gate_up: B::Buffer,
    act: B::Buffer,
    logit_x: B::Buffer,
    logit_attn: B::Buffer,
    logits: B::Buffer,
    cache: Option<B::Cache>,
    feature_cache: Option<FeatureCache<B>>,
}

/// What attention and the MLP add to every position of all sequences, `[layers - 1, positions, d_model]`: the first layer's is
/// not kept.
struct FeatureCache<B: Backend> {
    attention: B::Buffer,
    mlp: B::Buffer,
    positions: usize,
}

impl<B: Backend> FeatureCache<B> {
    /// Where a layer's part begins, in rows.
    fn first_row(&self, layer: usize) -> usize {
        assert!(layer > 0, "nothing is kept of the first layer");
        (layer - 1) * self.positions
    }
}

/// Where the rows of a pass stand, and what its launches are sized for.
struct PassBuffers<B: Backend> {
    rows: B::Rows,
    room: LaunchBucket,
    spans: Vec<SequenceRows>,
    /// Of each span, where a choice is made.
    parts: Vec<UpdateRanges>,
}

/// A model, a device, and the buffers and cache of one decode.
pub struct Session<'m, B: Backend> {
    transformer: &'m Transformer<B>,
    pub(super) backend: B,
    sizes: SessionConfig,
    buffers: Buffers<B>,
    /// So many that one pass can follow another without waiting for the host.
    slots: Vec<PassBuffers<B>>,
    /// Of all passes so far.
    pub(super) macs: u64,
    /// Which of a sequence and its twin the pass runs.
    twins: Range<usize>,
    /// Logits of sequences less those of their twins, by sequence and position.
    distances: HashMap<(usize, usize), Vec<f32>>,
    /// Of the pass that is run, if it is observed.
    selected: Option<Vec<SelectedRows>>,
}

impl<'m, B: Backend> Session<'m, B> {
    /// Allocates for a decode of these sizes.
    pub fn new(transformer: &'m Transformer<B>, mut backend: B, sizes: SessionConfig) -> Result<Self> {
        let config = &transformer.config;
        let widths = Widths::of(config);
        let needs = sizes.needs(config);
        backend.prepare(&needs, config.rope_theta)?;
        let SessionLimits { rows, logit_rows, .. } = needs;
        let buffers = Buffers {
            x: backend.buffer(rows, widths.d)?,
            normed: backend.buffer(rows, widths.d)?,
            delta: backend.buffer(rows, widths.d)?,
            qkv: backend.buffer(rows, widths.qkv)?,
            attn: backend.buffer(rows, widths.q)?,
            gate_up: backend.buffer(rows, 2 * widths.mlp)?,
            act: backend.buffer(rows, widths.mlp)?,
            logit_x: backend.buffer(logit_rows, widths.d)?,
            logit_attn: backend.buffer(logit_rows, widths.q)?,
            logits: backend.logits(logit_rows, config.vocab_size)?,
            cache: match sizes.kv_cache {
                true => Some(backend.cache(config.num_layers, rows, config.kv_width())?),
                false => None,
            },
            feature_cache: match sizes.feature_cache {
                true => {
                    let outputs = || backend.buffer((config.num_layers - 1) * rows, widths.d);
                    Some(FeatureCache { attention: outputs()?, mlp: outputs()?, positions: rows })
                }
                false => None,
            },
        };
        let slot = |_| -> Result<PassBuffers<B>> {
            Ok(PassBuffers { rows: backend.rows(&needs)?, room: LaunchBucket::default(), spans: vec![], parts: vec![] })
        };
        let slots = (0..sizes.slots()).map(slot).collect::<Result<_>>()?;
        let (twins, distances) = (0..sizes.twins(), HashMap::new());
        Ok(Session { transformer, backend, sizes, buffers, slots, macs: 0, twins, distances, selected: None })
    }

    /// Whether passes from now on remember what V-verify chooses, which is read back layer by layer.
    #[cfg(feature = "cuda")]
    pub(super) fn observe(&mut self, observed: bool) {
        self.selected = observed.then(Vec::new);
    }

    /// What was remembered.
    #[cfg(feature = "cuda")]
    pub(super) fn observed(&self) -> &[SelectedRows] {
        self.selected.as_deref().unwrap_or_default()
    }

    /// Sizes and constants of the model.
    #[cfg(feature = "cuda")]
    pub(super) fn config(&self) -> &'m Config {
        &self.transformer.config
    }

    #[cfg(feature = "cuda")]
    pub(super) fn num_layers(&self) -> usize {
        self.transformer.layers.len()
    }

    #[cfg(feature = "cuda")]
    pub(super) fn sizes(&self) -> &SessionConfig {
        &self.sizes
    }

    /// The cache, when the session keeps one.
    pub fn cache(&self) -> Option<&B::Cache> {
        self.buffers.cache.as_ref()
    }

    /// The tokens of all sequences one after the other, and a mask token behind them: what rows are embedded from.
    pub(super) fn flat(&self, tokens: &[Vec<u32>]) -> Vec<u32> {
        tokens.iter().flatten().copied().chain([self.transformer.config.mask_token_id]).collect()
    }

    /// The spans of a pass, one for each window; unconditional twins come last.
    fn spans(&self, windows: &[QueryRows]) -> Vec<SequenceRows> {
        let sequences = self.sizes.prompt_lens.len();
        let positions = self.first_token(sequences);
        let span = |twin: usize, window: &QueryRows| SequenceRows {
            sequence: twin * sequences + window.sequence,
            start: window.rows.start,
            end: window.rows.end,
            len: window.num_keys,
            cache_base: twin * positions + self.first_token(window.sequence),
        };
        self.twins.clone().flat_map(|twin| windows.iter().map(move |window| span(twin, window))).collect()
    }

    /// For each row of a pass its position and the index of its token among the flat ones; the prompts of twins are masked.
    fn places(&self, windows: &[QueryRows]) -> (Vec<usize>, Vec<usize>) {
        let mask = self.first_token(self.sizes.prompt_lens.len());
        let (mut positions, mut tokens) = (Vec::new(), Vec::new());
        for twin in self.twins.clone() {
            for window in windows {
                let (base, prompt) = (self.first_token(window.sequence), self.sizes.prompt_lens[window.sequence]);
                for position in window.rows.clone() {
                    positions.push(position);
                    tokens.push(if twin == 1 && position < prompt { mask } else { base + position });
                }
            }
        }
        (positions, tokens)
    }

    /// Where the tokens of a sequence begin among the flat ones.
    pub(super) fn first_token(&self, sequence: usize) -> usize {
        self.sizes.prompt_lens[..sequence].iter().map(|prompt| prompt + self.sizes.gen_length).sum()
    }

    /// Which rows the passes of slot `slot` run, and of which of them logits are asked for. Launches are sized for `room`, or
    /// without one for just these rows; what they are sized for in the end is returned.
    ///
    /// # Panics
    /// When the pass is larger than the session's [`SessionConfig`], or layers of the plan choose differently.
    pub(super) fn set_batch(
        &mut self,
        slot: usize,
        windows: &[QueryRows],
        plan: &dyn CachePlan,
        logit_rows: &[usize],
        room: Option<LaunchBucket>,
    ) -> Result<LaunchBucket> {
        let (spans, (positions, tokens)) = (self.spans(windows), self.places(windows));
        let choices = (0..self.transformer.layers.len()).filter_map(|layer| plan.layer(layer).choice());
        let choice = choices.reduce(|a, b| {
            assert_eq!(a, b, "two choices in a pass");
            a
        });
        let parts = |choice: RowUpdate| -> Vec<UpdateRanges> {
            let of = |(span, window): (&SequenceRows, &QueryRows)| {
                choice.parts((span.start, span.end), self.sizes.prompt_lens[window.sequence], &window.block)
            };
            spans.iter().zip(windows.iter().cycle()).map(of).collect()
        };
        let parts = choice.map(parts).unwrap_or_default();
        let longest = spans.iter().map(SequenceRows::rows).max().unwrap_or(0);
        let least =
            LaunchBucket { rows: tokens.len(), longest, logit_rows: logit_rows.len(), ..LaunchBucket::default() };
        let room = LaunchBucket {
            selected: parts.iter().map(UpdateRanges::rows).sum(),
            longest_selected: parts.iter().map(UpdateRanges::rows).max().unwrap_or(0),
            ..room.unwrap_or(least)
        };
        let needs = self.sizes.needs(&self.transformer.config);
        assert!(tokens.len() <= room.rows && room.rows <= needs.rows, "{room:?} in {needs:?}");
        assert!(
            logit_rows.len() <= room.logit_rows && room.logit_rows <= needs.logit_rows && longest <= room.longest,
            "{room:?}"
        );
        let placement =
            BatchMetadata { spans: &spans, positions: &positions, tokens: &tokens, logit_rows, parts: &parts, room };
        let slot = &mut self.slots[slot];
        self.backend.set_batch(&mut slot.rows, &placement)?;
        (slot.room, slot.spans, slot.parts) = (room, spans, parts);
        Ok(room)
    }

    /// Embeds the rows of the pass that slot `slot` holds; then come its layers, and the head.
    ///
    /// Here and there `hidden`, when given, receives the residual stream after the embedding and after every layer but the last
    /// (all rows), and then the final norm's output (scored rows).
    pub(super) fn embed(&mut self, slot: usize, hidden: Option<&mut Vec<Vec<f32>>>) -> Result<()> {
        let PassBuffers { rows: placed, room, .. } = &self.slots[slot];
        self.backend.embed(&self.transformer.embedding, placed, &mut self.buffers.x)?;
        if let Some(hidden) = hidden {
            hidden.push(self.backend.read(&self.buffers.x, room.rows, self.transformer.config.d_model)?);
        }
        Ok(())
    }

    /// Layers of the pass that slot `slot` holds, in their order; of the last one only what the head goes on from.
    pub(super) fn layers(
        &mut self,
        slot: usize,
        plan: &dyn CachePlan,
        range: Range<usize>,
        mut hidden: Option<&mut Vec<Vec<f32>>>,
    ) -> Result<()> {
        let Transformer { config, layers, .. } = self.transformer;
        let heads = config.heads();
        let eps = config.rms_norm_eps;
        for i in range {
            #[cfg(feature = "cuda")]
            let _range = crate::gpu::nvtx::range_of(|| format!("layer {i}"));
            let layer = &layers[i];
            self.residual_norm_of(slot, plan, i, &layer.attn_norm)?;
            if i > 0
                && let Some(hidden) = &mut hidden
            {
                hidden.push(self.backend.read(&self.buffers.x, self.slots[slot].room.rows, config.d_model)?);
            }
            let (reuse, store, store_features) = match plan.layer(i) {
                LayerPlan::Full { reuse, store, store_features } => (reuse, store, store_features),
                LayerPlan::Partial(_) => {
                    self.partial_layer(slot, i)?;
                    continue;
                }
            };
            let PassBuffers { rows: placed, room, .. } = &self.slots[slot];
            let (backend, b, rows) = (&mut self.backend, &mut self.buffers, room.rows);
            backend.linear(&b.normed, &layer.qkv, &mut b.qkv, rows)?;
            let cache = if store { b.cache.as_mut().map(|cache| (cache, i)) } else { None };
            assert!(!store || cache.is_some(), "the session keeps no cache");
            backend.rope(&mut b.qkv, heads, placed, cache)?;
            let cache = if reuse { b.cache.as_ref().map(|cache| (cache, i)) } else { None };
            assert!(!reuse || cache.is_some(), "the session keeps no cache");
            backend.attention(&b.qkv, heads, placed, cache, &mut b.attn)?;
            if i + 1 == layers.len() && !store_features {
                break; // the rest of the last layer only for the rows whose logits are asked for
            }
            let mut feature_cache = if store_features { b.feature_cache.as_mut() } else { None };
            assert!(!store_features || feature_cache.is_some(), "the session keeps no outputs");
            backend.linear(&b.attn, &layer.attn_out, &mut b.delta, rows)?;
            if let Some(feature_cache) = &mut feature_cache {
                let first_row = feature_cache.first_row(i);
                backend.store_features(
                    &b.delta,
                    RowSet::All,
                    config.d_model,
                    placed,
                    (&mut feature_cache.attention, first_row),
                )?;
            }
            backend.residual_norm(&mut b.x, Some(&b.delta), &layer.mlp_norm, eps, &mut b.normed, rows)?;
            backend.linear(&b.normed, &layer.gate_up, &mut b.gate_up, rows)?;
            backend.swiglu(&b.gate_up, config.mlp_hidden_size, &mut b.act, rows)?;
            backend.linear(&b.act, &layer.down, &mut b.delta, rows)?;
            if let Some(feature_cache) = &mut feature_cache {
                let first_row = feature_cache.first_row(i);
                backend.store_features(
                    &b.delta,
                    RowSet::All,
                    config.d_model,
                    placed,
                    (&mut feature_cache.mlp, first_row),
                )?;
            }
        }
        Ok(())
    }

    /// Adds to the residual stream what layer `i - 1` has left to add, and norms it for layer `i`, or for the head.
    fn residual_norm_of(&mut self, slot: usize, plan: &dyn CachePlan, i: usize, weight: &B::Vector) -> Result<()> {
        let eps = self.transformer.config.rms_norm_eps;
        let PassBuffers { rows: placed, room, .. } = &self.slots[slot];
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        match (i.checked_sub(1).map(|before| plan.layer(before)), &b.feature_cache) {
            (Some(LayerPlan::Partial(_)), Some(feature_cache)) => {
                let first_row = feature_cache.first_row(i - 1);
                backend.residual_norm_features(
                    &mut b.x,
                    (&feature_cache.mlp, first_row),
                    placed,
                    weight,
                    eps,
                    &mut b.normed,
                )
            }
            (before, _) => {
                let delta = before.is_some().then_some(&b.delta);
                backend.residual_norm(&mut b.x, delta, weight, eps, &mut b.normed, room.rows)
            }
        }
    }

    /// Layer `i` where only some rows run: its normed input stands in `normed`. What it adds is left in what is kept.
    fn partial_layer(&mut self, slot: usize, i: usize) -> Result<()> {
        let Transformer { config, layers, .. } = self.transformer;
        let (layer, heads, eps) = (&layers[i], config.heads(), config.rms_norm_eps);
        let (q, kv) = (config.q_width(), config.kv_width());
        let PassBuffers { rows: placed, room, spans, parts } = &mut self.slots[slot];
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        let (Some(cache), Some(feature_cache)) = (&mut b.cache, &mut b.feature_cache) else {
            panic!("the session keeps no outputs")
        };
        let first_row = feature_cache.first_row(i);
        let rows = room.selected;
        if rows > 0 {
            // With V-verify the values of all rows are fresh; without, of those that run.
            let verifies = parts.iter().any(|parts| parts.share.is_some());
            if verifies {
                backend.linear_part(&b.normed, &layer.qkv, q + kv..q + 2 * kv, &mut b.qkv, room.rows)?;
            }
            backend.select_rows(verifies.then_some(&b.qkv), heads, placed, (cache, i))?;
            if let (true, Some(selected)) = (verifies, &mut self.selected) {
                let mut rows = backend.selected(placed)?;
                rows.truncate(spans.len() / self.twins.len());
                selected.push(SelectedRows { layer: i, rows });
            }
            let features = 0..if verifies { q + kv } else { q + 2 * kv };
            backend.gather_selected(&b.normed, placed, config.d_model, &mut b.delta)?;
            backend.linear_part(&b.delta, &layer.qkv, features, &mut b.qkv, rows)?;
            backend.rope_selected(&mut b.qkv, heads, placed, (cache, i), !verifies)?;
            backend.attention_selected(&b.qkv, heads, placed, (cache, i), !verifies, &mut b.attn)?;
            backend.linear(&b.attn, &layer.attn_out, &mut b.delta, rows)?;
            backend.store_features(
                &b.delta,
                RowSet::Selected,
                config.d_model,
                placed,
                (&mut feature_cache.attention, first_row),
            )?;
        }
        backend.residual_norm_features(
            &mut b.x,
            (&feature_cache.attention, first_row),
            placed,
            &layer.mlp_norm,
            eps,
            &mut b.normed,
        )?;
        if rows > 0 {
            backend.gather_selected(&b.normed, placed, config.d_model, &mut b.delta)?;
            backend.linear(&b.delta, &layer.gate_up, &mut b.gate_up, rows)?;
            backend.swiglu(&b.gate_up, config.mlp_hidden_size, &mut b.act, rows)?;
            backend.linear(&b.act, &layer.down, &mut b.delta, rows)?;
            backend.store_features(
                &b.delta,
                RowSet::Selected,
                config.d_model,
                placed,
                (&mut feature_cache.mlp, first_row),
            )?;
        }
        Ok(())
    }

    /// The rest of the last layer, and the head: the logits of the i-th scored row become row `i` of the logits buffer.
    pub(super) fn head(&mut self, slot: usize, plan: &dyn CachePlan, hidden: Option<&mut Vec<Vec<f32>>>) -> Result<()> {
        let Transformer { config, embedding, layers, final_norm, head } = self.transformer;
        let Some(last) = layers.last() else { return Ok(()) };
        let rows = self.slots[slot].room.logit_rows;
        if rows == 0 {
            return Ok(());
        }
        let open = matches!(plan.layer(layers.len() - 1), LayerPlan::Full { store_features: false, .. });
        if !open {
            self.residual_norm_of(slot, plan, layers.len(), final_norm)?;
        }
        let placed = &self.slots[slot].rows;
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        let head = head.as_ref().unwrap_or(embedding);
        if !open {
            backend.gather(&b.normed, placed, config.d_model, &mut b.logit_x)?;
            if let Some(hidden) = hidden {
                hidden.push(backend.read(&b.logit_x, rows, config.d_model)?);
            }
            return backend.linear(&b.logit_x, head, &mut b.logits, rows);
        }
        let eps = config.rms_norm_eps;
        backend.gather(&b.x, placed, config.d_model, &mut b.logit_x)?;
        backend.gather(&b.attn, placed, config.q_width(), &mut b.logit_attn)?;
        backend.linear(&b.logit_attn, &last.attn_out, &mut b.delta, rows)?;
        backend.residual_norm(&mut b.logit_x, Some(&b.delta), &last.mlp_norm, eps, &mut b.normed, rows)?;
        backend.linear(&b.normed, &last.gate_up, &mut b.gate_up, rows)?;
        backend.swiglu(&b.gate_up, config.mlp_hidden_size, &mut b.act, rows)?;
        backend.linear(&b.act, &last.down, &mut b.delta, rows)?;
        backend.residual_norm(&mut b.logit_x, Some(&b.delta), final_norm, eps, &mut b.normed, rows)?;
        if let Some(hidden) = hidden {
            hidden.push(backend.read(&b.normed, rows, config.d_model)?);
        }
        backend.linear(&b.normed, head, &mut b.logits, rows)
    }

    /// Multiply-adds of these layers of the pass that slot `slot` holds, and with one more of the head: of the products and of
    /// attention, of rows that there are.
    pub(super) fn work(&self, slot: usize, plan: &dyn CachePlan, range: Range<usize>) -> u64 {
        let Transformer { config, layers, .. } = self.transformer;
        let PassBuffers { room, spans, parts, .. } = &self.slots[slot];
        let (d, q, kv) = (config.d_model, config.q_width(), config.kv_width());
        let rest = |rows: usize| rows * d * (q + 3 * config.mlp_hidden_size);
        let attention = |rows: usize, keys: usize| rows * (d * (q + 2 * kv) + 2 * keys * q);
        let all: usize = spans.iter().map(SequenceRows::rows).sum();
        // The rest of the last layer may be run for the rows only whose logits are asked for.
        let open = |layer: usize| {
            layer + 1 == layers.len() && matches!(plan.layer(layer), LayerPlan::Full { store_features: false, .. })
        };
        let of = |layer: usize| match layer < layers.len() {
            true => match plan.layer(layer) {
                LayerPlan::Full { reuse, .. } => {
                    let attended: usize = spans.iter().map(|span| attention(span.rows(), span.keys(reuse))).sum();
                    attended + if open(layer) { 0 } else { rest(all) }
                }
                LayerPlan::Partial(_) if room.selected == 0 => 0,
                LayerPlan::Partial(choice) => {
                    let pairs = parts.iter().zip(spans);
                    let attended: usize = pairs.map(|(parts, span)| attention(parts.rows(), span.len)).sum();
                    let values = if choice.others.is_some() { (all - room.selected) * d * kv } else { 0 };
                    values + attended + rest(room.selected)
                }
            },
            false => {
                let last = if layer > 0 && open(layer - 1) { rest(room.logit_rows) } else { 0 };
                last + room.logit_rows * d * config.vocab_size
            }
        };
        range.map(|layer| of(layer) as u64).sum()
    }

    /// Runs one pass. The logits of row `index[i]` of it become row `i` of the logits buffer; `hidden` as in the layers above:
    /// the residual stream after the embedding and after every layer but the last, and the final norm's output.
    ///
    /// # Errors
    /// The device's; the CPU has none.
    ///
    /// # Panics
    /// When the pass is larger than the session's [`SessionConfig`], a token is not in the vocabulary, a plan uses a cache that the
    /// session does not keep, or two of its layers choose differently.
    pub fn forward(
        &mut self,
        tokens: &[Vec<u32>],
        windows: &[QueryRows],
        plan: &dyn CachePlan,
        index: &[usize],
        hidden: Option<&mut Vec<Vec<f32>>>,
    ) -> Result<()> {
        let flat = self.flat(tokens);
        self.backend.write_tokens(&flat)?;
        self.set_batch(0, windows, plan, index, None)?;
        self.macs += self.work(0, plan, 0..self.transformer.layers.len() + 1);
        let mut hidden = hidden;
        self.embed(0, hidden.as_deref_mut())?;
        self.layers(0, plan, 0..self.transformer.layers.len(), hidden.as_deref_mut())?;
        self.head(0, plan, hidden)
    }

    /// The first `rows` rows of the logits that [`Session::forward`] left, `[rows, vocab_size]`.
    pub fn logits(&self, rows: usize) -> Result<Vec<f32>> {
        self.backend.read(&self.buffers.logits, rows, self.transformer.config.vocab_size)
    }

    /// The rows of a pass whose logits decide about the groups' positions; with guidance those of the twins behind them.
    pub(super) fn logit_rows(&self, windows: &[QueryRows], groups: &[(usize, &[usize])]) -> Vec<usize> {
        let family = self.transformer.config.family;
        let rows: usize = windows.iter().map(|window| window.rows.len()).sum();
        let mut index = Vec::new();
        for twin in 0..self.twins.len() {
            for (group, positions) in groups {
                let mut first = twin * rows;
                for window in windows {
                    if window.sequence == *group {
                        index.extend(positions.iter().map(|p| first + logit_row_for(family, &window.rows, *p)));
                    }
                    first += window.rows.len();
                }
            }
        }
        index
    }
}

impl<B: Backend> Session<'_, B> {
    /// The logits that decide about positions, sequence after sequence, of the sequences or of their twins.
    fn logits_of(
        &mut self,
        tokens: &[Vec<u32>],
        (plan, windows): (&dyn CachePlan, &[QueryRows]),
        positions: &[(usize, &[usize])],
        twin: bool,
    ) -> Result<Vec<f32>> {
        self.twins = if twin { 1..2 } else { 0..1 };
        let index = self.logit_rows(windows, positions);
        let ran = self.forward(tokens, windows, plan, &index, None);
        self.twins = 0..self.sizes.twins();
        ran?;
        self.logits(index.len())
    }

    /// A pass whose twins run apart, or not at all. Logits are read, and decided about here.
    pub(super) fn step_apart(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let Config { vocab_size, mask_token_id, .. } = self.transformer.config;
        let groups: Vec<_> = pass.groups.iter().map(|group| (group.sequence, &group.positions[..])).collect();
        let own = (pass.plan, pass.windows);
        let mut logits = Vec::new();
        if let CfgBranch::Separate { plan, windows } = pass.twins {
            // Any mask may be decided about before the twins run again.
            let masks = |window: &QueryRows| -> (usize, Vec<usize>) {
                let masked = |p: &usize| tokens[window.sequence][*p] == mask_token_id;
                (window.sequence, window.rows.clone().filter(masked).collect())
            };
            let masks: Vec<_> = pass.windows.iter().map(masks).collect();
            let open: Vec<_> = masks.iter().map(|(s, positions)| (*s, &positions[..])).collect();
            self.selected = None;
            let of_twins = self.logits_of(tokens, (plan, windows), &open, true)?;
            self.selected = pass.observed.then(Vec::new);
            let all = self.logits_of(tokens, own, &open, false)?;
            self.distances.retain(|(s, _), _| masks.iter().all(|(open, _)| open != s));
            let places = masks.iter().flat_map(|(s, positions)| positions.iter().map(move |p| (*s, *p)));
            for ((key, row), twin) in places.zip(all.chunks(vocab_size)).zip(of_twins.chunks(vocab_size)) {
                self.distances.insert(key, row.iter().zip(twin).map(|(own, twin)| own - twin).collect());
                if groups.iter().any(|(s, positions)| *s == key.0 && positions.contains(&key.1)) {
                    logits.extend(row);
                }
            }
        } else {
            self.selected = pass.observed.then(Vec::new);
            logits = self.logits_of(tokens, own, &groups, false)?;
        }
        let places = groups.iter().flat_map(|(s, positions)| positions.iter().map(move |p| (*s, *p)));
        let mut guided = logits.clone();
        for (key, row) in places.zip(logits.chunks(vocab_size)) {
            let distance = self.distances.get(&key).ok_or_else(|| {
                let (sequence, position) = key;
                let found = format!("none for sequence {sequence}, position {position}");
                Error::argument("twins", "a pass in which they ran", found)
            })?;
            guided.extend(row.iter().zip(distance).map(|(own, distance)| own - distance));
        }
        crate::sampling::sample(&mut guided, vocab_size, pass.groups, pass.unmask)
    }
}

impl<B: HostUnmask> DecodeEngine for Session<'_, B> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        if !matches!(pass.twins, CfgBranch::Batched) {
            return self.step_apart(tokens, pass);
        }
        let groups: Vec<_> = pass.groups.iter().map(|group| (group.sequence, &group.positions[..])).collect();
        let index = self.logit_rows(pass.windows, &groups);
        self.selected = pass.observed.then(Vec::new);
        self.forward(tokens, pass.windows, pass.plan, &index, None)?;
        let vocab_size = self.transformer.config.vocab_size;
        self.backend.unmask(&mut self.buffers.logits, vocab_size, pass.groups, pass.unmask)
    }

    fn selected_rows(&self) -> &[SelectedRows] {
        self.selected.as_deref().unwrap_or_default()
    }

    fn macs(&self) -> u64 {
        self.macs
    }
}

/// The row of a window whose logits decide about `position`, which is near: its own for LLaDA, the one before for Dream (whose
/// first row of a window stands for itself).
pub fn logit_row_for(family: Family, window: &Range<usize>, position: usize) -> usize {
    match family {
        Family::Llada => position - window.start,
        Family::Dream => (position - window.start).saturating_sub(1),
    }
}

#[cfg(feature = "cuda")]
impl Session<'_, crate::backend::cuda::Cuda> {
    /// Where the logits lie on the device.
    pub(super) fn logits_address(&self) -> u64 {
        self.buffers.logits.address()
    }
}
