//! Completions between two texts, and canvases of texts and holes.

use lacuna::service::proto::Stopping;
use serde_json::json;

use crate::client::{Client, TASK, joined, pair, text};
use crate::harness::{generate, request};

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_filled_and_nothing_else_is_told() {
    let server = pair().await;
    let client = Client::new(&server);
    let before = TASK.to_owned() + "    return sum(";
    for (suffix, length) in [(" if x > 17)\n", 5), (" # ä漢🙂\n", 7), ("é", 12)] {
        let asked = json!({"prompt": before, "suffix": suffix, "max_tokens": length, "seed": 1});
        let mut wire = request(&before);
        wire.suffix = Some(suffix.into());
        wire.stopping = Some(Stopping { max_new_tokens: Some(length), stop: vec![] });
        let by_grpc = generate(&mut server.client().await, wire).await.expect("it fills").text();
        for path in ["/v1/fim/completions", "/v1/completions"] {
            let whole = client.well(path, &asked).await;
            assert_eq!(text(&whole, 0).to_owned() + suffix, by_grpc, "gRPC's text has the suffix in it");
            assert_eq!(whole["choices"][0]["finish_reason"], "length");
            assert_eq!(whole["usage"]["completion_tokens"], length);
            assert_eq!(joined(&client.chunks(path, &asked).await, 0), text(&whole, 0));
        }
    }
    // A stop string within the gap, and one that only the suffix has.
    let asked = |stop: &str| json!({"prompt": before, "suffix": " if x > 17)\n", "max_tokens": 5, "stop": stop});
    for (stop, expected) in [(" in", "x for x"), (" > 17", "x for x in xs"), ("xs if", "x for x in ")] {
        let whole = client.well("/v1/fim/completions", &asked(stop)).await;
        assert_eq!((text(&whole, 0), &whole["choices"][0]["finish_reason"]), (expected, &json!("stop")), "{stop}");
    }
    let template = json!({"prompt": TASK, "lacuna": {"template": ["    return sum(", 5, " if x > 17)\n"]}});
    let whole = client.well("/v1/completions", &template).await;
    assert_eq!(text(&whole, 0), "    return sum(x for x in xs if x > 17)\n", "a template's text is the whole canvas");
}
