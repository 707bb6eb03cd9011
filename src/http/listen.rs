//! One accept loop for both ports: bounds on who may stay, and how a port closes.
//!
//! Everything that a peer may do by saying or taking nothing has a bound here: the handshake and the first bytes, a header's length and
//! time, a silent HTTP/2 connection, one that nobody reads from, the number of connections. It knows neither gRPC nor what is served.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Sleep;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::together::Together;
use crate::service::tls::Tls;

/// A browser's or proxy's worth of headers; ours are a few hundred bytes.
pub const HEADER_BYTES_MAX: u32 = 16 << 10;
/// What HTTP/1.1 reads before it has the whole header, which this bounds too.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// A header in HTTP/1.1, from its first byte or from the end of the answer before it: idle connections end with it.
pub const HEADER_TIME_MAX: Duration = Duration::from_secs(30);
/// A TLS handshake, and thereafter the bytes that tell HTTP/1.1 from HTTP/2.
pub const OPENING_TIME_MAX: Duration = Duration::from_secs(10);
/// How often a quiet HTTP/2 connection is asked for a sign of life, and how long it may take to give one.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams that a client may reset before they are accepted, per connection: a bound on the rapid-reset attack.
pub const PENDING_RESETS_MAX: usize = 32;
/// How long to leave a listener alone that has no file descriptor for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What every HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What stands between TCP and HTTP.
#[derive(Clone, Default)]
pub enum Acceptor {
    #[default]
    Plain,
    Tls(Tls),
}

/// Anything that bytes come through.
trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

impl Acceptor {
    async fn accept(&self, stream: TcpStream) -> io::Result<Box<dyn Transport>> {
        Ok(match self {
            Self::Plain => Box::new(stream),
            Self::Tls(tls) => Box::new(tls.acceptor().accept(stream).await?),
        })
    }
}

/// How far a port has closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub enum Stage {
    Open,
    /// No further connections. Those there are may go on, and be told by us that no further calls are taken.
    Draining,
    /// Connections are asked to end when their calls have.
    Closing,
}

/// A port to serve.
pub struct Port {
    pub listener: TcpListener,
    pub acceptor: Acceptor,
    /// HTTP/2 alone, as gRPC has it.
    pub http2_only: bool,
    pub connections_max: usize,
    /// Concurrent calls on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// How long a peer may take none of the bytes that are ready for it.
    pub stall_time_max: Duration,
}

impl Port {
    /// Serves `router` until `stage` is [`Stage::Closing`] and every connection has ended, which may take for ever.
    pub async fn serve(self, router: Router, mut stage: watch::Receiver<Stage>) {
        let builder = self.builder();
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(self.connections_max));
        let Self { listener, acceptor, stall_time_max, .. } = self;
        loop {
            let accepted = tokio::select! {
                // A dropped sender means the same.
                _ = stage.wait_for(|stage| *stage >= Stage::Draining) => break,
                accepted = accept(&listener, &places) => accepted,
            };
            let Some((stream, place)) = accepted else { continue };
            let (acceptor, builder, watcher, router) = (acceptor.clone(), builder.clone(), graceful.watcher(), router.clone());
            tokio::spawn(async move {
                let _place = place;
                let opened = tokio::time::timeout(OPENING_TIME_MAX, acceptor.accept(stream)).await;
                let Ok(Ok(transport)) = opened else { return debug!("a handshake failed") };
                let service = router.map_request(|request: http::Request<Incoming>| request.map(Body::new));
                let io = TokioIo::new(Together::new(Bounded::new(transport, stall_time_max)));
                let connection = builder.serve_connection(io, TowerToHyperService::new(service)).into_owned();
                if let Err(error) = watcher.watch(connection).await {
                    debug!(error, "a connection failed");
                }
            });
        }
        // From here on the operating system refuses connections.
        drop(listener);
        let _ = stage.wait_for(|stage| *stage == Stage::Closing).await;
        graceful.shutdown().await;
    }

    fn builder(&self) -> Builder<TokioExecutor> {
        let mut builder = Builder::new(TokioExecutor::new());
        if self.http2_only {
            builder = builder.http2_only();
        }
        let timer = TokioTimer::new();
        builder.http1().timer(timer.clone()).header_read_timeout(HEADER_TIME_MAX).max_buf_size(BUFFER_BYTES_MAX);
        builder
            .http2()
            .timer(timer)
            .max_concurrent_streams(self.streams_per_connection_max)
            .max_header_list_size(HEADER_BYTES_MAX)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
            .max_local_error_reset_streams(PENDING_RESETS_MAX);
        builder
    }
}

