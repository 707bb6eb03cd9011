//! Result files, recognised by their fields and brought to one form: points with whatever figures they have. `kinds`
//! knows the form of each kind.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::kinds;
use super::score::Spread;
use crate::eval::machine::Machine;
use crate::eval::speculate::Cost;

/// The setting where nothing is set.
pub const DEFAULTS: &str = "defaults";

/// Why a file is no result.
#[derive(Debug, Error)]
pub enum Unreadable {
    #[error("cannot read {file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("{file} is not JSON ({source}): name a file that 'lacuna eval', 'sweep' or 'bench' wrote with --json")]
    Json { file: String, source: serde_json::Error },
    #[error(
        "{file} has the fields of no result that a report knows: name one of 'lacuna eval --json', 'sweep', 'bench speculate --json', \
         'bench step --json' or 'bench serve --json'"
    )]
    Unknown { file: String },
    #[error("{file} seems to be {kind}, but {source}: measure anew with this version")]
    Fields { file: String, kind: &'static str, source: serde_json::Error },
}

/// What made a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Sweep,
    Evaluation,
    Load,
    Speculation,
    Step,
    /// Steps over a grid of windows, beside what they cost at least.
    Grid,
    Likelihood,
    /// Another program on the same work in turn, by a script of `benches/`.
    Peer,
}

impl Kind {
    /// As a heading.
    pub fn title(self) -> &'static str {
        match self {
            Self::Sweep => "Sweeps",
            Self::Evaluation => "Accuracy",
            Self::Load => "Load on a server",
            Self::Speculation => "Drafts against plain decoding",
            Self::Step => "Where a denoising step's time goes",
            Self::Grid => "Steps beside their floor",
            Self::Likelihood => "Likelihood of given texts",
            Self::Peer => "Beside other programs",
        }
    }

    fn told(self) -> &'static str {
        match self {
            Self::Sweep => "a result of 'lacuna sweep'",
            Self::Evaluation => "a result of 'lacuna eval'",
            Self::Load => "a result of 'lacuna bench serve'",
            Self::Speculation => "a result of 'lacuna bench speculate'",
            Self::Step => "a result of 'lacuna bench step'",
            Self::Grid => "a result of 'lacuna bench step --window'",
            Self::Likelihood => "a result of 'lacuna eval likelihood'",
            Self::Peer => "a comparison with another program",
        }
    }

    fn of(json: &Value) -> Option<Self> {
        let has = |fields: &[&str]| fields.iter().all(|field| json.get(field).is_some());
        let kinds: [(Self, &[&str]); 8] = [
            (Self::Sweep, &["sweep", "cells"]),
            (Self::Evaluation, &["suite", "pass_at_1"]),
            (Self::Load, &["target", "lanes"]),
            (Self::Speculation, &["plain_tokens_per_second"]),
            (Self::Step, &["forward", "head", "total"]),
            (Self::Grid, &["cells", "ceilings"]),
            (Self::Likelihood, &["perplexity", "tokens"]),
            (Self::Peer, &["what", "ratio_median", "rounds"]),
        ];
        let several = || json.pointer("/lacuna/perplexity").map(|_| Self::Likelihood);
        kinds.into_iter().find(|(_, fields)| has(fields)).map(|(kind, _)| kind).or_else(several)
    }
}

/// One file.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its name without a folder.
    pub file: String,
    pub kind: Kind,
    pub about: About,
    pub points: Vec<Point>,
}

/// What was measured with what; unset what the file does not tell.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct About {
    pub dtype: Option<String>,
    pub device: Option<String>,
    pub threads: Option<u64>,
    #[serde(skip)]
    pub commands: Vec<String>,
    pub machine: Option<Machine>,
    suite: Option<String>,
    form: Option<String>,
    tasks_seed: Option<u64>,
    prompts_seed: Option<u64>,
    seed: Option<u64>,
}

impl About {
    /// The tasks, and how they are put to the model.
    pub fn suite(&self) -> Option<String> {
        let form = self.form.as_ref().filter(|form| *form != "raw");
        self.suite.as_ref().map(|suite| form.map_or(suite.clone(), |form| format!("{suite}, {form}")))
    }

    /// Of the choice of tasks or prompts; where there is none, of what is random beside it.
    pub fn seed(&self) -> Option<u64> {
        self.tasks_seed.or(self.prompts_seed).or(self.seed)
    }
}

