//! Advance: between two passes over a block, which sequences continue and how many tokens the next pass may commit.

use crate::sampling::QuotaSchedule;
use std::ops::Range;

/// State of one sequence in a block. Positions count from the start of the sequence.
///
/// It repeats fields of [`crate::sampling::SequenceState`], which describes a sequence before the first pass of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Range of its tokens among the tokens of the batch.
    pub tokens: Range<usize>,
    /// First generated position.
    pub generated: usize,
    /// The sequence is active while a position of this range is masked.
    pub active_range: Range<usize>,
    /// [`QuotaSchedule::Dream`] and [`QuotaSchedule::CarryOver`] count the masks of this range.
    pub quota_range: Range<usize>,
    /// Masks of `active_range` at the start of the block.
    pub initial_masks: usize,
    /// [`QuotaSchedule::CarryOver`]: positions that each pass considers.
    pub per_step: usize,
    /// [`QuotaSchedule::CarryOver`]: positions that earlier passes considered and rejected.
    pub deficit: usize,
    /// Largest number of passes over this block.
    pub max_passes: usize,
    /// Passes in which the sequence was active.
    pub forwards: usize,
    /// Number of tokens that the next pass may commit; `None` when the sequence is inactive.
    pub quota: Option<usize>,
    /// Whether an end-of-text token precedes every mask of the generated positions.
    pub ended: bool,
}

/// Failure of a sequence: a row without a finite logit, or an index out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Index of the sequence.
    pub sequence: usize,
    /// Position or code that unmask reported.
    pub position: i32,
    /// Passes in which the sequence had been active before.
    pub step: usize,
}

/// State of a batch in a block.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Schedule of the quotas.
    pub schedule: QuotaSchedule,
    /// Passes over this block so far.
    pub pass: usize,
    /// Passes so far.
    pub passes: usize,
    /// Passes so far in which a sequence was active.
    pub nfe: usize,
    /// First failure.
    pub failure: Option<Failure>,
    /// Sequences of the batch.
    pub sequences: Vec<Sequence>,
    /// Mask token.
    pub mask: i32,
    /// Tokens that end a text; without any, no sequence ends early.
    pub end_tokens: Vec<i32>,
}

impl Sequence {
    /// Returns an active sequence that consists of one block of masks. It has no limit of passes, and a quota of 0.
    pub fn new(tokens: Range<usize>) -> Sequence {
        let len = tokens.len();
        Sequence {
            tokens,
            generated: 0,
            active_range: 0..len,
            quota_range: 0..len,
            initial_masks: len,
            per_step: 0,
            deficit: 0,
            max_passes: usize::MAX,
            forwards: 0,
            quota: Some(0),
            ended: false,
        }
    }

    /// Returns the quota of pass `pass` over the block, with `masks` masks in `quota_range`.
    fn next_quota(&self, schedule: &QuotaSchedule, pass: usize, masks: usize) -> usize {
        match schedule {
            QuotaSchedule::Unlimited => usize::MAX,
            QuotaSchedule::Llada { steps } if pass >= *steps => 1,
            QuotaSchedule::Llada { steps } => {
                self.initial_masks / steps + usize::from(pass < self.initial_masks % steps)
            }
            QuotaSchedule::Dream(ratios) if pass + 1 >= ratios.len() => masks,
            QuotaSchedule::Dream(ratios) => ((masks as f32 * ratios[pass]) as usize).min(masks),
            QuotaSchedule::CarryOver => (self.per_step + self.deficit).min(masks),
        }
    }
}

impl State {
    /// Returns the state of a batch before its first pass. No token ends a text.
    pub fn new(schedule: QuotaSchedule, sequences: Vec<Sequence>, mask: i32) -> State {
        State { schedule, pass: 0, passes: 0, nfe: 0, failure: None, sequences, mask, end_tokens: vec![] }
    }

