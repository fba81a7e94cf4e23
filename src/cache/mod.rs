//! Caches of a decode: the rows that a forward pass computes, what it stores, and what it reuses.
//!
//! - [`BlockCache`]: no cache, or Fast-dLLM's PrefixCache and DualCache (section 3.1), and the hybrid cache.
//! - [`AdaptiveCache`]: dLLM-Cache (sections 3.2 and 3.3).

pub mod adaptive;
mod block;

pub use adaptive::AdaptiveCache;
pub use block::{BlockCache, BlockPlan, Refresh};

use crate::error::Error;
use crate::model::{CachePlan, Family, LayerPlan, QueryRows};
use adaptive::{AdaptivePlan, CfgPlan};
use std::ops::Range;
use std::str::FromStr;

/// Cache of a decode: the keys, values and features that forward passes reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheMode {
    /// No cache: every forward computes all positions.
    None,
    /// Fast-dLLM's PrefixCache: keys and values of the positions before the block.
    Prefix,
    /// Fast-dLLM's DualCache: keys and values of the positions before and after the block.
    Dual,
    /// dLLM-Cache: keys, values and the outputs of attention and MLP of all positions ([`adaptive`]).
    Adaptive,
}

impl CacheMode {
    /// All cache modes, in the order of the command line's help.
    pub const ALL: [CacheMode; 4] = [CacheMode::None, CacheMode::Prefix, CacheMode::Dual, CacheMode::Adaptive];

    /// Whether the first forward of a block stores keys and values for the later ones.
    pub(crate) fn has_block_refreshes(self) -> bool {
        matches!(self, CacheMode::Prefix | CacheMode::Dual)
    }

    /// Returns the name on the command line, which [`Display`](std::fmt::Display) writes and [`FromStr`] parses.
    pub fn name(self) -> &'static str {
        match self {
            CacheMode::None => "none",
            CacheMode::Prefix => "prefix",
            CacheMode::Dual => "dual",
            CacheMode::Adaptive => "adaptive",
        }
    }

    /// Returns the kind of every forward of a block but its first.
    pub fn block_pass(self) -> PassKind {
        match self {
            CacheMode::None | CacheMode::Adaptive => PassKind::Full,
            CacheMode::Prefix => PassKind::Suffix,
            CacheMode::Dual => PassKind::Block,
        }
    }
}

impl std::fmt::Display for CacheMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Parses the name of a cache mode; any other text is an [`Error::Argument`].
impl FromStr for CacheMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<CacheMode, Error> {
        let found = CacheMode::ALL.into_iter().find(|mode| mode.name() == name);
        found.ok_or_else(|| Error::argument("cache", "none, prefix, dual or adaptive", name))
    }
}

/// Kind of a forward pass: the part of the sequence that it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassKind {
    /// All positions, up to the end of the suffix window.
    Full,
    /// The response, with Dream also the row before it, and every position after the first mask of the prompt.
    Response,
    /// The block and every position after it.
    Suffix,
    /// The block.
    Block,
}

impl PassKind {
    /// Returns the rows of a pass over a sequence of `len` positions. No token before `first_active_row`
    /// ([`adaptive::first_active_row`]) can change.
    pub fn rows(self, block: &Range<usize>, first_active_row: usize, len: usize) -> Range<usize> {
        match self {
            PassKind::Full => 0..len,
            PassKind::Response => first_active_row..len,
            PassKind::Suffix => block.start..len,
            PassKind::Block => block.clone(),
        }
    }

    /// Whether the pass is a refresh, which begins a block.
    pub fn is_refresh(self) -> bool {
        matches!(self, PassKind::Full | PassKind::Response)
    }
}

/// Constants of one sequence that determine its rows. Positions count from the start of the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceLayout {
    /// Index of the sequence in the batch.
    pub index: usize,
    /// Length of the prompt, in tokens.
    pub prompt_len: usize,
    /// Length of prompt and generated region, in tokens.
    pub len: usize,
    /// First row that passes compute while the prompt is not refreshed ([`adaptive::first_active_row`]).
    pub first_active_row: usize,
    /// Distance from the row of a position to the earlier row that has its logits: 1 for Dream, 0 for LLaDA.
    pub logit_shift: usize,
}

impl SequenceLayout {
    /// Describes sequence `index`: `prompt` and `gen_length` generated positions.
    pub fn new(index: usize, family: Family, prompt: &[u32], gen_length: usize, mask_token: u32) -> SequenceLayout {
        SequenceLayout {
            index,
            prompt_len: prompt.len(),
            len: prompt.len() + gen_length,
            first_active_row: adaptive::first_active_row(family, prompt, mask_token),
            logit_shift: if family == Family::Dream { 1 } else { 0 },
        }
    }
}

