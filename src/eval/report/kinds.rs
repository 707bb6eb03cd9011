//! The form of each kind of result, and the points that are in it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::command::Command;
use super::input::{DEFAULTS, Point};
use super::score::{Spread, interval};
use crate::eval::load;
use crate::eval::speculate::Cost;
use crate::eval::sweep::Outcome as Sweep;

pub fn sweep(sweep: Sweep) -> Vec<Point> {
    let point = |cell: crate::eval::sweep::Cell| {
        let rates = cell.runs.iter().map(|run| run.tokens_per_second).collect();
        let median = |part: fn(&crate::eval::sweep::Run) -> Option<f64>| {
            Spread::of(cell.runs.iter().filter_map(part).collect()).map(|spread| spread.median)
        };
        let pair = |p50: Option<f64>, p90: Option<f64>| p50.zip(p90);
        Point {
            tokens_per_second: Spread::of(rates),
            runs: Some(cell.runs.len()),
            first_ms: pair(median(|run| Some(run.first_ms.as_ref()?.p50)), median(|run| Some(run.first_ms.as_ref()?.p90))),
            total_ms: pair(median(|run| Some(run.total_ms.as_ref()?.p50)), median(|run| Some(run.total_ms.as_ref()?.p90))),
            in_flight: Some(cell.concurrency as u64),
            tasks: Some(cell.tasks as u64),
            passed: Some(cell.passed as u64),
            interval: Some(interval(cell.passed as u64, cell.tasks as u64)),
            forwards: Some(cell.forwards.model() as u64),
            tokens_per_forward: Some(cell.tokens_per_forward),
            setting: Some(Command::parse(&cell.setting).all()).filter(|told| !told.is_empty()).unwrap_or(DEFAULTS.into()),
            model: cell.model,
            path: cell.path,
            ..Point::default()
        }
    };
    sweep.cells.into_iter().map(point).collect()
}

#[derive(Deserialize)]
pub struct Evaluation {
    model: String,
    tasks: u64,
    passed: u64,
    forwards: BTreeMap<String, u64>,
    tokens_per_forward: f64,
    tokens_per_second: f64,
    wall_tokens_per_second: Option<f64>,
    concurrency: Option<u64>,
    samples: Option<u64>,
    #[serde(default)]
    pass_at: Vec<PassAt>,
    #[serde(default)]
    command: String,
}

#[derive(Deserialize)]
struct PassAt {
    k: u64,
    low: f64,
    high: f64,
}

pub fn evaluation(found: Evaluation) -> Vec<Point> {
    let command = Command::parse(&found.command);
    let own = |(kind, _): &(&String, &u64)| kind.as_str() != "draft";
    let setting = command.setting();
    let samples = found.samples.unwrap_or(1);
    // Samples of one task are not independent, so that the file's own interval is taken, which draws tasks.
    let drawn = found.pass_at.iter().find(|at| at.k == 1 && samples > 1).map(|at| (at.low, at.high));
    let rate = found.wall_tokens_per_second.filter(|rate| *rate > 0.0).unwrap_or(found.tokens_per_second);
    vec![Point {
        path: command.path(&found.model),
        setting: if setting.is_empty() { DEFAULTS.into() } else { setting },
        model: found.model,
        in_flight: Some(found.concurrency.unwrap_or(1)),
        tasks: Some(found.tasks * samples),
        passed: Some(found.passed),
        interval: drawn.or_else(|| Some(interval(found.passed, found.tasks))),
        forwards: Some(found.forwards.iter().filter(own).map(|(_, count)| count).sum()),
        tokens_per_forward: Some(found.tokens_per_forward),
        tokens_per_second: Some(Spread::one(rate)),
        runs: Some(1),
        ..Point::default()
    }]
}