    /// Advances the state after a pass. `tokens` are the tokens of the batch after the pass. `committed` is the number of
    /// tokens that the pass committed and `failed` the failed position, both per sequence.
    pub fn advance(&mut self, tokens: &[i32], committed: &[usize], failed: &[Option<i32>]) {
        self.passes += 1;
        self.nfe += usize::from(self.active() > 0);
        self.pass += 1;
        let failures = (0..self.sequences.len()).filter(|s| self.sequences[*s].quota.is_some()).filter_map(|s| {
            let step = self.sequences[s].forwards;
            failed[s].map(|position| Failure { sequence: s, position, step })
        });
        self.failure = self.failure.or(failures.min_by_key(|failure| failure.sequence));

        for (s, sequence) in self.sequences.iter_mut().enumerate() {
            let Some(quota) = sequence.quota else { continue };
            let tokens = &tokens[sequence.tokens.clone()];
            let masks = |positions: Range<usize>| tokens[positions].iter().filter(|t| **t == self.mask).count();
            sequence.forwards += 1;
            if !self.end_tokens.is_empty() {
                let mut settled = tokens[sequence.generated..].iter().take_while(|t| **t != self.mask);
                sequence.ended = settled.any(|t| self.end_tokens.contains(t));
            }
            if self.schedule == QuotaSchedule::CarryOver {
                sequence.deficit = quota - committed[s];
                if self.pass >= sequence.max_passes && sequence.deficit > 0 {
                    sequence.max_passes += 1;
                    sequence.per_step = 0;
                }
            }
            let continues = failed[s].is_none()
                && !sequence.ended
                && self.pass < sequence.max_passes
                && masks(sequence.active_range.clone()) > 0;
            sequence.quota =
                continues.then(|| sequence.next_quota(&self.schedule, self.pass, masks(sequence.quota_range.clone())));
        }
    }

