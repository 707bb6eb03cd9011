//! SIGTERM under load, and among peers that hold on: what runs finishes, health turns first, and the end comes in time.

use std::time::{Duration, Instant};

use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::process::{Process, generate, long, read};
use crate::wire::{call, framed, h2, half_open};

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_loses_nothing_and_ends_in_time() {
    let mut process = Process::start(&["--max-resident", "4", "--queue", "16"]);
    // Peers of every kind that will not let go by themselves.
    let half_open = half_open(&process).await;
    let mut unread = h2(process.http).await;
    let (head, mut body) = unread.send_request(call(process.http), false).expect("a stream");
    body.send_data(framed(&long(2)), true).expect("the request is sent");
    let head = head.await.expect("a head");
    let health = HealthCheckRequest { service: String::new() };
    let mut watch = HealthClient::new(process.channel()).watch(health).await.expect("health").into_inner();
    assert_eq!(watch.message().await.expect("a status").expect("one").status(), ServingStatus::Serving);

    let mut client = process.client();
    let mut running = vec![];
    for _ in 0..8 {
        running.push(tokio::spawn(read(client.generate(long(12)).await.expect("it is taken").into_inner())));
    }
    process.signal(libc::SIGTERM);
    let begun = Instant::now();
    assert_eq!(watch.message().await.expect("a status").expect("one").status(), ServingStatus::NotServing);
    // Health has turned before requests are refused: one in between is taken, and finished.
    let refused = loop {
        match generate(&mut client, long(1)).await {
            Ok((_, finished)) => assert!(finished),
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    for stream in running {
        let (_, finished) = stream.await.expect("no panic").expect("it runs to its end");
        assert!(finished);
    }
    let status = process.end();
    println!("ended {:?} after the signal", begun.elapsed());
    assert_eq!(status.code(), Some(0), "{}", process.log_text());
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
    drop((half_open, head));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_among_silent_peers_ends_at_the_bound() {
    // However fast the machine: what runs takes a second or more, and is given none.
    let mut process = Process::start(&["--drain-seconds", "0"]);
    let half_open = half_open(&process).await;
    let mut client = process.client();
    let endless = client.generate(long(4096)).await.expect("it begins").into_inner();
    process.signal(libc::SIGTERM);
    let begun = Instant::now();
    assert_eq!(read(endless).await.expect_err("it is cut short").code(), Code::Unavailable);
    assert_eq!(process.end().code(), Some(0));
    println!("ended {:?} after the signal", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    drop(half_open);
}

/// A second signal is no reason for anything but going on with the first.
#[tokio::test(flavor = "multi_thread")]
async fn signals_may_come_twice() {
    let mut process = Process::start(&[]);
    let mut client = process.client();
    let running = client.generate(long(12)).await.expect("it is taken").into_inner();
    process.signal(libc::SIGTERM);
    process.signal(libc::SIGINT);
    process.signal(libc::SIGTERM);
    assert!(read(running).await.expect("it runs to its end").1);
    assert_eq!(process.end().code(), Some(0));
}
