//! How fast cells are committed: a request's [`Commit`] and the place reached in it, as the [`Rule`] of each step.
//!
//! It counts in units, the cells that are filled together before those behind them: blocks or sub-blocks. Steps are the whole
//! canvas's and shared among the units that have something to fill.

use super::select::Rule;
use super::{Commit, schedule};

/// The place in the schedule of the unit being filled.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    commit: Commit,
    /// Units that had a masked cell at the start.
    units: usize,
    /// Cells that a linear schedule spreads over the unit's steps.
    share: usize,
    /// Steps since the unit was begun.
    step: usize,
}

impl Pace {
    pub fn new(commit: Commit, units: usize) -> Self {
        Self { commit, units, share: 0, step: 0 }
    }

    /// Begins a unit, `share` cells of which the steps are made for.
    pub fn begin(&mut self, share: usize) {
        (self.share, self.step) = (share, 0);
    }

    pub fn advance(&mut self) {
        self.step += 1;
    }

    /// Steps that one unit gets of those for the whole canvas; never none.
    fn steps(&self, steps: usize) -> usize {
        (steps / self.units.max(1)).max(1)
    }

    fn linear(&self, steps: usize, open: usize) -> usize {
        let steps = self.steps(steps);
        if self.step >= steps { open } else { schedule::linear(self.share, steps, self.step) }
    }

    /// How many cells of `open` masked ones the schedule commits in the current step; `None` where the scores decide.
    pub fn scheduled(&self, open: usize) -> Option<usize> {
        match self.commit {
            Commit::Linear { steps } => Some(self.linear(steps, open)),
            Commit::Timesteps { steps, eps, independent: false } => {
                Some(schedule::timestep_count(open, self.steps(steps), eps, self.step))
            }
            _ => None,
        }
    }

    pub fn rule(&self, open: usize) -> Rule {
        match self.commit {
            Commit::Timesteps { steps, eps, independent: true } => {
                Rule::Probability(f64::from(schedule::timestep_share(self.steps(steps), eps, self.step)))
            }
            Commit::Threshold(threshold) => Rule::Threshold { threshold, least: 1 },
            Commit::Dynamic { threshold, steps } => Rule::Threshold { threshold, least: self.linear(steps, open) },
            Commit::Factor(factor) => Rule::Factor(factor),
            Commit::EntropyBound(bound) => Rule::EntropyBound(bound),
            Commit::Linear { .. } | Commit::Timesteps { .. } => Rule::Count(self.scheduled(open).unwrap_or(open)),
        }
    }
}
