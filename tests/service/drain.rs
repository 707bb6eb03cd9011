//! How a server begins and ends: health tells, streams finish, and nothing can hold it up for ever.

use std::time::{Duration, Instant};

use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use tokio::io::AsyncWriteExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{PATIENCE, collect, generate, long, occupied, serve_engine, server, start, started};

const LIMITS: Limits = Limits { resident: 1, queued: 4, tokens: None, queued_tokens: None, prefix_tokens: None };

fn everything() -> HealthCheckRequest {
    HealthCheckRequest { service: String::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_turns_first_and_streams_finish() {
    let mut server = server().await;
    server.serving().await;
    let mut watch = HealthClient::new(server.channel().await).watch(everything()).await.expect("health").into_inner();
    assert_eq!(watch.message().await.expect("a status").expect("one").status(), ServingStatus::Serving);
    let mut client = server.client().await;
    let mut stream = client.generate(long(60)).await.expect("it begins").into_inner();
    let first = started(&mut stream).await.expect("it starts");
    server.signal_shutdown();
    assert_eq!(watch.message().await.expect("a status").expect("one").status(), ServingStatus::NotServing);
    assert!(server.engine.active() > 0, "health turned while the stream was running");
    let refused = generate(&mut client, long(2)).await.expect_err("it is draining");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let elsewhere = server.endpoint().connect().await;
    assert!(elsewhere.is_err(), "the server still takes connections");
    let (mut commits, mut finished) = (0, false);
    while let Some(event) = crate::harness::next(&mut stream).await.expect("the stream runs on") {
        use lacuna::service::proto::generate_event::Event;
        match event {
            Event::Committed(commit) => commits += commit.token_ids.len(),
            Event::Finished(_) => finished = true,
            _ => {}
        }
    }
    assert!(finished);
    assert_eq!(commits, first.canvas.len(), "nothing is lost");
    tokio::time::timeout(PATIENCE, server.task).await.expect("it ends").expect("no panic").expect("no error");
}

/// Connects, says hello in HTTP/2, and is never heard of again.
async fn silent_peer(address: std::net::SocketAddr) -> tokio::net::TcpStream {
    let mut peer = tokio::net::TcpStream::connect(address).await.expect("the server listens");
    peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("it reads");
    peer
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_outlasts_the_drain_timeout() {
    let options = ServeOptions { drain_timeout: Duration::from_millis(300), ..ServeOptions::default() };
    let mut server = start(LIMITS, options).await;
    server.serving().await;
    let silent = silent_peer(server.address).await;
    let mut client = server.client().await;
    let mut running = client.generate(long(200)).await.expect("it begins").into_inner();
    started(&mut running).await.expect("it starts");
    let waiting = client.generate(long(200)).await.expect("it waits").into_inner();
    let begun = Instant::now();
    server.signal_shutdown();
    for stream in [tokio::spawn(rest(running)), tokio::spawn(async { collect(waiting).await.map(drop) })] {
        let status = stream.await.expect("no panic").expect_err("it is cut short");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    tokio::time::timeout(PATIENCE, server.task).await.expect("it ends").expect("no panic").expect("no error");
    let took = begun.elapsed();
    println!("ended {took:?} after the signal, with a drain timeout of 300ms");
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");
    drop(silent);
}

async fn rest(mut stream: tonic::Streaming<lacuna::service::proto::GenerateEvent>) -> Result<(), tonic::Status> {
    while crate::harness::next(&mut stream).await?.is_some() {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_ends_at_once() {
    let mut server = server().await;
    server.serving().await;
    let _idle = server.channel().await;
    // A watcher stays for as long as it is let.
    let _watch = HealthClient::new(server.channel().await).watch(everything()).await.expect("health").into_inner();
    let begun = Instant::now();
    server.signal_shutdown();
    tokio::time::timeout(PATIENCE, server.task).await.expect("it ends").expect("no panic").expect("no error");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_waits_for_the_warm_up() {
    let (info, engine, events) = occupied().await;
    let server = serve_engine(info, engine, ServeOptions::default()).await;
    let mut health = HealthClient::new(server.channel().await);
    for service in ["", "lacuna.v1.Generation", "lacuna.v1.Models", "lacuna.v1.Tokenization"] {
        let asked = HealthCheckRequest { service: service.into() };
        let status = health.check(asked).await.expect("it is known").into_inner().status();
        assert_eq!(status, ServingStatus::NotServing, "{service:?}");
    }
    drop(events);
    server.serving().await;
    let unknown = HealthCheckRequest { service: "lacuna.v1.Nothing".into() };
    assert_eq!(health.check(unknown).await.expect_err("it is unknown").code(), Code::NotFound);
}
