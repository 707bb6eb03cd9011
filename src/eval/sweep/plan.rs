//! The plan of a sweep: what to run beside what, and how often.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::eval::report::provenance::Trait;
use crate::tensor::Dtype;

const IN_FLIGHT_MAX: u16 = 1024;
const ROUNDS_MAX: u32 = 1000;

/// What is wrong with a plan.
#[derive(Debug, Error)]
pub enum PlanError {
    #[error("cannot read {file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("{file} is no plan of a sweep: {source}")]
    Toml { file: String, source: Box<toml::de::Error> },
    #[error("the plan's {field} is {value}: use {wanted}")]
    Value { field: &'static str, value: String, wanted: String },
    #[error("the plan has no {0}: name at least one")]
    Nothing(String),
    #[error("the suite {0} takes its tasks from a file: give data")]
    NoData(&'static str),
    #[error("the suite nano draws its tasks: leave data away, or name another suite")]
    Data,
    #[error("path '{0}' has two {1}: each must occur once")]
    Twice(String, String),
    #[error(
        "the plan's paths differ in dtype ({0}): what they give cannot be compared; give all the same, or say --allow dtype"
    )]
    Dtypes(String),
}

/// A file of TOML.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Names the result.
    pub name: String,
    pub suite: Suite,
    /// File of a suite that is not drawn.
    pub data: Option<PathBuf>,
    /// Put the tasks through the models' chat templates.
    #[serde(default)]
    pub chat: bool,
    /// At most so many.
    pub tasks: u32,
    /// Of the choice of tasks, where they are drawn.
    pub tasks_seed: u64,
    /// Every cell is run so many times.
    pub rounds: u32,
    /// Tasks that go before each run's clock starts.
    pub warm_up: u32,
    pub threads: usize,
    pub device: String,
    pub dtype: String,
    /// Numbers of requests in flight, for every path.
    pub in_flight: Vec<u16>,
    #[serde(rename = "path")]
    pub paths: Vec<PlanPath>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    Nano,
    Humaneval,
    Jsonl,
}

impl Suite {
    pub fn name(self) -> &'static str {
        match self {
            Self::Nano => "nano",
            Self::Humaneval => "humaneval",
            Self::Jsonl => "jsonl",
        }
    }
}

/// One model, run in one way but for settings along a curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanPath {
    pub name: String,
    /// A folder or a GGUF file.
    pub model: PathBuf,
    /// As "bf16", or "f32/int8" with weights in fewer bits; unset: the plan's.
    pub dtype: Option<String>,
    /// Flags of 'lacuna eval', for each point.
    pub settings: Vec<String>,
}

/// One of the things to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct CellPlan {
    /// Of the plan's paths.
    pub path: usize,
    pub setting: String,
    pub concurrency: u16,
}

