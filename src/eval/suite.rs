//! Running a model over a suite: decode every prompt, some of them side by side, then run what came out, and count.
//!
//! Judging waits until all is decoded, so that the processes that run generated code take no time from the decoding that is
//! measured.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::sandbox::{self, Limits};
use super::task::{Suite, Task};
use crate::draft::Drafters;
use crate::engine::request::{
    AutoregressiveOptions, DiffusionOptions, GenerateOptions, MethodKind, ModelInfo, Prompt, SamplingOptions, validate,
};
use crate::engine::{Engine, Event, Forwards, Usage};

/// How to decode.
#[derive(Clone, Debug)]
pub struct Options {
    pub max_new_tokens: Option<u64>,
    pub method: Option<MethodKind>,
    pub diffusion: DiffusionOptions,
    pub autoregressive: AutoregressiveOptions,
    pub sampling: SamplingOptions,
    /// Requests in flight. How many of them are decoded together is the engine's matter.
    pub concurrency: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            method: None,
            diffusion: DiffusionOptions::default(),
            autoregressive: AutoregressiveOptions::default(),
            sampling: SamplingOptions::default(),
            concurrency: 1,
        }
    }
}

/// What became of one task.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub task: String,
    pub prompt: String,
    pub text: String,
    /// Unset until the text has been judged.
    pub passed: Option<bool>,
    pub generated_tokens: usize,
    pub forwards: Forwards,
    pub decoding_seconds: f64,
}

/// Told while a suite runs.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// In the order in which they finish.
    Decoded(&'a Outcome),
    Judged(&'a Outcome),
}

/// Sums over all tasks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub suite: String,
    pub tasks: usize,
    pub passed: usize,
    pub pass_at_1: f64,
    pub generated_tokens: usize,
    pub forwards: Forwards,
    /// Generated tokens over forwards of any kind but the drafter's own.
    pub tokens_per_forward: f64,
    /// Summed over the requests, each from the moment that it became resident.
    pub decoding_seconds: f64,
    /// Generated tokens over that: the speed that one request sees.
    pub tokens_per_second: f64,
    /// Requests in flight as asked for, and the most that were decoded together.
    pub concurrency: usize,
    pub concurrency_peak: usize,
    /// From the first request to the end of the last; judging is not in it.
    pub wall_seconds: f64,
    /// Generated tokens over that: the speed of all requests together.
    pub wall_tokens_per_second: f64,
    /// What of the sandbox does not hold on this machine.
    pub sandbox_gaps: Vec<String>,
    /// In the order of the tasks.
    #[serde(skip)]
    pub outcomes: Vec<Outcome>,
}

/// Starts an engine for so many requests at a time. Nothing is kept of a prompt, as every task has its own.
pub fn engine(model: &ModelInfo, network: crate::model::Transformer, drafters: Drafters, concurrency: usize) -> Result<Engine> {
    let limits = crate::engine::Limits { resident: concurrency, queued: concurrency, ..crate::engine::Limits::one() };
    Engine::start(network, drafters, Arc::clone(&model.tokenizer), limits).context("cannot start the engine's thread")
}

/// Runs the suite on an engine that takes at least `concurrency` requests.
pub fn run(
    model: &ModelInfo,
    engine: &Engine,
    suite: &Suite,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    let peak = AtomicUsize::new(0);
    let started = Instant::now();
    let decode = |_: usize, task: &Task| one(model, engine, task, options, &peak);
    let mut outcomes =
        side_by_side(options.concurrency, &suite.tasks, decode, &mut |outcome| progress(Progress::Decoded(outcome)))?;
    let wall_seconds = started.elapsed().as_secs_f64();

    let judges = std::thread::available_parallelism().map_or(1, usize::from);
    let limits = Limits::default();
    let judge = |at: usize, task: &Task| {
        let passed = task.passes(&outcomes[at].text, &limits).context("generated code could not be run")?;
        Ok(Outcome { passed: Some(passed), ..outcomes[at].clone() })
    };
    outcomes = side_by_side(judges, &suite.tasks, judge, &mut |outcome| progress(Progress::Judged(outcome)))?;

    let mut report = report(&suite.name, outcomes);
    report.concurrency = options.concurrency;
    report.concurrency_peak = peak.into_inner();
    report.wall_seconds = wall_seconds;
    report.wall_tokens_per_second = report.generated_tokens as f64 / wall_seconds.max(1e-9);
    Ok(report)
}

