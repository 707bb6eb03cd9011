//! The API that most clients speak, in OpenAI's shapes: models, chat, completions, and completions between two texts.
//!
//! A body becomes the very message that gRPC would have brought (`ask`), is checked and run by the same code, and its events come
//! back as deltas (`choice`) in JSON (`answer`). What goes wrong is told in this API's form (`error`). docs/HTTP.md is for clients.

mod answer;
mod ask;
mod choice;
mod error;
mod fields;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures::FutureExt;
use futures::stream::{self, Stream, StreamExt};
use http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};
use tonic::Status;

use crate::engine::Method;
use crate::service::boundary::{Boundary, Call};
use crate::service::generation::Checked;
use crate::service::models::describe;
use crate::service::proto::{ModelState, Usage};
use crate::service::registry::Registry;
use crate::service::{Served, status};
use crate::telemetry::{Account, Outcome};
use answer::{Answer, Whole};
pub use ask::CHOICES_MAX;
use ask::{Ask, Endpoint};
use choice::{Choice, Delta};
pub use error::Error;

/// A comment goes out when nothing else has for so long, so that nobody between us and a client thinks that the connection is dead.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

#[derive(Clone)]
struct Api {
    registry: Arc<Registry>,
    /// When the models were put here, in seconds since 1970.
    since: u64,
}

type Deltas = Pin<Box<dyn Stream<Item = Result<Delta, Status>> + Send>>;

/// Everything below `/v1`.
pub fn router(registry: Arc<Registry>, boundary: Boundary, body_bytes_max: usize) -> Router {
    let generate = |endpoint| {
        post(
            move |State(api): State<Api>,
                  Extension(call): Extension<Call>,
                  headers: HeaderMap,
                  body: Result<Bytes, BytesRejection>| { generate(endpoint, api, call, headers, body) },
        )
    };
    Router::new()
        .route("/models", get(models))
        .route("/models/{name}", get(model))
        .route("/chat/completions", generate(Endpoint::Chat))
        .route("/completions", generate(Endpoint::Completion))
        .route("/fim/completions", generate(Endpoint::Fim))
        .fallback(async || Error::not_found())
        .method_not_allowed_fallback(async || Error::method_not_allowed())
        .with_state(Api { registry, since: now() })
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .layer(middleware::from_fn_with_state(boundary, admit))
}

/// What every call passes: a deadline and a net for panics. It counts as running until its body is sent.
async fn admit(State(boundary): State<Boundary>, mut request: Request, next: Next) -> Response {
    let call = boundary.begin(request.extensions(), Duration::MAX);
    request.extensions_mut().insert(call.clone());
    let handled = AssertUnwindSafe(next.run(request)).catch_unwind();
    match tokio::time::timeout_at(call.deadline.into(), handled).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => told(&status::fault("a handler panicked", Some(&call.account.id()))).into_response(),
        Err(_) => told(&status::deadline_exceeded()).into_response(),
    }
}

