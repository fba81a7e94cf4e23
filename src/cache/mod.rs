//! Which rows a forward pass runs, and what it reuses of earlier ones: Fast-dLLM's block caches (section 3.1) here,
//! dLLM-Cache in [`adaptive`].
//!
//! At the start of a block everything runs and is cached (a refresh). Until the block is done, PrefixCache runs the
//! block and all that follows against the cached prefix; DualCache runs the block alone, against cached prefix and
//! suffix. Nothing outlives the block.

pub mod adaptive;

use crate::model::{CachePlan, LayerPlan};
use std::ops::Range;

/// What is kept between forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// Nothing: every forward runs everything.
    None,
    /// Keys and values of the positions before the block.
    Prefix,
    /// Keys and values of the positions before and after the block.
    Dual,
    /// dLLM-Cache: keys, values and the outputs of attention and MLP of all positions, renewed at intervals and where values
    /// turned most ([`adaptive`]).
    Adaptive,
}

/// The part of the sequence that a forward runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassKind {
    /// All positions.
    Full,
    /// The block and all that follows.
    Suffix,
    /// The block.
    Block,
}

impl CacheMode {
    /// As the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            CacheMode::None => "none",
            CacheMode::Prefix => "prefix",
            CacheMode::Dual => "dual",
            CacheMode::Adaptive => "adaptive",
        }
    }

    /// What the forwards of a block run after its first one.
    pub fn block_pass(self) -> PassKind {
        match self {
            CacheMode::None | CacheMode::Adaptive => PassKind::Full,
            CacheMode::Prefix => PassKind::Suffix,
            CacheMode::Dual => PassKind::Block,
        }
    }
}

impl PassKind {
    /// The positions that run, for a block of a sequence of `len` positions.
    pub fn window(self, block: &Range<usize>, len: usize) -> Range<usize> {
        match self {
            PassKind::Full => 0..len,
            PassKind::Suffix => block.start..len,
            PassKind::Block => block.clone(),
        }
    }
}

/// The cache use of one pass, the same in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlan {
    /// What is kept.
    pub mode: CacheMode,
    /// What runs.
    pub pass: PassKind,
}

impl CachePlan for BlockPlan {
    fn layer(&self, _layer: usize) -> LayerPlan {
        let full = self.pass == PassKind::Full;
        // A later pass of the block recomputes all the rows it stands in for, so only the refresh needs to store.
        LayerPlan::Whole { reuse: !full, store: full && self.mode != CacheMode::None, keep: false }
    }
}
