//! Which rows a forward pass runs, and what it reuses of earlier ones: Fast-dLLM's block caches (section 3.1) here,
//! dLLM-Cache in [`adaptive`].
//!
//! At the start of a block everything runs and is cached (a refresh). Until the block is done, PrefixCache runs the
//! block and all that follows against the cached prefix; DualCache runs the block alone, against cached prefix and
//! suffix. Nothing outlives the block, unless they are joined with what dLLM-Cache does ([`BlockPlan::refresh`]): then a
//! refresh may leave the prompt as it is cached, or run the block and those other rows whose values turned most.

pub mod adaptive;

use crate::backend::{Ratio, RowUpdate, UpdateAlways};
use crate::error::Error;
use crate::model::{CachePlan, LayerPlan};
use std::ops::Range;
use std::str::FromStr;

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
    /// The response, and what is before it that can change.
    Response,
    /// The block and all that follows.
    Suffix,
    /// The block.
    Block,
}

impl CacheMode {
    /// All cache modes, in the order of the command line's help.
    pub const ALL: [CacheMode; 4] = [CacheMode::None, CacheMode::Prefix, CacheMode::Dual, CacheMode::Adaptive];

    /// Returns the name on the command line, which [`Display`](std::fmt::Display) writes and [`FromStr`] parses.
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

impl PassKind {
    /// The rows that run, for a block of a sequence of `len` positions, of which none before `first_active_row` can change
    /// ([`adaptive::first_active_row`]).
    pub fn window(self, block: &Range<usize>, first_active_row: usize, len: usize) -> Range<usize> {
        match self {
            PassKind::Full => 0..len,
            PassKind::Response => first_active_row..len,
            PassKind::Suffix => block.start..len,
            PassKind::Block => block.clone(),
        }
    }

    /// Whether it begins a block.
    pub fn refreshes(self) -> bool {
        matches!(self, PassKind::Full | PassKind::Response)
    }
}

/// What the refreshes of a block leave to later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// Nothing: all rows run again.
    Whole,
    /// This one runs all rows, and keeps what later ones need.
    Keep,
    /// This one runs the block, and of the other rows the share whose values turned most since the last refresh.
    Some(Ratio),
}

/// The cache use of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlan {
    /// What is kept.
    pub mode: CacheMode,
    /// What runs.
    pub pass: PassKind,
    /// Of a refresh.
    pub refresh: Refresh,
}

impl BlockPlan {
    /// Refreshes run all rows.
    pub const fn new(mode: CacheMode, pass: PassKind) -> BlockPlan {
        BlockPlan { mode, pass, refresh: Refresh::Whole }
    }
}

impl CachePlan for BlockPlan {
    fn layer(&self, layer: usize) -> LayerPlan {
        let reuse = self.pass != PassKind::Full;
        // A later pass of the block recomputes all the rows it stands in for, so only the refresh needs to store.
        let store = self.pass.refreshes() && self.mode != CacheMode::None;
        match self.refresh {
            Refresh::Some(share) if store && layer > 0 => {
                LayerPlan::Partial(RowUpdate { always: UpdateAlways::Block, others: Some(share) })
            }
            refresh => LayerPlan::Full { reuse, store, store_features: store && layer > 0 && refresh == Refresh::Keep },
        }
    }
}
