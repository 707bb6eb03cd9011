//! The service: puts one engine per model on gRPC, and on HTTP beside it, with health, reflection, deadlines and an orderly end.
//!
//! A call passes `boundary` (deadline, panics, unreadable messages), becomes an engine request in `convert`, and its events
//! come back through `generation` and `events`; `compare` runs several of them on one prompt, for `local` callers too. Every error
//! is turned into a status in `status` and nowhere else. `registry` and `library` have the models; `tls`, `tokens` and `access` say
//! who may call. `lifecycle` warms up and shuts down. The service knows nothing of tensors; the engine knows nothing of the service.

pub(crate) mod access;
pub(crate) mod boundary;
mod compare;
pub(crate) mod convert;
mod events;
pub(crate) mod generation;
mod library;
pub(crate) mod lifecycle;
mod local;
pub(crate) mod models;
pub(crate) mod registry;
pub(crate) mod status;
pub mod tls;
mod tokenization;
pub mod tokens;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use http::HeaderValue;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;
use tower::{Layer, ServiceExt};
use tracing::info;

use crate::engine::Engine;
use crate::engine::request::ModelInfo;
use crate::http::listen::{Acceptor, Port, Stage};
use crate::telemetry::{Calls, Telemetry, metrics, panics};
use access::Door;
use boundary::Boundary;
use lifecycle::Health;
use proto::generation_server::GenerationServer;
use proto::models_server::ModelsServer;
use proto::tokenization_server::TokenizationServer;
use registry::Registry;
use tokens::Tokens;

pub use convert::{autoregressive_message, check, diffusion_message, sampling_message};
pub use library::{Library, Loader, need_of};
pub use lifecycle::{hangups, on_hangup, shutdown_signal};
pub use local::Local;

/// The public API as generated from `proto/lacuna/v1`: messages, servers and clients.
#[allow(clippy::all, rustdoc::all, missing_docs, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("lacuna.v1");

    /// The descriptors of the package, for reflection.
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("lacuna");
}

/// Everything that is served by gRPC.
const DESCRIPTORS: [&[u8]; 4] = [
    proto::DESCRIPTORS,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
];

/// A model and the engine that runs it.
#[derive(Clone)]
pub struct Served {
    pub info: Arc<ModelInfo>,
    pub engine: Engine,
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Bytes of the largest request message.
    pub message_bytes_max: usize,
    /// Connections at one time, on each port; further ones wait.
    pub connections_max: usize,
    /// Concurrent calls on one connection.
    pub streams_per_connection_max: u32,
    /// Longest time for one call, whatever its deadline: a reader that never reads must not keep its place for ever.
    pub request_time_max: Duration,
    /// How long running calls may go on after the signal to stop.
    pub drain_timeout: Duration,
    /// Origins whose pages may call by HTTP, beside the server's own; `*` for all.
    pub http_origins: Vec<HeaderValue>,
    /// Who may call; unset, everybody who can.
    pub tokens: Option<Arc<Tokens>>,
    /// From where models are loaded by request; unset, none are.
    pub library: Option<Library>,
    /// Whether the process ends with serving: engines are laid to rest then.
    pub ends_process: bool,
    /// Where its figures and spans go.
    pub telemetry: Telemetry,
    /// Whether prompts may stand in the log.
    pub log_prompts: bool,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            message_bytes_max: 4 << 20,
            connections_max: 1024,
            streams_per_connection_max: 128,
            request_time_max: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(30),
            http_origins: vec![],
            tokens: None,
            library: None,
            ends_process: false,
            telemetry: Telemetry::default(),
            log_prompts: false,
        }
    }
}

/// Where to serve.
pub struct Listeners {
    pub grpc: TcpListener,
    pub http: Option<TcpListener>,
    /// For both.
    pub acceptor: Acceptor,
}

impl From<TcpListener> for Listeners {
    /// gRPC alone, in the clear.
    fn from(grpc: TcpListener) -> Self {
        Self { grpc, http: None, acceptor: Acceptor::Plain }
    }
}

/// Why serving could not begin.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error("there is no model to serve")]
    NoModel,
    #[error("two models are called {0}: give their folders different names")]
    SameName(String),
    #[error("reflection cannot be set up: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves `models` on `listeners`, the first being the default one, until `shutdown` resolves; then lets running calls finish for
