//! Methods by settings by numbers of requests in flight, in turn: the plan, and what came of it.
//!
//! [`plan`] says what to run in which order, an [`Outcome`] holds every run of every cell, and a sweep that was cut short goes
//! on from it. Nothing here loads a model or has a clock: whoever runs the cells hands in what they came to.

pub mod plan;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::machine::Machine;
use super::report::provenance::Trait;
use super::score::{self, Report};
use crate::engine::Forwards;
use plan::Plan;

/// Why a sweep cannot go on from what is there.
#[derive(Debug, Error)]
pub enum Unlike {
    #[error("the result there is of another plan: name another folder, or remove it")]
    Plan,
    #[error("the result there was begun on another machine ({0}): name another folder, or say --allow machine")]
    Machine(Machine),
    #[error("the result there was begun by version {0}: name another folder, or remove it")]
    Version(String),
}

/// All that was measured. `sweep` is the plan's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub sweep: String,
    pub suite: plan::Suite,
    /// How tasks are put: raw or chat.
    pub form: String,
    pub dtype: String,
    pub device: String,
    pub threads: usize,
    pub tasks_seed: u64,
    pub machine: Machine,
    pub version: String,
    pub command: String,
    pub plan: Plan,
    pub cells: Vec<Cell>,
}

/// One setting with so many requests in flight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    pub path: String,
    pub model: String,
    pub setting: String,
    pub concurrency: usize,
    /// That measures it by itself.
    pub command: String,
    pub tasks: usize,
    /// Of the first run, as are the figures up to `runs`: greedy texts do not change from run to run.
    pub passed: usize,
    pub generated_tokens: usize,
    pub forwards: Forwards,
    pub tokens_per_forward: f64,
    pub runs: Vec<Run>,
}

/// One run of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub passed: usize,
    pub generated_tokens: usize,
    /// From the first request to the end of the last.
    pub seconds: f64,
    /// Of all requests together.
    pub tokens_per_second: f64,
    /// From the request to its first committed token, the wait for a place included.
    pub first_ms: Option<Quantiles>,
    pub total_ms: Option<Quantiles>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p90: f64,
    pub max: f64,
}

impl Quantiles {
    /// Of times in milliseconds: the smallest that so many of them do not exceed. `None` of nothing.
    pub fn of(mut times: Vec<f64>) -> Option<Self> {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times.get(((share * times.len() as f64).ceil() as usize).saturating_sub(1)).copied();
        Some(Self { p50: at(0.5)?, p90: at(0.9)?, max: at(1.0)? })
    }
}

impl Outcome {
    /// Of nothing yet.
    pub fn new(plan: &Plan, machine: Machine, device: String, command: String) -> Self {
        let cell = |cell: &plan::CellPlan| Cell {
            path: plan.paths[cell.path].name.clone(),
            model: String::new(),
            setting: cell.setting.clone(),
            concurrency: usize::from(cell.concurrency),
            command: plan.command(cell),
            tasks: plan.tasks as usize,
            passed: 0,
            generated_tokens: 0,
            forwards: Forwards::default(),
            tokens_per_forward: 0.0,
            runs: vec![],
        };
        Self {
            sweep: plan.name.clone(),
            suite: plan.suite,
            form: if plan.chat { "chat" } else { "raw" }.into(),
            dtype: plan.dtypes().join(" and "),
            device,
            threads: plan.threads,
            tasks_seed: plan.tasks_seed,
            machine,
            version: env!("CARGO_PKG_VERSION").into(),
            command,
            plan: plan.clone(),
            cells: plan.cells().iter().map(cell).collect(),
        }
    }

    /// Goes on from `before`, where that is the same sweep.
    pub fn go_on(self, before: Self, allow: &[Trait]) -> Result<Self, Unlike> {
        if before.plan != self.plan || before.cells.len() != self.cells.len() || before.device != self.device {
            return Err(Unlike::Plan);
        }
        if before.machine != self.machine && !allow.contains(&Trait::Machine) {
            return Err(Unlike::Machine(before.machine));
        }
        if before.version != self.version {
            return Err(Unlike::Version(before.version));
        }
        Ok(before)
    }

    /// Whether a cell still lacks this round's run.
    pub fn wants(&self, cell: usize, round: u32) -> bool {
        self.cells[cell].runs.len() <= round as usize
    }

    /// Runs that are still to come.
    pub fn missing(&self) -> usize {
        self.cells.iter().map(|cell| (self.plan.rounds as usize).saturating_sub(cell.runs.len())).sum()
    }

    /// Takes in one run of a cell, by a model of this name.
    pub fn add(&mut self, cell: usize, model: &str, report: &Report) {
        let cell = &mut self.cells[cell];
        if cell.runs.is_empty() {
            cell.model = model.into();
            cell.tasks = report.tasks;
            cell.passed = report.passed;
            cell.generated_tokens = report.generated_tokens;
            cell.forwards = report.forwards;
            cell.tokens_per_forward = report.tokens_per_forward;
        }
        let times = |time: fn(&score::Outcome) -> Option<f64>| {
            Quantiles::of(report.outcomes.iter().filter_map(time).map(|seconds| 1e3 * seconds).collect())
        };
        cell.runs.push(Run {
            passed: report.passed,
            generated_tokens: report.generated_tokens,
            seconds: report.wall_seconds,
            tokens_per_second: report.wall_tokens_per_second,
            first_ms: times(|outcome| outcome.seconds_to_first),
            total_ms: times(|outcome| Some(outcome.seconds)),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_values() {
        let found = Quantiles::of((1..=10).map(f64::from).collect()).unwrap();
        assert_eq!((found.p50, found.p90, found.max), (5.0, 9.0, 10.0));
        assert_eq!(Quantiles::of(vec![3.0]).unwrap(), Quantiles { p50: 3.0, p90: 3.0, max: 3.0 });
        assert!(Quantiles::of(vec![]).is_none());
    }
}
