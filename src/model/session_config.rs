//! The sizes of a decode, and of the buffers that follow from them.

use super::config::Config;
#[cfg(feature = "cuda")]
use crate::backend::LaunchBucket;
use crate::backend::SessionLimits;

/// The sizes of a decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionConfig {
    /// Prompt length of each sequence, in tokens.
    pub prompt_lens: Vec<usize>,
    /// Positions to generate, the same for each sequence.
    pub gen_length: usize,
    /// Candidates of a pass, over all sequences.
    pub max_candidates: usize,
    /// Whether keys and values are cached between passes.
    pub kv_cache: bool,
    /// Whether the outputs of attention and MLP are cached too, in every layer but the first.
    pub feature_cache: bool,
    /// Whether each sequence has an unconditional sequence (classifier-free guidance).
    pub guided: bool,
    /// Whether guidance reuses the unconditional logits of earlier passes.
    pub reuses_guidance: bool,
    /// Steps of a schedule by shares ([`crate::sampling::QuotaSchedule::Dream`]); 0 without one.
    pub max_ratios: usize,
    /// Number of tokens that end a sequence early.
    pub num_end_tokens: usize,
}

impl SessionConfig {
    /// Branches of guidance: 2 with guidance, else 1.
    pub(crate) fn branches(&self) -> usize {
        if self.guided { 2 } else { 1 }
    }

    /// Kinds of passes that a block can have: its first pass and the others. With a feature cache there are four kinds of others,
    /// by whether they refresh the prompt and the response.
    pub(crate) fn num_templates(&self) -> usize {
        if self.feature_cache { 5 } else { 2 }
    }

    /// Positions of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        self.prompt_lens.iter().max().unwrap_or(&0) + self.gen_length
    }

    /// Positions of all sequences, without unconditional ones.
    fn positions(&self) -> usize {
        self.prompt_lens.iter().map(|prompt| prompt + self.gen_length).sum()
    }

    /// Returns the largest sizes of the session's passes, for a model of this shape.
    pub(crate) fn limits(&self, config: &Config) -> SessionLimits {
        SessionLimits {
            rows: self.positions() * self.branches(),
            // Unconditional logits that are reused come from a pass of their own.
            logit_rows: self.max_candidates * if self.reuses_guidance { 1 } else { self.branches() },
            sequences: self.prompt_lens.len() * self.branches(),
            longest: self.longest(),
            tokens: self.positions() + 1,
            heads: config.heads(),
            selects_rows: self.feature_cache,
        }
    }

    /// Returns the launch sizes of a pass with `logit_rows` logit rows over sequences of `row_counts` rows.
    ///
    /// With `buckets` 0 the sizes are exact. Otherwise row counts are rounded up to a multiple of `gen_length / buckets`, so that
    /// one captured graph serves several row counts. Selected rows are not included.
    #[cfg(feature = "cuda")]
    pub(crate) fn bucket(&self, row_counts: &[usize], logit_rows: usize, buckets: usize) -> LaunchBucket {
        let (rows, longest) = (row_counts.iter().sum::<usize>(), row_counts.iter().copied().max().unwrap_or(0));
        if buckets == 0 {
            return LaunchBucket { rows: rows * self.branches(), longest, logit_rows, ..LaunchBucket::default() };
        }
        let longest = longest.next_multiple_of(self.gen_length.div_ceil(buckets).max(1)).min(self.longest());
        // Attention's workspace is sized for the rows that the sequences can have.
        let rows = (row_counts.len() * self.branches() * longest).min(self.positions() * self.branches());
        LaunchBucket { rows, longest, logit_rows, ..LaunchBucket::default() }
    }

    /// Elements of the key/value cache and the feature cache.
    pub(crate) fn cache_elements(&self, config: &Config) -> usize {
        let keys_and_values = if self.kv_cache { config.num_layers * config.kv_width() } else { 0 };
        let features = if self.feature_cache { (config.num_layers - 1) * config.d_model } else { 0 };
        2 * self.positions() * self.branches() * (keys_and_values + features)
    }

    /// Elements of the activation buffers of a session.
    pub(crate) fn activation_elements(&self, config: &Config) -> usize {
        let (limits, widths) = (self.limits(config), Widths::new(config));
        limits.rows * widths.row() + limits.logit_rows * widths.logit_row()
    }

    /// Elements of the widest input of a matrix product.
    pub(crate) fn widest_input(config: &Config) -> usize {
        let widths = Widths::new(config);
        widths.d.max(widths.q).max(widths.mlp)
    }
}

/// Widths of the activation buffers, in elements.
pub(super) struct Widths {
    pub d: usize,
    pub q: usize,
    pub qkv: usize,
    pub mlp: usize,
}

impl Widths {
    pub fn new(config: &Config) -> Widths {
        let q = config.q_width();
        Widths { d: config.d_model, q, qkv: q + 2 * config.kv_width(), mlp: config.mlp_hidden_size }
    }

    /// Elements per row of a pass: x, normed and delta; qkv; attention output; gate and up; their product.
    fn row(&self) -> usize {
        3 * self.d + self.qkv + self.q + 3 * self.mlp
    }

    /// Elements per logit row: x and attention output.
    fn logit_row(&self) -> usize {
        self.d + self.q
    }
}
