//! What answers look like: field for field what OpenAI's API says, and the extension beside it.

use serde_json::{Value, json};

use crate::client::{Client, TASK, joined, pair, text};

/// The names of an object's fields.
fn names(object: &Value) -> Vec<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn assert_cost(cost: &Value) {
    let model: u64 =
        ["prefill", "denoise", "decode", "verify"].iter().map(|kind| cost["forwards"][kind].as_u64().unwrap()).sum();
    assert!(model > 0 && cost["steps"].as_u64() > Some(0), "{cost}");
    assert!(cost["tokens_per_forward"].as_f64() > Some(0.0), "{cost}");
}

#[tokio::test(flavor = "multi_thread")]
async fn completions() {
    let server = pair().await;
    let client = Client::new(&server);
    let asked = json!({"model": "nano", "prompt": TASK, "seed": 3});
    let answer = client.ask(
        http::Method::POST,
        "/v1/completions",
        &[("content-type", "application/json; charset=utf-8"), ("x-request-id", "mine.1")],
        asked.to_string().into_bytes(),
    );
    let answer = answer.await;
    assert_eq!(answer.header("x-request-id"), Some("mine.1"));
    let whole = answer.json();
    assert_eq!(names(&whole), ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]);
    assert_eq!(whole["id"], "cmpl-mine.1");
    assert_eq!((&whole["object"], &whole["model"]), (&json!("text_completion"), &json!("nano")));
    assert_eq!(text(&whole, 0), "    return sum(x for x in xs if x > 17)\n");
    let choice = &whole["choices"][0];
    assert_eq!(names(choice), ["index", "text", "logprobs", "finish_reason", "lacuna"]);
    assert_eq!((&choice["logprobs"], &choice["finish_reason"]), (&Value::Null, &json!("stop")));
    assert_eq!(choice["lacuna"]["seed"], 3);
    assert_cost(&choice["lacuna"]);
    let usage = &whole["usage"];
    let count = |name: &str| usage[name].as_u64().expect("a count");
    assert_eq!(count("prompt_tokens") + count("completion_tokens"), count("total_tokens"));
    assert!(count("completion_tokens") > 10 && usage["prompt_tokens_details"]["cached_tokens"].is_u64(), "{usage}");
    assert_cost(&usage["lacuna"]);
    // An id that cannot be one is nobody's fault.
    let headers = [("content-type", "application/json"), ("x-request-id", "two words")];
    let other = client.ask(http::Method::POST, "/v1/completions", &headers, asked.to_string().into_bytes()).await;
    assert_eq!(other.header("x-request-id").map(str::len), Some(32));
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_whole_and_streamed() {
    let server = pair().await;
    let client = Client::new(&server);
    let asked = json!({
        "model": "nano-ar",
        "messages": [
            {"role": "developer", "content": "Write Python.", "name": null},
            {"role": "user", "content": [{"type": "text", "text": &TASK[..10]}, {"type": "text", "text": &TASK[10..]}]},
        ],
        "max_completion_tokens": 8,
        "stream_options": null,
    });
    let whole = client.well("/v1/chat/completions", &asked).await;
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{whole}");
    let choice = &whole["choices"][0];
    assert_eq!(names(choice), ["index", "message", "logprobs", "finish_reason", "lacuna"]);
    assert_eq!(choice["message"], json!({"role": "assistant", "content": text(&whole, 0), "refusal": null}));
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 8);

    let mut streamed = asked.clone();
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = client.chunks("/v1/chat/completions", &streamed).await;
    let (last, rest) = chunks.split_last().expect("chunks");
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == last["id"]));
    assert_eq!(rest[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(rest[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    assert!(rest.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)), "usage is told once");
    let (end, before) = rest.split_last().expect("an end");
    assert!(before.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert_eq!((&end["choices"][0]["finish_reason"], &end["choices"][0]["delta"]), (&json!("length"), &json!({})));
    assert_cost(&end["choices"][0]["lacuna"]);
    assert_eq!(last["choices"], json!([]));
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][field], whole["usage"][field]);
    }
    assert_eq!(joined(rest, 0), text(&whole, 0));
    assert!(before.len() > 4, "one token at a time comes as it is decoded: {before:?}");
    let silent = client.chunks("/v1/chat/completions", &asked).await;
    assert!(silent.iter().all(|chunk| chunk.get("usage").is_none()), "nobody asked for usage");
}

#[tokio::test(flavor = "multi_thread")]
async fn models() {
    let server = pair().await;
    let client = Client::new(&server);
    let list = client.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let shown: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(shown, ["nano", "nano-ar"]);
    for (index, name) in shown.iter().enumerate() {
        let one = client.get(&format!("/v1/models/{name}")).await;
        assert_eq!(one.json(), list["data"][index]);
        assert_eq!((&one.json()["object"], &one.json()["owned_by"]), (&json!("model"), &json!("lacuna")));
        assert!(one.json()["created"].as_u64() > Some(1_700_000_000));
        assert!(one.header("x-request-id").is_some());
    }
    assert_eq!(list["data"][0]["lacuna"]["capabilities"]["infill"], true);
    assert_eq!(list["data"][1]["lacuna"]["drafters"], json!(["redrafter", "medusa", "chain", "lookup"]));
    let gone = client.get("/v1/models/gpt-4o").await;
    assert_eq!((gone.status.as_u16(), &gone.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities() {
    let server = pair().await;
    let client = Client::new(&server);
    for (model, stream) in [("nano", false), ("nano", true), ("nano-ar", false), ("nano-ar", true)] {
        let chat =
            json!({"model": model, "messages": [{"role": "user", "content": TASK}], "logprobs": true, "top_logprobs": 2});
        let (text, content): (String, Vec<Value>) = if stream {
            let chunks = client.chunks("/v1/chat/completions", &chat).await;
            let content = |chunk: &Value| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default();
            (joined(&chunks, 0), chunks.iter().flat_map(content).collect())
        } else {
            let whole = client.well("/v1/chat/completions", &chat).await;
            (text(&whole, 0).into(), whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone())
        };
        // The end of the text is a token too, but not of the text.
        let joined: String = content.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
        assert_eq!(joined, text, "{model}");
        for entry in &content {
            assert_eq!(names(entry), ["token", "logprob", "bytes", "top_logprobs"]);
            assert!(entry["logprob"].as_f64().is_some_and(|logprob| logprob <= 0.0));
            assert_eq!(entry["bytes"], json!(entry["token"].as_str().unwrap().as_bytes()));
            let others = entry["top_logprobs"].as_array().unwrap();
            assert_eq!(others.len(), 2);
            assert_eq!(others[0]["token"], entry["token"], "greedy takes the best");
            assert!(others[0]["logprob"].as_f64() >= others[1]["logprob"].as_f64());
        }
    }
    let bare = json!({"model": "nano", "messages": [{"role": "user", "content": TASK}], "logprobs": true});
    let bare = client.well("/v1/chat/completions", &bare).await;
    assert_eq!(bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    let old = client.well("/v1/completions", &json!({"model": "nano-ar", "prompt": TASK, "logprobs": 1})).await;
    let shown = &old["choices"][0]["logprobs"];
    assert_eq!(names(shown), ["tokens", "token_logprobs", "top_logprobs", "text_offset"]);
    for (token, offset) in shown["tokens"].as_array().unwrap().iter().zip(shown["text_offset"].as_array().unwrap()) {
        let behind: String = text(&old, 0).chars().skip(offset.as_u64().unwrap() as usize).collect();
        assert!(behind.starts_with(token.as_str().unwrap()), "{token} at {offset}");
    }
}
