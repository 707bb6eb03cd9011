//! Sends together what several tasks have to say at the same time.
//!
//! A round of the engine ends with an event for each of a connection's calls, and each call is a task of its own. The first of them to
//! run would have its few bytes sent alone, and the next likewise: a system call each, a packet each, and a peer that is woken for each.
//! So bytes that are to leave first let the tasks run that are ready to. It knows nothing of what is sent.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, BufWriter, ReadBuf};

/// Bytes that wait at most.
const ROOM: usize = 32 << 10;

/// A connection whose bytes leave when they are flushed, or are more than there is room for.
pub struct Together<T> {
    connection: BufWriter<T>,
    /// Whether others have had their turn since bytes were to leave.
    waited: bool,
}

impl<T: AsyncWrite> Together<T> {
    pub fn new(connection: T) -> Self {
        Self { connection: BufWriter::with_capacity(ROOM, connection), waited: false }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Together<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Together<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waits = !self.connection.buffer().is_empty();
        if waits && !std::mem::replace(&mut self.waited, true) {
            // To the end of the runtime's queue, behind whoever is ready.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let flushed = Pin::new(&mut self.connection).poll_flush(context);
        // A flush that waits for the peer goes on without another turn.
        self.waited = flushed.is_pending();
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::mpsc;

    use super::*;

    /// As a round's events come: one task's are there first, and others are about to run.
    #[tokio::test]
    async fn what_is_said_at_the_same_time_leaves_together() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let (out, mut queue) = mpsc::unbounded_channel();
        let tasks = tokio::task::LocalSet::new();
        let speaker = |_| {
            let (say, mut saying) = mpsc::unbounded_channel::<u8>();
            let out = out.clone();
            tasks.spawn_local(async move {
                while let Some(byte) = saying.recv().await {
                    out.send(byte).expect("the connection is open");
                }
            });
            say
        };
        let says: Vec<_> = (0..4).map(speaker).collect();
        tasks.spawn_local(async move {
            let mut connection = Together::new(ours);
            // As HTTP/2 does it: all that is queued is written, then flushed.
            std::future::poll_fn(|context| {
                while let Poll::Ready(byte) = queue.poll_recv(context) {
                    let Some(byte) = byte else { return Poll::Ready(()) };
                    assert!(matches!(Pin::new(&mut connection).poll_write(context, &[byte]), Poll::Ready(Ok(1))));
                }
                assert!(!matches!(Pin::new(&mut connection).poll_flush(context), Poll::Ready(Err(_))));
                Poll::Pending
            })
            .await;
        });
        let listener = tasks.spawn_local(async move {
            for _ in 0..3 {
                out.send(0).expect("the connection is open");
                says.iter().zip(1..).for_each(|(say, byte)| say.send(byte).expect("they listen"));
                let mut heard = [0; 8];
                assert_eq!(theirs.read(&mut heard).await.expect("it is open"), 5, "one read has all of them");
                assert_eq!(heard[..5], [0, 1, 2, 3, 4]);
            }
        });
        // What panics in a task is told to whoever waits for it alone.
        tasks.run_until(listener).await.expect("all of a round leaves together");
    }

    #[tokio::test]
    async fn a_flush_waits_until_all_is_gone() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut connection = Together::new(ours);
        let sent: Vec<u8> = (0..=255).cycle().take(3 * ROOM + 7).collect();
        let expected = sent.clone();
        let reader = tokio::spawn(async move {
            let mut heard = vec![0; expected.len()];
            theirs.read_exact(&mut heard).await.expect("all of it comes");
            assert!(heard == expected);
        });
        connection.write_all(&sent).await.expect("it is taken");
        connection.flush().await.expect("it is sent");
        reader.await.expect("all of it was there");
    }
}