/// The next connection, once there is a place for it: until then peers wait in the operating system's queue.
async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => {
            // Events are small and should leave at once. A socket that cannot do it serves all the same.
            let _ = stream.set_nodelay(true);
            Some((stream, place))
        }
        Err(error) => {
            let gone = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionRefused];
            if !gone.contains(&error.kind()) {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None
        }
    }
}

/// A peer's bytes, and how long it may be silent where hyper would wait for ever: before it has said which protocol it speaks, and while
/// it takes nothing of what it is sent.
struct Bounded {
    transport: Box<dyn Transport>,
    /// Bytes of HTTP/2's preface that have come.
    matched: usize,
    /// Gone once the protocol is known.
    opening: Option<Pin<Box<Sleep>>>,
    stall_time_max: Duration,
    /// Runs while bytes wait for the peer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Bounded {
    fn new(transport: Box<dyn Transport>, stall_time_max: Duration) -> Self {
        let opening = Some(Box::pin(tokio::time::sleep(OPENING_TIME_MAX)));
        Self { transport, matched: 0, opening, stall_time_max, stalled: None }
    }

    /// What came of sending: an error if the peer has stood still for too long.
    fn sent<T>(&mut self, context: &mut Context<'_>, sent: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if sent.is_ready() {
            self.stalled = None;
            return sent;
        }
        let stall_time_max = self.stall_time_max;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall_time_max)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Bounded {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let start = buffer.filled().len();
        let read = Pin::new(&mut self.transport).poll_read(context, buffer);
        if let Some(opening) = &mut self.opening {
            if read.is_pending() {
                ready!(opening.as_mut().poll(context));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            let (read, expected) = (&buffer.filled()[start..], &PREFACE[self.matched..]);
            let common = read.iter().zip(expected).take_while(|(read, expected)| read == expected).count();
            if common == expected.len() || common < read.len() || read.is_empty() {
                self.opening = None;
            }
            self.matched += common;
        }
        read
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.transport).poll_write(context, bytes);
        self.sent(context, sent)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut self.transport).poll_flush(context);
        self.sent(context, sent)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut self.transport).poll_shutdown(context);
        self.sent(context, sent)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.transport).poll_write_vectored(context, slices);
        self.sent(context, sent)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What a read finds after `said`, an hour later.
    async fn hear(said: &[u8]) -> io::Result<()> {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut bounded = Bounded::new(Box::new(ours), Duration::MAX);
        theirs.write_all(said).await?;
        let mut heard = vec![0; said.len()];
        bounded.read_exact(&mut heard).await?;
        assert_eq!(heard, said);
        tokio::select! {
            read = bounded.read_u8() => read.map(drop),
            () = tokio::time::sleep(Duration::from_secs(3600)) => Ok(()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_say_what_it_speaks_is_left() {
        for (said, left) in [(&b""[..], true), (b"PRI * HT", true), (PREFACE, false), (b"GET /", false), (b"PO", false)] {
            let heard = hear(said).await.map_err(|error| error.kind());
            let expected = if left { Err(io::ErrorKind::TimedOut) } else { Ok(()) };
            assert_eq!(heard, expected, "{}", String::from_utf8_lossy(said));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_left_and_a_slow_one_is_not() {
        let stall = Duration::from_secs(60);
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut bounded = Bounded::new(Box::new(ours), stall);
        let reader = tokio::spawn(async move {
            for _ in 0..4 {
                tokio::time::sleep(stall / 2).await;
                theirs.read_exact(&mut [0; 64]).await.expect("it is sent");
            }
            theirs
        });
        let began = tokio::time::Instant::now();
        let failed = bounded.write_all(&[7; 64 * 6]).await.expect_err("the last 64 bytes are for nobody");
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed().as_secs(), (4 * stall / 2 + stall).as_secs());
        drop(reader);
    }
}
