//! A session: a model on a backend, with the buffers and caches of one decode.

use super::config::{Config, Family};
use super::plan::{CachePlan, SelectedRows};
use super::query_rows::QueryRows;
use super::session_config::{SessionConfig, Widths};
use super::transformer::Transformer;
use crate::backend::{Backend, BatchMetadata, BufferKind, LaunchBucket, RowUpdate, SequenceRows, UpdateRanges};
use crate::error::Result;
use std::ops::Range;

/// Activations, allocated once per decode.
pub(super) struct Buffers<B: Backend> {
    pub x: B::Buffer,
    pub normed: B::Buffer,
    pub delta: B::Buffer,
    pub qkv: B::Buffer,
    pub attn: B::Buffer,
    pub gate_up: B::Buffer,
    pub act: B::Buffer,
    pub logit_x: B::Buffer,
    pub logit_attn: B::Buffer,
    pub logits: B::Buffer,
    pub kv_cache: Option<B::KvCache>,
    pub features: Option<FeatureCache<B>>,
}

/// Cached outputs of attention and MLP (dLLM-Cache: features), `[layers - 1, positions, d_model]` each. The first layer is
/// always computed and has none.
pub(super) struct FeatureCache<B: Backend> {
    pub attention: B::Buffer,
    pub mlp: B::Buffer,
    positions: usize,
}

impl<B: Backend> FeatureCache<B> {
    /// First row of a layer.
    pub fn first_row(&self, layer: usize) -> usize {
        assert!(layer > 0, "the first layer has no cached features");
        (layer - 1) * self.positions
    }
}

/// Metadata of one kind of pass.
pub(super) struct PassBuffers<B: Backend> {
    pub batch: B::Batch,
    pub bucket: LaunchBucket,
    pub sequences: Vec<SequenceRows>,
    /// For each sequence, when layers select rows.
    pub updates: Vec<UpdateRanges>,
}

/// A model on a backend, with the buffers and caches of one decode.
pub struct Session<'m, B: Backend> {
    pub(super) transformer: &'m Transformer<B>,
    pub(super) backend: B,
    pub(super) config: SessionConfig,
    pub(super) buffers: Buffers<B>,
    /// One for each kind of pass, so that a pass can be enqueued while another one runs.
    pub(super) passes: Vec<PassBuffers<B>>,
    macs: u64,
    /// Branches of guidance that a pass runs: 0 is the sequence, 1 the unconditional sequence.
    branches: Range<usize>,
    /// Rows that V-verify selected in the last pass, when it is observed.
    pub(super) selected: Option<Vec<SelectedRows>>,
}

impl<'m, B: Backend> Session<'m, B> {
    /// Allocates the buffers of a decode.
    ///
    /// # Errors
    /// The backend's, when there is no memory.
    pub fn new(transformer: &'m Transformer<B>, mut backend: B, config: SessionConfig) -> Result<Self> {
        let model = &transformer.config;
        let widths = Widths::new(model);
        let limits = config.limits(model);
        backend.prepare(&limits, model.rope_theta)?;
        let activations = |rows: usize, width: usize| backend.buffer(BufferKind::Activations, rows, width);
        let (rows, logit_rows) = (limits.rows, limits.logit_rows);
        let buffers = Buffers {
            x: activations(rows, widths.d)?,
            normed: activations(rows, widths.d)?,
            delta: activations(rows, widths.d)?,
            qkv: activations(rows, widths.qkv)?,
            attn: activations(rows, widths.q)?,
            gate_up: activations(rows, 2 * widths.mlp)?,
            act: activations(rows, widths.mlp)?,
            logit_x: activations(logit_rows, widths.d)?,
            logit_attn: activations(logit_rows, widths.q)?,
            logits: backend.buffer(BufferKind::Logits, logit_rows, model.vocab_size)?,
            kv_cache: if config.kv_cache {
                Some(backend.kv_cache(model.num_layers, rows, model.kv_width())?)
            } else {
                None
            },
            features: if config.feature_cache {
                let outputs = || activations((model.num_layers - 1) * rows, widths.d);
                Some(FeatureCache { attention: outputs()?, mlp: outputs()?, positions: rows })
            } else {
                None
            },
        };
        let pass = |_| -> Result<PassBuffers<B>> {
            let (bucket, sequences, updates) = (LaunchBucket::default(), vec![], vec![]);
            Ok(PassBuffers { batch: backend.batch(&limits)?, bucket, sequences, updates })
        };
        let passes = (0..config.num_templates()).map(pass).collect::<Result<_>>()?;
        let branches = 0..config.branches();
        Ok(Session { transformer, backend, config, buffers, passes, macs: 0, branches, selected: None })
    }

