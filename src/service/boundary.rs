//! What every call passes before and after its handler: a deadline, a net for panics, and statuses for messages that could not be
//! read.
//!
//! tonic's services have no deadline, and its decoder blames the server (INTERNAL) for a client's malformed message. This layer stands
//! around them and corrects both. It knows no service.

use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::FutureExt;
use http::{Extensions, Request, Response};
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::access::Access;
use super::{convert, status};
use crate::telemetry::{Account, Watched};

/// Our deadline is this much earlier than the client's, so that it fires before the timer of tonic's clients, which would say CANCELLED.
const MARGIN: Duration = Duration::from_millis(2);

/// A running call, found in the request's extensions. The call counts as running until the last clone is dropped.
#[derive(Clone)]
pub struct Call {
    pub arrived: Instant,
    /// What is told of it when it is over.
    pub account: Account,
    /// The client's deadline, or the server's own bound where that is earlier.
    pub deadline: Instant,
    /// What the client may do.
    pub access: Access,
    _running: Arc<Running>,
}

impl Call {
    /// Takes the call out of a request. The boundary puts one into each.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Self>().cloned().ok_or_else(|| status::fault("the call has no deadline", None))
    }

    /// What its client calls it, or else we do.
    pub fn name(&self, asked: Option<&str>) -> Result<String, Status> {
        let Some(asked) = asked else { return Ok(self.account.id()) };
        let id = convert::request_id(Some(asked))?;
        self.account.named(&id);
        Ok(id)
    }
}

/// One call in the count of running ones.
struct Running(Arc<watch::Sender<usize>>);

impl Running {
    fn new(count: &Arc<watch::Sender<usize>>) -> Arc<Self> {
        count.send_modify(|running| *running += 1);
        Arc::new(Self(count.clone()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.send_modify(|running| *running -= 1);
    }
}

/// The layer.
#[derive(Clone)]
pub struct Boundary {
    time_max: Duration,
    running: Arc<watch::Sender<usize>>,
}

impl Boundary {
    pub fn new(time_max: Duration) -> Self {
        Self { time_max, running: Arc::new(watch::channel(0).0) }
    }

    /// A call that begins now, and may take no longer than `asked`.
    pub fn begin(&self, extensions: &Extensions, asked: Duration) -> Call {
        let arrived = Instant::now();
        Call {
            arrived,
            account: Account::of(extensions),
            deadline: arrived + asked.min(self.time_max),
            access: Access::of(extensions),
            _running: Running::new(&self.running),
        }
    }

    /// How many calls run.
    pub fn calls(&self) -> watch::Receiver<usize> {
        self.running.subscribe()
    }
}

impl<S> Layer<S> for Boundary {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, boundary: self.clone() }
    }
}

/// A service behind the boundary.
#[derive(Clone)]
pub struct Guarded<S> {
    inner: S,
    boundary: Boundary,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let asked = match request.headers().get("grpc-timeout").map(|value| timeout(value.as_bytes())) {
            Some(None) => {
                let status = status::bad_field("grpc-timeout", "it is not 1 to 8 digits and a unit of H, M, S, m, u or n");
                return Box::pin(std::future::ready(Ok(status.into_http())));
            }
            Some(Some(timeout)) => timeout.saturating_sub(MARGIN),
            None => Duration::MAX,
        };
        let call = self.boundary.begin(request.extensions(), asked);
        let account = call.account.clone();
        request.extensions_mut().insert(call.clone());
        let handled = AssertUnwindSafe(self.inner.call(request)).catch_unwind();
        Box::pin(async move {
            // Also covers a client that never sends the rest of its message.
            let handled = tokio::time::timeout_at(call.deadline.into(), handled).await;
            drop(call);
            let response = match handled {
                Ok(Ok(Ok(response))) => blame(response),
                Ok(Err(_)) => status::fault("a handler panicked", Some(&account.id())).into_http(),
                Err(_) => status::deadline_exceeded().into_http(),
            };
            let watched = Watched::within(response, &account);
            Ok(watched.map(Body::new))
        })
    }
}

/// Corrects tonic's statuses for requests that it could not read. Our own INTERNAL always has details, tonic's never has, and
/// only tonic says OUT_OF_RANGE.
fn blame(response: Response<Body>) -> Response<Body> {
    let corrected = response.extensions().get::<Status>().and_then(|given| match given.code() {
        tonic::Code::Internal if given.details().is_empty() => Some(status::unreadable(given.message())),
        tonic::Code::OutOfRange => Some(status::oversize(given.message())),
        _ => None,
    });
    corrected.map_or(response, Status::into_http)
}

