//! Requests on the wire: sends them as a lane wants them sent, and notes what comes back and when.
//!
//! The server often shares its cores with this, so little is done per event: of an answer only its end is decoded, everything else
//! is skipped where it lies. One lock is taken per request, none per event.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use http::uri::PathAndQuery;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

use crate::cli::connection::Connection;
use crate::eval::load::arrivals::{cancellation, open_loop};
use crate::eval::load::window::Gate;
use crate::eval::load::{Cost, Forwards, Lane, Outcome, Round, Sample, Until};
use crate::service::proto::{self, GenerateRequest};

/// How long a user of a closed loop rests after a request that did not get through, where the server does not say.
const REST: Duration = Duration::from_millis(100);
/// Requests of an open loop on their way from the clock's thread.
const DUE_MAX: usize = 1024;

/// `GenerateEvent` as far as a load cares: which kind of event it is, and what `Finished` says.
#[derive(Clone, PartialEq, prost::Message)]
struct Glance {
    #[prost(message, optional, tag = "1")]
    started: Option<()>,
    #[prost(message, optional, tag = "2")]
    step: Option<()>,
    #[prost(message, optional, tag = "3")]
    committed: Option<()>,
    #[prost(message, optional, tag = "4")]
    finished: Option<proto::Finished>,
}

/// What to send, and to whom. Requests take turns on the prompts and the connections.
pub struct Load {
    pub channels: Vec<Connection>,
    /// One for each prompt.
    pub requests: Vec<GenerateRequest>,
    /// Of arrivals and cancellations; with a request's number added, of its sampling.
    pub seed: u64,
    /// Requests behind the warm-up to be cancelled, 0 to 1.
    pub cancel_share: f64,
    /// Longest time of a request.
    pub timeout: Duration,
    /// Requests of an open loop under way at once.
    pub in_flight_max: usize,
    pub warm_up: u64,
    pub until: Until,
}

/// A run as it goes.
struct Run {
    load: Arc<Load>,
    clock: Instant,
    book: Mutex<Book>,
}

struct Book {
    /// Of a closed loop.
    gate: Gate,
    sent: u64,
    samples: Vec<Sample>,
    /// Of finished requests, from sending to end.
    finished: u32,
    finished_time: Duration,
}

/// Runs a lane once.
pub async fn round(load: &Arc<Load>, lane: Lane, number: u64) -> Result<Round> {
    let gate = Gate::new(load.warm_up, load.until);
    let book = Book { gate, sent: 0, samples: vec![], finished: 0, finished_time: Duration::ZERO };
    let run = Arc::new(Run { load: load.clone(), clock: Instant::now(), book: Mutex::new(book) });
    let (window, unsent) = match lane {
        Lane::Closed { concurrency } => {
            let mut users: JoinSet<()> = (0..concurrency).map(|_| run.clone().user()).collect();
            while let Some(user) = users.join_next().await {
                user.context("a user of the closed loop failed")?;
            }
            (run.book().gate.window().context("the window did not open")?, vec![])
        }
        Lane::Open { rate } => {
            let (due, window) = open_loop(rate, load.seed, number, load.warm_up, load.until)?;
            (window, run.clone().open(due).await?)
        }
    };
    let samples = std::mem::take(&mut run.book().samples);
    Ok(Round { samples, unsent, window })
}

impl Run {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One user of a closed loop.
    async fn user(self: Arc<Self>) {
        let mut intended = Duration::ZERO;
        while !self.book().gate.closed(self.clock.elapsed()) {
            let rest = self.request(intended).await;
            intended = self.clock.elapsed();
            if let Some(rest) = rest {
                tokio::time::sleep(rest).await;
                intended = self.clock.elapsed();
            }
        }
    }

    /// Sends requests as they are due, and gives those that could not be sent. A thread of its own minds the clock: the runtime's
    /// timers count whole milliseconds.
    async fn open(self: Arc<Self>, due: Vec<Duration>) -> Result<Vec<Duration>> {
        let (at, mut arrivals) = mpsc::channel(DUE_MAX);
        let clock = self.clock;
        std::thread::spawn(move || {
            for moment in due {
                std::thread::sleep(moment.saturating_sub(clock.elapsed()));
                if at.blocking_send(moment).is_err() {
                    break;
                }
            }
        });
        let (mut requests, mut unsent) = (JoinSet::new(), vec![]);
        while let Some(moment) = arrivals.recv().await {
            while let Some(ended) = requests.try_join_next() {
                ended.context("a request failed here")?;
            }
            if requests.len() >= self.load.in_flight_max {
                unsent.push(moment);
                continue;
            }
            let run = self.clone();
            requests.spawn(async move { run.request(moment).await });
        }
        while let Some(ended) = requests.join_next().await {
            ended.context("a request failed here")?;
        }
        Ok(unsent)
    }

