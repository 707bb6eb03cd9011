//! How serving begins and ends: warm-up, health, the signals to stop, and waiting for calls to finish.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::Receiver;
use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health as HealthApi, HealthServer};
use tonic_health::server::{HealthReporter, HealthService};
use tracing::{error, info, warn};

use super::proto::{generation_server, models_server, tokenization_server};
use super::registry::Registry;
use super::{Served, convert};
use crate::engine::request::{GenerateOptions, MethodKind, unsupported, validate};
use crate::engine::{Event, Failure, Refused, Request};

/// How long a connection may take to hand over its last bytes once no call runs any more.
pub const LAST_WORDS: Duration = Duration::from_secs(1);
/// A single step takes milliseconds to seconds; a device that needs longer is not fit to serve.
const WARM_TIME_MAX: Duration = Duration::from_secs(300);
/// How long the warm-up waits before it asks a full queue again.
const WARM_RETRY: Duration = Duration::from_millis(20);
/// The empty name stands for the server as a whole.
const SERVICES: [&str; 4] =
    ["", generation_server::SERVICE_NAME, models_server::SERVICE_NAME, tokenization_server::SERVICE_NAME];

/// The health service's statuses. All services turn together: they share the models.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    /// The same, for those who do not speak gRPC.
    serving: Arc<AtomicBool>,
}

impl Health {
    /// Not serving, until told otherwise.
    pub async fn new() -> Self {
        let health = Self { reporter: HealthReporter::new(), serving: Arc::default() };
        health.set_serving(false).await;
        health
    }

    pub fn server(&self) -> HealthServer<impl HealthApi> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
    }

    /// Whether the models are warm and requests are taken.
    pub fn serving(&self) -> bool {
        self.serving.load(Ordering::Acquire)
    }

    pub async fn set_serving(&self, serving: bool) {
        self.serving.store(serving, Ordering::Release);
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in SERVICES {
            self.reporter.set_service_status(service, status).await;
        }
    }

    /// Ends every watcher's stream.
    pub async fn clear(&self) {
        let mut reporter = self.reporter.clone();
        for service in SERVICES {
            reporter.clear_service_status(service).await;
        }
    }
}

/// Runs one step of every model, which allocates what later steps reuse, then reports healthy. Never returns: a server whose
/// warm-up failed stays up and unhealthy, so that its log can be read and its models described.
pub async fn warm(registry: &Registry, health: &Health) {
    let mut warm = true;
    for model in &registry.all() {
        let started = Instant::now();
        match tokio::time::timeout(WARM_TIME_MAX, warm_one(model)).await.unwrap_or_else(|_| Err("it took too long".into())) {
            Ok(()) => info!(model = model.info.name, seconds = started.elapsed().as_secs_f64(), "warm"),
            Err(reason) => {
                error!(model = model.info.name, reason, "the warm-up failed: the server stays unhealthy");
                warm = false;
            }
        }
    }
    if warm {
        health.set_serving(true).await;
    }
    std::future::pending().await
}

/// Runs the smallest requests there are.
pub async fn warm_one(model: &Served) -> Result<(), String> {
    run(model, convert::warm_up(None, Instant::now() + WARM_TIME_MAX)).await?;
    // The first request that drafts has the costs of drafting measured; let it be one of ours.
    let drafts = unsupported(&model.info, MethodKind::Autoregressive).is_none();
    for drafter in model.info.drafters.iter().filter(|_| drafts) {
        run(model, convert::warm_up(Some(drafter.kind), Instant::now() + WARM_TIME_MAX)).await?;
    }
    Ok(())
}

async fn run(model: &Served, options: GenerateOptions) -> Result<(), String> {
    let request = validate(&model.info, options).map_err(|e| e.to_string())?;
    let mut events = submit(model, request).await?;
    while let Some(event) = events.recv().await {
        if let Event::Finished { .. } = event.map_err(|e| e.to_string())? {
            return Ok(());
        }
    }
    Err("the engine is gone".into())
}

/// Clients may fill the queue before the warm-up has its turn; it waits for a place like anybody else.
async fn submit(model: &Served, request: Request) -> Result<Receiver<Result<Event, Failure>>, String> {
    loop {
        match model.engine.submit(request.clone()) {
            Ok(events) => return Ok(events),
            Err(Refused::QueueFull { .. } | Refused::TokensFull { .. }) => tokio::time::sleep(WARM_RETRY).await,
            Err(refused) => return Err(refused.to_string()),
        }
    }
}

/// Waits until no call runs; false if some still do after `timeout`.
pub async fn drained(mut calls: watch::Receiver<usize>, timeout: Duration) -> bool {
    // An error means that nobody counts any more, hence that nothing runs.
    tokio::time::timeout(timeout, calls.wait_for(|running| *running == 0)).await.is_ok()
}

/// Resolves on SIGTERM or SIGINT.
pub async fn shutdown_signal() -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// From here on SIGHUP does not end the process.
pub fn hangups() -> std::io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Does something at every SIGHUP, for ever.
pub async fn on_hangup(hangups: std::io::Result<Signal>, act: impl Fn()) {
    match hangups {
        Ok(mut hangups) => {
            while hangups.recv().await.is_some() {
                act();
            }
        }
        Err(error) => warn!(%error, "SIGHUP cannot be caught"),
    }
    std::future::pending().await
}
