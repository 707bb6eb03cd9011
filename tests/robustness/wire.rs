//! Peers of either port that say what no client library would.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process::Process;

/// HTTP/2's first words, with settings that set nothing.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A connection that has said `words`.
pub async fn peer(address: SocketAddr, words: &[u8]) -> TcpStream {
    let mut peer = TcpStream::connect(address).await.expect("it listens");
    peer.write_all(words).await.expect("it reads");
    peer
}

/// One of each kind that begins to speak and does not go on, on both ports.
pub async fn half_open(process: &Process) -> Vec<TcpStream> {
    let mut peers = vec![];
    for address in [process.grpc, process.http] {
        for words in [&b""[..], b"G", b"PRI * HTTP/2.0\r\n", b"GET /metrics HTTP/1.1\r\nhost: ", PREFACE] {
            peers.push(peer(address, words).await);
        }
    }
    // A TLS hello to a port in the clear, and a body that does not come.
    peers.push(peer(process.grpc, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03").await);
    peers.push(peer(process.http, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03").await);
    let post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 4000\r\n\r\n{";
    peers.push(peer(process.http, post).await);
    peers
}

/// Whether the other side has closed, within this time.
pub async fn closed(peer: &mut TcpStream, within: Duration) -> bool {
    let mut heard = [0; 4096];
    let closing = async { while peer.read(&mut heard).await.is_ok_and(|count| count > 0) {} };
    tokio::time::timeout(within, closing).await.is_ok()
}

/// An HTTP/2 connection with streams of its own making.
pub async fn h2(address: SocketAddr) -> SendRequest<Bytes> {
    shake_hands(address, h2::client::Builder::new()).await
}

/// One that takes a kilobyte of each stream until it has read that.
pub async fn narrow(address: SocketAddr) -> SendRequest<Bytes> {
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1024);
    shake_hands(address, builder).await
}

async fn shake_hands(address: SocketAddr, builder: h2::client::Builder) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.expect("it listens");
    let (sender, connection) = builder.handshake(stream).await.expect("HTTP/2");
    // It ends with the connection, however that comes about.
    tokio::spawn(async move { drop(connection.await) });
    sender.ready().await.expect("room for a stream")
}

/// The head of a call of `Generation.Generate`.
pub fn call(address: SocketAddr) -> Request<()> {
    Request::post(format!("http://{address}/lacuna.v1.Generation/Generate"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .expect("a request")
}

/// A message as gRPC frames it.
pub fn framed(message: &impl prost::Message) -> Bytes {
    let bytes = message.encode_to_vec();
    let mut framed = vec![0];
    framed.extend((bytes.len() as u32).to_be_bytes());
    framed.extend(bytes);
    framed.into()
}