    /// Sends the next request and notes how it went; says how long to rest before another try if it did not get through.
    async fn request(&self, intended: Duration) -> Option<Duration> {
        let (index, usual) = {
            let mut book = self.book();
            book.sent += 1;
            (book.sent - 1, book.finished_time.checked_div(book.finished))
        };
        let load = &self.load;
        // Until a request has finished, nobody knows what a moment within one is.
        let cancel = cancellation(load.seed, index, load.cancel_share).filter(|_| index >= load.warm_up);
        let cancel = cancel.zip(usual).map(|(share, usual)| usual.mul_f64(share)).filter(|moment| *moment < load.timeout);
        let sent = self.clock.elapsed();
        let outcome = Outcome::Cancelled;
        let mut sample = Sample { intended, sent, ended: sent, first_step: None, first_commit: None, gaps: vec![], outcome };
        let followed = tokio::time::timeout(cancel.unwrap_or(load.timeout), self.follow(index, &mut sample)).await;
        let (outcome, rest) = match followed {
            Ok(Ok(cost)) => (Outcome::Finished(cost), None),
            Ok(Err(status)) => {
                let told = status.get_error_details().retry_info().and_then(|retry| retry.retry_delay);
                let outcome = match status.code() {
                    Code::ResourceExhausted => Outcome::Rejected,
                    code => failed(code),
                };
                (outcome, Some(told.unwrap_or(REST)))
            }
            Err(_) if cancel.is_some() => (Outcome::Cancelled, None),
            Err(_) => (failed(Code::DeadlineExceeded), Some(REST)),
        };
        sample.outcome = outcome;
        let mut book = self.book();
        // Under the lock, so that ends are noted in their order.
        sample.ended = self.clock.elapsed();
        if matches!(sample.outcome, Outcome::Finished(_)) {
            book.finished += 1;
            book.finished_time += sample.ended.saturating_sub(sample.sent);
        }
        book.gate.ended(sample.intended, sample.ended);
        book.samples.push(sample);
        rest
    }

    /// Reads one answer to its end. Dropping this cancels the call.
    async fn follow(&self, index: u64, sample: &mut Sample) -> Result<Cost, Status> {
        let Load { channels, requests, seed, .. } = self.load.as_ref();
        let mut request = requests[index as usize % requests.len()].clone();
        request.sampling.get_or_insert_default().seed = Some(seed.wrapping_add(index));
        let mut client = tonic::client::Grpc::new(channels[index as usize % channels.len()].clone());
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static("/lacuna.v1.Generation/Generate");
        let codec = ProstCodec::<GenerateRequest, Glance>::default();
        let mut events = client.server_streaming(Request::new(request), path, codec).await?.into_inner();
        let mut committed = None;
        while let Some(event) = events.message().await? {
            let now = self.clock.elapsed();
            if event.step.is_some() {
                sample.first_step.get_or_insert(now);
            } else if event.committed.is_some() {
                sample.first_commit.get_or_insert(now);
                sample.gaps.extend(committed.replace(now).map(|before| now.saturating_sub(before)));
            } else if let Some(finished) = event.finished {
                return Ok(cost(&finished.usage.unwrap_or_default()));
            }
        }
        Err(Status::internal("the stream ended without a finish"))
    }
}

fn cost(usage: &proto::Usage) -> Cost {
    let proto::Forwards { prefill, denoise, cache_store, verify, draft, decode } = usage.forwards.unwrap_or_default();
    Cost {
        prompt_tokens: usage.prompt_tokens,
        generated_tokens: usage.generated_tokens,
        queued: Duration::try_from_secs_f64(usage.queue_seconds).unwrap_or_default(),
        forwards: Forwards { prefill, denoise, cache_store, decode, verify, draft },
    }
}

/// By the name that gRPC gives the code: `DeadlineExceeded` is DEADLINE_EXCEEDED.
fn failed(code: Code) -> Outcome {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    Outcome::Failed(name)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::service::proto::{Cell, Finished, GenerateEvent, Started, Step, Usage, generate_event};

    #[test]
    fn a_glance_reads_what_the_server_writes() {
        let glance = |event| {
            let event = GenerateEvent { event: Some(event) };
            Glance::decode(event.encode_to_vec().as_slice()).expect("an event is a glance")
        };
        let cell = Cell { token_id: 3, text: "three".into(), masked: true };
        let started = Started { canvas: vec![cell], ..Started::default() };
        assert_eq!(glance(generate_event::Event::Started(started)), Glance { started: Some(()), ..Glance::default() });
        let step = Step { step: 7, ..Step::default() };
        assert_eq!(glance(generate_event::Event::Step(step)), Glance { step: Some(()), ..Glance::default() });
        let committed = proto::Committed { text: "three".into(), ..proto::Committed::default() };
        assert_eq!(glance(generate_event::Event::Committed(committed)), Glance { committed: Some(()), ..Glance::default() });
        let usage = Usage { generated_tokens: 12, queue_seconds: 0.5, ..Usage::default() };
        let finished = Finished { usage: Some(usage), ..Finished::default() };
        assert_eq!(glance(generate_event::Event::Finished(finished.clone())).finished, Some(finished));
    }

    #[test]
    fn failures_have_the_names_that_grpc_gives() {
        assert_eq!(failed(Code::DeadlineExceeded), Outcome::Failed("DEADLINE_EXCEEDED".into()));
        assert_eq!(failed(Code::Internal), Outcome::Failed("INTERNAL".into()));
    }
}
