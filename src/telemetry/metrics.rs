//! The figures of a server, in Prometheus' text format. Every name is in one table with its help, so that none goes without.
//!
//! Labels have few values: models that are served, methods that are published, codes and reasons that are enumerated. What an engine
//! knows at any time (queue, residents, drafts) is asked when somebody scrapes; the rest is counted as it happens.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::routing::{MethodRouter, get};
use http::header;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

use super::meter::{Ends, Forward, Handles, Kind, Meter, Phase, Requests};
use super::panics;
use crate::engine::request::{MethodKind, ModelInfo, unsupported};
use crate::engine::{Drafted, Engine, Load, Readings};

/// Seconds of whole requests: from what a warm cache needs to the longest that a server lets one take.
const REQUEST_SECONDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// Seconds of forwards and what comes at their pace.
const STEP_SECONDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const TOKENS: [f64; 14] = [1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0, 65_536.0];
const TOKENS_OF_A_STEP: [f64; 11] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0, 256.0];
const SEQUENCES: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

const COUNTERS: [(&str, &str); 16] = [
    ("lacuna_requests_total", "Calls that have ended, by their gRPC code, or HTTP status where they are not gRPC."),
    ("lacuna_prompt_tokens_total", "Tokens of the prompts of complete requests."),
    ("lacuna_reused_tokens_total", "Of those, tokens whose keys another request had computed."),
    ("lacuna_output_tokens_total", "Tokens that complete requests were given."),
    ("lacuna_tokens_remasked_total", "Committed tokens that were masked again."),
    ("lacuna_forward_passes_total", "Sequences that the network saw, by what for."),
    ("lacuna_rounds_total", "Rounds of the engine."),
    ("lacuna_steps_total", "Steps of sequences taken in its rounds."),
    ("lacuna_coalesced_steps_total", "Steps that slow readers were told as part of a later one."),
    ("lacuna_spec_drafts_total", "Forwards that verified at least one drafted token."),
    ("lacuna_spec_draft_tokens_total", "Drafted tokens that were verified."),
    ("lacuna_spec_accepted_tokens_total", "Drafted tokens that were accepted."),
    ("lacuna_rejected_total", "Requests that the engine did not take, by reason."),
    ("lacuna_cancelled_total", "Requests that were taken and ended before they were complete, by reason."),
    ("lacuna_panics_total", "Panics of the process; each ended one request at most."),
    ("lacuna_trace_spans_total", "Spans by what became of them."),
];

const GAUGES: [(&str, &str); 9] = [
    ("lacuna_build_info", "Always 1; the labels say what runs."),
    ("lacuna_requests_inflight", "Calls that run."),
    ("lacuna_queue_depth", "Requests that wait for a place."),
    ("lacuna_queue_tokens", "Tokens of the requests that wait."),
    ("lacuna_residents", "Sequences that are decoded together."),
    ("lacuna_resident_tokens", "Their tokens, canvas and cache, as the scheduler counts them."),
    ("lacuna_prefix_tokens", "Tokens whose keys are kept for requests that begin alike."),
    ("lacuna_kv_used_bytes", "Bytes of keys and values that residents and kept beginnings may fill."),
    ("lacuna_kv_total_bytes", "Bytes of keys and values that there is room for."),
];

/// With the bounds of their buckets.
const HISTOGRAMS: [(&str, &[f64], &str); 12] = [
    ("lacuna_request_seconds", &REQUEST_SECONDS, "Time of a call, from its arrival to its last byte."),
    ("lacuna_queue_seconds", &REQUEST_SECONDS, "Time from submission to a place in the engine."),
    ("lacuna_time_to_first_provisional_seconds", &REQUEST_SECONDS, "Time from submission to the first guess at a token."),
    ("lacuna_time_to_first_commit_seconds", &REQUEST_SECONDS, "Time from submission to the first committed token."),
    ("lacuna_decoding_seconds", &REQUEST_SECONDS, "Time from a place in the engine to the last token."),
    ("lacuna_inter_chunk_seconds", &STEP_SECONDS, "Time between two pieces of final text; a piece may have many tokens."),
    ("lacuna_time_per_output_token_seconds", &STEP_SECONDS, "Time behind the first committed token, by the tokens behind it."),
    ("lacuna_forward_seconds", &STEP_SECONDS, "Time of one forward, logits and statistics with it, by what it was for."),
    ("lacuna_batch_size", &SEQUENCES, "Sequences in one forward."),
    ("lacuna_tokens_committed_per_step", &TOKENS_OF_A_STEP, "Tokens that one step of one sequence committed."),
    ("lacuna_request_prompt_tokens", &TOKENS, "Tokens of a complete request's prompt."),
    ("lacuna_request_output_tokens", &TOKENS, "Tokens that a complete request was given."),
];

