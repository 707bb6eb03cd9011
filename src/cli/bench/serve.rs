//! `lacuna bench serve`: the flags of a load on a running server, and what is printed of it.
//!
//! One request goes ahead of the load: it shows that the server can do what is asked, and which settings are in force.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::traffic::{self, Load};
use super::{Prompts, command};
use crate::cli::connection::{Connection, ConnectionFlags};
use crate::cli::load;
use crate::cli::method::{AutoregressiveFlags, DiffusionFlags, SamplingFlags, methods};
use crate::cli::remote::{failed, request};
use crate::engine::request::{GenerateOptions, Prompt};
use crate::eval::load::compare::{About, Report};
use crate::eval::load::summary::{Counts, Limits, Spread, summary};
use crate::eval::load::{Lane, Until};
use crate::service::proto::generation_client::GenerationClient;
use crate::service::proto::models_client::ModelsClient;
use crate::service::proto::{self, GenerateRequest, generate_event};

/// Requests of an open loop's warm-up, where nothing else is said.
const WARM_UP: u64 = 8;

#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)]
pub struct Options {
    /// The server; https://HOST:PORT for TLS
    #[arg(long, value_name = "HOST:PORT")]
    target: String,
    #[command(flatten)]
    connection: ConnectionFlags,
    /// Closed loops of so many users, each of whom sends a request as soon as the one before has ended
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,4,16")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: Vec<u32>,
    /// Open loops of so many requests a second at random moments (by --seed), whether those before have ended or not
    #[arg(long, value_name = "R,…", value_delimiter = ',', value_parser = rate, conflicts_with = "concurrency")]
    rate: Vec<f64>,
    /// Requests of an open loop under way at once; what is due beyond that is not sent, and counted as unsent
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_in_flight: u32,
    /// Run all loops so many times in turn, rather than each once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of a run's window in requests: those that have begun and ended, or in an open loop were due
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    requests: Option<u64>,
    /// Length of a run's window
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    duration: Duration,
    /// Requests that go before a run's window [default: twice the concurrency; 8 in an open loop]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    warm_up: Option<u64>,
    #[command(flatten)]
    prompts: Prompts,
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u64>,
    /// Ask for step events, and time the first provisional tokens
    #[arg(long)]
    events: bool,
    /// Share of requests to cancel, each at a random moment (by --seed) within the time that requests take on average
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    cancel_share: f64,
    /// Goodput: count requests whose first committed token comes within this
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    ttfc_limit_ms: Option<f64>,
    /// Goodput: count requests that end within this
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    latency_limit_ms: Option<f64>,
    /// Longest time of a request; what takes longer has failed
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    timeout: Duration,
    /// Connections that requests take turns on
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: u32,
    /// Threads that send and read
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    client_threads: u32,
    #[command(flatten)]
    diffusion: DiffusionFlags,
    #[command(flatten)]
    autoregressive: AutoregressiveFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Print one JSON object, which 'bench compare' reads
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub fn run(options: Options) -> Result<()> {
    let mut runtime = match options.client_threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        threads => {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            runtime.worker_threads(threads as usize);
            runtime
        }
    };
    let runtime = runtime.enable_all().build().context("cannot start the runtime")?;
    let report = runtime.block_on(options.measure())?;
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

impl Options {
    async fn measure(&self) -> Result<Report> {
        let prompts = self.prompts.read()?;
        ensure!(!prompts.is_empty(), "there are no prompts: the file needs at least one line");
        let seed = self.sampling.options().seed.unwrap_or(1);
        let requests: Vec<_> = prompts.iter().map(|prompt| self.request(prompt, seed)).collect();
        let mut channels = vec![];
        for _ in 0..self.connections {
            channels.push(self.connection.connect(&self.target).await?);
        }
        let about = self.about(channels[0].clone(), requests[0].clone(), requests.len(), seed).await?;
        let lanes = self.lanes();
        let bar = load::steps("measuring", lanes.len() * self.rounds as usize);
        let mut rounds: Vec<_> = lanes.iter().map(|_| vec![]).collect();
        for round in 0..self.rounds {
            for turn in 0..lanes.len() {
                // Each lane comes first in its turn, so that a machine that slows down slows all of them.
                let at = (turn + round as usize) % lanes.len();
                let (channels, requests) = (channels.clone(), requests.clone());
                let load = Arc::new(self.load(lanes[at], channels, requests, seed));
                rounds[at].push(traffic::round(&load, lanes[at], u64::from(round)).await?);
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        let figures = lanes.iter().zip(&rounds).map(|(lane, rounds)| summary(*lane, rounds, &about.limits));
        let lanes = figures.collect::<Result<_, _>>().context("cannot sum up the latencies")?;
        Ok(Report { about, lanes })
    }

    fn lanes(&self) -> Vec<Lane> {
        if self.rate.is_empty() {
            self.concurrency.iter().map(|users| Lane::Closed { concurrency: *users as usize }).collect()
        } else {
            self.rate.iter().map(|rate| Lane::Open { rate: *rate }).collect()
        }
    }

    fn load(&self, lane: Lane, channels: Vec<Connection>, requests: Vec<GenerateRequest>, seed: u64) -> Load {
        let warm_up = match lane {
            Lane::Closed { concurrency } => 2 * concurrency as u64,
            Lane::Open { .. } => WARM_UP,
        };
        Load {
            channels,
            requests,
            seed,
            cancel_share: self.cancel_share,
            timeout: self.timeout,
            in_flight_max: self.max_in_flight as usize,
            warm_up: self.warm_up.unwrap_or(warm_up),
            until: self.requests.map_or(Until::Time(self.duration), Until::Requests),
        }
    }

    fn request(&self, prompt: &str, seed: u64) -> GenerateRequest {
        let (method, diffusion, autoregressive) = methods(&self.diffusion, &self.autoregressive);
        let mut sampling = self.sampling.options();
        sampling.seed = Some(seed);
        request(&GenerateOptions {
            id: "bench".into(),
            prompt: Prompt::Text(prompt.into()),
            template: vec![],
            max_new_tokens: self.max_new_tokens,
            method,
            diffusion,
            autoregressive,
            sampling,
            stops: vec![],
            steps: self.events,
            deadline: None,
            priority: 0,
        })
    }

    /// What is measured, as the server tells it, and as the answer to one request shows it.
    async fn about(&self, channel: Connection, request: GenerateRequest, count: usize, seed: u64) -> Result<About> {
        let described = ModelsClient::new(channel.clone()).get(proto::GetModelRequest::default()).await.map_err(failed)?;
        let model = described.into_inner().model.context("the server did not describe its model")?;
        let mut events = GenerationClient::new(channel).generate(request).await.map_err(failed)?.into_inner();
        let mut started = None;
        while let Some(event) = events.message().await.map_err(failed)? {
            if let Some(generate_event::Event::Started(event)) = event.event {
                started = Some(event);
            }
        }
        let started = started.context("the server answered a request with nothing")?;
        let (method, drafter, settings) = settings(&started);
        Ok(About {
            target: self.target.clone(),
            model: model.name,
            parameters: model.parameters,
            dtype: if model.quantization.is_empty() { model.dtype } else { format!("{}/{}", model.dtype, model.quantization) },
            device: model.device,
            threads: model.threads,
            resident_max: model.resident_max,
            queued_max: model.queued_max,
            method: method.into(),
            drafter,
            settings,
            prompts: self.prompts.prompts.as_ref().map_or("nano".into(), |path| path.display().to_string()),
            prompts_count: count,
            prompts_seed: self.prompts.prompts_seed,
            max_new_tokens: self.max_new_tokens,
            events: self.events,
            cancel_share: self.cancel_share,
            limits: Limits { first_committed_ms: self.ttfc_limit_ms, total_ms: self.latency_limit_ms },
            seed,
            connections: self.connections as usize,
            client_threads: self.client_threads as usize,
            client_version: env!("CARGO_PKG_VERSION").into(),
            command: command(),
        })
    }
}

/// The method, its drafter, and its settings in force that are set.
fn settings(started: &proto::Started) -> (&'static str, Option<String>, Value) {
    let (method, drafter, settings) = match (&started.diffusion, &started.autoregressive) {
        (Some(diffusion), _) => {
            let cache = diffusion.cache().as_str_name().trim_start_matches("DIFFUSION_CACHE_").to_lowercase();
            let settings = json!({
                "steps": diffusion.steps, "threshold": diffusion.threshold, "factor": diffusion.factor,
                "entropy_bound": diffusion.entropy_bound, "block_length": diffusion.block_length,
                "cfg_scale": diffusion.cfg_scale, "finish_early": diffusion.finish_early,
                "cache": cache, "deterministic": diffusion.deterministic,
            });
            ("diffusion", None, settings)
        }
        (None, Some(autoregressive)) => {
            let name = autoregressive.drafter().as_str_name().trim_start_matches("DRAFTER_").to_lowercase();
            let settings = json!({
                "draft_length": autoregressive.draft_length, "beam_width": autoregressive.beam_width,
                "adapt": autoregressive.adapt, "deterministic": autoregressive.deterministic,
            });
            ("autoregressive", Some(name), settings)
        }
        (None, None) => ("unknown", None, json!({})),
    };
    let Value::Object(mut settings) = settings else { return (method, drafter, settings) };
    settings.retain(|_, value| !value.is_null());
    let temperature = started.sampling.as_ref().and_then(|sampling| sampling.temperature);
    settings.insert("temperature".into(), json!(temperature.unwrap_or_default()));
    (method, drafter, Value::Object(settings))
}

fn print(Report { about, lanes }: &Report) {
    let drafter = about.drafter.as_ref().map_or(String::new(), |name| format!(", drafter {name}"));
    println!("{} ({}, {}) on {}: {}{drafter}", about.model, about.dtype, about.device, about.target, about.method);
    for lane in lanes {
        let Counts { finished, rejected, cancelled, failed, unsent, .. } = lane.counted;
        let goodput = lane.goodput_per_second.map_or(String::new(), |rate| format!("  goodput {rate:.2}/s"));
        println!("{}: {:.1} tokens/s  {:.2} requests/s{goodput}", lane.lane, lane.tokens_per_second, lane.requests_per_second);
        let unsent = if unsent > 0 { format!(", {unsent} unsent") } else { String::new() };
        println!(
            "  {finished} finished, {rejected} rejected, {cancelled} cancelled, {failed} failed{unsent} in {:.1} s",
            lane.window_seconds
        );
        let latency = &lane.latency_ms;
        for (name, spread) in [
            ("first provisional", latency.first_provisional),
            ("first committed", latency.first_committed),
            ("between commits", latency.between_commits),
            ("total", latency.total),
            ("of it in the queue", lane.queue_ms),
        ] {
            if let Some(Spread { p50, p90, p99, max, .. }) = spread {
                println!("  {name:>18}  p50 {p50:9.2}  p90 {p90:9.2}  p99 {p99:9.2}  max {max:9.2} ms");
            }
        }
        for (code, count) in &lane.counted.failed_by_code {
            println!("  {count} failed with {code}");
        }
        lane.notes.iter().for_each(|note| println!("  note: {note}"));
    }
}

/// A number within bounds.
fn number(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("use a number from {least} to {most}"))
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, 0.001, 100_000.0)
}

fn share(text: &str) -> Result<f64, String> {
    number(text, 0.0, 1.0)
}

fn milliseconds(text: &str) -> Result<f64, String> {
    number(text, 0.001, 86_400_000.0)
}

fn seconds(text: &str) -> Result<Duration, String> {
    number(text, 0.001, 86_400.0).map(Duration::from_secs_f64)
}