/// Reads a `grpc-timeout`: 1 to 8 digits and a unit.
fn timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits.iter().fold(0, |count, digit| count * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt;

    use super::*;
    use crate::http::listen::{Acceptor, Port, Stage};
    use crate::telemetry::{Calls, Telemetry, panics};

    /// What the service behind the boundary does.
    #[derive(Clone, Copy)]
    enum Behaviour {
        Panic,
        Hang,
    }

    impl Service<Request<Body>> for Behaviour {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            match self {
                Behaviour::Panic => Box::pin(async { panic!("as the test wants it") }),
                Behaviour::Hang => Box::pin(std::future::pending()),
            }
        }
    }

    async fn status_of(behaviour: Behaviour, timeout: &'static str) -> Status {
        let boundary = Boundary::new(Duration::from_millis(20));
        let calls = boundary.calls();
        let mut request = Request::new(Body::default());
        request.headers_mut().insert("grpc-timeout", http::HeaderValue::from_static(timeout));
        let answer = boundary.layer(behaviour).call(request);
        assert_eq!(*calls.borrow(), 1);
        let Ok(response) = answer.await;
        assert_eq!(*calls.borrow(), 0, "the call no longer counts");
        response.extensions().get::<Status>().cloned().expect("a status")
    }

    /// A panic on one stream of a connection, and calls on the others: over the network, through all that a call passes.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_ends_one_call_and_is_counted() {
        panics::watch();
        let before = panics::count();
        let telemetry = Telemetry::default();
        let handle = |request: Request<Body>| async move {
            assert_ne!(request.uri().path(), "/panic", "as the test wants it");
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok::<_, Infallible>(Status::not_found("nothing is here").into_http())
        };
        let service = Boundary::new(Duration::from_secs(60)).layer(tower::service_fn(handle));
        let service = service.map_request(|request: Request<axum::body::Body>| request.map(Body::new));
        let router = axum::Router::new().fallback_service(service).layer(Calls::new(telemetry.clone(), &[]));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let port = Port {
            listener,
            acceptor: Acceptor::Plain,
            http2_only: true,
            connections_max: 4,
            streams_per_connection_max: 16,
            stall_time_max: Duration::from_secs(60),
        };
        let (_stage, stages) = watch::channel(Stage::Open);
        tokio::spawn(port.serve(router, stages));

        let stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
        let (mut sender, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        tokio::spawn(async move { drop(connection.await) });
        let mut answers = vec![];
        for path in ["/one", "/panic", "/two", "/panic", "/three"] {
            sender = sender.ready().await.expect("room for a stream");
            let request = Request::post(format!("http://{address}{path}")).header("content-type", "application/grpc");
            let (answer, _) = sender.send_request(request.body(()).expect("a request"), true).expect("a stream");
            answers.push(answer);
        }
        let mut codes = vec![];
        for answer in answers {
            let answer = answer.await.expect("an answer");
            codes.push(answer.headers().get("grpc-status").expect("a status").to_str().expect("ascii").to_owned());
        }
        assert_eq!(codes, ["5", "13", "5", "13", "5"]);
        assert!(panics::count() >= before + 2);
        let figures = telemetry.metrics.render();
        for line in [
            "lacuna_requests_total{model=\"\",method=\"other\",code=\"INTERNAL\"} 2",
            "lacuna_requests_total{model=\"\",method=\"other\",code=\"NOT_FOUND\"} 3",
            "lacuna_requests_inflight{method=\"other\"} 0",
        ] {
            assert!(figures.contains(line), "{line}: {figures}");
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error_with_an_id() {
        let status = status_of(Behaviour::Panic, "1H").await;
        assert_eq!(status.code(), tonic::Code::Internal);
        let id = tonic_types::StatusExt::get_details_request_info(&status).expect("a request id").request_id;
        assert!(status.message().contains(&id));
    }

    #[tokio::test]
    async fn a_handler_that_hangs_meets_its_deadline() {
        // The client's, one that has passed on arrival, and the server's own.
        for timeout in ["5m", "1n", "1H"] {
            assert_eq!(status_of(Behaviour::Hang, timeout).await.code(), tonic::Code::DeadlineExceeded);
        }
    }

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        assert_eq!(timeout(b"200m"), Some(Duration::from_millis(200)));
        assert_eq!(timeout(b"99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout(b"0n"), Some(Duration::ZERO));
        for bad in [&b""[..], b"m", b"5", b"-1S", b"123456789S", b"5s", b"5 S", b"\xff"] {
            assert_eq!(timeout(bad), None, "{bad:?}");
        }
    }
}