impl Plan {
    pub fn read(path: &Path) -> Result<Self, PlanError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::Io { file: file.clone(), source })?;
        toml::from_str(&text).map_err(|source| PlanError::Toml { file, source: Box::new(source) })
    }

    /// Checks what the form of the file does not.
    pub fn validate(&self, allow: &[Trait]) -> Result<(), PlanError> {
        let wrong = |field, value: &dyn ToString, wanted: &str| {
            Err(PlanError::Value { field, value: value.to_string(), wanted: wanted.into() })
        };
        let named = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(named) {
            return wrong("name", &format!("'{}'", self.name), "letters, digits, - and _, since the result's file has it");
        }
        if !(1..=100_000).contains(&self.tasks) {
            return wrong("tasks", &self.tasks, "a number from 1 to 100000");
        }
        match (self.suite, &self.data) {
            (Suite::Nano, Some(_)) => return Err(PlanError::Data),
            (Suite::Humaneval | Suite::Jsonl, None) => return Err(PlanError::NoData(self.suite.name())),
            _ => {}
        }
        if !(1..=ROUNDS_MAX).contains(&self.rounds) {
            return wrong("rounds", &self.rounds, &format!("a number from 1 to {ROUNDS_MAX}"));
        }
        if let Some(count) = self.in_flight.iter().find(|count| !(1..=IN_FLIGHT_MAX).contains(count)) {
            return wrong("in_flight", count, &format!("numbers from 1 to {IN_FLIGHT_MAX}"));
        }
        if self.in_flight.is_empty() {
            return Err(PlanError::Nothing("in_flight".into()));
        }
        if self.paths.is_empty() {
            return Err(PlanError::Nothing("path".into()));
        }
        for (at, path) in self.paths.iter().enumerate() {
            if path.settings.is_empty() {
                return Err(PlanError::Nothing(format!("settings of path '{}' (\"\" is the model's own)", path.name)));
            }
            if self.paths[..at].iter().any(|other| other.name == path.name) {
                return Err(PlanError::Twice(path.name.clone(), "entries".into()));
            }
            if let Some(setting) = twice(&path.settings) {
                return Err(PlanError::Twice(path.name.clone(), format!("settings '{setting}'")));
            }
        }
        if let Some(count) = twice(&self.in_flight) {
            return wrong("in_flight", &format!("{count} twice"), "each number once");
        }
        let dtypes = self.dtypes();
        if let Some(dtype) = dtypes.iter().find(|dtype| dtype.parse::<Dtype>().is_err()) {
            return wrong("dtype", dtype, "f32, f16 or bf16");
        }
        if dtypes.len() > 1 && !allow.contains(&Trait::Dtype) {
            return Err(PlanError::Dtypes(dtypes.join(" and ")));
        }
        Ok(())
    }

    pub fn dtype<'a>(&'a self, path: &'a PlanPath) -> &'a str {
        path.dtype.as_deref().unwrap_or(&self.dtype)
    }

    /// All that occur.
    pub fn dtypes(&self) -> Vec<&str> {
        let mut dtypes: Vec<&str> = self.paths.iter().map(|path| self.dtype(path)).collect();
        dtypes.sort_unstable();
        dtypes.dedup();
        dtypes
    }

    /// Everything to measure, path by path.
    pub fn cells(&self) -> Vec<CellPlan> {
        let settings =
            self.paths.iter().enumerate().flat_map(|(path, of)| of.settings.iter().map(move |setting| (path, setting)));
        let cells = settings.flat_map(|(path, setting)| {
            self.in_flight.iter().map(move |count| CellPlan { path, setting: setting.clone(), concurrency: *count })
        });
        cells.collect()
    }

    /// The cells of one round, as indices into [`Plan::cells`]: path by path, so that a model is loaded once a round. Every
    /// round begins with another path and within it with another cell, and every other one goes backwards, so that a machine
    /// that slows down slows all of them.
    pub fn order(&self, round: u32) -> Vec<Vec<usize>> {
        let cells = self.cells();
        let mut paths: Vec<Vec<usize>> =
            (0..self.paths.len()).map(|path| (0..cells.len()).filter(|cell| cells[*cell].path == path).collect()).collect();
        paths.rotate_left(round as usize % self.paths.len().max(1));
        for cells in &mut paths {
            let turn = round as usize % cells.len().max(1);
            cells.rotate_left(turn);
            if round % 2 == 1 {
                cells.reverse();
            }
        }
        paths
    }

    /// What gives one cell's accuracy and speed by itself.
    pub fn command(&self, cell: &CellPlan) -> String {
        let path = &self.paths[cell.path];
        let mut command = format!(
            "eval {} --json --model {} --dtype {} --device {} --threads {} --tasks {} --concurrency {}",
            self.suite.name(),
            path.model.display(),
            self.dtype(path),
            self.device,
            self.threads,
            self.tasks,
            cell.concurrency
        );
        match &self.data {
            Some(data) => command += &format!(" --data {}", data.display()),
            None => command += &format!(" --tasks-seed {}", self.tasks_seed),
        }
        if self.chat {
            command += " --chat";
        }
        if !cell.setting.is_empty() {
            command += " ";
            command += &cell.setting;
        }
        command
    }
}

fn twice<T: PartialEq + Clone>(values: &[T]) -> Option<T> {
    values.iter().enumerate().find(|(at, value)| values[..*at].contains(value)).map(|(_, value)| value.clone())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