/// What does not depend on how the outcomes came about.
fn report(suite: &str, outcomes: Vec<Outcome>) -> Report {
    let (tasks, passed) = (outcomes.len(), outcomes.iter().filter(|outcome| outcome.passed == Some(true)).count());
    let mut forwards = Forwards::default();
    outcomes.iter().for_each(|outcome| forwards.add(&outcome.forwards));
    let generated_tokens: usize = outcomes.iter().map(|outcome| outcome.generated_tokens).sum();
    let decoding_seconds: f64 = outcomes.iter().map(|outcome| outcome.decoding_seconds).sum();
    Report {
        suite: suite.into(),
        tasks,
        passed,
        pass_at_1: passed as f64 / tasks.max(1) as f64,
        generated_tokens,
        forwards,
        tokens_per_forward: generated_tokens as f64 / forwards.model().max(1) as f64,
        decoding_seconds,
        tokens_per_second: generated_tokens as f64 / decoding_seconds.max(1e-9),
        concurrency: 0,
        concurrency_peak: 0,
        wall_seconds: 0.0,
        wall_tokens_per_second: 0.0,
        sandbox_gaps: sandbox::capabilities(),
        outcomes,
    }
}

/// Works on all items by so many threads, and returns what came of them in the items' order. The first failure ends it all.
fn side_by_side<T: Sync, R: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(usize, &T) -> Result<R> + Sync,
    done: &mut dyn FnMut(&R),
) -> Result<Vec<R>> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (results, finished) = mpsc::channel();
    let worker = |results: mpsc::Sender<(usize, Result<R>)>| {
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { break };
            let result = work(at, item);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            if results.send((at, result)).is_err() {
                break;
            }
        }
    };
    let mut found: Vec<Option<R>> = items.iter().map(|_| None).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, items.len().max(1)) {
            let (worker, results) = (&worker, results.clone());
            scope.spawn(move || worker(results));
        }
        drop(results);
        for (at, result) in finished {
            let result = result?;
            done(&result);
            found[at] = Some(result);
        }
        Ok(found.into_iter().flatten().collect())
    })
}

fn one(model: &ModelInfo, engine: &Engine, task: &Task, options: &Options, peak: &AtomicUsize) -> Result<Outcome> {
    let request = validate(
        model,
        GenerateOptions {
            id: task.id.clone(),
            prompt: Prompt::Text(task.prompt.clone()),
            template: vec![],
            max_new_tokens: options.max_new_tokens,
            method: options.method,
            diffusion: options.diffusion.clone(),
            autoregressive: options.autoregressive.clone(),
            sampling: options.sampling.clone(),
            stops: vec![],
            steps: false,
            deadline: None,
            priority: 0,
        },
    )?;
    let mut events = engine.submit(request)?;
    let mut text = String::new();
    while let Some(event) = events.blocking_recv() {
        match event? {
            Event::Committed { text: more, .. } => text.push_str(&more),
            Event::Started { .. } => {
                peak.fetch_max(engine.load().residents, Ordering::Relaxed);
            }
            Event::Finished { usage, .. } => return Ok(outcome(task, text, &usage)),
            Event::Step(_) => {}
        }
    }
    bail!("the engine ended a request without finishing it")
}

fn outcome(task: &Task, text: String, usage: &Usage) -> Outcome {
    Outcome {
        task: task.id.clone(),
        prompt: task.prompt.clone(),
        text,
        passed: None,
        generated_tokens: usage.generated_tokens,
        forwards: usage.forwards,
        decoding_seconds: usage.decoding.as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_items_order_and_the_first_failure_ends_it() {
        let items: Vec<u64> = (0..50).collect();
        let slow_first = |at: usize, item: &u64| {
            std::thread::sleep(std::time::Duration::from_millis(20 * u64::from(at == 0)));
            Ok(item * 2)
        };
        let mut last_told = 1;
        let found = side_by_side(4, &items, slow_first, &mut |result| last_told = *result).unwrap();
        assert_eq!(found, items.iter().map(|item| item * 2).collect::<Vec<_>>());
        assert_eq!(last_told, 0, "the first item took longest");

        let tried = AtomicUsize::new(0);
        let fails = |at: usize, _: &u64| {
            tried.fetch_add(1, Ordering::Relaxed);
            if at == 3 { bail!("third") } else { Ok(()) }
        };
        assert_eq!(side_by_side(1, &items, fails, &mut |_| ()).unwrap_err().to_string(), "third");
        assert_eq!(tried.into_inner(), 4);
    }
}
