//! Bytes that are no message, no HTTP/2, or too much: each is answered or cut off, none is believed.

use std::time::Duration;

use bytes::Bytes;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::process::{PROMPT, Process, generate, request};
use crate::wire::{PREFACE, call, closed, framed, h2, peer};

/// The gRPC status that answers a body.
async fn status_of(process: &Process, body: Bytes) -> String {
    let mut connection = h2(process.grpc).await;
    let (response, mut sender) = connection.send_request(call(process.grpc), false).expect("a stream");
    // The server may answer, and close, before it has all of it.
    sender.reserve_capacity(body.len());
    let _ = sender.send_data(body, true);
    let response = tokio::time::timeout(Duration::from_secs(30), response).await.expect("in time").expect("a head");
    let head = response.headers().get("grpc-status").cloned();
    let mut body = response.into_body();
    while let Some(Ok(bytes)) = body.data().await {
        let _ = body.flow_control().release_capacity(bytes.len());
    }
    let trailers = body.trailers().await.ok().flatten();
    let status = head.or_else(|| trailers.and_then(|trailers| trailers.get("grpc-status").cloned()));
    status.and_then(|status| status.to_str().ok().map(str::to_owned)).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_none_are_the_clients_fault() {
    let process = Process::start(&[]);
    let invalid = "3";
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..50 {
        let mut noise = vec![0u8; rng.random_range(0..200)];
        rng.fill(&mut noise[..]);
        let mut framed = vec![0];
        framed.extend((noise.len() as u32).to_be_bytes());
        framed.extend(&noise);
        let status = status_of(&process, framed.into()).await;
        // Noise may happen to be a message; then what it asks for is judged.
        assert!(["0", "3", "5", "9"].contains(&status.as_str()), "{status}: {noise:?}");
    }
    // A length that lies, upwards and downwards; a compression that was not agreed on; nothing at all.
    assert_eq!(status_of(&process, Bytes::from_static(b"\0\0\0\0\x40abc")).await, invalid);
    let mut short = framed(&request(PROMPT)).to_vec();
    short[4] -= 3;
    assert_eq!(status_of(&process, short.into()).await, invalid);
    let mut compressed = framed(&request(PROMPT)).to_vec();
    compressed[0] = 1;
    assert_ne!(status_of(&process, compressed.into()).await, "0");
    assert_ne!(status_of(&process, Bytes::new()).await, "0");
    // Too much, by what the frame says and by what it has.
    assert_eq!(status_of(&process, Bytes::from_static(b"\0\x7f\xff\xff\xffabc")).await, "8");
    generate(&mut process.client(), request(PROMPT)).await.expect("the others are served");
    assert!(process.get("/metrics").1.contains("\nlacuna_panics_total 0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_instead_of_http_is_cut_off() {
    let process = Process::start(&[]);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for round in 0..100 {
        for address in [process.grpc, process.http] {
            let mut noise = vec![0u8; rng.random_range(64..4096)];
            rng.fill(&mut noise[..]);
            // Half of it after a proper beginning, so that it meets the frames' reader.
            let words = if round % 2 == 0 { [PREFACE, &noise].concat() } else { noise };
            let mut peer = peer(address, &words).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut peer).await;
            assert!(closed(&mut peer, Duration::from_secs(60)).await, "{words:?}");
        }
    }
    // Heads without end: more than is read, in either protocol.
    let mut endless = b"GET / HTTP/1.1\r\n".to_vec();
    endless.extend(b"x-more: ".iter().chain([b'y'; 200_000].iter()));
    let mut talker = tokio::net::TcpStream::connect(process.http).await.expect("it listens");
    let _ = tokio::io::AsyncWriteExt::write_all(&mut talker, &endless).await;
    assert!(closed(&mut talker, Duration::from_secs(60)).await, "200 KB of a header are too much");
    let mut connection = h2(process.grpc).await;
    let mut heavy = call(process.grpc);
    heavy.headers_mut().insert("x-more", "y".repeat(100_000).parse().expect("ascii"));
    let refused = match connection.send_request(heavy, true) {
        Ok((response, _)) => response.await.map_or(true, |response| !response.status().is_success()),
        Err(_) => true,
    };
    assert!(refused, "100 KB of headers are too much");
    generate(&mut process.client(), request(PROMPT)).await.expect("the others are served");
    assert_eq!(process.get("/health").0, 200);
}
