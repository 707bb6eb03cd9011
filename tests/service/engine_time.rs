//! Work ends when its client does: at the deadline, on cancelling, and when the client does not read.

use std::time::{Duration, Instant};

use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use lacuna::service::proto::GenerateRequest;
use lacuna::service::proto::generate_event::Event;
use lacuna::service::proto::generation_client::GenerationClient;
use tonic::{Code, Request};

use crate::harness::{collect, long, next, server, start, started};

fn with_timeout(request: GenerateRequest, timeout: &'static str) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    // tonic's client bounds only the wait for a stream's first bytes by it; what follows is the server's doing.
    request.metadata_mut().insert("grpc-timeout", timeout.parse().expect("ascii"));
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_work() {
    let server = server().await;
    server.serving().await;
    let begun = Instant::now();
    let stream = server.client().await.generate(with_timeout(long(200), "300m")).await.expect("it begins").into_inner();
    let status = collect(stream).await.expect_err("300 ms are not enough");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(begun.elapsed() >= Duration::from_millis(290), "{:?}", begun.elapsed());
    server.idle().await;
}

/// The engine looks at waiting requests between rounds only: the stream has to end by itself where a round is long.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_wait_in_the_queue() {
    let server = start(Limits { resident: 1, queued: 4, ..Limits::default() }, ServeOptions::default()).await;
    server.serving().await;
    let mut client = server.client().await;
    let mut first = client.generate(long(200)).await.expect("it begins").into_inner();
    started(&mut first).await.expect("it has its place");
    let stream = client.generate(with_timeout(long(200), "200m")).await.expect("it waits").into_inner();
    let status = collect(stream).await.expect_err("its turn does not come");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(matches!(next(&mut first).await, Ok(Some(_))), "the first one runs on");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_bounds_a_request_without_a_deadline() {
    let options = ServeOptions { request_time_max: Duration::from_millis(300), ..ServeOptions::default() };
    let server = start(Limits { resident: 1, queued: 4, ..Limits::default() }, options).await;
    server.serving().await;
    let stream = server.client().await.generate(long(200)).await.expect("it begins").into_inner();
    let status = collect(stream).await.expect_err("300 ms are not enough");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_stream_frees_the_engine() {
    let server = server().await;
    server.serving().await;
    let mut stream = server.client().await.generate(long(200)).await.expect("it begins").into_inner();
    started(&mut stream).await.expect("it starts");
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        let begun = Instant::now();
        while !matches!(next(&mut stream).await, Ok(Some(Event::Step(_)))) {}
        longest = longest.max(begun.elapsed());
    }
    drop(stream);
    let freed = server.idle().await;
    println!("freed after {freed:?}; a step takes up to {longest:?}");
    // One step, plus the way of the reset through the network on a busy machine.
    assert!(freed < longest + Duration::from_millis(500), "{freed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_loses_its_place_at_the_deadline() {
    let server = start(Limits { resident: 1, queued: 4, ..Limits::default() }, ServeOptions::default()).await;
    server.serving().await;
    // Room for a few events only, so that the server soon has to hold its own back.
    let channel = server.endpoint().initial_stream_window_size(2048).connect().await.expect("the server listens");
    let mut stalled = GenerationClient::new(channel);
    let stream = stalled.generate(with_timeout(long(200), "1500m")).await.expect("it begins").into_inner();
    let begun = Instant::now();
    server.idle().await;
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    drop(stream);
    collect(server.client().await.generate(long(2)).await.expect("it begins").into_inner()).await.expect("its place is free");
}
