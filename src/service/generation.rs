//! The Generation service: checks a request off the network's threads, hands it to the engine, and reads its events as the client
//! takes them.
//!
//! The stream is pulled, not pushed: a client that does not read holds back its own sequence, and dropping the stream drops the
//! engine's receiver, which cancels the sequence. Nothing in between buffers without bound.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tracing::{debug, info};

use super::boundary::Call;
use super::events::Translator;
use super::models::Registry;
use super::proto::{self, GenerateEvent, GenerateRequest};
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

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<EventStream>, Status> {
        let call = Call::of(&request)?;
        let request = request.into_inner();
        let id = convert::request_id(request.request_id.as_deref())?;
        let model = self.registry.find(&request.model)?.clone();
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
        let reader = Reader { events, translator, call };
        let stream = futures::stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            let event = reader.next().await;
            let more = matches!(event, Ok((_, true)));
            Some((event.map(|(event, _)| event), more.then_some(reader)))
        });
        let guarded = AssertUnwindSafe(stream).catch_unwind();
        let stream = guarded.map(move |event| event.unwrap_or_else(|_| Err(status::fault("a stream panicked", Some(&id)))));
        Ok(Response::new(Box::pin(stream)))
    }
}

/// One request's events on their way to the client.
struct Reader {
    events: mpsc::Receiver<Result<Event, Failure>>,
    translator: Translator,
    call: Call,
}

impl Reader {
    /// The next event, and whether more will follow. The deadline is the engine's too; here it covers an engine that is stuck.
    async fn next(&mut self) -> Result<(GenerateEvent, bool), Status> {
        let id = self.translator.id();
        match tokio::time::timeout_at(self.call.deadline.into(), self.events.recv()).await {
            Ok(Some(Ok(event))) => {
                let more = !matches!(event, Event::Finished { .. });
                if let Event::Finished { usage, .. } = &event {
                    let milliseconds = self.call.arrived.elapsed().as_millis() as u64;
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
