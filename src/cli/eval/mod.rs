//! `lacuna eval`: how often what a model writes is right, and at what cost; `lacuna eval likelihood`: how probable it finds a text.

pub(super) mod likelihood;

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::load::ModelOptions;
use super::method::{AutoregressiveFlags, DiffusionFlags, SamplingFlags, methods};
use crate::engine::request::{ModelInfo, SamplingOptions};
use crate::eval::problems::{self, Format};
use crate::eval::record::{self, Record};
use crate::eval::sandbox;
use crate::eval::score::{Outcome, Report};
use crate::eval::suite::{self, Progress};
use crate::eval::task::{Form, Suite};

/// Nano tasks where the command does not say how many.
const NANO_TASKS: usize = 300;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    measure: Option<Measure>,
    #[command(flatten)]
    suite: SuiteOptions,
}

#[derive(Subcommand, Debug)]
enum Measure {
    /// Perplexity of a text, or its bound under a diffusion model
    Likelihood(Box<likelihood::Options>),
}

#[derive(Args, Debug)]
struct SuiteOptions {
    /// Tasks to run
    #[arg(value_enum, default_value = "nano")]
    suite: SuiteName,
    #[command(flatten)]
    tasks: TaskFlags,
    #[command(flatten)]
    model: ModelOptions,
    /// Ask in the model's chat template, and take the first fenced block of the answer
    #[arg(long, conflicts_with = "infill")]
    chat: bool,
    /// Take the middle out of every task's solution, and have it filled in; the hole is as long as --max-new-tokens says, or what stood there
    #[arg(long)]
    infill: bool,
    /// Length of the canvas in tokens
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u64>,
    /// End a text there; may be repeated [default: where the suite's authors do, unless --chat or --infill]
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    diffusion: DiffusionFlags,
    #[command(flatten)]
    autoregressive: AutoregressiveFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Texts for each task
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    samples: u16,
    /// The k of pass@k, besides 1
    #[arg(long, value_name = "K,K", value_delimiter = ',')]
    k: Vec<usize>,
    /// Requests in flight, decoded together as far as there is room
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Keep every text there, one JSON object a line; a run that was cut off goes on from it
    #[arg(long, value_name = "FILE")]
    outcomes: Option<PathBuf>,
    /// Judge the texts in this file, one JSON object with task and text a line, instead of decoding
    #[arg(long, value_name = "FILE", conflicts_with = "outcomes")]
    judge: Option<PathBuf>,
}

/// Which tasks of a suite.
#[derive(Args, Debug)]
pub(super) struct TaskFlags {
    /// File of the suite's tasks, one JSON object a line; .gz is unpacked
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// How many tasks [default: all of a file, 300 of nano]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    tasks: Option<u32>,
    /// Seed of the choice of nano's tasks
    #[arg(long, default_value_t = 7)]
    tasks_seed: u64,
}

impl TaskFlags {
    /// Whether any but the seed is set.
    pub(super) fn any(&self) -> bool {
        self.data.is_some() || self.tasks.is_some()
    }