/// How often what was recorded is put into its buckets.
const UPKEEP: Duration = Duration::from_secs(5);
const METADATA: Metadata = Metadata::new(module_path!(), Level::INFO, None);

/// What an engine says of itself, and what of it each figure is.
struct Reading {
    load: Load,
    drafted: Drafted,
    bytes_per_token: usize,
}

/// A figure's name, and how it is read.
type Read<T> = (&'static str, fn(&Reading) -> T);

const READ_GAUGES: [Read<usize>; 7] = [
    ("lacuna_queue_depth", |found| found.load.waiting),
    ("lacuna_queue_tokens", |found| found.load.waiting_tokens),
    ("lacuna_residents", |found| found.load.residents),
    ("lacuna_resident_tokens", |found| found.load.tokens),
    ("lacuna_prefix_tokens", |found| found.load.prefix_tokens),
    ("lacuna_kv_used_bytes", |found| (found.load.tokens + found.load.prefix_tokens) * found.bytes_per_token),
    ("lacuna_kv_total_bytes", |found| found.load.tokens_max * found.bytes_per_token),
];

const READ_COUNTERS: [Read<u64>; 6] = [
    ("lacuna_rounds_total", |found| found.load.rounds),
    ("lacuna_steps_total", |found| found.load.steps),
    ("lacuna_coalesced_steps_total", |found| found.load.coalesced),
    ("lacuna_spec_drafts_total", |found| found.drafted.speculation.drafts as u64),
    ("lacuna_spec_draft_tokens_total", |found| found.drafted.speculation.drafted as u64),
    ("lacuna_spec_accepted_tokens_total", |found| found.drafted.speculation.accepted as u64),
];

/// A model whose engine is asked at each scrape.
struct Watched {
    readings: Readings,
    bytes_per_token: usize,
    gauges: Vec<Gauge>,
    /// With what has been counted already: a model that is loaded anew begins at 0, its counters go on.
    counters: Vec<(Counter, u64)>,
}

impl Watched {
    /// False once the engine is gone; its gauges are 0 then.
    fn read(&mut self) -> bool {
        let Some((load, drafted)) = self.readings.take() else {
            self.gauges.iter().for_each(|gauge| gauge.set(0.0));
            return false;
        };
        let reading = Reading { load, drafted, bytes_per_token: self.bytes_per_token };
        self.gauges.iter().zip(READ_GAUGES).for_each(|(gauge, (_, of))| gauge.set(of(&reading) as f64));
        for ((counter, counted), (_, of)) in self.counters.iter_mut().zip(READ_COUNTERS) {
            counter.increment(of(&reading).saturating_sub(*counted));
            *counted = of(&reading);
        }
        true
    }
}

/// The scrape.
pub fn route(metrics: Arc<Metrics>) -> MethodRouter {
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    get(move || async move { (content_type, metrics.render()) })
}

/// A server's figures.
pub struct Metrics {
    recorder: PrometheusRecorder,
    watched: Mutex<Vec<Watched>>,
    panics: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let builder = HISTOGRAMS.iter().fold(PrometheusBuilder::new(), |builder, (name, bounds, _)| {
            // The only error is a list without bounds.
            builder.set_buckets_for_metric(Matcher::Full((*name).into()), bounds).unwrap_or_default()
        });
        let recorder = builder.build_recorder();
        COUNTERS.iter().for_each(|(name, help)| recorder.describe_counter((*name).into(), None, (*help).into()));
        GAUGES.iter().for_each(|(name, help)| recorder.describe_gauge((*name).into(), None, (*help).into()));
        HISTOGRAMS.iter().for_each(|(name, _, help)| recorder.describe_histogram((*name).into(), None, (*help).into()));
        let panics = recorder.register_counter(&key("lacuna_panics_total", &[]), &METADATA);
        let metrics = Self { recorder, watched: Mutex::default(), panics };
        metrics.gauge("lacuna_build_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        metrics
    }
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let label = |(name, value): &(&'static str, &str)| Label::new(*name, (*value).to_owned());
    Key::from_parts(name, labels.iter().map(label).collect::<Vec<_>>())
}

impl Metrics {
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    pub fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.recorder.register_histogram(&key(name, labels), &METADATA)
    }

    /// Has `engine` count into the figures of its model, and asks it at each scrape from here on.
    pub fn watch(&self, info: &ModelInfo, engine: &Engine) {
        let config = &info.config;
        let bytes_per_token = config.layers * 2 * config.kv_heads * config.head_dim * info.placement.dtype.size();
        let model = [("model", info.name.as_str())];
        let watched = Watched {
            readings: engine.readings(),
            bytes_per_token,
            gauges: READ_GAUGES.iter().map(|(name, _)| self.gauge(name, &model)).collect(),
            counters: READ_COUNTERS.iter().map(|(name, _)| (self.counter(name, &model), 0)).collect(),
        };
        engine.count_into(self.meter(info));
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
    }

    /// All figures, as Prometheus reads them.
    pub fn render(&self) -> String {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).retain_mut(Watched::read);
        self.panics.absolute(panics::count());
        self.recorder.handle().render()
    }

    /// Moves what was recorded into its buckets, again and again: without a scrape nobody else does, and it would pile up.
    pub async fn upkeep(&self) {
        let (handle, mut interval) = (self.recorder.handle(), tokio::time::interval(UPKEEP));
        loop {
            interval.tick().await;
            handle.run_upkeep();
        }
    }

    /// Handles for all that `info` can do; what it cannot do counts into nothing.
    fn meter(&self, info: &ModelInfo) -> Meter {
        let model = info.name.as_str();
        let can = |method| unsupported(info, method).is_none();
        let (diffusion, autoregressive) = (can(MethodKind::Diffusion), can(MethodKind::Autoregressive));
        let requests = Kind::ALL.map(|kind| {
            let labels = [("model", model), ("decoder", kind.name())];
            let able = if kind == Kind::Diffusion { diffusion } else { autoregressive };
            let histogram = |name| if able { self.histogram(name, &labels) } else { Histogram::noop() };
            let counter = |name| if able { self.counter(name, &labels) } else { Counter::noop() };
            Requests {
                queue: histogram("lacuna_queue_seconds"),
                first_provisional: histogram("lacuna_time_to_first_provisional_seconds"),
                first_commit: histogram("lacuna_time_to_first_commit_seconds"),
                inter_chunk: histogram("lacuna_inter_chunk_seconds"),
                per_output_token: histogram("lacuna_time_per_output_token_seconds"),
                decoding: histogram("lacuna_decoding_seconds"),
                prompt_tokens: histogram("lacuna_request_prompt_tokens"),
                output_tokens: histogram("lacuna_request_output_tokens"),
                committed_per_step: histogram("lacuna_tokens_committed_per_step"),
                prompt_tokens_total: counter("lacuna_prompt_tokens_total"),
                reused_tokens_total: counter("lacuna_reused_tokens_total"),
                output_tokens_total: counter("lacuna_output_tokens_total"),
                remasked_total: counter("lacuna_tokens_remasked_total"),
            }
        });
        let forwards = Phase::ALL.map(|phase| {
            let labels = [("model", model), ("phase", phase.name())];
            let able = match phase {
                Phase::Denoise => diffusion,
                Phase::Decode | Phase::Verify => autoregressive,
                Phase::Prefill | Phase::Mixed => true,
            };
            let histogram = |name| if able { self.histogram(name, &labels) } else { Histogram::noop() };
            Forward {
                seconds: histogram("lacuna_forward_seconds"),
                sequences: histogram("lacuna_batch_size"),
                passes: if able { self.counter("lacuna_forward_passes_total", &labels) } else { Counter::noop() },
            }
        });
        let reason = |name, reason| self.counter(name, &[("model", model), ("reason", reason)]);
        let (rejected, cancelled) = (|why| reason("lacuna_rejected_total", why), |why| reason("lacuna_cancelled_total", why));
        let ends = Ends {
            queue_full: rejected("queue_full"),
            tokens_full: rejected("tokens_full"),
            too_large: rejected("too_large"),
            refused_stopping: rejected("stopping"),
            client_left: cancelled("client_left"),
            unread: cancelled("unread"),
            deadline: cancelled("deadline"),
            stopping: cancelled("stopping"),
            out_of_memory: cancelled("out_of_memory"),
            internal: cancelled("internal"),
        };
        Meter::new(Handles { requests, forwards, ends })
    }
}
