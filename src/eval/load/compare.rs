//! Results of two runs, side by side.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::summary::{Limits, Spread, Summary};

/// What was measured, and with what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    pub target: String,
    /// As the server describes it.
    pub model: String,
    pub parameters: u64,
    pub dtype: String,
    pub device: String,
    /// That an operation on the server's CPU may use.
    pub threads: u32,
    pub resident_max: u64,
    pub queued_max: u64,
    pub method: String,
    pub drafter: Option<String>,
    /// Settings of the method that are in force.
    pub settings: Value,
    /// "nano", or the file's name.
    pub prompts: String,
    pub prompts_count: usize,
    pub prompts_seed: u64,
    pub max_new_tokens: Option<u64>,
    pub events: bool,
    pub cancel_share: f64,
    pub limits: Limits,
    pub seed: u64,
    pub connections: usize,
    pub client_threads: usize,
    pub client_version: String,
    pub command: String,
}

/// One result: what `bench serve --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    #[serde(flatten)]
    pub about: About,
    pub lanes: Vec<Summary>,
}

/// Without these the same, two results do not measure the same thing.
const SAME: [&str; 5] = ["model", "parameters", "dtype", "device", "threads"];
/// These say how a result was called for; they differ without meaning anything.
const APART: [&str; 2] = ["target", "command"];

/// Why two results cannot be compared.
#[derive(Debug, Error)]
pub enum Unlike {
    #[error("the results differ in {0}: measure both alike, or compare them with --anyway")]
    Settings(String),
    #[error("the results have no lane in common: measure both at the same --concurrency or --rate")]
    Lanes,
}

/// A setting that is not the same in both.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    pub name: String,
    pub a: String,
    pub b: String,
}

/// One figure of a lane in both.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub lane: String,
    pub figure: &'static str,
    pub a: f64,
    pub b: f64,
}

impl Row {
    /// B by A, if there is such a number.
    pub fn ratio(&self) -> Option<f64> {
        (self.a > 0.0).then(|| self.b / self.a)
    }
}

/// Settings that differ, and every figure that both have, lane by lane.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub differences: Vec<Difference>,
    pub rows: Vec<Row>,
}

/// Sets B beside A. `anyway` lets them differ in what they measure.
pub fn compare(a: &Report, b: &Report, anyway: bool) -> Result<Comparison, Unlike> {
    let differences = differences(&a.about, &b.about);
    let unlike: Vec<_> = differences.iter().filter(|found| SAME.contains(&found.name.as_str())).collect();
    if !unlike.is_empty() && !anyway {
        let told = unlike.iter().map(|found| format!("{} ({} and {})", found.name, found.a, found.b));
        return Err(Unlike::Settings(told.collect::<Vec<_>>().join(", ")));
    }
    let both = a.lanes.iter().filter_map(|a| Some((a, b.lanes.iter().find(|b| a.lane == b.lane)?)));
    let rows: Vec<_> = both.flat_map(|(a, b)| rows(a, b)).collect();
    if rows.is_empty() { Err(Unlike::Lanes) } else { Ok(Comparison { differences, rows }) }
}

fn differences(a: &About, b: &About) -> Vec<Difference> {
    let [Ok(Value::Object(a)), Ok(Value::Object(b))] = [a, b].map(serde_json::to_value) else { return vec![] };
    let told = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let differing = a.iter().filter_map(|(name, a)| Some((name, a, b.get(name)?))).filter(|(_, a, b)| a != b);
    let worth = differing.filter(|(name, ..)| !APART.contains(&name.as_str()));
    worth.map(|(name, a, b)| Difference { name: name.clone(), a: told(a), b: told(b) }).collect()
}

