//! The gRPC service: puts one engine per model on a listener, with health, reflection, deadlines and an orderly end.
//!
//! A call passes `boundary` (deadline, panics, unreadable messages), becomes an engine request in `convert`, and its events
//! come back through `generation` and `events`; `compare` runs several of them on one prompt, for `local` callers too. Every error is turned into a status in `status` and nowhere else.
//! `lifecycle` warms up and shuts down. The service knows nothing of tensors; the engine knows nothing of the service.

mod boundary;
mod compare;
mod convert;
mod events;
mod generation;
mod lifecycle;
mod local;
mod models;
mod status;
mod tokenization;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tracing::info;

use crate::engine::Engine;
use crate::engine::request::ModelInfo;
use boundary::Boundary;
use models::Registry;
use proto::generation_server::GenerationServer;
use proto::models_server::ModelsServer;
use proto::tokenization_server::TokenizationServer;

pub use convert::{autoregressive_message, diffusion_message, sampling_message};
pub use lifecycle::shutdown_signal;
pub use local::Local;

/// The public API as generated from `proto/lacuna/v1`: messages, servers and clients.
#[allow(clippy::all, rustdoc::all, missing_docs, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("lacuna.v1");

    /// The descriptors of the package, for reflection.
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("lacuna");
}

/// A browser's or proxy's worth of headers; ours are a few hundred bytes.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// Streams that a client may reset before they are accepted, per connection: a bound on the rapid-reset attack.
const PENDING_RESETS_MAX: usize = 32;
/// How often a quiet connection is asked for a sign of life, and how long it may take to give one.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// Concurrent calls on one connection.
    pub streams_per_connection_max: u32,
    /// Longest time for one call, whatever its deadline: a reader that never reads must not keep its place for ever.
    pub request_time_max: Duration,
    /// How long running calls may go on after the signal to stop.
    pub drain_timeout: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            message_bytes_max: 4 << 20,
            streams_per_connection_max: 128,
            request_time_max: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// Why serving ended other than by its signal.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error("there is no model to serve")]
    NoModel,
    #[error("two models are called {0}: give their folders different names")]
    SameName(String),
    #[error("reflection cannot be set up: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("the server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves `models` on `listener`, the first being the default one, until `shutdown` resolves; then lets running calls finish for
/// [`ServeOptions::drain_timeout`], ends the rest, and returns whatever its peers do.
///
/// Connections live in tasks of their own: those that outlast the drain end with the runtime.
pub async fn serve(
    listener: TcpListener,
    models: Vec<Served>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let registry = Arc::new(Registry::new(models, &options)?);
    if let Ok(address) = listener.local_addr() {
        info!(%address, "listening");
    }
    let health = lifecycle::Health::new().await;
    let boundary = Boundary::new(options.request_time_max);
    let calls = boundary.calls();
    let (stop_accepting, accepting_stopped) = oneshot::channel::<()>();
    let (close_connections, connections_closed) = oneshot::channel::<()>();
    // The listener is dropped at once, but connections are told only when their calls are done: until then a new call on one of
    // them gets its UNAVAILABLE from us, and not some error of the client's transport.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let incoming = incoming.take_until(accepting_stopped).chain(futures::stream::pending());
    let generation = generation::Generation::new(registry.clone());
    let tokenization = tokenization::Tokenization::new(registry.clone());
    let bytes_max = options.message_bytes_max;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let server = Server::builder()
        .max_concurrent_streams(options.streams_per_connection_max)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(PENDING_RESETS_MAX))
        .layer(boundary)
        .add_service(GenerationServer::new(generation).max_decoding_message_size(bytes_max))
        .add_service(ModelsServer::new(models::ModelsService(registry.clone())).max_decoding_message_size(bytes_max))
        .add_service(TokenizationServer::new(tokenization).max_decoding_message_size(bytes_max))
        .add_service(health.server())
        .add_service(reflection().build_v1()?)
        // grpcurl, Postman and others still ask for this version.
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming_shutdown(incoming, async {
            // A dropped sender means the same.
            let _ = connections_closed.await;
        });
    let mut server = std::pin::pin!(server);

    let warm_and_wait = async {
        tokio::select! {
            () = shutdown => {}
            // Warming up ends in serving, for ever.
            () = lifecycle::warm(&registry, &health) => {}
        }
    };
    tokio::select! {
        ended = &mut server => return Ok(ended?),
        () = warm_and_wait => {}
    }
    info!("draining");
    health.set_serving(false).await;
    registry.engines().for_each(Engine::drain);
    let _ = stop_accepting.send(());
    let drained = tokio::select! {
        ended = &mut server => return Ok(ended?),
        drained = lifecycle::drained(calls, options.drain_timeout) => drained,
    };
    if !drained {
        info!("the drain timeout passed: ending what still runs");
        registry.engines().for_each(Engine::stop);
    }
    let _ = close_connections.send(());
    // Watchers of the health service would keep their connections open for ever.
    health.clear().await;
    match tokio::time::timeout(lifecycle::LAST_WORDS, &mut server).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            info!("peers keep their connections open: leaving them");
            Ok(())
        }
    }
}