    /// Sizes and constants of the model.
    pub(crate) fn model_config(&self) -> &'m Config {
        &self.transformer.config
    }

    pub(crate) fn num_layers(&self) -> usize {
        self.transformer.layers.len()
    }

    /// The key/value cache, if the session has one.
    pub fn kv_cache(&self) -> Option<&B::KvCache> {
        self.buffers.kv_cache.as_ref()
    }

    /// Multiply-accumulates of matrix products and attention in all passes so far.
    pub fn macs(&self) -> u64 {
        self.macs
    }

    /// Selects whether later passes record the rows that V-verify selects. They are read back layer by layer.
    pub(crate) fn observe(&mut self, observed: bool) {
        self.selected = observed.then(Vec::new);
    }

    /// The rows that V-verify selected since the last call of `observe`; empty when passes are not observed.
    pub fn selected_rows(&self) -> &[SelectedRows] {
        self.selected.as_deref().unwrap_or_default()
    }

    /// Runs `f` with passes that run only these branches of guidance.
    pub(crate) fn with_branches<T>(&mut self, branches: Range<usize>, f: impl FnOnce(&mut Self) -> T) -> T {
        let all = std::mem::replace(&mut self.branches, branches);
        let result = f(self);
        self.branches = all;
        result
    }

    pub(super) fn num_branches(&self) -> usize {
        self.branches.len()
    }

    /// Returns the tokens of all sequences, concatenated, and a mask token after them. Rows are embedded from these.
    pub(crate) fn concat_tokens(&self, tokens: &[Vec<u32>]) -> Vec<u32> {
        tokens.iter().flatten().copied().chain([self.transformer.config.mask_token_id]).collect()
    }

    /// Returns the offset of a sequence in the concatenated tokens.
    pub(crate) fn token_offset(&self, sequence: usize) -> usize {
        self.config.prompt_lens[..sequence].iter().map(|prompt| prompt + self.config.gen_length).sum()
    }

    /// Returns the rows of each sequence of a pass. Unconditional sequences come last.
    fn sequence_rows(&self, query_rows: &[QueryRows]) -> Vec<SequenceRows> {
        let num_sequences = self.config.prompt_lens.len();
        let positions = self.token_offset(num_sequences);
        let rows_of = |branch: usize, rows: &QueryRows| SequenceRows {
            sequence: branch * num_sequences + rows.sequence,
            start: rows.rows.start,
            end: rows.rows.end,
            num_keys: rows.num_keys,
            cache_base: branch * positions + self.token_offset(rows.sequence),
        };
        let branches = self.branches.clone();
        branches.flat_map(|branch| query_rows.iter().map(move |rows| rows_of(branch, rows))).collect()
    }

    /// Returns for each row of a pass its position and its index in the concatenated tokens. Unconditional sequences have a
    /// masked prompt.
    fn positions_and_tokens(&self, query_rows: &[QueryRows]) -> (Vec<usize>, Vec<usize>) {
        let mask = self.token_offset(self.config.prompt_lens.len());
        let (mut positions, mut tokens) = (Vec::new(), Vec::new());
        for branch in self.branches.clone() {
            for rows in query_rows {
                let (base, prompt) = (self.token_offset(rows.sequence), self.config.prompt_lens[rows.sequence]);
                for position in rows.rows.clone() {
                    positions.push(position);
                    tokens.push(if branch == 1 && position < prompt { mask } else { base + position });
                }
            }
        }
        (positions, tokens)
    }

    /// Applies the row update of a plan to each sequence of a pass.
    fn updates(&self, sequences: &[SequenceRows], query_rows: &[QueryRows], plan: &dyn CachePlan) -> Vec<UpdateRanges> {
        let updates = (0..self.num_layers()).filter_map(|layer| plan.layer(layer).update());
        let update = updates.reduce(|a, b| {
            assert_eq!(a, b, "the layers of a pass have different updates");
            a
        });
        let ranges = |update: RowUpdate| -> Vec<UpdateRanges> {
            let ranges_of = |(sequence, rows): (&SequenceRows, &QueryRows)| {
                let response = self.config.prompt_lens[rows.sequence];
                update.ranges((sequence.start, sequence.end), response, &rows.block)
            };
            sequences.iter().zip(query_rows.iter().cycle()).map(ranges_of).collect()
        };
        update.map(ranges).unwrap_or_default()
    }

    /// Stores the metadata of pass `pass`: its rows, and those of them that need logits.
    ///
    /// Launches are padded to `bucket`, or without one get exact sizes. Returns the sizes, with those of selected rows added.
    ///
    /// # Panics
    /// When the pass is larger than the [`SessionConfig`] allows, or layers of the plan have different updates.
    pub(crate) fn set_batch(
        &mut self,
        pass: usize,
        query_rows: &[QueryRows],
        plan: &dyn CachePlan,
        logit_rows: &[usize],
        bucket: Option<LaunchBucket>,
    ) -> Result<LaunchBucket> {
        let (sequences, (positions, tokens)) = (self.sequence_rows(query_rows), self.positions_and_tokens(query_rows));
        let updates = self.updates(&sequences, query_rows, plan);
        let longest = sequences.iter().map(SequenceRows::rows).max().unwrap_or(0);
        let exact = LaunchBucket { rows: tokens.len(), longest, logit_rows: logit_rows.len(), ..Default::default() };
        let bucket = LaunchBucket {
            selected: updates.iter().map(UpdateRanges::rows).sum(),
            longest_selected: updates.iter().map(UpdateRanges::rows).max().unwrap_or(0),
            ..bucket.unwrap_or(exact)
        };
        let limits = self.config.limits(&self.transformer.config);
        assert!(tokens.len() <= bucket.rows && bucket.rows <= limits.rows, "{bucket:?} in {limits:?}");
        assert!(
            logit_rows.len() <= bucket.logit_rows
                && bucket.logit_rows <= limits.logit_rows
                && longest <= bucket.longest,
            "{bucket:?}"
        );
        let metadata = BatchMetadata {
            sequences: &sequences,
            positions: &positions,
            tokens: &tokens,
            logit_rows,
            updates: &updates,
            bucket,
        };
        let pass = &mut self.passes[pass];
        self.backend.set_batch(&mut pass.batch, &metadata)?;
        (pass.bucket, pass.sequences, pass.updates) = (bucket, sequences, updates);
        Ok(bucket)
    }

    /// Runs one pass over `tokens`, one vector per sequence. The logits of row `logit_rows[i]` become row i of the logits buffer.
    ///
    /// `hidden`, when given, receives the residual stream `[rows, d_model]` after the embedding and after every layer but the last,
    /// and the output of the final norm, `[logit rows, d_model]`.
    ///
    /// # Errors
    /// Errors of the device. The CPU backend returns none.
    ///
    /// # Panics
    /// When the pass is larger than the [`SessionConfig`] allows, a token is not in the vocabulary, the plan uses a cache that the
    /// session does not have, or its layers have different updates.
    pub fn forward(
        &mut self,
        tokens: &[Vec<u32>],
        query_rows: &[QueryRows],
        plan: &dyn CachePlan,
        logit_rows: &[usize],
        mut hidden: Option<&mut Vec<Vec<f32>>>,
    ) -> Result<()> {
        let tokens = self.concat_tokens(tokens);
        self.backend.write_tokens(&tokens)?;
        self.set_batch(0, query_rows, plan, logit_rows, None)?;
        let num_layers = self.num_layers();
        self.macs += self.pass_macs(0, plan, 0..num_layers + 1);
        self.embed(0, hidden.as_deref_mut())?;
        for layer in 0..num_layers {
            self.layer(0, plan, layer, hidden.as_deref_mut())?;
        }
        self.head(0, plan, hidden)
    }

    /// Reads back the first `rows` rows of the logits of the last pass, `[rows, vocab_size]`.
    pub fn logits(&self, rows: usize) -> Result<Vec<f32>> {
        self.backend.read(&self.buffers.logits, rows, self.transformer.config.vocab_size)
    }

    /// The logits buffer, for sampling in place.
    pub(crate) fn logits_buffer_mut(&mut self) -> &mut B::Buffer {
        &mut self.buffers.logits
    }

    /// Returns the rows of a pass whose logits predict these positions, given per sequence. Rows of unconditional sequences
    /// follow.
    pub(crate) fn logit_rows(&self, query_rows: &[QueryRows], positions: &[(usize, &[usize])]) -> Vec<usize> {
        let family = self.transformer.config.family;
        let rows_per_branch: usize = query_rows.iter().map(|rows| rows.rows.len()).sum();
        let mut logit_rows = Vec::new();
        for branch in 0..self.num_branches() {
            for (sequence, positions) in positions {
                let mut first = branch * rows_per_branch;
                for rows in query_rows {
                    if rows.sequence == *sequence {
                        logit_rows.extend(positions.iter().map(|p| first + logit_row_for(family, &rows.rows, *p)));
                    }
                    first += rows.rows.len();
                }
            }
        }
        logit_rows
    }
}

/// Access for the CUDA engine.
#[cfg(feature = "cuda")]
impl<B: Backend> Session<'_, B> {
    /// The backend.
    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, to store tokens or synchronise.
    pub(crate) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Sizes of the session.
    pub(crate) fn config(&self) -> &SessionConfig {
        &self.config
    }

    pub(crate) fn add_macs(&mut self, macs: u64) {
        self.macs += macs;
    }

    /// The logits buffer.
    pub(crate) fn logits_buffer(&self) -> &B::Buffer {
        &self.buffers.logits
    }
}

/// Returns the row of `rows` whose logits predict `position`: the position itself for LLaDA, the one before it for Dream. The
/// first row of a Dream pass predicts itself.
pub fn logit_row_for(family: Family, rows: &Range<usize>, position: usize) -> usize {
    match family {
        Family::Llada => position - rows.start,
        Family::Dream => (position - rows.start).saturating_sub(1),
    }
}
