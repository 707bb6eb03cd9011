//! `lacuna serve`: loads models and puts them on gRPC and HTTP until a signal ends it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use http::{HeaderValue, Uri};
use tokio::net::TcpListener;
use tracing::{info, warn};

use super::load::{self, RunOptions};
use crate::engine::{Engine, Limits};
use crate::http::listen::Acceptor;
use crate::service::{Listeners, ServeOptions, serve, shutdown_signal};
use crate::telemetry::{Telemetry, Tracing};

#[derive(Args, Debug)]
pub struct Options {
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
pub struct HttpAddress(Option<SocketAddr>);

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

/// A port that is taken is known before a model is loaded.
async fn listen(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    if !address.ip().is_loopback() {
        warn!(%address, "listening beyond this machine, without encryption or accounts");
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}: {flag} takes another address"))
}

fn tokens(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("it is not a whole number above 0".into()),
        Ok(tokens) => Ok(tokens),
    }
}

pub fn run(options: Options) -> Result<()> {
    ensure!(options.max_resident > 0 && options.max_resident <= 1024, "--max-resident must be from 1 to 1024");
    ensure!(options.queue > 0 && options.queue <= 65_536, "--queue must be from 1 to 65536");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let grpc = listen(options.address, "--address").await?;
        let http = match options.http.0 {
            Some(address) => Some(listen(address, "--http").await?),
            None => None,
        };
        let mut telemetry = Telemetry::default();
        if let Some(endpoint) = &options.otlp_endpoint {
            let tracing = Tracing::start(endpoint, &telemetry.metrics);
            telemetry.tracing = Some(tracing.with_context(|| format!("cannot send spans to {endpoint}"))?);
        }
        let models = tokio::task::block_in_place(|| load::load_all(&options.model, &options.run))?;
        for (model, network, _) in &models {
            let placement = network.placement();
            info!(
                model = model.name,
                family = model.config.family.name,
                device = placement.device_name(),
                dtype = placement.dtype.name(),
                threads = tch::get_num_threads(),
                context = model.context,
                "loaded"
            );
        }
        let limits = Limits {
            resident: options.max_resident,
            queued: options.queue,
            tokens: options.max_tokens,
            queued_tokens: options.queue_tokens,
            prefix_tokens: options.prefix_tokens,
        };
        let served = load::start_all(models, limits)?;
        let engines: Vec<Engine> = served.iter().map(|model| model.engine.clone()).collect();
        let settings = ServeOptions {
            request_time_max: Duration::from_secs(options.request_seconds),
            drain_timeout: Duration::from_secs(options.drain_seconds),
            http_origins: options.http_allow_origin,
            telemetry: telemetry.clone(),
            log_prompts: options.log_prompts,
            ..ServeOptions::default()
        };
        let signal = async {
            if let Err(error) = shutdown_signal().await {
                warn!(%error, "signals cannot be caught: only a kill will end the server");
                std::future::pending::<()>().await;
            }
        };
        let listeners = Listeners { grpc, http, acceptor: Acceptor::Plain };
        serve(listeners, served, settings, signal).await?;
        info!("stopped");
        if let Some(tracing) = telemetry.tracing {
            tokio::task::block_in_place(|| tracing.finish());
        }
        engines.into_iter().for_each(Engine::rest);
        anyhow::Ok(())
    })
}
