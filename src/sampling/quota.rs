//! Quota schedules: the number of tokens that a pass commits with a fixed policy.

use super::sequence::SequenceState;

/// Rule for the quota of a pass: the number of masked tokens that the pass commits, or considers for a threshold. Passes
/// of a block are counted from 0.
#[derive(Clone, Debug, PartialEq)]
pub enum QuotaSchedule {
    /// No limit.
    Unlimited,
    /// LLaDA: `initial_masks / steps`, and one more in the first `initial_masks % steps` passes. 1 after `steps` passes.
    Llada {
        /// Number of passes of the schedule, at least 1.
        steps: usize,
    },
    /// Dream: pass i commits the share `ratios[i]` of the remaining masks, rounded down. The last pass commits all of them.
    Dream(Vec<f32>),
    /// Fast-dLLM's threshold for Dream without blocks: `per_step` positions and those that earlier passes rejected. A
    /// sequence that rejects positions in its last pass gets one more pass.
    CarryOver,
}

impl QuotaSchedule {
    /// Returns the quota of pass `pass` of a sequence with `masks` masked tokens in its `quota_range`.
    pub fn next(&self, sequence: &SequenceState, pass: usize, masks: usize) -> usize {
        match self {
            QuotaSchedule::Unlimited => usize::MAX,
            // Masks of the prompt may have used up a part of the schedule; it goes on with one token per pass.
            QuotaSchedule::Llada { steps } if pass >= *steps => 1,
            QuotaSchedule::Llada { steps } => llada_quota(sequence.initial_masks, *steps, pass),
            QuotaSchedule::Dream(ratios) => dream_quota(ratios, pass, masks),
            QuotaSchedule::CarryOver => (sequence.per_step + sequence.deficit).min(masks),
        }
    }

    /// Updates a sequence after pass `pass`, which had this quota and committed `committed` tokens. Only
    /// [`QuotaSchedule::CarryOver`] has state.
    pub fn update(&self, sequence: &mut SequenceState, pass: usize, quota: usize, committed: usize) {
        if let QuotaSchedule::CarryOver = self {
            sequence.deficit = quota - committed;
            if pass + 1 >= sequence.max_passes && sequence.deficit > 0 {
                sequence.max_passes += 1;
                sequence.per_step = 0;
            }
        }
    }
}

/// Returns LLaDA's quota of step `step`, for `masks` masked tokens over `steps` steps (at least 1).
pub fn llada_quota(masks: usize, steps: usize, step: usize) -> usize {
    masks / steps + usize::from(step < masks % steps)
}

/// Dream's schedule: `t = linspace(1, eps, steps + 1)`. Step i commits the share `1 - t[i + 1] / t[i]` of the remaining
/// masks, and the last step commits all of them.
#[derive(Clone, Debug)]
pub struct DreamSchedule {
    timesteps: Vec<f32>,
}

impl DreamSchedule {
    /// Creates a schedule of `steps` steps, at least 1, that ends at the timestep `eps`.
    pub fn new(steps: usize, eps: f64) -> DreamSchedule {
        // As the reference implementation's linspace: in f32, with one rounding per point, from both ends to the middle.
        let (start, end) = (1.0f32, eps as f32);
        let step = (end - start) / steps as f32;
        let timestep = |i: usize| {
            if i < steps.div_ceil(2) { step.mul_add(i as f32, start) } else { step.mul_add(-((steps - i) as f32), end) }
        };
        DreamSchedule { timesteps: (0..=steps).map(timestep).collect() }
    }

    /// Returns the `steps + 1` timesteps.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// Returns the share of each step, `1 - t[i + 1] / t[i]`.
    pub fn ratios(&self) -> Vec<f32> {
        self.timesteps.windows(2).map(|pair| 1.0 - pair[1] / pair[0]).collect()
    }

    /// Returns the quota of step `step` with `masks` masked tokens; from the last step on all of them.
    pub fn quota(&self, step: usize, masks: usize) -> usize {
        dream_quota(&self.ratios(), step, masks)
    }
}

/// Returns Dream's quota of step `step` from the shares of [`DreamSchedule::ratios`].
pub fn dream_quota(ratios: &[f32], step: usize, masks: usize) -> usize {
    match ratios.get(step) {
        Some(ratio) if step + 1 < ratios.len() => (masks as f32 * ratio) as usize,
        _ => masks,
    }
}
