//! `lacuna serve`: loads models and puts them on gRPC and HTTP until a signal ends it.
//!
//! Flags are layered over the environment and a file in [`config`], validated in [`settings`], and only looked at in [`check`].

mod check;
pub mod config;
mod settings;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;
use http::{HeaderValue, Uri};
use tokio::net::TcpListener;
use tracing::{error, info, warn};

use super::load::{self, ByRequest, RunOptions};
use crate::engine::memory::Need;
use crate::http::listen::Acceptor;
use crate::service::{Library, Listeners, Served, hangups, need_of, on_hangup, serve, shutdown_signal};
use crate::telemetry::Tracing;
use crate::tensor::{self, mebibytes};
use config::InForce;
use settings::Settings;

/// Share of the memory that is free once the first models are loaded that models may take where nothing else is said.
const BUDGET_SHARE: f64 = 0.75;

#[derive(Args, Debug)]
#[command(
    after_help = "Every flag may stand in the environment too (--max-resident as LACUNA_MAX_RESIDENT; several paths as in PATH), \
                        or in the file of --config by its name (max-resident = 8). Flags go before the environment, and that before \
                        the file. SIGHUP has tokens and certificates read anew."
)]
pub struct Options {
    /// TOML file of settings by the flags' names
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Say what would be in force and everything that is wrong with it, and do not serve
    #[arg(long)]
    pub check: bool,
    /// Model folder in Hugging Face layout, or GGUF file; give one flag for each model, the default one first
    #[arg(long, value_name = "PATH", default_value = "models/nano")]
    pub model: Vec<PathBuf>,
    #[command(flatten)]
    pub run: RunOptions,
    /// Where to listen; port 0 takes a free one and logs it
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    pub address: SocketAddr,
    /// Where to listen for HTTP (OpenAI's API, the page, health, gRPC-web); port 0 takes a free one and logs it, 'none' turns it off
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub http: HttpAddress,
    /// Origin of pages that may call by HTTP beside the server's own, such as https://example.org, or '*'; give one flag for each
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    pub http_allow_origin: Vec<HeaderValue>,
    /// Connections at one time, on each port; further ones wait
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_connections: usize,
    /// The server's certificate (PEM, with those between it and its root): both ports speak TLS then
    #[arg(long, value_name = "FILE")]
    pub tls_certificate: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Who issues clients' certificates (PEM): clients must show one then
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// TOML file of the tokens that clients must send, as 'lacuna token' makes them; health, metrics and the page need none
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Folder of models that may be loaded and unloaded by request; give one flag for each
    #[arg(long, value_name = "DIR")]
    pub model_folder: Vec<PathBuf>,
    /// What all models may take together where they are loaded by request, such as 6GiB [default: three quarters of the free memory]
    #[arg(long, value_name = "BYTES")]
    pub memory_budget: Option<Bytes>,
    /// Sequences decoded together; like the next four, for each model
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub max_resident: usize,
    /// Tokens, of canvas and cache, of all sequences decoded together [default: what fits half of the free memory, shared by the models]
    #[arg(long, value_name = "N", value_parser = tokens)]
    pub max_tokens: Option<usize>,
    /// Tokens whose keys are kept for requests that begin alike; 0 for none [default: a quarter of --max-tokens]
    #[arg(long, value_name = "N")]
    pub prefix_tokens: Option<usize>,
    /// Tokens that may wait [default: four times --max-tokens]
    #[arg(long, value_name = "N")]
    pub queue_tokens: Option<usize>,
    /// Requests that may wait; one more is refused
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub queue: usize,
    /// Longest time for one request, whatever its deadline
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_seconds: u64,
    /// How long running requests may go on once the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub drain_seconds: u64,
    /// Send spans of requests to the OpenTelemetry collector there, by OTLP over gRPC
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Write prompts to the log, which are people's own words
    #[arg(long)]
    pub log_prompts: bool,
}

/// An address, or none.
#[derive(Clone, Copy, Debug)]
pub struct HttpAddress(pub Option<SocketAddr>);

impl FromStr for HttpAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = (text != "none").then(|| text.parse()).transpose();
        address.map(Self).map_err(|_| "it is neither HOST:PORT, the host as an IP address, nor 'none'".into())
    }
}

fn origin(text: &str) -> Result<HeaderValue, String> {
    let said = HeaderValue::from_str(text).ok();
    let whole =
        |uri: Uri| uri.scheme().is_some() && uri.path_and_query().is_none_or(|path| path == "/") && !text.ends_with('/');
    said.filter(|_| text == "*" || text.parse().is_ok_and(whole))
        .ok_or_else(|| "it is neither SCHEME://HOST, with a port if there is one and without a path, nor '*'".into())
}

