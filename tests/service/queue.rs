//! A full queue says so at once, and says when to come again.

use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{assert_refused, collect, generate, long, start, started};

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_exhausts() {
    let server = start(Limits { resident: 1, queued: 1, ..Limits::default() }, ServeOptions::default()).await;
    server.serving().await;
    let mut client = server.client().await;
    let mut first = client.generate(long(200)).await.expect("it gets its place").into_inner();
    started(&mut first).await.expect("it has its place");
    let second = client.generate(long(2)).await.expect("it waits").into_inner();
    let status = client.generate(long(2)).await.expect_err("there is no room");
    assert_refused(&status, Code::ResourceExhausted, None);
    let retry = status.get_error_details().retry_info().and_then(|retry| retry.retry_delay);
    assert!(retry.is_some_and(|delay| !delay.is_zero()), "{status:?}");
    drop(first);
    collect(second).await.expect("the one that waited gets its turn");
    generate(&mut client, long(2)).await.expect("there is room again");
}
