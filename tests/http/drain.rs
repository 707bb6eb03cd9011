//! A server that ends: health turns first, streams finish, and nothing holds it up for ever. Both ports end together.

use std::time::{Duration, Instant};

use http::Method;
use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::client::{Client, Connection, TASK};
use crate::harness::{PATIENCE, long, start, started};

fn busy(steps: u64) -> Value {
    let diffusion = json!({"steps": steps, "block_length": 200, "finish_early": false, "suppress_end": true});
    json!({"prompt": TASK, "max_tokens": 200, "stream": true, "lacuna": {"diffusion": diffusion}})
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_finish_and_new_calls_are_refused() {
    let options = ServeOptions { drain_timeout: PATIENCE, ..ServeOptions::default() };
    let mut server = start(Limits { resident: 4, queued: 16, ..Limits::default() }, options).await;
    server.serving().await;
    let (client, mut idle) = (Client::new(&server), Connection::new(&server).await);
    assert_eq!(idle.ask(Method::GET, "/health", vec![]).await.json(), json!({"status": "serving"}));
    // Long enough that it still runs when a slow machine comes to ask.
    let mut events = client.stream("/v1/completions", &busy(150)).await;
    let mut others = vec![];
    for _ in 0..2 {
        others.push(client.stream("/v1/completions", &busy(10)).await);
    }
    let mut grpc = server.client().await;
    let mut stream = grpc.generate(long(20)).await.expect("it begins").into_inner();
    started(&mut stream).await.expect("it starts");
    server.signal_shutdown();
    // A connection that stands is told; none is taken any more.
    loop {
        let health = idle.ask(Method::GET, "/health", vec![]).await;
        if health.status == 503 {
            assert_eq!(health.json(), json!({"status": "not serving"}));
            break;
        }
    }
    assert!(server.engine.active() > 0, "health turned while streams were running");
    let refused = idle.ask(Method::POST, "/v1/completions", json!({"prompt": TASK}).to_string().into_bytes()).await;
    assert_eq!((refused.status.as_u16(), refused.header("retry-after")), (503, Some("1")), "{refused:?}");
    assert!(tokio::net::TcpStream::connect(server.http).await.is_err(), "the port still takes connections");
    for events in others.iter_mut().chain([&mut events]) {
        let mut last = String::new();
        while let Some(data) = events.next().await {
            last = data;
        }
        assert_eq!(last, "[DONE]");
    }
    while crate::harness::next(&mut stream).await.expect("the stream runs on").is_some() {}
    tokio::time::timeout(PATIENCE, server.task).await.expect("it ends").expect("no panic").expect("no error");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_outlasts_the_drain_timeout() {
    let options = ServeOptions { drain_timeout: Duration::from_millis(300), ..ServeOptions::default() };
    let mut server = start(Limits { resident: 1, queued: 4, ..Limits::default() }, options).await;
    server.serving().await;
    let client = Client::new(&server);
    let mut running = client.stream("/v1/completions", &busy(4000)).await;
    running.next().await.expect("it runs");
    // One that waits has had no answer yet, and one never says what it wants.
    let waiting = tokio::spawn(async move { client.post("/v1/completions", &busy(4000)).await });
    let mut silent = tokio::net::TcpStream::connect(server.http).await.expect("the server listens");
    silent.write_all(b"GET /health HTTP/1.1\r\n").await.expect("it reads");
    while server.engine.active() < 2 {
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    server.signal_shutdown();
    let mut last = String::new();
    while let Some(data) = running.next().await {
        last = data;
    }
    let told: Value = serde_json::from_str(&last).expect("an error, not [DONE]");
    assert_eq!((&told["error"]["code"], &told["error"]["type"]), (&json!("unavailable"), &json!("server_error")));
    let waited = waiting.await.expect("no panic");
    assert_eq!(waited.status, 503, "{waited:?}");
    tokio::time::timeout(PATIENCE, server.task).await.expect("it ends").expect("no panic").expect("no error");
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");
    drop(silent);
}
