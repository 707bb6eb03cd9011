//! `lacuna bench step`: one step by its parts, or the cost of steps over a grid of windows beside what it can be at least.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::{Value, json};

use super::command;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::cli::load::{self, ModelOptions};
use crate::eval::machine::Machine;
use crate::eval::step::ceilings::Ceilings;
use crate::eval::step::grid::{self, Cell, Grid, Outcome};
use crate::eval::step::{self, Spread};
use crate::model::quantized::Quantizing;
use crate::model::{RandomWeights, Transformer};
use crate::tensor::fused::Fused;
use crate::tensor::{self, Device, Dtype, Placement};

#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Random weights of the shape that this config.json says; --model then lends its tokenizer only
    #[arg(long, value_name = "CONFIG")]
    random_weights: Option<PathBuf>,
    /// Tokens before the canvas
    #[arg(long, default_value_t = 32, value_parser = count)]
    prompt: usize,
    /// Cells of the canvas, all masked
    #[arg(long, default_value_t = 48, value_parser = count)]
    canvas: usize,
    /// Sequences that take a step in one round
    #[arg(long, default_value_t = 1, value_parser = count)]
    batch: usize,
    /// In place of prompt and canvas: windows of so many tokens, for each of these numbers, each prefix and each number of sequences
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count, conflicts_with_all = ["prompt", "canvas", "batch"])]
    window: Vec<usize>,
    /// Tokens whose keys are cached before the window
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count, requires = "window", default_value = "0")]
    prefix: Vec<usize>,
    /// Sequences with such a window in one round
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count, requires = "window", default_value = "1")]
    sequences: Vec<usize>,
    /// Runs before those that count
    #[arg(long, default_value_t = 5, value_parser = count)]
    warm_up: usize,
    #[arg(long, default_value_t = 30, value_parser = count)]
    runs: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is measured.
struct Subject {
    name: String,
    network: Transformer,
    tokenizer: std::sync::Arc<Tokenizer>,
}

pub fn run(options: Options) -> Result<()> {
    let subject = match &options.random_weights {
        Some(path) => {
            let network = random(path, &options)?;
            let tokenizer = load::open(&options.model.model)?.tokenizer.into();
            Subject { name: path.display().to_string(), network, tokenizer }
        }
        None => {
            let (model, network, _) = options.model.load()?;
            Subject { name: model.name, network, tokenizer: model.tokenizer }
        }
    };
    if options.window.is_empty() { parts(&options, &subject) } else { windows(&options, &subject) }
}

/// Adds what both kinds of result tell.
fn about(json: &mut Value, options: &Options, subject: &Subject) {
    let placement = subject.network.placement();
    json["model"] = subject.name.as_str().into();
    json["parameters"] = subject.network.config().parameters().into();
    json["random_weights"] = options.random_weights.is_some().into();
    json["dtype"] = subject.network.precision().into();
    json["cuda_graphs"] = subject.network.graphs().into();
    json["fused_kernels"] = subject.network.fused().map(Fused::names).unwrap_or_default().into();
    // µs of each kernel and of libtorch's operations in its place.
    json["fused_races"] = json!(subject.network.fused().map(Fused::races).unwrap_or_default());
    json["many_lengths_at_once"] = subject.network.attends_ragged().into();
    json["device"] = placement.device_name().into();
    json["threads"] = tch::get_num_threads().into();
    json["seed"] = options.seed.into();
    json["unit"] = json!("milliseconds");
    json["machine"] = json!(Machine::here());
    json["command"] = command().into();
}

fn parts(options: &Options, subject: &Subject) -> Result<()> {
    let Options { prompt, canvas, batch, warm_up, runs, seed, .. } = *options;
    let Subject { name, network, tokenizer } = subject;
    let report = step::run(network, tokenizer, &step::Options { prompt, canvas, batch, warm_up, runs, seed })?;
    if options.json {
        let mut json = serde_json::to_value(&report)?;
        about(&mut json, options, subject);
        println!("{json}");
        return Ok(());
    }
    println!("{name}: prompt {prompt}, canvas {canvas}, batch {batch}, {}, {runs} runs", network.precision());
    for (part, Spread { median, min, max }) in [
        ("forward", report.forward),
        ("head", report.head),
        ("selection", report.selection),
        ("event", report.event),
        ("total", report.total),
    ] {
        println!("{part:>10}  {median:9.3} ms  ({min:.3} to {max:.3})");
    }
    println!("all but forward and head: {:.1} % of a step", 100.0 * report.overhead_share);
    Ok(())
}