/// [`ServeOptions::drain_timeout`], ends the rest, and returns whatever its peers do.
///
/// Connections live in tasks of their own: those that outlast the drain end with the runtime.
pub async fn serve(
    listeners: impl Into<Listeners>,
    models: Vec<Served>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let listeners = listeners.into();
    panics::watch();
    let registry = Arc::new(Registry::new(models, &options)?);
    let _rest = options.ends_process.then(|| Rest(registry.clone()));
    let health = Health::new().await;
    let boundary = Boundary::new(options.request_time_max);
    let calls = boundary.calls();
    let grpc = boundary.layer(grpc_services(&registry, &health, &options)?);
    let http = crate::http::Context { registry: registry.clone(), boundary, health: health.clone(), options: options.clone() };
    let http = http.router(grpc.clone());
    let door = Door { tokens: options.tokens.clone(), grpc: true };
    let grpc = Router::new()
        .fallback_service(grpc.map_request(|request: http::Request<_>| request.map(tonic::body::Body::new)))
        .layer(middleware::from_fn_with_state(door, access::admit));
    let metrics = options.telemetry.metrics.clone();
    // Outside of everything else: who is turned away is counted too.
    let rim = Calls::new(options.telemetry.clone(), &DESCRIPTORS);
    let (grpc, http) = (grpc.layer(rim.clone()), http.route("/metrics", metrics::route(metrics.clone())).layer(rim));
    let (stage, stages) = watch::channel(Stage::Open);
    let port = |listener, http2_only| Port {
        listener,
        acceptor: listeners.acceptor.clone(),
        http2_only,
        connections_max: options.connections_max,
        streams_per_connection_max: options.streams_per_connection_max,
        stall_time_max: options.request_time_max,
    };
    if let Ok(address) = listeners.grpc.local_addr() {
        info!(%address, "listening");
    }
    let grpc = port(listeners.grpc, true).serve(grpc, stages.clone());
    if let Some(Ok(address)) = listeners.http.as_ref().map(TcpListener::local_addr) {
        info!(%address, "listening for HTTP");
    }
    let http = listeners.http.map(|listener| port(listener, false).serve(http, stages));
    let ports = async { tokio::join!(grpc, futures::future::OptionFuture::from(http)) };
    let ports = async {
        tokio::select! {
            _ = ports => {}
            // For ever.
            () = metrics.upkeep() => {}
        }
    };
    let mut ports = std::pin::pin!(ports);

    let warm_and_wait = async {
        tokio::select! {
            () = shutdown => {}
            // Warming up ends in serving, for ever.
            () = lifecycle::warm(&registry, &health) => {}
        }
    };
    tokio::select! {
        // They end when they are told to.
        _ = &mut ports => return Ok(()),
        () = warm_and_wait => {}
    }
    info!("draining");
    health.set_serving(false).await;
    registry.drain();
    // The listeners are dropped at once, but connections are told only when their calls are done: until then a new call on one of
    // them gets its UNAVAILABLE from us, and not some error of the client's transport.
    stage.send_replace(Stage::Draining);
    let drained = tokio::select! {
        _ = &mut ports => return Ok(()),
        drained = lifecycle::drained(calls, options.drain_timeout) => drained,
    };
    if !drained {
        info!("the drain timeout passed: ending what still runs");
        registry.stop();
    }
    stage.send_replace(Stage::Closing);
    // Watchers of the health service would keep their connections open for ever.
    health.clear().await;
    if tokio::time::timeout(lifecycle::LAST_WORDS, &mut ports).await.is_err() {
        info!("peers keep their connections open: leaving them");
    }
    Ok(())
}

/// The published services, as both ports serve them.
fn grpc_services(registry: &Arc<Registry>, health: &Health, options: &ServeOptions) -> Result<Routes, ServeError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let generation = generation::Generation::new(registry.clone());
    let tokenization = tokenization::Tokenization::new(registry.clone());
    let bytes_max = options.message_bytes_max;
    let routes = Routes::new(GenerationServer::new(generation).max_decoding_message_size(bytes_max))
        .add_service(ModelsServer::new(models::ModelsService(registry.clone())).max_decoding_message_size(bytes_max))
        .add_service(TokenizationServer::new(tokenization).max_decoding_message_size(bytes_max))
        .add_service(health.server())
        .add_service(reflection().build_v1()?)
        // grpcurl, Postman and others still ask for this version.
        .add_service(reflection().build_v1alpha()?);
    Ok(routes.prepare())
}

/// Lays the engines to rest at the end of a process, however serving ends.
struct Rest(Arc<Registry>);

impl Drop for Rest {
    fn drop(&mut self) {
        self.0.rest();
    }
}
