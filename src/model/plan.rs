//! The plan of a pass: which rows each layer computes, and how it uses the caches.

use crate::backend::RowUpdate;

/// Rows that a layer computes, and its use of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerPlan {
    /// The layer computes every row of the pass.
    Full {
        /// Attend to cached keys and values outside the rows of the pass.
        reuse: bool,
        /// Store the keys and values of this pass in the cache.
        store: bool,
        /// Store the outputs of attention and MLP in the feature cache. Not available in the first layer.
        store_features: bool,
    },
    /// The layer computes some rows. They attend to the cached keys of all positions, and their keys, values and features are
    /// stored. All other rows use the feature cache. Not available in the first layer. All partial layers of a pass have the
    /// same update.
    Partial(RowUpdate),
}

impl LayerPlan {
    /// Returns the update of a partial layer.
    pub fn update(&self) -> Option<RowUpdate> {
        match self {
            LayerPlan::Full { .. } => None,
            LayerPlan::Partial(update) => Some(*update),
        }
    }

    /// Whether the layer computes every row and stores no features: then the end of the last layer can be restricted to the rows
    /// that need logits.
    pub(crate) fn is_full_without_features(&self) -> bool {
        matches!(self, LayerPlan::Full { store_features: false, .. })
    }
}

/// The plan of a pass, layer by layer. Implemented by [`crate::cache`].
pub trait CachePlan {
    /// Returns the plan of layer `layer`.
    fn layer(&self, layer: usize) -> LayerPlan;
}

/// Element i is the plan of layer i.
impl CachePlan for Vec<LayerPlan> {
    fn layer(&self, layer: usize) -> LayerPlan {
        self[layer]
    }
}

/// The rows that V-verify selected in one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedRows {
    /// Index of the layer.
    pub layer: usize,
    /// For each sequence of the pass the selected rows, ascending, counted among the rows that V-verify selects from
    /// ([`crate::backend::UpdateRanges::other`]). With the adaptive cache index 0 is the first row of the response.
    pub rows: Vec<Vec<usize>>,
}
