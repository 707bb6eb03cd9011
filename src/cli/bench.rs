//! `lacuna bench step`: where a denoising step's time goes, for a model or for random weights of a config's shape.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use serde_json::json;

use super::load::{self, ModelOptions};
use crate::checkpoint::config::ModelConfig;
use crate::eval::step::{self, Spread};
use crate::model::{RandomWeights, Transformer};
use crate::tensor::{self, Device, Dtype, Placement};

#[derive(Args, Debug)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Time one denoising step by its parts
    Step(Step),
}

#[derive(Args, Debug)]
struct Step {
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

pub fn run(options: Options) -> Result<()> {
    let What::Step(options) = options.what;
    let (name, network, tokenizer) = match &options.random_weights {
        Some(path) => {
            let network = random(path, &options)?;
            (path.display().to_string(), network, load::open(&options.model.model)?.tokenizer.into())
        }
        None => {
            let (model, network, _) = options.model.load()?;
            (model.name, network, model.tokenizer)
        }
    };
    let Step { prompt, canvas, batch, warm_up, runs, seed, .. } = options;
    let report = step::run(&network, &tokenizer, &step::Options { prompt, canvas, batch, warm_up, runs, seed })?;
    let placement = network.placement();
    if options.json {
        let mut json = serde_json::to_value(&report)?;
        json["model"] = name.into();
        json["parameters"] = network.config().parameters().into();
        json["random_weights"] = options.random_weights.is_some().into();
        json["dtype"] = placement.dtype.name().into();
        json["device"] = placement.device_name().into();
        json["threads"] = tch::get_num_threads().into();
        json["seed"] = seed.into();
        json["unit"] = json!("milliseconds");
        println!("{json}");
        return Ok(());
    }
    println!("{name}: prompt {prompt}, canvas {canvas}, batch {batch}, {}, {runs} runs", placement.dtype.name());
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

/// A whole number that sums and products of a few cannot overflow.
fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count <= 1 << 20).ok_or_else(|| format!("use a whole number up to {}", 1 << 20))
}

fn random(path: &std::path::Path, options: &Step) -> Result<Transformer> {
    tensor::set_threads(options.model.threads);
    let device = tensor::device(&options.model.device).map_err(anyhow::Error::msg)?;
    let config = ModelConfig::read(path).with_context(|| format!("cannot take the shape from {}", path.display()))?;
    let stored = if device == Device::Cpu { Dtype::F32 } else { config.dtype.unwrap_or(Dtype::Bf16) };
    let placement = Placement { device, dtype: options.model.dtype.unwrap_or(stored) };
    let _generator = tensor::seeded(options.seed);
    tch::no_grad(|| Transformer::new(&config, placement, options.model.context as usize, &mut RandomWeights { placement }))
        .map_err(|error| anyhow!(error))
}