/// A number of bytes, with a unit if need be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "kB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            _ => return Err("its unit is none of B, KiB, MiB, GiB, kB, MB and GB".into()),
        };
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
        bytes.filter(|bytes| *bytes > 0).map(Self).ok_or_else(|| "it is not a whole number above 0, and a unit".into())
    }
}

/// A port that is taken is known before a model is loaded.
async fn listen(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}: {flag} takes another address"))
}

fn tokens(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("it is not a whole number above 0".into()),
        Ok(tokens) => Ok(tokens),
    }
}

pub fn run(options: Options, in_force: &InForce) -> Result<()> {
    if options.check {
        return check::check(&options, in_force);
    }
    let settings = Settings::new(&options)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let hangups = hangups();
        settings.warnings().iter().for_each(|warning| warn!("{warning}"));
        let grpc = listen(settings.grpc, "--address").await?;
        let http = match settings.http {
            Some(address) => Some(listen(address, "--http").await?),
            None => None,
        };
        let mut service = settings.service.clone();
        if let Some(endpoint) = &settings.otlp_endpoint {
            let tracing = Tracing::start(endpoint, &service.telemetry.metrics);
            service.telemetry.tracing = Some(tracing.with_context(|| format!("cannot send spans to {endpoint}"))?);
        }
        let tracing = service.telemetry.tracing.clone();
        let served = tokio::task::block_in_place(|| load(&settings))?;
        service.library = library(&settings, &served)?;
        let acceptor = settings.tls.clone().map_or(Acceptor::Plain, Acceptor::Tls);
        let listeners = Listeners { grpc, http, acceptor };
        tokio::select! {
            ended = serve(listeners, served, service, signal()) => ended?,
            // For ever.
            () = on_hangup(hangups, || reload(&settings)) => {}
        }
        info!("stopped");
        if let Some(tracing) = tracing {
            tokio::task::block_in_place(|| tracing.finish());
        }
        anyhow::Ok(())
    })
}

async fn signal() {
    if let Err(error) = shutdown_signal().await {
        warn!(%error, "signals cannot be caught: only a kill will end the server");
        std::future::pending::<()>().await;
    }
}

/// Loads the models that are served from the start.
fn load(settings: &Settings) -> Result<Vec<Served>> {
    let models = load::load_all(&settings.models, &settings.run)?;
    if let Some((_, network, _)) = models.first() {
        let device = network.placement().device;
        info!("device {}: {}", network.placement().device_name(), tensor::describe(device));
    }
    for (model, network, _) in &models {
        let placement = network.placement();
        info!(
            model = model.name,
            family = model.config.family.name,
            device = placement.device_name(),
            dtype = network.precision(),
            threads = tch::get_num_threads(),
            context = model.context,
            "loaded"
        );
    }
    load::start_all(models, settings.limits, !settings.folders.is_empty())
}

/// From where further ones may be loaded, and what all may take.
fn library(settings: &Settings, served: &[Served]) -> Result<Option<Library>> {
    if settings.folders.is_empty() {
        return Ok(None);
    }
    let needs: Vec<Need> = served.iter().map(need_of).collect();
    let taken = needs.iter().map(Need::bytes).sum::<u64>();
    let weights = needs.iter().map(|need| need.weights + need.drafters).sum::<u64>();
    let free = needs.first().and_then(|need| need.free).unwrap_or(0);
    let budget = settings.budget.unwrap_or(weights + (free as f64 * BUDGET_SHARE) as u64);
    ensure!(
        taken <= budget,
        "the models take {} from the start, more than --memory-budget, which is {}: fewer --max-tokens take less",
        mebibytes(taken),
        mebibytes(budget)
    );
    info!(budget, taken, "models are loaded and unloaded by request");
    // Draft heads that were named are the first model's.
    let run = RunOptions { drafters: None, ..settings.run.clone() };
    let loader = ByRequest { run, limits: settings.limits };
    Ok(Some(Library::new(settings.folders.clone(), budget, Arc::new(loader))))
}

/// Reads tokens and certificates anew. Where something is wrong with a file, the old one stays in force.
fn reload(settings: &Settings) {
    if let Some(tokens) = &settings.tokens {
        match tokens.reload() {
            Ok(count) => info!(count, "tokens read anew"),
            Err(error) => error!(%error, "the tokens cannot be read anew: the old ones stay in force"),
        }
    }
    if let Some(tls) = &settings.tls {
        match tls.reload() {
            Ok(()) => info!("certificates read anew"),
            Err(error) => error!(%error, "the certificates cannot be read anew: the old ones stay in force"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        let read = |text: &str| text.parse::<Bytes>().map(|bytes| bytes.0).ok();
        assert_eq!(read("1024"), Some(1024));
        assert_eq!(read("6GiB"), Some(6 << 30));
        assert_eq!(read("20 MB"), Some(20_000_000));
        for wrong in ["", "0", "-1", "GiB", "6 GIB", "1.5GiB", "99999999999GiB"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
