//! Spans for an OpenTelemetry collector, over OTLP. A call's span begins at the rim, in the trace that its client names (W3C
//! `traceparent`); the engine adds the parts of its request beneath it, and spans of some rounds, which many requests share and which
//! are therefore linked, not nested. Spans wait in a bounded queue: a collector that is slow or dead costs spans, never a request.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use metrics::Counter;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Link, Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter as Otlp, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter};
use tracing::{info, warn};

use super::Metrics;

/// Longest time that the collector has for one batch.
const EXPORT_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest time that the last spans hold up the end of the process.
pub const FLUSH_TIME_MAX: Duration = Duration::from_secs(3);

/// The way to a collector. Clones share it.
#[derive(Clone)]
pub struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl fmt::Debug for Tracing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Tracing")
    }
}

impl Tracing {
    /// Sends to the collector at `endpoint`, whether or not it is there yet. Called within the runtime that carries the connection.
    pub fn start(endpoint: &str, metrics: &Metrics) -> Result<Self, ExporterBuildError> {
        let exporter = Otlp::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT_TIME_MAX).build()?;
        let outcome = |outcome| metrics.counter("lacuna_trace_spans_total", &[("outcome", outcome)]);
        let exporter = Told {
            exporter,
            endpoint: endpoint.to_owned(),
            silent: AtomicBool::new(false),
            sent: outcome("sent"),
            failed: outcome("failed"),
        };
        let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "lacuna".into());
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let resource = Resource::builder().with_service_name(name).with_attribute(version).build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("lacuna");
        Ok(Self { provider, tracer })
    }

    /// Sends what there is and ends, within [`FLUSH_TIME_MAX`]. Blocks.
    pub fn finish(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIME_MAX) {
            warn!(%error, "the last spans may not have reached the collector");
        }
    }

    /// Begins a call's span, in its client's trace if `headers` name one.
    pub fn call(&self, name: String, headers: &HeaderMap) -> Trace {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        let span = self.tracer.span_builder(name).with_kind(SpanKind::Server).start_with_context(&self.tracer, &parent);
        // What the client's sampling leaves out costs no more than this.
        let recording = span.is_recording();
        let context = parent.with_span(span);
        Trace(recording.then(|| Arc::new(Traced { context, tracer: self.tracer.clone() })))
    }
}

/// A call's span, or nothing where none is made.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Traced>>);

struct Traced {
    context: Context,
    tracer: SdkTracer,
}

impl fmt::Debug for Trace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Trace({:?})", self.id())
    }
}

impl Trace {
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The trace's id, as the log has it.
    pub fn id(&self) -> Option<String> {
        self.0.as_ref().map(|traced| traced.context.span().span_context().trace_id().to_string())
    }

    /// A part of the call that is over.
    pub fn part(&self, name: &'static str, from: Instant, to: Instant, attributes: Vec<KeyValue>) {
        if let Some(traced) = &self.0 {
            let part = traced.tracer.span_builder(name).with_start_time(wall(from)).with_attributes(attributes);
            part.start_with_context(&traced.tracer, &traced.context).end_with_timestamp(wall(to));
        }
    }

    /// A round that the calls of `members` shared: a span of its own, and links both ways.
    pub fn round(members: &[Self], from: Instant, to: Instant, attributes: Vec<KeyValue>) {
        let members: Vec<&Traced> = members.iter().filter_map(|member| member.0.as_deref()).collect();
        let Some(first) = members.first() else { return };
        let links = members.iter().map(|member| Link::with_context(member.context.span().span_context().clone())).collect();
        let round = first.tracer.span_builder("round").with_start_time(wall(from)).with_attributes(attributes);
        let mut round = round.with_links(links).start_with_context(&first.tracer, &Context::new());
        let context = round.span_context().clone();
        members.iter().for_each(|member| member.context.span().add_link(context.clone(), vec![]));
        round.end_with_timestamp(wall(to));
    }

    /// The call is over; `error` says what went wrong if it was ours.
    pub fn end(&self, attributes: Vec<KeyValue>, error: Option<String>) {
        if let Some(traced) = &self.0 {
            let span = traced.context.span();
            span.set_attributes(attributes);
            if let Some(error) = error {
                span.set_status(Status::error(error));
            }
            span.end();
        }
    }
}

/// The wall clock's time at a moment that has passed.
fn wall(moment: Instant) -> SystemTime {
    SystemTime::now() - moment.elapsed()
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// An exporter whose trouble is logged when it begins and when it is over, not batch after batch.
struct Told<E> {
    exporter: E,
    endpoint: String,
    silent: AtomicBool,
    sent: Counter,
    failed: Counter,
}

impl<E> fmt::Debug for Told<E> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Told({})", self.endpoint)
    }
}

impl<E: SpanExporter> SpanExporter for Told<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let sent = self.exporter.export(batch).await;
        match &sent {
            Ok(()) => {
                self.sent.increment(spans);
                if self.silent.swap(false, Ordering::Relaxed) {
                    info!(endpoint = self.endpoint, "the collector takes spans again");
                }
            }
            Err(error) => {
                self.failed.increment(spans);
                if !self.silent.swap(true, Ordering::Relaxed) {
                    warn!(endpoint = self.endpoint, %error, "the collector takes no spans: they are lost until it does");
                }
            }
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
