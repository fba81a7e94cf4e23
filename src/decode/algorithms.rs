//! The published decoding algorithms, one function each: the passes over each block, their candidates and quotas.

use super::block_loop::{BlockLoop, CandidateStart, PassSpec};
use super::decoder::Decoder;
use super::options::Policy;
use crate::cache::PassKind;
use crate::error::Result;
use crate::sampling::{DreamSchedule, QuotaSchedule};

/// A pass over all positions, whose masks are candidates up to the end of the block.
const FULL: PassSpec =
    PassSpec { kind: PassKind::Full, candidates_from: CandidateStart::Sequence, first_position_only: false };

impl Decoder<'_> {
    /// LLaDA's algorithm: `steps / num_blocks` forwards for every block, fewer when the block is complete.
    pub fn llada(&mut self) -> Result<()> {
        let steps = self.steps_per_block();
        for block in 0..self.state.num_blocks() {
            let schedule = QuotaSchedule::Llada { steps };
            self.run_block(block, &BlockLoop { block: Some(block), passes: [FULL; 2], schedule, max_passes: steps })?;
        }
        Ok(())
    }

    /// Fast-dLLM's algorithms for LLaDA: every block runs until it has no mask. The first forward of a block is a refresh;
    /// the others compute the rows that the cache leaves.
    pub fn fast_llada(&mut self) -> Result<()> {
        let schedule = match self.state.options.policy {
            Policy::Fixed => QuotaSchedule::Llada { steps: self.steps_per_block() },
            _ => QuotaSchedule::Unlimited,
        };
        let spec = |kind| PassSpec { kind, candidates_from: CandidateStart::QueryRows, first_position_only: false };
        for block in 0..self.state.num_blocks() {
            let passes = [spec(self.state.cache.first_pass(block)), spec(self.state.cache.block_pass())];
            let schedule = schedule.clone();
            self.run_block(block, &BlockLoop { block: Some(block), passes, schedule, max_passes: usize::MAX })?;
        }
        Ok(())
    }

    /// Dream's algorithm: all positions at once, in `steps` forwards.
    pub fn dream(&mut self) -> Result<()> {
        let steps = self.state.options.steps();
        let schedule = self.dream_schedule(steps);
        self.run_block(0, &BlockLoop { block: None, passes: [FULL; 2], schedule, max_passes: steps })
    }

    /// Fast-dLLM's threshold for Dream without blocks. Each step considers `masks / steps` positions and those that earlier
    /// steps rejected. Positions that the last step rejects get more steps.
    pub fn dream_threshold(&mut self) -> Result<()> {
        let schedule = QuotaSchedule::CarryOver;
        self.run_block(0, &BlockLoop { block: None, passes: [FULL; 2], schedule, max_passes: usize::MAX })
    }

    /// Fast-dLLM's algorithm for Dream in blocks. Query rows that begin at the block lack the logits of the block's first
    /// position, which are those of the row before it. So the first forward of a block commits that position, and no other.
    pub fn dream_block(&mut self) -> Result<()> {
        let schedule = match self.state.options.policy {
            Policy::Fixed => self.dream_schedule(self.steps_per_block().max(1)),
            _ => QuotaSchedule::Unlimited,
        };
        let spec =
            |kind, first_position_only| PassSpec { kind, candidates_from: CandidateStart::Block, first_position_only };
        for block in 0..self.state.num_blocks() {
            let cache = &self.state.cache;
            let passes = [spec(cache.first_pass(block), true), spec(cache.block_pass(), false)];
            let schedule = schedule.clone();
            self.run_block(block, &BlockLoop { block: Some(block), passes, schedule, max_passes: usize::MAX })?;
        }
        Ok(())
    }

    fn steps_per_block(&self) -> usize {
        self.state.options.steps() / self.state.num_blocks()
    }

    fn dream_schedule(&self, steps: usize) -> QuotaSchedule {
        QuotaSchedule::Dream(DreamSchedule::new(steps, self.state.options.eps).ratios())
    }
}
