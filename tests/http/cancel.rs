//! A client that hangs up gives its places back.

use http::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::client::{Client, TASK};
use crate::harness::{PATIENCE, TestServer, server};

/// Minutes of work, if nobody ends it.
fn long(stream: bool) -> Value {
    let steps = json!({"diffusion": {"steps": 4000, "block_length": 200, "finish_early": false, "suppress_end": true}});
    json!({"prompt": TASK, "max_tokens": 200, "n": 3, "stream": stream, "diffusing": stream, "lacuna": steps})
}

/// Waits until so many requests are in the engine.
async fn active(server: &TestServer, wanted: usize) {
    let busy = async {
        while server.engine.active() != wanted {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, busy).await.unwrap_or_else(|_| panic!("{} are active", server.engine.active()));
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_up_cancels_every_choice() {
    let server = server().await;
    server.serving().await;
    // In the middle of a stream.
    let client = Client::new(&server);
    let mut events = client.stream("/v1/completions", &long(true)).await;
    events.next().await.expect("a first chunk");
    active(&server, 3).await;
    drop(events);
    server.idle().await;
    // Before there is an answer: by closing the connection.
    let body = long(false).to_string();
    let mut connection = TcpStream::connect(server.http).await.expect("the server listens");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(head.as_bytes()).await.expect("it reads");
    active(&server, 3).await;
    drop(connection);
    server.idle().await;
    // Before the body is whole: nothing was begun.
    let mut connection = TcpStream::connect(server.http).await.expect("the server listens");
    connection.write_all(&head.as_bytes()[..head.len() - 5]).await.expect("it reads");
    drop(connection);
    let answer = client.ask(Method::GET, "/health", &[], vec![]).await;
    assert_eq!((answer.status.as_u16(), server.engine.active()), (200, 0));
}
