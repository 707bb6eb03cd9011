//! Readers that do not read: what waits for them is bounded, and nobody else waits with them.

use std::time::Duration;

use crate::process::{PROMPT, Process, generate, long, request};
use crate::wire::{call, framed, h2, narrow};

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_never_read_cost_little_and_hold_up_nobody() {
    let process = Process::start(&["--max-resident", "1", "--queue", "64", "--request-seconds", "60"]);
    let mut client = process.client();
    let expected = generate(&mut client, request(PROMPT)).await.expect("a text");
    let before = process.memory();
    let mut stalled = vec![];
    for address in [process.grpc, process.http] {
        for _ in 0..1 {
            let mut connection = narrow(address).await;
            let (response, mut body) = connection.send_request(call(address), false).expect("a stream");
            body.send_data(framed(&long(12)), true).expect("the request is sent");
            // Its body is never asked for, so that the window fills and stays full.
            stalled.push((connection, response.await.expect("a head")));
        }
    }
    for _ in 0..3 {
        let text = generate(&mut client, request(PROMPT)).await.expect("the others are served");
        assert_eq!(text, expected);
    }
    let grown = process.memory().saturating_sub(before);
    println!("{} KiB for 2 stalled readers", grown >> 10);
    assert!(grown < 128 << 20, "{grown} bytes");
    drop(stalled);
    process.until("their places are free", || {
        let (_, metrics) = process.get("/metrics");
        metrics.contains("lacuna_residents{model=\"nano\"} 0") && metrics.contains("lacuna_queue_depth{model=\"nano\"} 0")
    });
}

/// One that sends its request byte after byte has its deadline like any other.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_trickles_in_ends_at_the_servers_bound() {
    let process = Process::start(&["--request-seconds", "1"]);
    let mut connection = h2(process.grpc).await;
    let (response, mut body) = connection.send_request(call(process.grpc), false).expect("a stream");
    let trickle = tokio::spawn(async move {
        for byte in framed(&request(&"x".repeat(4096))) {
            if body.send_data(vec![byte].into(), false).is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let answer = tokio::time::timeout(Duration::from_secs(20), response).await.expect("in time").expect("a head");
    assert_eq!(answer.headers().get("grpc-status").expect("a status"), "4", "{answer:?}");
    trickle.abort();
}