/// One setting's figures; unset what was not measured.
#[derive(Clone, Debug, Default)]
pub struct Point {
    pub model: String,
    /// The curve that it belongs to: a model, and how it is run but for what trades accuracy for speed.
    pub path: String,
    pub setting: String,
    /// Requests in flight, or sequences in a step.
    pub in_flight: Option<u64>,
    /// Texts that were judged, one or more for each task.
    pub tasks: Option<u64>,
    pub passed: Option<u64>,
    /// Of the share that passed.
    pub interval: Option<(f64, f64)>,
    pub forwards: Option<u64>,
    pub tokens_per_forward: Option<f64>,
    pub tokens_per_second: Option<Spread>,
    /// Measurements behind the spread.
    pub runs: Option<usize>,
    pub requests_per_second: Option<f64>,
    pub first_ms: Option<(f64, f64)>,
    pub total_ms: Option<(f64, f64)>,
    pub speedup: Option<f64>,
    pub speedup_least: Option<f64>,
    pub acceptance_length: Option<f64>,
    pub acceptance: Vec<f64>,
    /// Prompts whose text is plain decoding's, and all.
    pub same_text: Option<(u64, u64)>,
    /// Milliseconds by part of a step.
    pub parts: Vec<(&'static str, Spread)>,
    pub total: Option<Spread>,
    /// Milliseconds that the step takes at least, what bounds it, and the share of the step outside the network.
    pub floor: Option<(f64, String)>,
    pub outside: Option<f64>,
    /// Of forwards of several tokens, by one of one.
    pub costs: Vec<Cost>,
    /// Of given tokens, and its standard error where it is a bound's.
    pub perplexity: Option<(f64, Option<f64>)>,
    pub bits_per_byte: Option<f64>,
    pub tokens: Option<u64>,
    /// Of another program's figure and ours, and what it is measured in.
    pub measured: Option<(String, Spread)>,
    pub ratio: Option<Spread>,
}

impl Point {
    pub fn share(&self) -> Option<f64> {
        Some(self.passed? as f64 / self.tasks.filter(|tasks| *tasks > 0)? as f64)
    }
}

/// Reads one file.
pub fn read(path: &Path) -> Result<Source, Unreadable> {
    let name = || path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| Unreadable::Io { file: name(), source })?;
    let file = path.file_name().map_or_else(name, |file| file.to_string_lossy().into_owned());
    parse(&name(), file, &bytes)
}

fn parse(told: &str, file: String, bytes: &[u8]) -> Result<Source, Unreadable> {
    let json: Value = serde_json::from_slice(bytes).map_err(|source| Unreadable::Json { file: told.into(), source })?;
    let kind = Kind::of(&json).ok_or_else(|| Unreadable::Unknown { file: told.into() })?;
    let points = match kind {
        Kind::Sweep => serde_json::from_value(json.clone()).map(kinds::sweep),
        Kind::Evaluation if json.get("transformers").is_some() => serde_json::from_value(json.clone()).map(kinds::judged),
        Kind::Evaluation => serde_json::from_value(json.clone()).map(kinds::evaluation),
        Kind::Load => serde_json::from_value(json.clone()).map(kinds::load),
        Kind::Speculation => serde_json::from_value(json.clone()).map(kinds::speculation),
        Kind::Step => serde_json::from_value(json.clone()).map(kinds::step),
        Kind::Grid => serde_json::from_value(json.clone()).map(kinds::grid),
        Kind::Likelihood => kinds::likelihood(&json),
        Kind::Peer => serde_json::from_value(json.clone()).map(kinds::peer),
    };
    let fields = |source| Unreadable::Fields { file: told.into(), kind: kind.told(), source };
    let points = points.map_err(fields)?;
    let commands = commands(&json);
    let about = About { commands, ..serde_json::from_value(json).map_err(fields)? };
    Ok(Source { file, kind, about, points })
}

/// All that a file tells: one, a list, or one for each program in it.
fn commands(json: &Value) -> Vec<String> {
    let of = |value: &Value| value.get("command").and_then(Value::as_str).map(str::to_owned);
    let list = json
        .get("commands")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|text| text.as_str().map(str::to_owned));
    let parts = json.as_object().into_iter().flat_map(|object| object.values()).filter_map(of);
    of(json).into_iter().chain(list).chain(parts).collect()
}

#[cfg(test)]
#[path = "input_tests.rs"]
mod tests;