fn windows(options: &Options, subject: &Subject) -> Result<()> {
    let Options { window, prefix, sequences, warm_up, runs, seed, .. } = options;
    let Subject { name, network, tokenizer } = subject;
    let grid = Grid {
        windows: window.clone(),
        prefixes: prefix.clone(),
        sequences: sequences.clone(),
        warm_up: *warm_up,
        runs: *runs,
        seed: *seed,
    };
    grid.check(network)?;
    let placement = network.placement();
    let ceilings = Ceilings::measure(placement, network.quantization())?;
    if !options.json {
        println!("{name}: {}, {}", network.precision(), tensor::describe(placement.device));
        println!("ceilings: {ceilings}");
        println!(
            "{:>6} {:>6} {:>5} {:>9} {:>20} {:>9} {:>6} {:>10} {:>8}  tokens/s by tokens committed in a step",
            "window", "prefix", "seqs", "step ms", "(least to most)", "floor ms", "times", "bound by", "outside"
        );
    }
    let (mut cells, mut skipped) = (vec![], vec![]);
    let bar = if options.json { load::steps("measuring", grid.len()) } else { indicatif::ProgressBar::hidden() };
    for outcome in grid::run(network, tokenizer, &grid, &ceilings) {
        bar.inc(1);
        match outcome? {
            Outcome::Measured(cell) => {
                if !options.json {
                    row(&cell);
                }
                cells.push(*cell);
            }
            Outcome::Skipped(skip) => {
                if !options.json {
                    println!("{:>6} {:>6} {:>5}  left out: {}", skip.window, skip.prefix, skip.sequences, skip.why);
                }
                skipped.push(skip);
            }
        }
    }
    bar.finish_and_clear();
    if options.json {
        let mut json = json!({
            "cells": cells, "skipped": skipped, "ceilings": ceilings, "runs": runs, "warm_up": warm_up,
            "processor": tensor::describe(placement.device),
        });
        about(&mut json, options, subject);
        println!("{json}");
    }
    Ok(())
}

fn row(cell: &Cell) {
    let Spread { median, min, max } = cell.total;
    let rates = cell.tokens_per_second.iter().map(|(tokens, rate)| format!("{tokens}: {rate:.0}"));
    println!(
        "{:>6} {:>6} {:>5} {median:>9.3} {:>20} {:>9.3} {:>6.2} {:>10} {:>6.1} %  {}",
        cell.window,
        cell.prefix,
        cell.sequences,
        format!("({min:.3} to {max:.3})"),
        cell.floor.milliseconds,
        cell.times_floor,
        cell.floor.bound.name(),
        100.0 * cell.outside_share,
        rates.collect::<Vec<_>>().join("  ")
    );
}

/// A whole number that sums and products of a few cannot overflow.
fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count <= 1 << 20).ok_or_else(|| format!("use a whole number up to {}", 1 << 20))
}

fn random(path: &Path, options: &Options) -> Result<Transformer> {
    tensor::set_threads(options.model.run.threads);
    let device = tensor::device(&options.model.run.device).map_err(anyhow::Error::msg)?;
    let config = ModelConfig::read(path).with_context(|| format!("cannot take the shape from {}", path.display()))?;
    let stored = if device == Device::Cpu { Dtype::F32 } else { config.dtype.unwrap_or(Dtype::Bf16) };
    let placement = Placement { device, dtype: options.model.run.dtype.unwrap_or(stored) };
    let name = path.display().to_string();
    options.model.run.bare(&config, placement).within(&name, None, &[]).map_err(anyhow::Error::msg)?;
    let _generator = tensor::seeded(options.seed);
    let (context, mut source) = (options.model.run.context as usize, RandomWeights { placement });
    let mut network = tch::no_grad(|| match options.model.run.quantize {
        None => Transformer::new(&config, placement, context, &mut source),
        Some(scheme) => Transformer::new(&config, placement, context, &mut Quantizing { source, scheme }),
    })
    .map_err(|error| anyhow!(error))?;
    options.model.run.record(&mut network);
    Ok(network)
}
