//! The rim of both ports: every call, whatever becomes of it, is counted, timed and logged once, and has its span.
//!
//! The layer stands outside of everything that may refuse a call. It gives each an [`Account`], which handlers find in the request's
//! extensions and tell what the call turned out to be about; it is closed with the last byte of the response, or when the client lets
//! go of it.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Bytes, HttpBody};
use axum::extract::MatchedPath;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body::{Frame, SizeHint};
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::Code;
use tower::{Layer, Service};

use super::Telemetry;
use super::account::{Account, Closing, Outcome};

/// Names the call, from its client or to it.
const REQUEST_ID: &str = "x-request-id";
/// Stands for every method that is not published: strangers do not choose labels.
const OTHER: &str = "other";

/// The layer.
#[derive(Clone)]
pub struct Calls {
    telemetry: Telemetry,
    methods: Arc<BTreeSet<String>>,
}

impl Calls {
    /// For the gRPC methods of these descriptors, and the router's own paths.
    pub fn new(telemetry: Telemetry, descriptors: &[&[u8]]) -> Self {
        let files = descriptors.iter().filter_map(|bytes| FileDescriptorSet::decode(*bytes).ok()).flat_map(|set| set.file);
        let services = files.flat_map(|file| {
            let package = file.package().to_owned();
            file.service.into_iter().map(move |service| (format!("{package}.{}", service.name()), service))
        });
        let methods = services
            .flat_map(|(name, service)| service.method.into_iter().map(move |method| format!("{name}/{}", method.name())));
        Self { telemetry, methods: Arc::new(methods.collect()) }
    }

    /// The method that a request is for: a published one of gRPC, or the path of a route.
    fn method<B>(&self, request: &Request<B>) -> String {
        let method = self.methods.get(request.uri().path().trim_start_matches('/')).map(String::as_str);
        let route = || request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        method.or_else(route).unwrap_or(OTHER).to_owned()
    }
}

impl<S> Layer<S> for Calls {
    type Service = Accounted<S>;

    fn layer(&self, inner: S) -> Accounted<S> {
        Accounted { inner, calls: self.clone() }
    }
}

/// A service whose calls are accounted for.
#[derive(Clone)]
pub struct Accounted<S> {
    inner: S,
    calls: Calls,
}

impl<S, B, R> Service<Request<B>> for Accounted<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Infallible>,
    S::Future: Send + 'static,
    R: HttpBody<Data = Bytes> + Unpin,
{
    type Response = Response<Watched<R>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let method = self.calls.method(&request);
        let asked = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let account = Account::open(&self.calls.telemetry, method, asked, request.headers());
        request.extensions_mut().insert(account.clone());
        let bodiless = request.method() == Method::HEAD;
        // Dropped with the future, should the client let go before there is a response.
        let closing = Closing::new(account.clone());
        let handled = self.inner.call(request);
        Box::pin(async move {
            let Ok(mut response) = handled.await;
            if let Ok(id) = HeaderValue::from_str(&account.id()) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            let kind = response.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            let grpc = kind.is_some_and(|kind| kind.starts_with("application/grpc"));
            let at_end = (!grpc).then_some(Outcome::Http(response.status()));
            note_grpc(&account, response.headers());
            if bodiless {
                // Nobody will ask for the body.
                account.settle(Outcome::Http(response.status()));
            }
            Ok(response.map(|body| Watched::new(body, account, at_end, Some(closing))))
        })
    }
}

/// A response's body, watched for the status in its trailers and for its end.
pub struct Watched<B> {
    body: B,
    account: Account,
    /// What its end means, where it does not say so itself.
    at_end: Option<Outcome>,
    closing: Option<Closing>,
}

impl<B: HttpBody> Watched<B> {
    fn new(body: B, account: Account, at_end: Option<Outcome>, closing: Option<Closing>) -> Self {
        let mut watched = Self { body, account, at_end, closing };
        if watched.body.is_end_stream() {
            watched.end();
        }
        watched
    }

    /// Watches for the status only: within gRPC-web, which hides the trailers from whoever stands outside of it.
    pub fn within(response: Response<B>, account: &Account) -> Response<Self> {
        note_grpc(account, response.headers());
        response.map(|body| Self::new(body, account.clone(), None, None))
    }

    fn end(&mut self) {
        if let Some(outcome) = self.at_end.take() {
            self.account.settle(outcome);
        }
        self.closing = None;
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Watched<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(trailers) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref()) {
            note_grpc(&self.account, trailers);
        }
        let last = match &frame {
            None => true,
            Some(Ok(frame)) => frame.is_trailers() || self.body.is_end_stream(),
            Some(Err(_)) => false,
        };
        if last {
            self.end();
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

/// Takes the gRPC status out of headers or trailers that have it.
fn note_grpc(account: &Account, headers: &HeaderMap) {
    if let Some(code) = headers.get("grpc-status") {
        account.settle(Outcome::Grpc(Code::from_bytes(code.as_bytes())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_published_becomes_a_label() {
        let calls =
            Calls::new(Telemetry::default(), &[crate::service::proto::DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET]);
        for (path, method) in [
            ("/lacuna.v1.Generation/Generate", "lacuna.v1.Generation/Generate"),
            ("/grpc.health.v1.Health/Check", "grpc.health.v1.Health/Check"),
            ("/lacuna.v1.Generation/Nothing", OTHER),
            ("/anything?at=all", OTHER),
        ] {
            let request = Request::builder().uri(path).body(()).expect("a request");
            assert_eq!(calls.method(&request), method);
        }
    }
}
