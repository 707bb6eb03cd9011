//! Running a model over a suite: decode every prompt, some of them side by side, then judge what came out, and count.
//!
//! Judging waits until all is decoded, so that the processes that run generated code take no time from the decoding that is
//! measured.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::sandbox::Limits;
use super::score;
use super::task::{Form, Suite, Task};
use crate::checkpoint::chat::Message;
use crate::decode::FinishReason;
use crate::draft::Drafters;
use crate::engine::request::{
    AutoregressiveOptions, DiffusionOptions, GenerateOptions, MethodKind, ModelInfo, Prompt, SamplingOptions, TemplatePiece,
    default_method, validate,
};
use crate::engine::{Engine, Event, Request};

pub use super::score::{Outcome, Report};

/// How to decode.
#[derive(Clone, Debug)]
pub struct Options {
    pub form: Form,
    /// In the infilling form, the hole's length; unset there, that of what stood in it.
    pub max_new_tokens: Option<u64>,
    pub method: Option<MethodKind>,
    pub diffusion: DiffusionOptions,
    pub autoregressive: AutoregressiveOptions,
    /// Its seed seeds the run (0 if unset): every text has a seed of its own, drawn from it, the task's place and the sample.
    pub sampling: SamplingOptions,
    /// Strings that end a text; unset, the suite's own where the form is raw, else none.
    pub stops: Option<Vec<String>>,
    /// Texts for each task.
    pub samples: usize,
    /// The k of pass@k, besides 1.
    pub ks: Vec<usize>,
    /// Requests in flight. How many of them are decoded together is the engine's matter.
    pub concurrency: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            form: Form::Raw,
            max_new_tokens: None,
            method: None,
            diffusion: DiffusionOptions::default(),
            autoregressive: AutoregressiveOptions::default(),
            sampling: SamplingOptions::default(),
            stops: None,
            samples: 1,
            ks: vec![],
            concurrency: 1,
        }
    }
}

/// Told while a suite runs.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// In the order in which they finish.
    Decoded(&'a Outcome),
    Judged(&'a Outcome),
}

/// One text to come.
struct Job<'a> {
    task: &'a Task,
    sample: usize,
    seed: u64,
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
    resume(model, engine, suite, options, vec![], progress)
}

/// Likewise, where some texts are known from a run that was cut off.
pub fn resume(
    model: &ModelInfo,
    engine: &Engine,
    suite: &Suite,
    options: &Options,
    known: Vec<Outcome>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    check(model, suite, options)?;
    let seed = options.sampling.seed.unwrap_or(0);
    let tasks = suite.tasks.iter().enumerate();
    let jobs = tasks.flat_map(|(at, task)| (0..options.samples).map(move |sample| (at, task, sample)));
    let jobs: Vec<Job> = jobs.map(|(at, task, sample)| Job { task, sample, seed: mix(seed, at, sample) }).collect();
    let mut known: BTreeMap<(String, usize), Outcome> =
        known.into_iter().map(|outcome| ((outcome.task.clone(), outcome.sample), outcome)).collect();
    let key = |job: &Job| (job.task.id.clone(), job.sample);
    let todo: Vec<&Job> = jobs.iter().filter(|job| !known.contains_key(&key(job))).collect();

    // A task that does not fit the model is told of now, not after hours of decoding.
    jobs.iter().try_for_each(|job| prepare(model, suite, job, options).map(drop))?;
    let peak = AtomicUsize::new(0);
    let started = Instant::now();
    let decode = |_: usize, job: &&Job| one(model, engine, suite, job, options, &peak);
    let fresh = side_by_side(options.concurrency, &todo, decode, &mut |outcome| progress(Progress::Decoded(outcome)))?;
    let wall_seconds = started.elapsed().as_secs_f64();
    let tokens: usize = fresh.iter().map(|outcome| outcome.generated_tokens).sum();

    known.extend(fresh.into_iter().map(|outcome| ((outcome.task.clone(), outcome.sample), outcome)));
    let texts: Vec<Outcome> = jobs.iter().filter_map(|job| known.remove(&key(job))).collect();
    let outcomes = judge(suite, options.form, texts, progress)?;
    let mut report = Report::of(&suite.name, options.form, &options.ks, seed, outcomes);
    report.concurrency = options.concurrency;
    report.concurrency_peak = peak.into_inner();
    report.wall_seconds = wall_seconds;
    report.wall_tokens_per_second = score::rate(tokens, wall_seconds);
    report.taken_over = jobs.len() - todo.len();
    Ok(report)
}

/// Judges the texts that have no verdict yet; `outcomes` are of the suite's tasks, in any order, and keep theirs.
pub fn judge(suite: &Suite, form: Form, outcomes: Vec<Outcome>, progress: &mut dyn FnMut(Progress)) -> Result<Vec<Outcome>> {
    let tasks: BTreeMap<&str, &Task> = suite.tasks.iter().map(|task| (task.id.as_str(), task)).collect();
    let limits = Limits::default();
    let verdict = |_: usize, outcome: &Outcome| {
        let Some(task) = tasks.get(outcome.task.as_str()) else {
            bail!("the suite {} has no task {}", suite.name, outcome.task)
        };
        if outcome.passed.is_some() {
            return Ok(outcome.clone());
        }
        let verdict = task.judge(&outcome.text, form, &limits).context("generated code could not be run")?;
        Ok(Outcome { passed: Some(verdict.passed), why: verdict.why, ..outcome.clone() })
    };
    let judges = std::thread::available_parallelism().map_or(1, usize::from);
    side_by_side(judges, &outcomes, verdict, &mut |outcome| progress(Progress::Judged(outcome)))
}

