//! How large the buffers of a decode are, and what they take.

use super::config::Config;
#[cfg(feature = "cuda")]
use crate::backend::LaunchBucket;
use crate::backend::SessionLimits;
#[cfg(feature = "cuda")]
use crate::error::Result;

/// How large a session's buffers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionConfig {
    /// Prompt lengths, one per sequence.
    pub prompt_lens: Vec<usize>,
    /// Positions to generate, the same for each.
    pub gen_length: usize,
    /// Candidates of a pass at most, all sequences together.
    pub candidates: usize,
    /// Whether keys and values are kept between passes.
    pub kv_cache: bool,
    /// Whether what attention and the MLP add is kept too, of every layer but the first.
    pub feature_cache: bool,
    /// Whether the twins' distances are remembered: [`super::CfgBranch::Separate`].
    pub remembered: bool,
    /// Whether each sequence has an unconditional twin (classifier-free guidance).
    pub guided: bool,
    /// Steps of a schedule by shares, if there is one: [`super::QuotaSchedule::Dream`].
    pub ratios: usize,
    /// Tokens that end a sequence early.
    pub end_tokens: usize,
}

/// Bytes that a decode takes besides the mapped weights (f32 activations).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Keys and values, what attention and the MLP add where that is kept, and distances of twins where they are remembered.
    pub cache: usize,
    /// Activations, logits, packed operands.
    pub workspace: usize,
    /// Per-thread scratch, all threads.
    pub scratch: usize,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> usize {
        self.cache + self.workspace + self.scratch
    }
}

impl SessionConfig {
    pub(super) fn twins(&self) -> usize {
        if self.guided { 2 } else { 1 }
    }

    /// Kinds of passes that a block is made of, at most: its first and the rest; with kept outputs the rest are of four, by
    /// whether they renew the prompt and the response.
    pub(crate) fn slots(&self) -> usize {
        if self.feature_cache { 5 } else { 2 }
    }

    /// Rows whose logits are asked for, at most: of twins too, where they run in the same pass.
    fn logit_rows(&self) -> usize {
        self.candidates * if self.remembered { 1 } else { self.twins() }
    }

    /// Rows of the largest pass: every position of every sequence.
    fn rows(&self) -> usize {
        let positions: usize = self.prompt_lens.iter().map(|p| p + self.gen_length).sum();
        positions * self.twins()
    }

    /// Positions of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        self.prompt_lens.iter().max().unwrap_or(&0) + self.gen_length
    }

    /// Elements of keys and values, and of what attention and the MLP add, between passes.
    fn cache_len(&self, config: &Config) -> usize {
        let keys_values = if self.kv_cache { config.num_layers * config.kv_width() } else { 0 };
        let outputs = if self.feature_cache { (config.num_layers - 1) * config.d_model } else { 0 };
        2 * self.rows() * (keys_values + outputs)
    }

    /// What launches are sized for, of passes over windows of these lengths and so many scored rows: just these rows, or with
    /// `rooms` windows of a multiple of that part of the generated positions, which no shrinking window exceeds. Rows that are
    /// chosen come on top.
    #[cfg(feature = "cuda")]
    pub(super) fn room(&self, windows: &[usize], logit_rows: usize, rooms: usize) -> LaunchBucket {
        let (rows, longest) = (windows.iter().sum::<usize>(), windows.iter().copied().max().unwrap_or(0));
        if rooms == 0 {
            return LaunchBucket { rows: rows * self.twins(), longest, logit_rows, ..LaunchBucket::default() };
        }
        let longest = longest.next_multiple_of(self.gen_length.div_ceil(rooms).max(1)).min(self.longest());
        // Not more than the windows could fill: attention's workspace is sized for that.
        let rows = (windows.len() * self.twins() * longest).min(self.rows());
        LaunchBucket { rows, longest, logit_rows, ..LaunchBucket::default() }
    }

    /// The same, as a backend wants to know it.
    pub(super) fn needs(&self, config: &Config) -> SessionLimits {
        let positions: usize = self.prompt_lens.iter().map(|p| p + self.gen_length).sum();
        SessionLimits {
            rows: self.rows(),
            logit_rows: self.logit_rows(),
            spans: self.prompt_lens.len() * self.twins(),
            longest: self.longest(),
            tokens: positions + 1,
            heads: config.heads(),
            selects: self.feature_cache,
        }
    }

    /// Elements of keys and values; of activations; of logits.
    #[cfg(feature = "cuda")]
    pub(super) fn elements(&self, config: &Config) -> [usize; 3] {
        let (rows, logit_rows, widths) = (self.rows(), self.logit_rows(), Widths::of(config));
        [self.cache_len(config), rows * widths.row() + logit_rows * widths.logit_row(), logit_rows * config.vocab_size]
    }

    /// Bytes that a session of these sizes allocates on a CUDA device with so many multiprocessors, besides the weights.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when a size does not fit 32 bits.
    #[cfg(feature = "cuda")]
    pub fn device_memory(&self, config: &Config, multiprocessors: usize) -> Result<MemoryEstimate> {
        let [cache, workspace] = super::resident::memory(self, config, multiprocessors)?;
        Ok(MemoryEstimate { cache, workspace, scratch: 0 })
    }

    /// What a CPU session of these sizes allocates with `threads` threads.
    pub fn memory(&self, config: &Config, threads: usize) -> MemoryEstimate {
        use crate::backend::cpu::{attention, linear};
        let (rows, logit_rows) = (self.rows(), self.logit_rows());
        let widths = Widths::of(config);
        let distances = if self.remembered { self.candidates * config.vocab_size } else { 0 };
        let cache = self.cache_len(config) + distances;
        // Logits of both on the host, and those that decide.
        let hosted = 3 * distances;
        let packed = linear::packed_len(rows, widths.widest());
        let longest = self.longest();
        let scratch = linear::SCRATCH_BYTES + 4 * attention::scratch_len(longest, config.head_dim);
        let workspace = rows * widths.row() + logit_rows * (widths.logit_row() + config.vocab_size) + packed + hosted;
        let angles = longest * config.head_dim;
        MemoryEstimate { cache: 4 * cache, workspace: 4 * (workspace + angles), scratch: threads * scratch }
    }
}

/// Widths of the buffers, in elements.
pub(super) struct Widths {
    pub d: usize,
    pub q: usize,
    pub qkv: usize,
    pub mlp: usize,
}

impl Widths {
    pub fn of(config: &Config) -> Widths {
        let q = config.q_width();
        Widths { d: config.d_model, q, qkv: q + 2 * config.kv_width(), mlp: config.mlp_hidden_size }
    }

    /// Per row of a pass: x, normed, delta; qkv; attention output; gate and up; their product.
    pub fn row(&self) -> usize {
        3 * self.d + self.qkv + self.q + 3 * self.mlp
    }

    /// Per scored row: x and attention output.
    pub fn logit_row(&self) -> usize {
        self.d + self.q
    }

    /// Of the inputs of matrices.
    pub fn widest(&self) -> usize {
        self.d.max(self.q).max(self.mlp)
    }
}
