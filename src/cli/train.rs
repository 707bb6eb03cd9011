//! `lacuna train`: the flags of [`crate::train`].

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::tensor::Dtype;
use crate::train::data::Objective;

#[derive(Args, Debug)]
pub struct Options {
    /// Folder of the model: written if absent, resumed if it holds a training state
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[arg(long, value_enum, default_value_t = Objective::Diffusion)]
    objective: Objective,
    /// Take the tokenizer of this model folder rather than train one
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Optimiser steps; with --minutes too, the run ends at the first of the two
    #[arg(long, required_unless_present = "minutes")]
    steps: Option<u64>,
    /// Time spent training, earlier runs that are resumed included
    #[arg(long)]
    minutes: Option<f64>,
    /// Checkpoint and stop after so many further steps; the same command goes on from there
    #[arg(long, value_name = "N")]
    stop_after: Option<u64>,
    /// Tasks in one step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    #[arg(long, default_value_t = 256)]
    hidden_size: usize,
    #[arg(long, default_value_t = 6)]
    layers: usize,
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Type of the projections; the residual stream and the optimiser stay in f32
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// Threads of one operation; 0 leaves it to libtorch
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

pub fn run(options: Options) -> Result<()> {
    crate::train::run(&crate::train::Options {
        out: options.out,
        objective: options.objective,
        tokenizer: options.tokenizer,
        seed: options.seed,
        steps: options.steps,
        minutes: options.minutes,
        stop_after: options.stop_after,
        batch: options.batch,
        learning_rate: options.learning_rate,
        hidden_size: options.hidden_size,
        layers: options.layers,
        heads: options.heads,
        dtype: options.dtype,
        threads: options.threads,
    })
}
