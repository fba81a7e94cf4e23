//! One forward pass with the decision that follows it, and the engines that run it.

use super::run::DeviceLoop;
use crate::error::Result;
use crate::model::{CachePlan, QueryRows, SelectedRows};
use crate::sampling::{Candidates, Prediction, SamplingParams};
use serde::Serialize;

/// One forward pass, and the decision that follows it.
pub struct Pass<'a> {
    /// Cache use, layer by layer.
    pub plan: &'a dyn CachePlan,
    /// Rows that the pass computes, at most one entry per sequence.
    pub query_rows: &'a [QueryRows],
    /// Masked positions that the pass may commit. They are among the rows of their sequence.
    pub candidates: &'a [Candidates],
    /// Sampling parameters.
    pub sampling: &'a SamplingParams,
    /// Execution of the unconditional sequences, with guidance.
    pub cfg: CfgBranch<'a>,
    /// Whether [`DecodeEngine::selected_rows`] will be called after the pass.
    pub observed: bool,
}

/// Execution of the unconditional branch of classifier-free guidance.
#[derive(Clone, Copy)]
pub enum CfgBranch<'a> {
    /// In the same pass, with the same plan.
    Batched,
    /// In a pass of its own. The engine keeps the difference between conditional and unconditional logits of every masked
    /// position, for later passes.
    Separate {
        /// Cache use of the unconditional pass, layer by layer.
        plan: &'a dyn CachePlan,
        /// Rows of the unconditional pass, in the order of the conditional pass.
        query_rows: &'a [QueryRows],
    },
    /// Not at all: the differences of the last separate pass are applied. A position that was not masked in that pass is an
    /// error.
    Reused,
}

/// Runs the passes of a decode.
pub trait DecodeEngine {
    /// Runs a pass over `tokens`, one vector per sequence with prompt and generated region. Returns one prediction per candidate,
    /// in the order of [`Pass::candidates`]. Does not change `tokens`.
    ///
    /// # Errors
    /// [`crate::Error::NoFiniteLogit`] names the first candidate without a finite logit; the device's errors.
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>>;

    /// Returns the engine as a [`DeviceLoop`], if it can run many passes without the host.
    fn device_loop(&mut self) -> Option<&mut dyn DeviceLoop> {
        None
    }

    /// Returns the kernel counts of a captured pass: the one with the fewest rows, and of those the one with the fewest selected
    /// rows. `None` when no pass was captured.
    fn kernel_counts(&self) -> Result<Option<KernelCounts>> {
        Ok(None)
    }

    /// Returns the rows that V-verify selected in the layers of the last pass, if it was observed.
    fn selected_rows(&self) -> &[SelectedRows] {
        &[]
    }

    /// Returns the multiply-accumulates (MACs) of matrix products and attention in all passes so far. On a CUDA device this
    /// includes padded logit rows, and first layers of passes that were enqueued in advance and discarded.
    fn macs(&self) -> u64 {
        0
    }
}

/// Number of kernels and products in a captured pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KernelCounts {
    /// Nodes of the first layer, without the embedding. Partial layers have other counts.
    pub layer: usize,
    /// Nodes of both graphs.
    pub pass: usize,
}
