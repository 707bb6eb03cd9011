//! `lacuna eval`: how often a model's generated code is right, and at how many tokens a forward.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::load::ModelOptions;
use super::method::{AutoregressiveFlags, DiffusionFlags, SamplingFlags, methods};
use crate::eval::suite::{self, Progress};
use crate::eval::task;

#[derive(Args, Debug)]
pub struct Options {
    /// Tasks to run
    #[arg(value_enum, default_value = "nano")]
    suite: Suite,
    #[command(flatten)]
    model: ModelOptions,
    /// How many tasks
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    tasks: u32,
    /// Seed of the choice of tasks
    #[arg(long, default_value_t = 7)]
    tasks_seed: u64,
    /// Length of the canvas in tokens
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u64>,
    #[command(flatten)]
    diffusion: DiffusionFlags,
    #[command(flatten)]
    autoregressive: AutoregressiveFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Requests in flight, decoded together as far as there is room
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write every task's outcome there, one JSON object a line
    #[arg(long, value_name = "FILE")]
    outcomes: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Suite {
    /// Small Python functions of compositions that training never showed
    Nano,
}

pub fn run(options: Options) -> Result<()> {
    let Suite::Nano = options.suite;
    let (model, network, drafters) = options.model.load()?;
    let placement = network.placement();
    let concurrency = usize::from(options.concurrency);
    let engine = suite::engine(&model, network, drafters, concurrency)?;
    let (method, diffusion, autoregressive) = methods(&options.diffusion, &options.autoregressive);
    let tasks = task::Suite::nano(options.tasks as usize, options.tasks_seed);
    let sampling = options.sampling.options();
    let wanted =
        suite::Options { max_new_tokens: options.max_new_tokens, method, diffusion, autoregressive, sampling, concurrency };
    let mut file = match &options.outcomes {
        Some(path) => Some(BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?)),
        None => None,
    };
    let bar = progress(options.tasks);
    let report = suite::run(&model, &engine, &tasks, &wanted, &mut |event| match event {
        Progress::Decoded(_) => bar.inc(1),
        Progress::Judged(_) => bar.set_message("judging"),
    })?;
    bar.finish_and_clear();
    engine.rest();
    if let Some(mut file) = file.take() {
        let lines = report.outcomes.iter().try_for_each(|outcome| writeln!(file, "{}", json!(outcome)));
        lines.and_then(|()| file.flush()).context("cannot write the outcomes")?;
    }
    ensure!(report.tasks > 0, "there is nothing to report");
    if options.json {
        let mut json = serde_json::to_value(&report)?;
        json["model"] = model.name.into();
        json["dtype"] = placement.dtype.name().into();
        json["device"] = placement.device_name().into();
        json["threads"] = tch::get_num_threads().into();
        json["tasks_seed"] = options.tasks_seed.into();
        json["command"] = std::env::args().skip(1).collect::<Vec<_>>().join(" ").into();
        println!("{json}");
        return Ok(());
    }
    for gap in &report.sandbox_gaps {
        eprintln!("warning: {gap}");
    }
    println!(
        "{} of {} tasks passed ({:.1} %), {:.2} tokens per forward ({} tokens, {} forwards), {:.0} tokens/s, {:.0} in all",
        report.passed,
        report.tasks,
        100.0 * report.pass_at_1,
        report.tokens_per_forward,
        report.generated_tokens,
        report.forwards.model(),
        report.tokens_per_second,
        report.wall_tokens_per_second,
    );
    Ok(())
}

fn progress(tasks: u32) -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:40}] {pos}/{len} {msg}, eta {eta}");
    let bar = ProgressBar::new(u64::from(tasks));
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
