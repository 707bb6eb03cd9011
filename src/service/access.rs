//! Who may call what: the layer in front of both ports that asks for tokens, and what a token's limits mean to a call.
//!
//! A call that was let in carries its [`Access`]; handlers ask that before they act. Without tokens everybody may do everything. How many
//! requests a token may have is [`super::tokens`]' business.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{Extensions, HeaderValue, Method, header};
use hyper::body::{Frame, SizeHint};
use tonic::Status;

use super::tokens::{Entry, Pass, Tokens};
use super::{proto, status};
use crate::http::api::Error;
use crate::telemetry::Account;

/// The health service, for which nobody needs a token.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// The part of the HTTP port that needs one, beside gRPC-web: the rest is health, metrics and the page's files.
const API: &str = "/v1/";

/// The layer's state.
#[derive(Clone)]
pub struct Door {
    pub tokens: Option<Arc<Tokens>>,
    /// Whether this is the gRPC port, where everything but health needs a token.
    pub grpc: bool,
}

impl Door {
    fn asks(&self, request: &Request) -> bool {
        let path = request.uri().path();
        if path.starts_with(HEALTH) {
            return false;
        }
        let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        // A browser asks whether it may ask before it sends what a page wants sent, its token included.
        let preflight = request.method() == Method::OPTIONS;
        self.grpc || speaks_grpc(request) || !reads || (path.starts_with(API) && !preflight)
    }
}

fn speaks_grpc(request: &Request) -> bool {
    grpc_type(request).is_some()
}

fn grpc_type(request: &Request) -> Option<&HeaderValue> {
    request.headers().get(header::CONTENT_TYPE).filter(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// The layer, for `axum::middleware::from_fn_with_state`.
pub async fn admit(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let Some(tokens) = door.tokens.as_ref().filter(|_| door.asks(&request)) else { return next.run(request).await };
    match tokens.admit(request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes)) {
        Ok(pass) => {
            Account::of(request.extensions()).client(&pass.entry.name);
            request.extensions_mut().insert(Access(Some(pass.entry.clone())));
            next.run(request).await.map(|body| Body::new(Held::new(body, pass)))
        }
        Err(turned) => {
            let status = status::turned(&turned);
            let mut response = match grpc_type(&request) {
                Some(kind) => in_grpc(&status, kind.clone()),
                None if door.grpc => status.into_http(),
                None => Error::of(&status, str::to_owned).into_response(),
            };
            if response.status() == http::StatusCode::UNAUTHORIZED {
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            response
        }
    }
}

/// A status without a body, in the client's own kind of gRPC.
fn in_grpc(status: &Status, kind: HeaderValue) -> Response {
    let mut response = status.clone().into_http();
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// A response's body: the request is under way until all of it is handed over, or it is dropped.
struct Held {
    body: Body,
    /// Gone before the client can see the end, and send its next request.
    pass: Option<Pass>,
}

impl Held {
    fn new(body: Body, pass: Pass) -> Self {
        Self { pass: (!body.is_end_stream()).then_some(pass), body }
    }
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let more = matches!(&frame, Some(Ok(frame)) if !frame.is_trailers());
        if !more || self.body.is_end_stream() {
            self.pass = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What a call may do, by its token.
#[derive(Clone, Debug, Default)]
pub struct Access(Option<Arc<Entry>>);

impl Access {
    /// That of a request, by its extensions.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    pub fn model(&self, model: &str) -> Result<(), Status> {
        match self.0.as_deref() {
            Some(Entry { name, models: Some(models), .. }) if !models.iter().any(|allowed| allowed == model) => {
                let allowed = models.join(", ");
                Err(status::denied("MODEL_NOT_ALLOWED", format!("model: {name} may not use '{model}', only {allowed}")))
            }
            _ => Ok(()),
        }
    }

    /// Whether so many new tokens may be asked for.
    pub fn new_tokens(&self, asked: usize) -> Result<(), Status> {
        match self.0.as_deref() {
            Some(Entry { name, max_new_tokens: Some(max), .. }) if asked as u64 > *max => {
                let reason = format!("{name} may ask for {max} new tokens in a request, not for {asked}");
                Err(status::denied("TOO_MANY_NEW_TOKENS", reason))
            }
            _ => Ok(()),
        }
    }

    /// How many new tokens a request gets that does not say, if fewer than the model would give it.
    pub fn fewer_new_tokens(&self, usual: usize) -> Option<u64> {
        self.0.as_ref()?.max_new_tokens.filter(|max| *max < usual as u64)
    }

    /// Whether models may be loaded and unloaded.
    pub fn admin(&self) -> Result<(), Status> {
        match self.0.as_deref() {
            Some(Entry { name, admin: false, .. }) => {
                let reason = format!("{name} may not load and unload models: that takes a token with admin = true");
                Err(status::denied("ADMIN_NEEDED", reason))
            }
            _ => Ok(()),
        }
    }

    /// As the service tells it to whoever asks.
    pub fn describe(&self) -> Option<proto::Caller> {
        let entry = self.0.as_ref()?;
        Some(proto::Caller {
            name: entry.name.clone(),
            admin: entry.admin,
            requests_in_flight_max: entry.requests_in_flight,
            requests_per_minute_max: entry.requests_per_minute,
            max_new_tokens: entry.max_new_tokens,
            models: entry.models.clone().unwrap_or_default(),
        })
    }
}
