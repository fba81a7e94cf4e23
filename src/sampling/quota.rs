//! How many tokens a fixed schedule commits in each step.

/// How many of a sequence's masks a pass commits, or among how many it chooses.
#[derive(Clone, Debug, PartialEq)]
pub enum QuotaSchedule {
    /// As many as there are.
    Unlimited,
    /// `initial_masks / steps`, the first `initial_masks % steps` passes one more; after `steps` passes one.
    Llada {
        /// Passes of the schedule, at least one.
        steps: usize,
    },
    /// Pass i the share `ratios[i]` of the masks that are left, rounded down; the last all of them.
    Dream(Vec<f32>),
    /// `per_step`, and as many as earlier passes have left over; a sequence that has something left over after its last
    /// pass gets another.
    CarryOver,
}

/// LLaDA: what step `i` commits of `masked` tokens over `steps` steps; the first `masked % steps` steps one more than
/// the rest.
pub fn llada_quota(masked: usize, steps: usize, i: usize) -> usize {
    masked / steps + usize::from(i < masked % steps)
}

/// Dream: `t = linspace(1, eps, steps + 1)`; step i commits the share `1 - t[i + 1] / t[i]` of the masks that are left,
/// the last step all of them.
#[derive(Clone, Debug)]
pub struct DreamSchedule {
    timesteps: Vec<f32>,
}

impl DreamSchedule {
    /// A schedule of `steps` steps, at least one.
    pub fn new(steps: usize, eps: f64) -> DreamSchedule {
        // In f32 with one rounding a point, from both ends towards the middle, as the original's linspace is formed.
        let (start, end) = (1.0f32, eps as f32);
        let step = (end - start) / steps as f32;
        let timestep = |i: usize| match i < steps.div_ceil(2) {
            true => step.mul_add(i as f32, start),
            false => step.mul_add(-((steps - i) as f32), end),
        };
        DreamSchedule { timesteps: (0..=steps).map(timestep).collect() }
    }

    /// The points t, `steps + 1` of them.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The share of each step, `1 - t[i + 1] / t[i]`.
    pub fn ratios(&self) -> Vec<f32> {
        self.timesteps.windows(2).map(|pair| 1.0 - pair[1] / pair[0]).collect()
    }

    /// How many of `masked` tokens step `i` commits; all of them from the last step on.
    pub fn quota(&self, i: usize, masked: usize) -> usize {
        dream_quota(&self.ratios(), i, masked)
    }
}

/// The same, by the shares of the steps.
pub fn dream_quota(ratios: &[f32], i: usize, masked: usize) -> usize {
    match ratios.get(i) {
        Some(ratio) if i + 1 < ratios.len() => (masked as f32 * ratio) as usize,
        _ => masked,
    }
}
