//! Confidence, commit rules, quotas and random numbers, and the sampler that runs on the CPU.

mod commit;
mod params;
pub mod philox;
mod quota;
mod sampler;
mod sequence;

pub use commit::{Candidates, CommitRule, Prediction, select};
pub use params::{Confidence, SamplingParams};
pub use quota::{DreamSchedule, QuotaSchedule, dream_quota, llada_quota};
pub use sampler::{min_kept_logit, sample, score_row};
pub use sequence::SequenceState;