fn rows(a: &Summary, b: &Summary) -> Vec<Row> {
    type Figure = (&'static str, fn(&Summary) -> Option<f64>);
    let figures: [Figure; 16] = [
        ("tokens/s", |lane| Some(lane.tokens_per_second)),
        ("requests/s", |lane| Some(lane.requests_per_second)),
        ("goodput/s", |lane| lane.goodput_per_second),
        ("first provisional p50 ms", |lane| of(lane.latency_ms.first_provisional, |s| s.p50)),
        ("first provisional p99 ms", |lane| of(lane.latency_ms.first_provisional, |s| s.p99)),
        ("first committed p50 ms", |lane| of(lane.latency_ms.first_committed, |s| s.p50)),
        ("first committed p99 ms", |lane| of(lane.latency_ms.first_committed, |s| s.p99)),
        ("between commits p50 ms", |lane| of(lane.latency_ms.between_commits, |s| s.p50)),
        ("between commits p99 ms", |lane| of(lane.latency_ms.between_commits, |s| s.p99)),
        ("total p50 ms", |lane| of(lane.latency_ms.total, |s| s.p50)),
        ("total p90 ms", |lane| of(lane.latency_ms.total, |s| s.p90)),
        ("total p99 ms", |lane| of(lane.latency_ms.total, |s| s.p99)),
        ("queue p50 ms", |lane| of(lane.queue_ms, |s| s.p50)),
        ("rejected", |lane| Some(lane.counted.rejected as f64)),
        ("cancelled", |lane| Some(lane.counted.cancelled as f64)),
        ("failed", |lane| Some(lane.counted.failed as f64)),
    ];
    let row = |(figure, value): Figure| Some(Row { lane: a.lane.clone(), figure, a: value(a)?, b: value(b)? });
    figures.into_iter().filter_map(row).collect()
}

fn of(spread: Option<Spread>, part: fn(&Spread) -> f64) -> Option<f64> {
    spread.as_ref().map(part)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::summary::summary;
    use super::super::window::Window;
    use super::super::{Cost, Lane, Outcome, Round, Sample};
    use super::*;

    fn report(lanes: &[usize], tokens: u64) -> Report {
        let second = Duration::from_secs(1);
        let sample = Sample {
            intended: Duration::ZERO,
            sent: Duration::ZERO,
            ended: second,
            first_step: None,
            first_commit: None,
            gaps: vec![],
            outcome: Outcome::Finished(Cost { generated_tokens: tokens, ..Cost::default() }),
        };
        let window = Window { opens: Duration::ZERO, closes: second };
        let round = Round { samples: vec![sample], unsent: vec![], window };
        let lane = |concurrency: &usize| {
            summary(Lane::Closed { concurrency: *concurrency }, std::slice::from_ref(&round), &Limits::default()).unwrap()
        };
        let about = About {
            target: "127.0.0.1:1".into(),
            model: "nano".into(),
            parameters: 5,
            dtype: "f32".into(),
            device: "cpu".into(),
            threads: 2,
            resident_max: 8,
            queued_max: 64,
            method: "diffusion".into(),
            drafter: None,
            settings: serde_json::json!({ "threshold": 0.9 }),
            prompts: "nano".into(),
            prompts_count: 1,
            prompts_seed: 7,
            max_new_tokens: None,
            events: false,
            cancel_share: 0.0,
            limits: Limits::default(),
            seed: 1,
            connections: 1,
            client_threads: 1,
            client_version: "0".into(),
            command: String::new(),
        };
        Report { about, lanes: lanes.iter().map(lane).collect() }
    }

    #[test]
    fn lanes_of_both_are_set_side_by_side() {
        let (a, mut b) = (report(&[1, 4], 10), report(&[4, 16], 15));
        b.about.target = "127.0.0.1:2".into();
        b.about.resident_max = 16;
        let Comparison { differences, rows } = compare(&a, &b, false).unwrap();
        assert!(rows.iter().all(|row| row.lane == "concurrency 4"), "{rows:?}");
        let speed = rows.iter().find(|row| row.figure == "tokens/s").unwrap();
        assert_eq!((speed.a, speed.b, speed.ratio()), (10.0, 15.0, Some(1.5)));
        assert_eq!(differences, [Difference { name: "resident_max".into(), a: "8".into(), b: "16".into() }]);
        let rejected = rows.iter().find(|row| row.figure == "rejected").unwrap();
        assert_eq!(rejected.ratio(), None);
        // What neither timed is no row.
        assert!(rows.iter().all(|row| !row.figure.starts_with("first")), "{rows:?}");
    }

    #[test]
    fn another_model_or_machine_is_refused() {
        let a = report(&[1], 10);
        let changes: [fn(&mut About); 4] = [
            |about| about.model = "nano-ar".into(),
            |about| about.parameters = 6,
            |about| about.dtype = "bf16".into(),
            |about| about.device = "cuda:0".into(),
        ];
        for change in changes {
            let mut b = a.clone();
            change(&mut b.about);
            let told = compare(&a, &b, false).unwrap_err().to_string();
            assert!(told.starts_with("the results differ in ") && told.contains("--anyway"), "{told}");
            assert_eq!(compare(&a, &b, true).unwrap().differences.len(), 1);
        }
        assert!(matches!(compare(&a, &report(&[2], 10), true), Err(Unlike::Lanes)));
    }

    #[test]
    fn a_result_survives_its_json() {
        let report = report(&[1, 4], 10);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
}
