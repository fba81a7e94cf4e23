//! PrefixCache and DualCache (Fast-dLLM, section 3.1), and the hybrid cache.
//!
//! - The first forward of a block is a refresh: it computes all positions and stores their keys and values.
//! - Until the block is complete, PrefixCache computes the block and every position after it, and reuses the prefix.
//!   DualCache computes the block only, and reuses prefix and suffix.
//! - The cache of a block is not used after the block.
//!
//! The hybrid cache adds dLLM-Cache's rules to the refreshes. `refresh_prompt_every` leaves the prompt out of some
//! refreshes. With a `refresh_ratio` below 1 a refresh recomputes the block and the share of the other rows whose values
//! changed most since the last refresh.

use super::{CacheMode, PassKind, SequenceLayout};
use crate::backend::{Ratio, RowUpdate, UpdateAlways};
use crate::model::{CachePlan, LayerPlan, QueryRows};
use std::ops::Range;

/// A block cache and its parameters: [`CacheMode::None`], [`CacheMode::Prefix`] or [`CacheMode::Dual`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockCache {
    /// Which keys and values are reused.
    pub mode: CacheMode,
    /// Share of the rows outside the block that a refresh recomputes, except the first refresh. In [0, 1].
    pub refresh_ratio: f64,
    /// Every n-th refresh, beginning with the first, includes the prompt. At least 1.
    pub refresh_prompt_every: usize,
    /// Rows on each side of the block that passes between refreshes compute too.
    pub vicinity: usize,
    /// Largest number of positions after the block that rows attend to; `None` for no limit.
    pub suffix_window: Option<usize>,
}

impl BlockCache {
    /// Whether refreshes store features, for partial refreshes.
    pub fn stores_features(&self) -> bool {
        self.mode.has_block_refreshes() && self.refresh_ratio < 1.0
    }

    /// Returns the kind of the first pass of block `block`.
    pub fn first_pass(&self, block: usize) -> PassKind {
        if self.mode.has_block_refreshes() && !block.is_multiple_of(self.refresh_prompt_every) {
            PassKind::Response
        } else {
            PassKind::Full
        }
    }

    /// Returns the cache use of a pass in the first or in a later block.
    pub(super) fn plan(&self, pass: PassKind, first_block: bool) -> BlockPlan {
        let refresh = match (self.stores_features(), first_block) {
            (false, _) => Refresh::Full,
            (true, true) => Refresh::FullWithFeatures,
            (true, false) => Refresh::Partial(Ratio::new(self.refresh_ratio)),
        };
        BlockPlan { mode: self.mode, pass, refresh }
    }

    /// Returns the rows of a pass around `block`.
    pub fn query_rows(&self, pass: PassKind, layout: &SequenceLayout, block: &Range<usize>) -> QueryRows {
        let num_keys = self.suffix_window.map_or(layout.len, |window| block.end.saturating_add(window).min(layout.len));
        let mut rows = pass.rows(block, layout.first_active_row, num_keys);
        if !pass.is_refresh() {
            rows = rows.start.saturating_sub(self.vicinity)..rows.end.saturating_add(self.vicinity).min(num_keys);
        }
        // With Dream the row before the block has the logits of its first position.
        let block = block.start.saturating_sub(layout.logit_shift)..block.end;
        QueryRows { sequence: layout.index, rows, block, num_keys }
    }
}

/// Extent of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// Computes all rows of the pass.
    Full,
    /// Computes all rows of the pass, and stores their features for partial refreshes.
    FullWithFeatures,
    /// Computes the block, and this share of the other rows: those whose values changed most since the last refresh.
    Partial(Ratio),
}

/// Cache use of one pass with a block cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlan {
    /// Which keys and values are reused.
    pub mode: CacheMode,
    /// Rows that the pass computes.
    pub pass: PassKind,
    /// Extent of the pass, if it is a refresh.
    pub refresh: Refresh,
}

impl BlockPlan {
    /// Creates a plan whose refreshes compute all rows.
    pub const fn new(mode: CacheMode, pass: PassKind) -> BlockPlan {
        BlockPlan { mode, pass, refresh: Refresh::Full }
    }
}

impl CachePlan for BlockPlan {
    fn layer(&self, layer: usize) -> LayerPlan {
        let reuse = self.pass != PassKind::Full;
        // Later passes of the block compute their own keys and values of the rows that change: only refreshes store.
        let store = self.pass.is_refresh() && self.mode != CacheMode::None;
        match self.refresh {
            Refresh::Partial(ratio) if store && layer > 0 => {
                LayerPlan::Partial(RowUpdate { always: UpdateAlways::Block, others: Some(ratio) })
            }
            refresh => {
                let store_features = store && layer > 0 && refresh == Refresh::FullWithFeatures;
                LayerPlan::Full { reuse, store, store_features }
            }
        }
    }
}
