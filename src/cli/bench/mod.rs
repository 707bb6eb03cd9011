//! `lacuna bench`: [`step`] says where a step's time goes, for a model or for random weights of a config's shape; `speculate` runs plain decoding and every drafter side by side; [`serve`] puts a load on a server, and [`compare`] sets two of
//! its results side by side.

mod compare;
mod serve;
mod step;
mod traffic;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::json;

use super::load::{self, ModelOptions};
use super::method::{DraftFlags, SamplingFlags};
use crate::decode::autoregressive::DrafterKind;
use crate::eval::machine::Machine;
use crate::eval::speculate;

#[derive(Args, Debug)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Time one denoising step by its parts
    Step(step::Options),
    /// Compare plain autoregressive decoding with every drafter, interleaved
    Speculate(Speculate),
    /// Put a load on a running server, and tell rates and latencies
    Serve(Box<serve::Options>),
    /// Set two results of 'bench serve --json' side by side
    Compare(compare::Options),
}

#[derive(Args, Debug)]
struct Prompts {
    /// One prompt a line, as JSON strings [default: tasks of the small models, and some prompts that they do not know]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// How many prompts
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// Seed of the choice of tasks
    #[arg(long, default_value_t = 7)]
    prompts_seed: u64,
}

impl Prompts {
    fn read(&self) -> Result<Vec<String>> {
        match &self.prompts {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                let prompt = |line: &str| serde_json::from_str(line).with_context(|| format!("'{line}' is no JSON string"));
                text.lines().filter(|line| !line.is_empty()).map(prompt).take(self.count as usize).collect()
            }
            None => Ok(speculate::nano_prompts(self.count as usize, self.prompts_seed)),
        }
    }
}

#[derive(Args, Debug)]
struct Speculate {
    #[command(flatten)]
    model: ModelOptions,
    /// Drafters to run [default: all that the model has]
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = drafter)]
    drafter: Vec<DrafterKind>,
    #[command(flatten)]
    prompts: Prompts,
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u64>,
    #[command(flatten)]
    autoregressive: DraftFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(options: Options) -> Result<()> {
    match options.what {
        What::Step(options) => step::run(options),
        What::Speculate(options) => speculate(options),
        What::Serve(options) => serve::run(*options),
        What::Compare(options) => compare::run(&options),
    }
}

/// What was typed, to be kept with a result.
fn command() -> String {
    std::env::args().skip(1).collect::<Vec<_>>().join(" ")
}

fn drafter(name: &str) -> Result<DrafterKind, String> {
    DrafterKind::from_name(name).ok_or_else(|| "use redrafter, medusa, chain or lookup".into())
}

fn speculate(options: Speculate) -> Result<()> {
    let (info, network, mut drafters) = options.model.load()?;
    let prompts = options.prompts.read()?;
    let known = drafters.infos().into_iter().map(|info| info.kind);
    let wanted = speculate::Options {
        drafters: if options.drafter.is_empty() { known.collect() } else { options.drafter.clone() },
        rounds: options.rounds as usize,
        max_new_tokens: options.max_new_tokens,
        sampling: options.sampling.options(),
        autoregressive: options.autoregressive.options(),
    };
    let bar = load::steps("measuring", prompts.len() * wanted.rounds);
    let report = speculate::run(&info, &network, &mut drafters, &prompts, &wanted, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    let placement = network.placement();
    if options.json {
        let mut json = serde_json::to_value(&report)?;
        json["model"] = info.name.into();
        json["parameters"] = network.config().parameters().into();
        json["dtype"] = network.precision().into();
        json["device"] = placement.device_name().into();
        json["threads"] = tch::get_num_threads().into();
        json["prompts_seed"] = options.prompts.prompts_seed.into();
        json["machine"] = json!(Machine::here());
        json["command"] = command().into();
        println!("{json}");
        return Ok(());
    }
    println!("{:>10}  {:7.0} tokens/s", "plain", report.plain_tokens_per_second);
    for (name, lane) in &report.lanes {
        println!(
            "{name:>10}  {:7.0} tokens/s  {:.2} times plain (least {:.2}; with prefill {:.2})  acceptance length {:.2}  same text {}/{}",
            lane.tokens_per_second,
            lane.speedup,
            lane.speedup_least,
            lane.whole_speedup,
            lane.acceptance_length,
            lane.same_text,
            report.prompts
        );
    }
    let curve: Vec<_> = report.cost_curve.iter().map(|cost| format!("{}: {:.2}", cost.tokens, cost.ratio)).collect();
    println!("a forward of several tokens, by one of one: {}", curve.join("  "));
    Ok(())
}
