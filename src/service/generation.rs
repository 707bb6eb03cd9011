//! The Generation service: checks a request off the network's threads, hands it to the engine, and reads its events as the client
//! takes them.
//!
//! The stream is pulled, not pushed: a client that does not read holds back its own sequence, and dropping the stream drops the
//! engine's receiver, which cancels the sequence. Nothing in between buffers without bound.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt, stream};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tracing::{debug, info};

use super::boundary::Call;
use super::compare::{CompareStream, compare};
use super::events::Translator;
use super::proto::{self, CompareRequest, GenerateEvent, GenerateRequest};
use super::registry::Registry;
use super::{convert, status};
use crate::engine::request::validate;
use crate::engine::{Event, Failure};

pub struct Generation {
    registry: Arc<Registry>,
}

impl Generation {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }
}

type EventStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

#[tonic::async_trait]
impl proto::generation_server::Generation for Generation {
    type GenerateStream = EventStream;
    type CompareStream = CompareStream;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<EventStream>, Status> {
        let call = Call::of(&request)?;
        let request = request.into_inner();
        let id = convert::request_id(request.request_id.as_deref())?;
        let model = self.registry.find(&request.model)?;
        let (info, name, deadline, suffix) = (model.info.clone(), id.clone(), call.deadline, request.suffix.is_some());
        let autoregressive = matches!(request.method, Some(proto::generate_request::Method::Autoregressive(_)));
        let checked = self.registry.off_thread(move || {
            let options = convert::options(&info, request, name, deadline)?;
            validate(&info, options)
                .map_err(|invalid| status::invalid(invalid, |field| convert::path(field, suffix, autoregressive)))
        });
        let request = checked.await??;
        let translator = Translator::new(model.clone(), &request, call.arrived.elapsed());
        let events = model.engine.submit(request).map_err(|refused| status::refused(&refused))?;
        debug!(request = id, model = model.info.name, "submitted");
        let reader = Reader::new(events, translator, call.arrived, call.deadline);
        let stream = stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            let event = reader.next().await;
            let more = matches!(event, Ok((_, true)));
            Some((event.map(|(event, _)| event), more.then_some(reader)))
        });
        Ok(Response::new(guarded(stream, call, id)))
    }

    async fn compare(&self, request: Request<CompareRequest>) -> Result<Response<CompareStream>, Status> {
        let call = Call::of(&request)?;
        let request = request.into_inner();
        let id = convert::request_id(request.request_id.as_deref())?;
        let stream = compare(&self.registry, request, id.clone(), call.deadline).await?;
        debug!(request = id, "comparing");
        Ok(Response::new(guarded(stream, call, id)))
    }
}

/// A call's stream up to its first error, a panic being one. The call runs until the stream is dropped.
fn guarded<T: Send + 'static>(
    stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
    call: Call,
    id: String,
) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
    let stream = AssertUnwindSafe(stream).catch_unwind();
    let stream = stream.map(move |event| event.unwrap_or_else(|_| Err(status::fault("a stream panicked", Some(&id)))));
    Box::pin(stream.scan((call, false), |(_, failed), event| {
        let event = (!*failed).then_some(event);
        *failed = matches!(event, Some(Err(_)));
        std::future::ready(event)
    }))
}

/// One request's events on their way to the client.
pub struct Reader {
    events: mpsc::Receiver<Result<Event, Failure>>,
    translator: Translator,
    /// For the log.
    since: Instant,
    deadline: Instant,
}

impl Reader {
    pub fn new(
        events: mpsc::Receiver<Result<Event, Failure>>,
        translator: Translator,
        since: Instant,
        deadline: Instant,
    ) -> Self {
        Self { events, translator, since, deadline }
    }

    /// The next event, and whether more will follow. The deadline is the engine's too; here it covers an engine that is stuck.
    pub async fn next(&mut self) -> Result<(GenerateEvent, bool), Status> {
        let id = self.translator.id();
        match tokio::time::timeout_at(self.deadline.into(), self.events.recv()).await {
            Ok(Some(Ok(event))) => {
                let more = !matches!(event, Event::Finished { .. });
                if let Event::Finished { usage, .. } = &event {
                    let milliseconds = self.since.elapsed().as_millis() as u64;
                    info!(request = id, tokens = usage.generated_tokens, steps = usage.steps, milliseconds, "finished");
                }
                Ok((self.translator.translate(event), more))
            }
            Ok(Some(Err(failure))) => {
                info!(request = id, %failure, "ended");
                Err(status::failure(&failure, id))
            }
            Ok(None) => Err(status::fault("the engine let go of a request without a word", Some(id))),
            Err(_) => Err(status::failure(&Failure::DeadlineExceeded, id)),
        }
    }
}