    /// Returns the number of sequences that are active in the next pass.
    pub fn active(&self) -> usize {
        self.sequences.iter().filter(|sequence| sequence.quota.is_some()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASK: i32 = 9;

    fn sequence(tokens: Range<usize>, quota: usize) -> Sequence {
        Sequence { quota: Some(quota), ..Sequence::new(tokens) }
    }

    fn state(schedule: QuotaSchedule, sequences: Vec<Sequence>) -> State {
        State::new(schedule, sequences, MASK)
    }

    /// Returns the quotas of all passes over a sequence of `masks` masks, when every pass uses up its quota.
    fn quotas(schedule: QuotaSchedule, first: usize, masks: usize) -> Vec<usize> {
        let mut state = state(schedule, vec![sequence(0..masks, first)]);
        let (mut tokens, mut quotas) = (vec![MASK; masks], vec![]);
        while let Some(quota) = state.sequences[0].quota {
            quotas.push(quota);
            let committed: Vec<usize> = (0..masks).filter(|i| tokens[*i] == MASK).take(quota).collect();
            committed.iter().for_each(|i| tokens[*i] = 1);
            state.advance(&tokens, &[committed.len()], &[None]);
        }
        assert_eq!((state.pass, state.nfe), (quotas.len(), quotas.len()));
        quotas
    }

    #[test]
    fn schedules_end_without_masks() {
        assert_eq!(quotas(QuotaSchedule::Unlimited, usize::MAX, 5), [usize::MAX]);
        assert_eq!(quotas(QuotaSchedule::Llada { steps: 3 }, 3, 8), [3, 3, 2]);
        // A quarter of 8, then of 6 and of 5; the last step commits the rest.
        assert_eq!(quotas(QuotaSchedule::Dream(vec![0.25; 4]), 2, 8), [2, 1, 1, 4]);
    }

    #[test]
    fn lladas_schedule_continues_with_one_token() {
        let mut state =
            state(QuotaSchedule::Llada { steps: 2 }, vec![Sequence { initial_masks: 4, ..sequence(0..6, 2) }]);
        let mut quotas = vec![];
        for _ in 0..4 {
            state.advance(&[MASK; 6], &[0], &[None]);
            quotas.push(state.sequences[0].quota);
        }
        assert_eq!(quotas, [Some(2), Some(1), Some(1), Some(1)]);
    }

    #[test]
    fn rejected_positions_are_considered_again() {
        let carrying = Sequence { per_step: 2, max_passes: 2, ..sequence(0..4, 2) };
        let mut state = state(QuotaSchedule::CarryOver, vec![carrying]);
        state.advance(&[1, MASK, MASK, MASK], &[1], &[None]);
        assert_eq!((state.sequences[0].deficit, state.sequences[0].quota), (1, Some(3)));
        state.advance(&[1, MASK, MASK, 1], &[1], &[None]);
        // After the last step, further passes consider the rejected positions only.
        let Sequence { per_step, deficit, max_passes, quota, .. } = state.sequences[0];
        assert_eq!((per_step, deficit, max_passes, quota), (0, 2, 3, Some(2)));
        state.advance(&[1, 1, MASK, 1], &[1], &[None]);
        assert_eq!((state.sequences[0].max_passes, state.sequences[0].quota), (4, Some(1)));
        state.advance(&[1; 4], &[1], &[None]);
        assert_eq!((state.sequences[0].max_passes, state.active()), (4, 0));
    }

    #[test]
    fn sequences_end_at_an_end_token_before_all_masks() {
        let advanced = |tokens: [i32; 4]| {
            let generated = Sequence { generated: 1, ..sequence(0..4, 1) };
            let mut state = State { end_tokens: vec![7, 8], ..state(QuotaSchedule::Unlimited, vec![generated]) };
            state.advance(&tokens, &[1], &[None]);
            (state.sequences[0].ended, state.active())
        };
        assert_eq!(advanced([1, 8, MASK, MASK]), (true, 0));
        assert_eq!(advanced([MASK, 1, 7, MASK]), (true, 0));
        assert_eq!(advanced([7, MASK, 7, 1]), (false, 1), "in the prompt, and after a mask");
        assert_eq!(advanced([7, 1, 1, 1]), (false, 0));
    }

    #[test]
    fn sequences_continue_independently() {
        let mut state = state(
            QuotaSchedule::Unlimited,
            vec![
                Sequence { active_range: 2..3, ..sequence(0..3, 1) },
                Sequence { max_passes: 1, ..sequence(3..6, 1) },
                Sequence { quota: None, ..sequence(6..9, 1) },
                sequence(9..12, 1),
            ],
        );
        state.advance(&[MASK; 12], &[0; 4], &[None; 4]);
        let active = |state: &State| state.sequences.iter().map(|s| s.quota.is_some()).collect::<Vec<_>>();
        assert_eq!(active(&state), [true, false, false, true]);
        let mut tokens = [MASK; 12];
        tokens[2] = 1;
        state.advance(&tokens, &[1, 0, 0, 0], &[None; 4]);
        assert_eq!(active(&state), [false, false, false, true]);
        // A mask that reappears changes nothing.
        state.advance(&[MASK; 12], &[0; 4], &[None; 4]);
        assert_eq!(active(&state), [false, false, false, true]);
        let forwards: Vec<usize> = state.sequences.iter().map(|s| s.forwards).collect();
        assert_eq!((forwards, state.nfe), (vec![2, 1, 0, 3], 3));
    }

    #[test]
    fn the_first_failure_stays() {
        let mut state = state(QuotaSchedule::Unlimited, (0..4).map(|s| sequence(s..s + 1, 1)).collect());
        state.sequences[0].quota = None;
        state.sequences[3].forwards = 5;
        state.advance(&[MASK; 4], &[0; 4], &[Some(0), None, None, None]);
        assert_eq!((state.failure, state.active()), (None, 3), "an inactive sequence does not fail");
        state.advance(&[MASK; 4], &[0; 4], &[None, None, Some(-2), Some(4)]);
        let failure = Some(Failure { sequence: 2, position: -2, step: 1 });
        assert_eq!((state.failure, state.active()), (failure, 1));
        state.advance(&[MASK; 4], &[0; 4], &[None, Some(3), None, None]);
        assert_eq!((state.failure, state.active()), (failure, 0));
    }
}
