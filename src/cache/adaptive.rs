//! The adaptive cache: dLLM-Cache (sections 3.2 and 3.3).
//!
//! Keys, values and the outputs of attention and MLP (the features) of all positions are cached in every layer.
//!
//! - Forward `t` of a sequence refreshes the prompt when `t` is a multiple of `prompt_interval`, and the response when `t`
//!   is a multiple of `response_interval`.
//! - Between two refreshes of the response, V-verify selects the share `refresh_ratio` of the response rows for
//!   recomputation: those whose values changed most since the forward before.
//! - The first layer always computes every row that a later layer or the head reads.

use super::SequenceLayout;
use crate::backend::{Ratio, RowUpdate, UpdateAlways};
use crate::model::{CachePlan, Family, LayerPlan, QueryRows};

/// Parameters of the adaptive cache. Intervals count forwards of a sequence and are at least 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveCache {
    /// Forwards from one refresh of the prompt to the next (Kp).
    pub prompt_interval: usize,
    /// Forwards from one refresh of the response to the next (Kr).
    pub response_interval: usize,
    /// Share of the response rows that V-verify selects in between (rho), in [0, 1]. 0 disables V-verify.
    pub refresh_ratio: f64,
    /// With guidance: forwards from one pass of the unconditional sequence to the next (Kc).
    pub cfg_interval: usize,
}

/// Pass of the unconditional sequence, with classifier-free guidance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CfgPlan {
    /// Runs in the pass of the sequence, with the same plan.
    Batched,
    /// Runs in a pass of its own, with this plan.
    Separate(AdaptivePlan),
    /// Does not run: guidance reuses the logit differences of the last separate pass.
    Reused,
}

/// Number of forwards at the start of a decode that always run the unconditional sequence.
const FIRST_CFG_FORWARDS: usize = 5;

impl AdaptiveCache {
    /// Returns the plan of forward `t` of a sequence, counted from 0.
    ///
    /// # Panics
    /// When an interval is 0.
    pub fn plan(&self, t: usize) -> AdaptivePlan {
        let response = t.is_multiple_of(self.response_interval);
        AdaptivePlan {
            prompt: t.is_multiple_of(self.prompt_interval),
            response,
            update_ratio: if response {
                Some(Ratio::new(1.0))
            } else {
                (self.refresh_ratio > 0.0).then(|| Ratio::new(self.refresh_ratio))
            },
        }
    }

    /// Returns the pass of the unconditional sequence in forward `t` of a guided sequence. The intervals of a separate pass
    /// count the passes of the unconditional sequence.
    ///
    /// # Panics
    /// When an interval is 0.
    pub fn cfg_plan(&self, t: usize) -> CfgPlan {
        let interval = self.cfg_interval;
        if interval == 1 {
            return CfgPlan::Batched;
        }
        let runs = |t: usize| t < FIRST_CFG_FORWARDS || t.is_multiple_of(interval);
        if runs(t) { CfgPlan::Separate(self.plan((0..t).filter(|t| runs(*t)).count())) } else { CfgPlan::Reused }
    }
}

/// Cache use of one forward with the adaptive cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdaptivePlan {
    /// Whether the forward refreshes the prompt.
    pub prompt: bool,
    /// Whether the forward refreshes the response.
    pub response: bool,
    /// Share of the response rows that layers after the first recompute.
    update_ratio: Option<Ratio>,
}

impl AdaptivePlan {
    /// Returns the rows of the forward: all positions when it refreshes the prompt, otherwise those from the first active
    /// row on.
    pub fn query_rows(&self, layout: &SequenceLayout) -> QueryRows {
        let first = if self.prompt { 0 } else { layout.first_active_row };
        QueryRows::new(layout.index, first..layout.len, layout.len)
    }
}

impl CachePlan for AdaptivePlan {
    fn layer(&self, layer: usize) -> LayerPlan {
        match (layer, self.prompt, self.response) {
            // Tokens before the query rows have not changed, so the keys and values of this layer are still valid. Their
            // features are not needed: no later layer computes these rows.
            (0, prompt, _) => LayerPlan::Full { reuse: !prompt, store: true, store_features: false },
            (_, true, true) => LayerPlan::Full { reuse: false, store: true, store_features: true },
            (_, prompt, _) => {
                let always = if prompt { UpdateAlways::Prompt } else { UpdateAlways::Nothing };
                LayerPlan::Partial(RowUpdate { always, others: self.update_ratio })
            }
        }
    }
}