    pub(super) fn suite(&self, name: SuiteName) -> Result<Suite> {
        let limit = self.tasks.map(|tasks| tasks as usize);
        let data = || self.data.as_deref().context("the suite takes its tasks from a file: name it with --data FILE");
        match name {
            SuiteName::Nano => {
                ensure!(self.data.is_none(), "nano draws its tasks: leave --data away, or name another suite");
                Ok(Suite::nano(limit.unwrap_or(NANO_TASKS), self.tasks_seed))
            }
            SuiteName::Humaneval => Ok(problems::read(data()?, Format::HumanEval, limit.unwrap_or(usize::MAX))?),
            SuiteName::Jsonl => Ok(problems::read(data()?, Format::Plain, limit.unwrap_or(usize::MAX))?),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SuiteName {
    /// Small Python functions of compositions that training never showed
    Nano,
    /// OpenAI's 164 problems, or a file in their format: --data HumanEval.jsonl.gz
    Humaneval,
    /// A file of {prompt, test | reference}: --data FILE
    Jsonl,
}

pub fn run(options: Options) -> Result<()> {
    match options.measure {
        Some(Measure::Likelihood(options)) => likelihood::run(*options),
        None => evaluate(options.suite),
    }
}

impl SuiteOptions {
    fn suite(&self) -> Result<Suite> {
        let suite = self.tasks.suite(self.suite)?;
        match self.infill {
            true => suite.infill().map_err(|id| anyhow!("task {id} has no solution to take a middle out of")),
            false => Ok(suite),
        }
    }

    fn form(&self) -> Form {
        match (self.chat, self.infill) {
            (true, _) => Form::Chat,
            (_, true) => Form::Infill,
            _ => Form::Raw,
        }
    }

    fn decoding(&self) -> suite::Options {
        let (method, diffusion, autoregressive) = methods(&self.diffusion, &self.autoregressive);
        suite::Options {
            form: self.form(),
            max_new_tokens: self.max_new_tokens,
            method,
            diffusion,
            autoregressive,
            sampling: self.sampling.options(),
            stops: (!self.stop.is_empty()).then(|| self.stop.clone()),
            samples: usize::from(self.samples),
            ks: self.k.clone(),
            concurrency: usize::from(self.concurrency),
        }
    }

    /// All that decides what the texts are.
    fn settings(&self, suite: &Suite, model: &ModelInfo, decoding: &suite::Options) -> Value {
        json!({
            "suite": suite.name,
            "tasks": suite.tasks.len(),
            "fingerprint": suite.fingerprint(),
            "model": self.model.model,
            "drafters": self.model.run.drafters,
            "dtype": model.precision(),
            "device": model.placement.device_name(),
            "form": decoding.form,
            "max_new_tokens": decoding.max_new_tokens,
            "samples": decoding.samples,
            "seed": decoding.sampling.seed.unwrap_or(0),
            "stops": decoding.stops,
            "method": set(&decoding.method),
            "diffusion": set(&decoding.diffusion),
            "autoregressive": set(&decoding.autoregressive),
            "sampling": set(&SamplingOptions { seed: None, ..decoding.sampling.clone() }),
        })
    }
}

/// The options that are set, as text.
fn set(options: &impl std::fmt::Debug) -> Vec<String> {
    let text = format!("{options:?}");
    let fields = text.split_once(" { ").map_or(text.as_str(), |(_, fields)| fields.trim_end_matches(" }"));
    fields.split(", ").filter(|field| !field.ends_with("None") && !field.ends_with("[]")).map(str::to_owned).collect()
}

fn evaluate(options: SuiteOptions) -> Result<()> {
    let tasks = options.suite()?;
    let gaps = if tasks.runs_programs() { sandbox::capabilities() } else { vec![] };
    gaps.iter().for_each(|gap| eprintln!("warning: {gap}"));
    if let Some(path) = &options.judge {
        return judge(&options, &tasks, record::texts(path)?);
    }
    let (model, network, drafters) = options.model.load()?;
    let decoding = options.decoding();
    let (mut record, known) = match &options.outcomes {
        Some(path) => {
            let (record, known) = Record::open(path, options.settings(&tasks, &model, &decoding))?;
            (Some(record), known)
        }
        None => (None, vec![]),
    };
    let engine = suite::engine(&model, network, drafters, decoding.concurrency)?;
    let bar = progress(tasks.tasks.len() * decoding.samples - known.len());
    let (mut failed_write, mut passed) = (None, 0);
    let report = suite::resume(&model, &engine, &tasks, &decoding, known, &mut |event| match event {
        Progress::Decoded(outcome) => {
            bar.inc(1);
            if let Some(Err(error)) = record.as_mut().map(|record| record.append(outcome)) {
                failed_write.get_or_insert(error);
            }
        }
        Progress::Judged(outcome) => judged(&bar, outcome, &mut passed),
    })?;
    bar.finish_and_clear();
    engine.rest();
    if let Some(record) = record {
        failed_write.map_or(Ok(()), Err).and_then(|()| record.finish(&report.outcomes))?;
    }
    told(&options, &report, Some(&model))
}

/// Texts of someone else, judged as our own.
fn judge(options: &SuiteOptions, suite: &Suite, texts: Vec<Outcome>) -> Result<()> {
    let bar = progress(texts.len());
    bar.inc(texts.len() as u64);
    let mut passed = 0;
    let outcomes = suite::judge(suite, options.form(), texts, &mut |event| {
        if let Progress::Judged(outcome) = event {
            judged(&bar, outcome, &mut passed);
        }
    })?;
    bar.finish_and_clear();
    let seed = options.sampling.options().seed.unwrap_or(0);
    told(options, &Report::of(&suite.name, options.form(), &options.k, seed, outcomes), None)
}

fn judged(bar: &ProgressBar, outcome: &Outcome, passed: &mut usize) {
    *passed += usize::from(outcome.passed == Some(true));
    bar.set_message(format!("decoded; judging, {passed} passed"));
}

fn told(options: &SuiteOptions, report: &Report, model: Option<&ModelInfo>) -> Result<()> {
    ensure!(report.tasks > 0, "there is nothing to report");
    if options.json {
        let mut json = serde_json::to_value(report)?;
        if let Some(model) = model {
            json["model"] = model.name.clone().into();
            json["dtype"] = model.precision().into();
            json["device"] = model.placement.device_name().into();
            json["threads"] = tch::get_num_threads().into();
        }
        if options.suite == SuiteName::Nano {
            json["tasks_seed"] = options.tasks.tasks_seed.into();
        }
        json["command"] = std::env::args().skip(1).collect::<Vec<_>>().join(" ").into();
        println!("{json}");
        return Ok(());
    }
    println!("{} of {} texts passed, {} tasks", report.passed, report.tasks * report.samples, report.tasks);
    for at in &report.pass_at {
        println!("pass@{} {:.1} % (95 %: {:.1} to {:.1})", at.k, 100.0 * at.value, 100.0 * at.low, 100.0 * at.high);
    }
    if model.is_some() {
        println!(
            "{:.2} tokens per forward ({} tokens, {} forwards), {:.0} tokens/s, {:.0} in all",
            report.tokens_per_forward,
            report.generated_tokens,
            report.forwards.model(),
            report.tokens_per_second,
            report.wall_tokens_per_second,
        );
        println!(
            "entropy {:.2} nats, {} distinct texts, {} cut off by their length",
            report.entropy, report.distinct_texts, report.cut_off
        );
    }
    Ok(())
}

fn progress(tasks: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:40}] {pos}/{len} {msg}, eta {eta}");
    let bar = ProgressBar::new(tasks as u64);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