/// Cache of a decode, with its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CacheConfig {
    /// No cache, PrefixCache, DualCache or the hybrid cache.
    Block(BlockCache),
    /// dLLM-Cache.
    Adaptive(AdaptiveCache),
}

impl CacheConfig {
    /// Returns the cache use of a pass around `block` that is forward `step` of the sequence.
    pub fn plan(&self, kind: PassKind, layout: &SequenceLayout, block: &Range<usize>, step: usize) -> PassPlan {
        match self {
            CacheConfig::Block(cache) => PassPlan::Block(cache.plan(kind, block.start == layout.prompt_len)),
            CacheConfig::Adaptive(cache) => PassPlan::Adaptive(cache.plan(step), cache.cfg_plan(step)),
        }
    }

    /// Returns the rows that a pass with this plan computes.
    pub fn query_rows(&self, plan: &PassPlan, layout: &SequenceLayout, block: &Range<usize>) -> QueryRows {
        match (self, plan) {
            (_, PassPlan::Adaptive(plan, _)) => plan.query_rows(layout),
            (CacheConfig::Block(cache), PassPlan::Block(plan)) => cache.query_rows(plan.pass, layout, block),
            (CacheConfig::Adaptive(_), PassPlan::Block(_)) => unreachable!("a block plan of the adaptive cache"),
        }
    }

    /// Returns the rows of a pass as observers see them: with the adaptive cache all positions, whatever the plan is.
    pub fn observed_rows(&self, kind: PassKind, layout: &SequenceLayout, block: &Range<usize>) -> Range<usize> {
        match self {
            CacheConfig::Block(cache) => cache.query_rows(kind, layout, block).rows,
            CacheConfig::Adaptive(_) => kind.rows(block, layout.first_active_row, layout.len),
        }
    }

    /// Returns the kind of the first pass of block `block`.
    pub fn first_pass(&self, block: usize) -> PassKind {
        match self {
            CacheConfig::Block(cache) => cache.first_pass(block),
            CacheConfig::Adaptive(_) => PassKind::Full,
        }
    }

    /// Returns the kind of every forward of a block but its first.
    pub fn block_pass(&self) -> PassKind {
        match self {
            CacheConfig::Block(cache) => cache.mode.block_pass(),
            CacheConfig::Adaptive(_) => PassKind::Full,
        }
    }

    /// Whether passes store features for later passes.
    pub fn stores_features(&self) -> bool {
        match self {
            CacheConfig::Block(cache) => cache.stores_features(),
            CacheConfig::Adaptive(_) => true,
        }
    }

    /// Returns the number of forwards after which the plans of [`CacheConfig::plan`] repeat.
    pub fn period(&self) -> usize {
        match self {
            CacheConfig::Block(_) => 1,
            CacheConfig::Adaptive(cache) => cache.prompt_interval.saturating_mul(cache.response_interval),
        }
    }

    /// Whether the plan of a pass depends on the number of forwards before it. Sequences with different numbers then need
    /// separate passes.
    pub fn depends_on_step(&self) -> bool {
        matches!(self, CacheConfig::Adaptive(_))
    }
}

/// Cache use of one pass of one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PassPlan {
    /// With a [`BlockCache`].
    Block(BlockPlan),
    /// With the [`AdaptiveCache`]: of the sequence, and of its unconditional sequence.
    Adaptive(AdaptivePlan, CfgPlan),
}

impl PassPlan {
    /// Number of template indices: 0 for the first pass of a block, and those of [`PassPlan::template_index`].
    pub const NUM_TEMPLATES: usize = 5;

    /// Returns the index, from 1 on, of this kind of pass among the step templates of a decode.
    pub fn template_index(&self) -> usize {
        match self {
            PassPlan::Block(_) => 1,
            PassPlan::Adaptive(plan, _) => 1 + 2 * usize::from(plan.prompt) + usize::from(plan.response),
        }
    }

    /// Returns the plan of the adaptive cache, if that is the cache.
    pub fn adaptive(&self) -> Option<AdaptivePlan> {
        match self {
            PassPlan::Block(_) => None,
            PassPlan::Adaptive(plan, _) => Some(*plan),
        }
    }
}

impl CachePlan for PassPlan {
    fn layer(&self, layer: usize) -> LayerPlan {
        match self {
            PassPlan::Block(plan) => plan.layer(layer),
            PassPlan::Adaptive(plan, _) => plan.layer(layer),
        }
    }
}