fn told(status: &Status) -> Error {
    Error::of(status, str::to_owned)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn models(State(api): State<Api>) -> Json<Value> {
    let away = |(id, state): (String, ModelState)| {
        let state = state.as_str_name().trim_start_matches("MODEL_STATE_").to_lowercase();
        json!({"id": id, "object": "model", "created": api.since, "owned_by": "lacuna", "lacuna": {"state": state}})
    };
    let ready = api.registry.all();
    let models: Vec<Value> =
        ready.iter().map(|model| shown(model, api.since)).chain(api.registry.away().into_iter().map(away)).collect();
    Json(json!({"object": "list", "data": models}))
}

async fn model(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let model = api.registry.find(&name).map_err(|status| told(&status))?;
    Ok(Json(shown(&model, api.since)))
}

fn shown(served: &Served, since: u64) -> Value {
    let model = describe(served);
    let can = model.capabilities.unwrap_or_default();
    let drafters = served.info.drafters.iter().filter(|_| can.autoregressive).map(|drafter| drafter.kind.name());
    json!({
        "id": model.name,
        "object": "model",
        "created": since,
        "owned_by": "lacuna",
        "lacuna": {
            "state": "ready",
            "family": model.family,
            "parameters": model.parameters,
            "dtype": model.dtype,
            "device": model.device,
            "context": model.context,
            "default_max_new_tokens": model.default_max_new_tokens,
            "capabilities": {
                "diffusion": can.diffusion,
                "autoregressive": can.autoregressive,
                "infill": can.infill,
                "chat": can.chat,
            },
            "drafters": drafters.collect::<Vec<_>>(),
        },
    })
}

async fn generate(
    endpoint: Endpoint,
    api: Api,
    call: Call,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Error> {
    // A page of another origin can send a body without asking first, but not as this type.
    let json = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()?.split(';').next());
    if !json.is_some_and(|json| json.trim().eq_ignore_ascii_case("application/json")) {
        return Err(Error::content_type());
    }
    let body = body.map_err(|rejected| Error::body(rejected.status(), rejected.body_text()))?;
    let mut ask = Ask::read(endpoint, &body)?;
    drop(body);
    let request = std::mem::take(&mut ask.request);
    let refused = |status: Status| Error::of(&status, |field| ask.path(field));
    let checked = Checked::new(&api.registry, request, call.account.id(), &call).await.map_err(refused)?;
    if ask.diffusing && !matches!(checked.request.method, Method::Diffusion(_)) {
        return Err(Error::field("diffusing", "text that comes from left to right has no drafts: leave it out"));
    }
    let answer = Answer { endpoint, request_id: call.account.id(), created: now(), model: checked.model.info.name.clone() };
    let mut deltas = submit(&ask, checked, &call).map_err(refused)?;
    // The status line waits for the first event: what ends a request before its turn still gets a status of its own.
    let Some(first) = deltas.next().await else {
        return Err(told(&status::fault("a request had no events", Some(&call.account.id()))));
    };
    let deltas: Deltas = Box::pin(stream::iter([first.map_err(|status| told(&status))?]).map(Ok).chain(deltas));
    if ask.stream { Ok(streamed(deltas, answer, &ask, call.account)) } else { whole(deltas, &answer, &ask).await }
}

/// Hands every choice to the engine. The first error of any ends the stream, and whoever drops it cancels them all.
fn submit(ask: &Ask, checked: Checked, call: &Call) -> Result<Deltas, Status> {
    let Checked { model, request } = checked;
    // Several choices are one request to whoever bounds its tokens.
    call.access.new_tokens(request.canvas.holes() * ask.choices as usize)?;
    let choice = |index: u64| {
        let request = match ask.choices {
            1 => request.clone(),
            _ => request.again(format!("{}.{index}", request.id), request.method.seed().wrapping_add(index)),
        };
        let mut choice = Choice::new(index, ask, model.info.clone());
        let events = Checked { model: model.clone(), request }.submit(call.clone())?;
        Ok(events.filter_map(move |event| std::future::ready(event.and_then(|event| choice.take(event)).transpose())))
    };
    let choices = (0..ask.choices).map(choice).collect::<Result<Vec<_>, Status>>()?;
    Ok(Box::pin(stream::select_all(choices)))
}

async fn whole(mut deltas: Deltas, answer: &Answer, ask: &Ask) -> Result<Response, Error> {
    let mut choices: Vec<Whole> = (0..ask.choices).map(|_| Whole::default()).collect();
    while let Some(delta) = deltas.next().await {
        let delta = delta.map_err(|status| told(&status))?;
        if let Some(choice) = choices.get_mut(delta.index as usize) {
            choice.add(delta);
        }
    }
    Ok(Json(answer.whole(&choices, ask.logprobs.is_some())).into_response())
}

fn streamed(deltas: Deltas, answer: Answer, ask: &Ask, account: Account) -> Response {
    let sending = Sending {
        deltas: Some(deltas),
        answer,
        include_usage: ask.include_usage,
        usages: vec![],
        tail: VecDeque::new(),
        account,
    };
    let events = stream::unfold(sending, |mut sending| async {
        let data = sending.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), sending))
    });
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEPALIVE_INTERVAL)).into_response();
    // nginx would otherwise gather the events before it hands them on.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// A stream of events on its way to the client.
struct Sending {
    /// Gone once they have ended.
    deltas: Option<Deltas>,
    answer: Answer,
    include_usage: bool,
    usages: Vec<Usage>,
    /// What follows the deltas.
    tail: VecDeque<String>,
    account: Account,
}

impl Sending {
    /// The next event's data.
    async fn next(&mut self) -> Option<String> {
        while let Some(deltas) = &mut self.deltas {
            match deltas.next().await {
                // A chat begins with a role, a completion with text.
                Some(Ok(delta)) if delta.first && delta.text.is_empty() && self.answer.endpoint != Endpoint::Chat => continue,
                Some(Ok(delta)) => {
                    self.usages.extend(delta.end.iter().map(|end| end.usage.clone()));
                    return Some(self.answer.chunk(&delta, self.include_usage).to_string());
                }
                // Too late for a status line. Clients of this API know an error by its name, and by the missing end.
                Some(Err(status)) => {
                    let error = told(&status);
                    self.account.settle(Outcome::Http(error.status));
                    self.tail.push_back(error.json().to_string());
                }
                None => {
                    let usage = self.include_usage.then(|| self.answer.usage_chunk(&self.usages).to_string());
                    self.tail.extend(usage);
                    self.tail.push_back("[DONE]".into());
                }
            }
            self.deltas = None;
        }
        self.tail.pop_front()
    }
}