pub fn load(report: load::compare::Report) -> Vec<Point> {
    let about = &report.about;
    let command = Command::parse(&about.command);
    let drafter = about.drafter.as_ref().map_or(String::new(), |name| format!(", drafter {name}"));
    let point = |lane: &load::summary::Summary| {
        let pair = |spread: Option<load::summary::Spread>| spread.map(|spread| (spread.p50, spread.p90));
        let in_flight = lane.lane.strip_prefix("concurrency ").and_then(|users| users.parse().ok());
        let forwards = &lane.forwards;
        let forwards = forwards.prefill + forwards.denoise + forwards.cache_store + forwards.decode + forwards.verify;
        Point {
            model: about.model.clone(),
            path: format!("{}, {}{drafter}", about.model, about.method),
            setting: if in_flight.is_some() { command.setting() } else { lane.lane.clone() },
            in_flight,
            forwards: Some(forwards),
            tokens_per_forward: (forwards > 0).then(|| lane.generated_tokens as f64 / forwards as f64),
            tokens_per_second: Spread::of(lane.tokens_per_second_by_round.clone())
                .map(|spread| Spread { median: lane.tokens_per_second, ..spread }),
            runs: Some(lane.tokens_per_second_by_round.len()),
            requests_per_second: Some(lane.requests_per_second),
            first_ms: pair(lane.latency_ms.first_committed),
            total_ms: pair(lane.latency_ms.total),
            ..Point::default()
        }
    };
    report.lanes.iter().map(point).collect()
}

