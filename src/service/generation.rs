//! The Generation service: checks a request off the network's threads, hands it to the engine, and reads its events as the client
//! takes them, by gRPC or by whatever else speaks in its messages.
//!
//! The stream is pulled, not pushed: a client that does not read holds back its own sequence, and dropping the stream drops the
//! engine's receiver, which cancels the sequence. Nothing in between buffers without bound.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tracing::{debug, info};

use super::access::Access;
use super::boundary::Call;
use super::compare::{CompareStream, compare};
use super::events::Translator;
use super::proto::{self, CompareRequest, GenerateEvent, GenerateRequest, compare_event, generate_event};
use super::registry::Registry;
use super::{Served, convert, status};
use crate::engine::{self, Event, Failure};
use crate::telemetry::Account;

pub struct Generation {
    registry: Arc<Registry>,
}

impl Generation {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }
}

pub type EventStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

#[tonic::async_trait]
impl proto::generation_server::Generation for Generation {
    type GenerateStream = EventStream;
    type CompareStream = CompareStream;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<EventStream>, Status> {
        let call = Call::of(&request)?;
        let request = request.into_inner();
        let id = call.name(request.request_id.as_deref())?;
        let checked = Checked::new(&self.registry, request, id, &call).await?;
        Ok(Response::new(checked.submit(call)?))
    }

    async fn compare(&self, request: Request<CompareRequest>) -> Result<Response<CompareStream>, Status> {
        let call = Call::of(&request)?;
        let request = request.into_inner();
        let id = call.name(request.request_id.as_deref())?;
        if self.registry.log_prompts {
            info!(request = id, prompt = ?request.prompt, "asked");
        }
        let stream = compare(&self.registry, request, id.clone(), call.deadline, call.account.trace(), &call.access).await?;
        debug!(request = id, "comparing");
        let account = call.account.clone();
        let stream = stream.inspect_ok(move |told| {
            if let Some(compare_event::Event::Generation(told)) = &told.event {
                note_cost(&account, told);
            }
        });
        Ok(Response::new(guarded(stream, call, id)))
    }
}

/// A request that its model can run.
pub struct Checked {
    pub model: Served,
    pub request: engine::Request,
}

impl Checked {
    pub async fn new(registry: &Registry, mut request: GenerateRequest, id: String, call: &Call) -> Result<Self, Status> {
        if registry.log_prompts {
            let GenerateRequest { prompt, template, suffix, .. } = &request;
            info!(request = id, ?prompt, ?template, ?suffix, "asked");
        }
        let model = registry.find(&request.model)?;
        call.account.model(&model.info.name);
        call.access.model(&model.info.name)?;
        shorten(&mut request, &call.access, model.info.default_canvas());
        let (info, deadline) = (model.info.clone(), call.deadline);
        let checked = registry.off_thread(move || convert::check(&info, request, id, deadline));
        let mut request = checked.await??;
        request.trace = call.account.trace();
        call.access.new_tokens(request.canvas.holes())?;
        Ok(Self { model, request })
    }

    /// Hands it to the engine. The events are those of the API, and end with the first error.
    pub fn submit(self, call: Call) -> Result<EventStream, Status> {
        let Self { model, request } = self;
        let id = request.id.clone();
        let translator = Translator::new(model.clone(), &request, call.arrived.elapsed());
        let events = model.engine.submit(request).map_err(|refused| status::refused(&refused))?;
        debug!(request = id, model = model.info.name, "submitted");
        let reader = Reader::new(events, translator, call.deadline);
        let stream = stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            let event = reader.next().await;
            let more = matches!(event, Ok((_, true)));
            Some((event.map(|(event, _)| event), more.then_some(reader)))
        });
        let account = call.account.clone();
        let stream = stream.inspect_ok(move |told| note_cost(&account, told));
        Ok(guarded(stream, call, id))
    }
}

/// What a request has cost is told with its end.
fn note_cost(account: &Account, told: &GenerateEvent) {
    if let Some(generate_event::Event::Finished(proto::Finished { usage: Some(usage), .. })) = &told.event {
        account.cost(usage.prompt_tokens, usage.generated_tokens, usage.steps);
    }
}

/// A request that does not say how long its text may be asks for no more than it may.
fn shorten(request: &mut GenerateRequest, access: &Access, usual: usize) {
    if let Some(fewer) = access.fewer_new_tokens(usual).filter(|_| request.template.is_empty()) {
        request.stopping.get_or_insert_default().max_new_tokens.get_or_insert(fewer);
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
    deadline: Instant,
}

impl Reader {
    pub fn new(events: mpsc::Receiver<Result<Event, Failure>>, translator: Translator, deadline: Instant) -> Self {
        Self { events, translator, deadline }
    }

    /// The next event, and whether more will follow. The deadline is the engine's too; here it covers an engine that is stuck.
    pub async fn next(&mut self) -> Result<(GenerateEvent, bool), Status> {
        let id = self.translator.id();
        match tokio::time::timeout_at(self.deadline.into(), self.events.recv()).await {
            Ok(Some(Ok(event))) => {
                let more = !matches!(event, Event::Finished { .. });
                if let Event::Finished { usage, .. } = &event {
                    debug!(request = id, tokens = usage.generated_tokens, steps = usage.steps, "finished");
                }
                Ok((self.translator.translate(event), more))
            }
            Ok(Some(Err(failure))) => {
                debug!(request = id, %failure, "ended");
                Err(status::failure(&failure, id))
            }
            Ok(None) => Err(status::fault("the engine let go of a request without a word", Some(id))),
            Err(_) => Err(status::failure(&Failure::DeadlineExceeded, id)),
        }
    }
}
