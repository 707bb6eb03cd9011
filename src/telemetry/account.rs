//! One call's account: what it is about, how it ended and what it took, told to metrics, log and trace when it is closed.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use http::{Extensions, HeaderMap, StatusCode};
use metrics::Gauge;
use opentelemetry::KeyValue;
use tonic::Code;
use tracing::{debug, info};

use super::{Telemetry, Trace};

/// Bytes of the longest id.
pub const ID_BYTES_MAX: usize = 128;
/// What machines call all the time, and what says nothing of use in a log or a trace.
const QUIET: [&str; 4] = ["grpc.health.v1.", "grpc.reflection.", "/health", "/metrics"];

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Grpc(Code),
    Http(StatusCode),
}

impl Outcome {
    /// As labels and logs have it.
    fn name(self) -> String {
        match self {
            Self::Grpc(code) => name(code).into(),
            Self::Http(status) => status.as_str().into(),
        }
    }

    /// Whether the fault is the server's, as OpenTelemetry judges it.
    fn is_fault(self) -> bool {
        match self {
            Self::Grpc(code) => matches!(
                code,
                Code::Unknown
                    | Code::DeadlineExceeded
                    | Code::Unimplemented
                    | Code::Internal
                    | Code::Unavailable
                    | Code::DataLoss
            ),
            Self::Http(status) => status.is_server_error(),
        }
    }
}

/// A code as gRPC's documents write it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A running call's account, found in the request's extensions. One without a call takes everything and tells nothing.
#[derive(Clone, Default)]
pub struct Account(Option<Arc<Entry>>);

struct Entry {
    telemetry: Telemetry,
    method: String,
    arrived: Instant,
    inflight: Gauge,
    trace: Trace,
    /// Made up, unless the client's headers have one; `chosen` comes from the message and goes before it.
    id: String,
    chosen: OnceLock<String>,
    model: OnceLock<String>,
    client: OnceLock<String>,
    outcome: OnceLock<Outcome>,
    prompt_tokens: AtomicU64,
    tokens: AtomicU64,
    steps: AtomicU64,
}

impl fmt::Debug for Account {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Account({})", self.id())
    }
}

impl Account {
    /// Opens a call's account. `asked` is what the client's headers call it.
    pub(super) fn open(telemetry: &Telemetry, method: String, asked: Option<&str>, headers: &HeaderMap) -> Self {
        let quiet = QUIET.iter().any(|prefix| method.starts_with(prefix));
        let tracing = telemetry.tracing.as_ref().filter(|_| !quiet);
        let trace = tracing.map(|tracing| tracing.call(method.clone(), headers)).unwrap_or_default();
        let inflight = telemetry.metrics.gauge("lacuna_requests_inflight", &[("method", &method)]);
        inflight.increment(1.0);
        Self(Some(Arc::new(Entry {
            telemetry: telemetry.clone(),
            method,
            arrived: Instant::now(),
            inflight,
            trace,
            id: asked.filter(|id| is_id(id)).map_or_else(new_id, str::to_owned),
            chosen: OnceLock::new(),
            model: OnceLock::new(),
            client: OnceLock::new(),
            outcome: OnceLock::new(),
            prompt_tokens: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
        })))
    }

    /// The account of the call whose extensions these are.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// What the call is named in logs, traces and errors.
    pub fn id(&self) -> String {
        self.0.as_ref().map_or_else(new_id, |entry| entry.chosen.get().unwrap_or(&entry.id).clone())
    }

    /// The client's message names the call.
    pub fn named(&self, id: &str) {
        if let Some(entry) = &self.0 {
            let _ = entry.chosen.set(id.into());
        }
    }

    /// The model that the call is about: one that is served, not whatever was asked for.
    pub fn model(&self, name: &str) {
        if let Some(entry) = &self.0 {
            let _ = entry.model.set(name.into());
        }
    }

    /// Whose token it came with, by name.
    pub fn client(&self, name: &str) {
        if let Some(entry) = &self.0 {
            let _ = entry.client.set(name.into());
        }
    }

    /// Tokens read and written, and steps taken; what several requests of one call cost is added up.
    pub fn cost(&self, prompt_tokens: u64, tokens: u64, steps: u64) {
        if let Some(entry) = &self.0 {
            entry.prompt_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
            entry.tokens.fetch_add(tokens, Ordering::Relaxed);
            entry.steps.fetch_add(steps, Ordering::Relaxed);
        }
    }

    /// How it ended; the first word stands.
    pub fn settle(&self, outcome: Outcome) {
        if let Some(entry) = &self.0 {
            let _ = entry.outcome.set(outcome);
        }
    }

    /// The call's span, for the engine to add to.
    pub fn trace(&self) -> Trace {
        self.0.as_ref().map(|entry| entry.trace.clone()).unwrap_or_default()
    }
}

/// Closes an account when it is dropped.
pub(super) struct Closing(Account);

impl Closing {
    pub fn new(account: Account) -> Self {
        Self(account)
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(entry) = &self.0.0 {
            entry.close(&self.0.id());
        }
    }
}

impl Entry {
    fn close(&self, id: &str) {
        // Whoever has not been told how it ended has let go of it.
        let outcome = *self.outcome.get_or_init(|| Outcome::Grpc(Code::Cancelled));
        let (method, code) = (self.method.as_str(), outcome.name());
        let model = self.model.get().map_or("", String::as_str);
        let client = self.client.get().map_or("", String::as_str);
        let took = self.arrived.elapsed();
        let metrics = &self.telemetry.metrics;
        self.inflight.decrement(1.0);
        metrics.counter("lacuna_requests_total", &[("model", model), ("method", method), ("code", &code)]).increment(1);
        metrics.histogram("lacuna_request_seconds", &[("model", model), ("method", method)]).record(took);
        let [prompt_tokens, tokens, steps] =
            [&self.prompt_tokens, &self.tokens, &self.steps].map(|count| count.load(Ordering::Relaxed));
        let (milliseconds, trace) = (took.as_millis() as u64, self.trace.id());
        if QUIET.iter().any(|prefix| method.starts_with(prefix)) {
            debug!(request = id, method, code, milliseconds, "called");
        } else {
            info!(request = id, method, model, client, code, prompt_tokens, tokens, steps, milliseconds, trace, "called");
        }
        if self.trace.is_on() {
            let (service, name) = method.rsplit_once('/').unwrap_or(("", method));
            let status = match outcome {
                Outcome::Grpc(code) => KeyValue::new("rpc.grpc.status_code", code as i64),
                Outcome::Http(status) => KeyValue::new("http.response.status_code", i64::from(status.as_u16())),
            };
            let attributes = vec![
                KeyValue::new("rpc.service", service.to_owned()),
                KeyValue::new("rpc.method", name.to_owned()),
                status,
                KeyValue::new("lacuna.request_id", id.to_owned()),
                KeyValue::new("lacuna.client", client.to_owned()),
                KeyValue::new("gen_ai.request.model", model.to_owned()),
                KeyValue::new("gen_ai.usage.input_tokens", prompt_tokens as i64),
                KeyValue::new("gen_ai.usage.output_tokens", tokens as i64),
                KeyValue::new("lacuna.steps", steps as i64),
            ];
            self.trace.end(attributes, outcome.is_fault().then_some(code));
        }
    }
}

/// Whether a client may call its request so.
pub fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    !id.is_empty() && id.len() <= ID_BYTES_MAX && id.bytes().all(allowed)
}

/// An id for a request that has none.
pub fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}
