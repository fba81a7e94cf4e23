//! dLLM-Cache (sections 3.2 and 3.3): what a forward runs when keys, values and the outputs of attention and MLP of all
//! positions are kept from forward to forward.
//!
//! Forward t of a sequence renews the prompt's features when t is a multiple of one interval, the response's when it is a
//! multiple of another. In between V-verify renews those response rows whose values turned most since the forward before.
//! The first layer runs everything that a later layer or the head looks at, always.

use crate::backend::{Ratio, RowUpdate, UpdateAlways};
use crate::model::{CachePlan, Family, LayerPlan};
use std::ops::Range;

/// When a decode renews what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adaptive {
    /// Forwards between two refreshes of the prompt.
    pub prompt_interval: usize,
    /// Forwards between two refreshes of the response.
    pub response_interval: usize,
    /// Share of the response that V-verify renews in between, 0 to 1; 0 is none, and no V-verify.
    pub refresh_ratio: f64,
    /// With guidance: forwards between two of the unconditional twin.
    pub guidance_interval: usize,
}

/// What the unconditional twin of a guided sequence does in a forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CfgPlan {
    /// What the sequence does.
    Batched,
    /// This, in a forward of its own.
    Separate(AdaptivePlan),
    /// Nothing: its logits are as far from the sequence's as when it ran last.
    Reused,
}

/// Forwards at the beginning in which twins run, whatever the interval.
const FIRST_TWINS: usize = 5;

impl Adaptive {
    /// What forward `t` of a sequence, counted from 0, renews.
    ///
    /// # Panics
    /// When an interval is 0.
    pub fn plan(&self, t: usize) -> AdaptivePlan {
        let response = t.is_multiple_of(self.response_interval);
        AdaptivePlan {
            prompt: t.is_multiple_of(self.prompt_interval),
            response,
            others: if response {
                Some(Ratio::new(1.0))
            } else {
                (self.refresh_ratio > 0.0).then(|| Ratio::new(self.refresh_ratio))
            },
        }
    }

    /// What the twin of a guided sequence does in the sequence's forward `t`. Its own forwards count on their own.
    ///
    /// # Panics
    /// When an interval is 0.
    pub fn twin(&self, t: usize) -> CfgPlan {
        let interval = self.guidance_interval;
        if interval == 1 {
            return CfgPlan::Batched;
        }
        let runs = |t: usize| t < FIRST_TWINS || t.is_multiple_of(interval);
        match runs(t) {
            true => CfgPlan::Separate(self.plan((0..t).filter(|t| runs(*t)).count())),
            false => CfgPlan::Reused,
        }
    }
}

/// What one forward renews.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdaptivePlan {
    /// Whether it renews the prompt.
    pub prompt: bool,
    /// Whether it renews the response.
    pub response: bool,
    /// Share of the response that layers from the second on run.
    others: Option<Ratio>,
}

impl AdaptivePlan {
    /// The positions that the forward has rows of: all when it renews the prompt, or else those from `first` on.
    pub fn window(&self, first: usize, len: usize) -> Range<usize> {
        if self.prompt { 0..len } else { first..len }
    }
}

impl CachePlan for AdaptivePlan {
    fn layer(&self, layer: usize) -> LayerPlan {
        match (layer, self.prompt, self.response) {
            // The tokens before the window have not changed, nor have their keys and values in this layer; and what it adds to
            // them nobody would read.
            (0, prompt, _) => LayerPlan::Full { reuse: !prompt, store: true, store_features: false },
            (_, true, true) => LayerPlan::Full { reuse: false, store: true, store_features: true },
            (_, prompt, _) => {
                let always = if prompt { UpdateAlways::Prompt } else { UpdateAlways::Nothing };
                LayerPlan::Partial(RowUpdate { always, others: self.others })
            }
        }
    }
}