/// Returns the first row that a forward must compute when it does not refresh the prompt: no token before it can change,
/// and its logits are the first that can be needed. This is the row of the first mask, with Dream the row before it.
pub fn first_active_row(family: Family, prompt: &[u32], mask_token: u32) -> usize {
    let first_mask = prompt.iter().position(|token| *token == mask_token).unwrap_or(prompt.len());
    match family {
        Family::Llada => first_mask,
        Family::Dream => first_mask.saturating_sub(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAPTIVE: AdaptiveCache =
        AdaptiveCache { prompt_interval: 6, response_interval: 3, refresh_ratio: 0.25, cfg_interval: 1 };
    const FULL: LayerPlan = LayerPlan::Full { reuse: false, store: true, store_features: true };

    fn partial_layer(prompt: bool, ratio: f64) -> LayerPlan {
        let always = if prompt { UpdateAlways::Prompt } else { UpdateAlways::Nothing };
        LayerPlan::Partial(RowUpdate { always, others: (ratio > 0.0).then_some(Ratio::new(ratio)) })
    }

    #[test]
    fn plans_of_a_period() {
        let later: Vec<LayerPlan> = (0..7).map(|t| ADAPTIVE.plan(t).layer(2)).collect();
        let (verify, refresh) = (partial_layer(false, 0.25), partial_layer(false, 1.0));
        assert_eq!(later, [FULL, verify, verify, refresh, verify, verify, FULL]);
        // A refresh of the prompt without the response, with V-verify or without.
        let other = AdaptiveCache { prompt_interval: 4, response_interval: 7, ..ADAPTIVE };
        assert_eq!(other.plan(4).layer(1), partial_layer(true, 0.25));
        let stale = AdaptiveCache { refresh_ratio: 0.0, ..other };
        assert_eq!(stale.plan(4).layer(1), partial_layer(true, 0.0));
        assert_eq!(stale.plan(5).layer(1), partial_layer(false, 0.0));
        assert_eq!(stale.plan(7).layer(1), partial_layer(false, 1.0));
    }

    #[test]
    fn the_first_layer_computes_all_rows() {
        for t in 0..20 {
            let plan = ADAPTIVE.plan(t);
            assert_eq!(plan.layer(0), LayerPlan::Full { reuse: t % 6 != 0, store: true, store_features: false });
            let layout = SequenceLayout { index: 0, prompt_len: 5, len: 14, first_active_row: 4, logit_shift: 1 };
            let first = if t % 6 == 0 { 0 } else { 4 };
            assert_eq!(plan.query_rows(&layout), QueryRows::new(0, first..14, 14));
        }
    }

    #[test]
    fn intervals_of_one_refresh_everything() {
        let always = AdaptiveCache { prompt_interval: 1, response_interval: 1, ..ADAPTIVE };
        assert!((0..5).all(|t| always.plan(t).layer(1) == FULL));
    }

    /// The unconditional sequence runs in the first five forwards and in every fourth.
    #[test]
    fn unconditional_sequences_count_their_own_forwards() {
        let separate = AdaptiveCache { cfg_interval: 4, ..ADAPTIVE };
        for (t, own) in [(0, 0), (1, 1), (4, 4), (8, 5), (12, 6), (16, 7)] {
            assert_eq!(separate.cfg_plan(t), CfgPlan::Separate(separate.plan(own)), "{t}");
        }
        assert!([5, 6, 7, 9, 11, 13].iter().all(|t| separate.cfg_plan(*t) == CfgPlan::Reused));
        assert!((0..20).all(|t| ADAPTIVE.cfg_plan(t) == CfgPlan::Batched));
    }

    #[test]
    fn active_rows_begin_at_the_first_mask() {
        const M: u32 = 9;
        let first_row = |family, prompt: &[u32]| first_active_row(family, prompt, M);
        assert_eq!(first_row(Family::Llada, &[1, 2, 3]), 3);
        assert_eq!(first_row(Family::Dream, &[1, 2, 3]), 2);
        assert_eq!(first_row(Family::Llada, &[1, M, 3, M]), 1);
        assert_eq!(first_row(Family::Dream, &[1, M, 3]), 0);
        assert_eq!(first_row(Family::Dream, &[M]), 0);
    }
}