#[derive(Deserialize)]
pub struct Speculation {
    model: String,
    prompts: u64,
    rounds: usize,
    plain_tokens_per_second: f64,
    cost_curve: Vec<Cost>,
    #[serde(flatten)]
    lanes: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Lane {
    tokens_per_second: f64,
    speedup: f64,
    speedup_least: f64,
    acceptance_length: f64,
    acceptance_by_position: Vec<f64>,
    same_text: u64,
}

pub fn speculation(found: Speculation) -> Vec<Point> {
    let rate = |rate| Some(Spread::one(rate));
    let plain = Point {
        model: found.model.clone(),
        path: found.model.clone(),
        setting: "plain".into(),
        in_flight: Some(1),
        tokens_per_second: rate(found.plain_tokens_per_second),
        runs: Some(found.rounds),
        costs: found.cost_curve,
        ..Point::default()
    };
    // Beside the lanes there are names and numbers.
    let lanes = found.lanes.into_iter().filter_map(|(name, value)| Some((name, serde_json::from_value::<Lane>(value).ok()?)));
    let drafted = lanes.map(|(name, lane)| Point {
        model: found.model.clone(),
        path: format!("{}, {name}", found.model),
        setting: name,
        in_flight: Some(1),
        tokens_per_second: rate(lane.tokens_per_second),
        runs: Some(found.rounds),
        speedup: Some(lane.speedup),
        speedup_least: Some(lane.speedup_least),
        acceptance_length: Some(lane.acceptance_length),
        acceptance: lane.acceptance_by_position,
        same_text: Some((lane.same_text, found.prompts)),
        ..Point::default()
    });
    std::iter::once(plain).chain(drafted).collect()
}

#[derive(Deserialize)]
pub struct Step {
    model: String,
    prompt: u64,
    canvas: u64,
    batch: u64,
    runs: usize,
    forward: Spread,
    head: Spread,
    selection: Spread,
    event: Spread,
    total: Spread,
}

pub fn step(found: Step) -> Vec<Point> {
    vec![Point {
        model: shape(&found.model),
        path: found.model,
        setting: format!("prompt {}, canvas {}", found.prompt, found.canvas),
        in_flight: Some(found.batch),
        runs: Some(found.runs),
        parts: vec![("forward", found.forward), ("head", found.head), ("selection", found.selection), ("events", found.event)],
        total: Some(found.total),
        ..Point::default()
    }]
}

#[derive(Deserialize)]
pub struct Grid {
    model: String,
    runs: usize,
    cells: Vec<GridCell>,
}

#[derive(Deserialize)]
struct GridCell {
    window: u64,
    prefix: u64,
    sequences: u64,
    total: Spread,
    outside_share: f64,
    floor: Floor,
}

#[derive(Deserialize)]
struct Floor {
    milliseconds: f64,
    bound: String,
}

pub fn grid(found: Grid) -> Vec<Point> {
    let point = |cell: GridCell| Point {
        model: shape(&found.model),
        path: found.model.clone(),
        setting: format!("window {}, prefix {}", cell.window, cell.prefix),
        in_flight: Some(cell.sequences),
        runs: Some(found.runs),
        total: Some(cell.total),
        floor: Some((cell.floor.milliseconds, cell.floor.bound)),
        outside: Some(cell.outside_share),
        ..Point::default()
    };
    found.cells.into_iter().map(point).collect()
}

/// A model's name; of random weights, that of the config whose path is told.
fn shape(model: &str) -> String {
    model.rsplit('/').next().unwrap_or_default().trim_end_matches(".json").into()
}

#[derive(Deserialize)]
pub struct Peer {
    what: String,
    model: Option<String>,
    rounds: usize,
    ratio_median: f64,
    ratio_min: f64,
    ratio_max: f64,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

pub fn peer(found: Peer) -> Vec<Point> {
    let ratio = Spread { median: found.ratio_median, min: found.ratio_min, max: found.ratio_max };
    // Every list has a program's figures, round by round.
    let lists = found.rest.iter().filter(|(name, _)| found.rest.contains_key(&program_median(name)));
    let figures = lists.filter_map(|(name, list)| {
        let spread = Spread::of(list.as_array()?.iter().filter_map(Value::as_f64).collect())?;
        Some(Point {
            model: found.model.clone().unwrap_or_default(),
            path: name.replace('_', " "),
            setting: name.replace('_', " "),
            runs: Some(found.rounds),
            measured: Some((found.what.clone(), spread)),
            ratio: name.starts_with("lacuna").then_some(ratio),
            ..Point::default()
        })
    });
    figures.collect()
}

/// `lacuna_step` has its median in `lacuna_median`.
fn program_median(list: &str) -> String {
    format!("{}_median", list.split('_').next().unwrap_or(list))
}

/// Texts of another program, judged by ours.
#[derive(Deserialize)]
pub struct Judged {
    tasks: u64,
    passed: u64,
    transformers: String,
}

pub fn judged(found: Judged) -> Vec<Point> {
    vec![Point {
        path: format!("transformers {}", found.transformers),
        setting: DEFAULTS.into(),
        tasks: Some(found.tasks),
        passed: Some(found.passed),
        interval: Some(interval(found.passed, found.tasks)),
        ..Point::default()
    }]
}

#[derive(Deserialize)]
struct Likelihood {
    #[serde(default)]
    model: String,
    tokens: u64,
    perplexity: f64,
    bits_per_byte: Option<f64>,
    /// "bound" where it is one.
    #[serde(default)]
    kind: String,
    standard_error: Option<f64>,
}

/// Of one program, or of several by their names.
pub fn likelihood(json: &Value) -> Result<Vec<Point>, serde_json::Error> {
    let point = |(program, json): (&str, &Value)| {
        let found: Likelihood = serde_json::from_value(json.clone())?;
        let error = found.standard_error.filter(|_| found.kind == "bound");
        Ok(Point {
            model: found.model,
            path: program.into(),
            setting: if found.kind == "bound" { "bound" } else { "exact" }.into(),
            perplexity: Some((found.perplexity, error.map(|nats| found.perplexity * nats / found.tokens.max(1) as f64))),
            bits_per_byte: found.bits_per_byte,
            tokens: Some(found.tokens),
            ..Point::default()
        })
    };
    match json.as_object().filter(|_| json.get("perplexity").is_none()) {
        Some(programs) => programs.iter().map(|(program, json)| point((program, json))).collect(),
        None => point(("lacuna", json)).map(|point| vec![point]),
    }
}