/// The first position of a sequence whose token can change, or whose logits can be asked for: as far as the prompt goes, what
/// is before it needs no rows in forwards that do not renew the prompt.
pub fn first_active_row(family: Family, prompt: &[u32], mask: u32) -> usize {
    let masked = prompt.iter().position(|token| *token == mask).unwrap_or(prompt.len());
    match family {
        Family::Llada => masked,
        // The logits of a position stand one before it.
        Family::Dream => masked.saturating_sub(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAPTIVE: Adaptive =
        Adaptive { prompt_interval: 6, response_interval: 3, refresh_ratio: 0.25, guidance_interval: 1 };
    const WHOLE: LayerPlan = LayerPlan::Full { reuse: false, store: true, store_features: true };

    fn partial_layer(prompt: bool, share: f64) -> LayerPlan {
        let always = if prompt { UpdateAlways::Prompt } else { UpdateAlways::Nothing };
        LayerPlan::Partial(RowUpdate { always, others: (share > 0.0).then_some(Ratio::new(share)) })
    }

    #[test]
    fn a_period() {
        let later: Vec<LayerPlan> = (0..7).map(|t| ADAPTIVE.plan(t).layer(2)).collect();
        let (verify, refresh) = (partial_layer(false, 0.25), partial_layer(false, 1.0));
        assert_eq!(later, [WHOLE, verify, verify, refresh, verify, verify, WHOLE]);
        // The prompt without the response; then V-verify runs beside it, or nothing does.
        let other = Adaptive { prompt_interval: 4, response_interval: 7, ..ADAPTIVE };
        assert_eq!(other.plan(4).layer(1), partial_layer(true, 0.25));
        let stale = Adaptive { refresh_ratio: 0.0, ..other };
        assert_eq!(stale.plan(4).layer(1), partial_layer(true, 0.0));
        assert_eq!(stale.plan(5).layer(1), partial_layer(false, 0.0));
        assert_eq!(stale.plan(7).layer(1), partial_layer(false, 1.0));
    }

    #[test]
    fn the_first_layer_always_runs_whole() {
        for t in 0..20 {
            let plan = ADAPTIVE.plan(t);
            assert_eq!(plan.layer(0), LayerPlan::Full { reuse: t % 6 != 0, store: true, store_features: false });
            assert_eq!(plan.window(4, 14), if t % 6 == 0 { 0..14 } else { 4..14 });
        }
    }

    #[test]
    fn every_forward_renews_everything_at_intervals_of_one() {
        let always = Adaptive { prompt_interval: 1, response_interval: 1, ..ADAPTIVE };
        assert!((0..5).all(|t| always.plan(t).layer(1) == WHOLE));
    }

    /// The first five forwards and every fourth; at their own places of the intervals.
    #[test]
    fn twins_count_their_own_forwards() {
        let apart = Adaptive { guidance_interval: 4, ..ADAPTIVE };
        for (t, own) in [(0, 0), (1, 1), (4, 4), (8, 5), (12, 6), (16, 7)] {
            assert_eq!(apart.twin(t), CfgPlan::Separate(apart.plan(own)), "{t}");
        }
        assert!([5, 6, 7, 9, 11, 13].iter().all(|t| apart.twin(*t) == CfgPlan::Reused));
        assert!((0..20).all(|t| ADAPTIVE.twin(t) == CfgPlan::Batched));
    }

    #[test]
    fn rows_begin_where_something_can_change() {
        const M: u32 = 9;
        let at = |family, prompt: &[u32]| first_active_row(family, prompt, M);
        assert_eq!(at(Family::Llada, &[1, 2, 3]), 3);
        assert_eq!(at(Family::Dream, &[1, 2, 3]), 2);
        assert_eq!(at(Family::Llada, &[1, M, 3, M]), 1);
        assert_eq!(at(Family::Dream, &[1, M, 3]), 0);
        assert_eq!(at(Family::Dream, &[M]), 0);
    }
}
