//! Rapid resets (CVE-2023-44487): streams opened and reset as fast as the connection takes them.

use std::time::Instant;

use h2::Reason;

use crate::process::{PROMPT, Process, generate, long, request};
use crate::wire::{call, framed, h2};

#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_end_their_connection_or_cost_nothing() {
    let process = Process::start(&[]);
    let before = process.memory();
    for address in [process.grpc, process.http] {
        let (begun, mut resets, mut connections) = (Instant::now(), 0, 0);
        while resets < 5000 {
            connections += 1;
            assert!(connections < 5000, "a connection takes {} resets", resets / connections);
            let mut connection = h2(address).await;
            loop {
                // Sooner or later the server has had enough of it.
                let Ok(ready) = connection.ready().await else { break };
                connection = ready;
                let Ok((response, mut body)) = connection.send_request(call(address), false) else { break };
                // A whole request, so that there is work to cancel.
                let _ = body.send_data(framed(&long(64)), true);
                body.send_reset(Reason::CANCEL);
                drop(response);
                resets += 1;
                if resets >= 5000 {
                    break;
                }
            }
        }
        println!("{resets} resets on {connections} connections in {:?}", begun.elapsed());
    }
    let begun = Instant::now();
    generate(&mut process.client(), request(PROMPT)).await.expect("the others are served");
    println!("a text thereafter in {:?}", begun.elapsed());
    let grown = process.memory().saturating_sub(before);
    assert!(grown < 128 << 20, "{grown} bytes");
    process.until("nothing is left of them", || {
        let (_, metrics) = process.get("/metrics");
        metrics.contains("Generation/Generate\"} 0") && metrics.contains("lacuna_residents{model=\"nano\"} 0")
    });
}