/// What would fail for every task fails before the first.
fn check(model: &ModelInfo, suite: &Suite, options: &Options) -> Result<()> {
    let holes = suite.tasks.iter().filter(|task| task.hole.is_some()).count();
    let method = options.method.unwrap_or(default_method(model));
    match options.form {
        Form::Infill => {
            ensure!(holes == suite.tasks.len(), "there is no hole in some tasks: make the suite one of infilling");
            ensure!(
                method == MethodKind::Diffusion,
                "model {} decodes from left to right and cannot fill a hole before given text: infilling takes a diffusion model",
                model.name
            );
        }
        Form::Raw | Form::Chat => ensure!(holes == 0, "tasks with text behind the answer ask for the infilling form"),
    }
    ensure!(options.samples > 0, "there must be at least one sample of each task");
    if let Some(k) = options.ks.iter().find(|k| **k == 0 || **k > options.samples) {
        bail!("pass@{k} takes at least {k} samples of each task: there are {}", options.samples);
    }
    Ok(())
}

/// A seed for one text. 53 bits, so that every reader of JSON has it whole. (SplitMix64's output function.)
fn mix(seed: u64, task: usize, sample: usize) -> u64 {
    let mut x = seed.wrapping_add(((task as u64) << 20 ^ sample as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ x >> 31) >> 11
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

/// The task as the options ask for it, and the prompt's text.
fn prepare(model: &ModelInfo, suite: &Suite, job: &Job, options: &Options) -> Result<(Request, String)> {
    let task = job.task;
    let (prompt, template) = match (options.form, &task.hole) {
        (Form::Chat, _) => {
            let chat = model.tokenizer.chat().with_context(|| format!("model {} has no chat template", model.name))?;
            let message = Message { role: "user".into(), content: task.message() };
            (chat.render(&[message]).map_err(anyhow::Error::msg)?, vec![])
        }
        (Form::Infill, Some(hole)) => {
            let length = match (options.max_new_tokens, &hole.middle) {
                (Some(length), _) => length,
                (None, Some(middle)) => model.tokenizer.encode(middle, false).map_err(anyhow::Error::msg)?.len().max(1) as u64,
                (None, None) => bail!("task {} does not say how long its hole is: give --max-new-tokens", task.id),
            };
            (
                format!("{}{}", task.prompt, hole.before),
                vec![TemplatePiece::Hole(length), TemplatePiece::Text(hole.after.clone())],
            )
        }
        (Form::Raw | Form::Infill, _) => (task.prompt.clone(), vec![]),
    };
    let own = || if options.form == Form::Raw { suite.stops.clone() } else { vec![] };
    let asked = GenerateOptions {
        id: task.id.clone(),
        prompt: Prompt::Text(prompt.clone()),
        max_new_tokens: if template.is_empty() { options.max_new_tokens } else { None },
        template,
        method: options.method,
        diffusion: options.diffusion.clone(),
        autoregressive: options.autoregressive.clone(),
        sampling: SamplingOptions { seed: Some(job.seed), ..options.sampling.clone() },
        stops: options.stops.clone().unwrap_or_else(own),
        steps: false,
        deadline: None,
        priority: 0,
    };
    let request = validate(model, asked).map_err(|error| anyhow!(error).context(format!("task {}", task.id)))?;
    ensure!(
        options.samples == 1 || request.method.sampling().temperature > 0.0,
        "at temperature 0 all samples of a task are one text: give --temperature, or one sample"
    );
    Ok((request, prompt))
}

fn one(model: &ModelInfo, engine: &Engine, suite: &Suite, job: &Job, options: &Options, peak: &AtomicUsize) -> Result<Outcome> {
    let (request, prompt) = prepare(model, suite, job, options)?;
    let mut events = engine.submit(request)?;
    let (mut text, mut tokens) = (String::new(), vec![]);
    while let Some(event) = events.blocking_recv() {
        match event? {
            Event::Committed { text: more, token_ids, .. } => {
                text.push_str(&more);
                tokens.extend(token_ids);
            }
            Event::Started { .. } => {
                peak.fetch_max(engine.load().residents, Ordering::Relaxed);
            }
            Event::Finished { reason, usage } => {
                return Ok(Outcome {
                    task: job.task.id.clone(),
                    sample: job.sample,
                    seed: job.seed,
                    prompt,
                    text,
                    passed: None,
                    why: None,
                    finish_reason: if reason == FinishReason::Stop { "stop" } else { "length" }.into(),
                    generated_tokens: usage.generated_tokens,
                    forwards: usage.forwards,
                    decoding_seconds: usage.decoding.as_secs_f64(),
                    seconds_to_first: usage.time_to_first_commit.map(|time| (usage.queued + time).as_secs_f64()),
                    seconds: (usage.queued + usage.decoding).as_secs_f64(),
                    entropy: score::entropy(&tokens),
                });
            }
            Event::Step(_) => {}
        }
    }
    bail!("the engine ended a request without finishing it")
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
