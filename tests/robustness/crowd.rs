//! Peers that are many, and peers that say nothing.

use std::time::{Duration, Instant};

use h2::client::ResponseFuture;

use crate::process::{PROMPT, Process, generate, request};
use crate::wire::{call, closed, h2, half_open};

/// What begins to speak and does not go on is let go of, within the bounds that the accept loop has, and harms nobody meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_are_let_go() {
    let process = Process::start(&[]);
    let peers = half_open(&process).await;
    generate(&mut process.client(), request(PROMPT)).await.expect("the others are served");
    assert_eq!(process.get("/health").0, 200);
    // Those that have not said what they speak are the first: ten seconds.
    let begun = Instant::now();
    let mut left = 0;
    for mut peer in peers {
        let patience = Duration::from_secs(20).saturating_sub(begun.elapsed()).max(Duration::from_millis(50));
        left += usize::from(!closed(&mut peer, patience).await);
    }
    println!("{left} are still there after {:?}", begun.elapsed());
    // A half-sent head or body has longer, and a silent HTTP/2 peer is asked for a sign of life first.
    assert!(left <= 6, "{left}");
    generate(&mut process.client(), request(PROMPT)).await.expect("the others are served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_idle_connections_and_streams_cost_little() {
    let process = Process::start(&[]);
    let mut client = process.client();
    generate(&mut client, request(PROMPT)).await.expect("a text");
    let before = process.memory();
    // Connections that have shaken hands, with eight streams each on some: heads without a message.
    let (mut connections, mut streams) = (vec![], vec![]);
    for index in 0..900 {
        let address = if index % 2 == 0 { process.grpc } else { process.http };
        let mut connection = h2(address).await;
        if index < 125 {
            for _ in 0..8 {
                connection = connection.ready().await.expect("room for a stream");
                let (response, body): (ResponseFuture, _) = connection.send_request(call(address), false).expect("a stream");
                streams.push((response, body));
            }
        }
        connections.push(connection);
    }
    assert_eq!((connections.len(), streams.len()), (900, 1000));
    let begun = Instant::now();
    for _ in 0..5 {
        generate(&mut client, request(PROMPT)).await.expect("the others are served");
    }
    let grown = process.memory().saturating_sub(before);
    println!("{} MiB for 900 connections and 1000 streams; five texts in {:?}", grown >> 20, begun.elapsed());
    assert!(grown < 256 << 20, "{grown} bytes");
    process.until("all streams are calls", || process.get("/metrics").1.contains("Generation/Generate\"} 1000"));
    drop((connections, streams));
    process.until("they are forgotten", || process.get("/metrics").1.contains("Generation/Generate\"} 0"));
}
