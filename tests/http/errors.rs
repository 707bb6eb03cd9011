//! What goes wrong is told in OpenAI's envelope, under a fitting status, by the name of the field.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use lacuna::service::tokens::{Tokens, make};
use serde_json::{Value, json};

use crate::client::{Answer, Client, TASK, pair};
use crate::harness::{long, start, started};

/// The error in an answer, whose shape must be whole.
fn error(answer: &Answer) -> Value {
    let error = answer.json()["error"].clone();
    let names: Vec<_> = error.as_object().unwrap_or_else(|| panic!("{answer:?}")).keys().collect();
    assert_eq!(names, ["message", "type", "param", "code"]);
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert!(answer.header("x-request-id").is_some(), "{answer:?}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_are_named() {
    let server = pair().await;
    let client = Client::new(&server);
    let chat = |messages: Value| json!({"messages": messages});
    let cases = [
        ("/v1/completions", json!({}), "prompt"),
        ("/v1/completions", json!({"prompt": ["two", "texts"]}), "prompt"),
        ("/v1/completions", json!({"prompt": [1, 70_000]}), "prompt"),
        ("/v1/completions", json!({"prompt": TASK, "model": 3}), "model"),
        ("/v1/completions", json!({"prompt": TASK, "temperature": 11}), "temperature"),
        ("/v1/completions", json!({"prompt": TASK, "temperature": "warm"}), "temperature"),
        ("/v1/completions", json!({"prompt": TASK, "top_p": 0}), "top_p"),
        ("/v1/completions", json!({"prompt": TASK, "presence_penalty": 1}), "presence_penalty"),
        ("/v1/completions", json!({"prompt": TASK, "logit_bias": {"1": 2000}}), "logit_bias"),
        ("/v1/completions", json!({"prompt": TASK, "logit_bias": {"one": 2}}), "logit_bias"),
        ("/v1/completions", json!({"prompt": TASK, "logprobs": 21}), "logprobs"),
        ("/v1/completions", json!({"prompt": TASK, "seed": 0.5}), "seed"),
        ("/v1/completions", json!({"prompt": TASK, "stop": [""]}), "stop"),
        ("/v1/completions", json!({"prompt": TASK, "stop": vec!["x"; 17]}), "stop"),
        ("/v1/completions", json!({"prompt": TASK, "n": 0}), "n"),
        ("/v1/completions", json!({"prompt": TASK, "n": 17}), "n"),
        ("/v1/completions", json!({"prompt": TASK, "best_of": 2}), "best_of"),
        ("/v1/completions", json!({"prompt": TASK, "echo": true}), "echo"),
        ("/v1/completions", json!({"prompt": TASK, "max_tokens": 0}), "max_tokens"),
        ("/v1/completions", json!({"prompt": TASK, "max_tokens": -1}), "max_tokens"),
        ("/v1/completions", json!({"prompt": TASK, "max_completion_tokens": 300}), "max_completion_tokens"),
        ("/v1/completions", json!({"prompt": TASK, "max_completion_tokens": 3, "max_tokens": 4}), "max_tokens"),
        ("/v1/completions", json!({"prompt": TASK, "stream_options": {"include_usage": true}}), "stream_options"),
        ("/v1/completions", json!({"prompt": TASK, "stream": true, "stream_options": {"usage": true}}), "stream_options.usage"),
        ("/v1/completions", json!({"prompt": TASK, "diffusing": true}), "diffusing"),
        ("/v1/completions", json!({"prompt": TASK, "diffusing": true, "stream": true, "logprobs": 1}), "diffusing"),
        ("/v1/completions", json!({"prompt": TASK, "model": "nano-ar", "diffusing": true, "stream": true}), "diffusing"),
        ("/v1/completions", json!({"prompt": TASK, "model": "nano-ar", "suffix": "end"}), "suffix"),
        ("/v1/completions", json!({"prompt": TASK, "messages": []}), "messages"),
        ("/v1/completions", json!({"prompt": TASK, "Prompt": TASK}), "Prompt"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": 3}), "lacuna"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"steps": 3}}), "lacuna.steps"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"diffusion": {"steps": 0}}}), "lacuna.diffusion.steps"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"diffusion": {"order": "best"}}}), "lacuna.diffusion.order"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"diffusion": {"stops": 1}}}), "lacuna.diffusion.stops"),
        (
            "/v1/completions",
            json!({"prompt": TASK, "lacuna": {"diffusion": {"steps": 3, "threshold": 0.5}}}),
            "lacuna.diffusion",
        ),
        (
            "/v1/completions",
            json!({"prompt": TASK, "lacuna": {"diffusion": {}, "autoregressive": {}}}),
            "lacuna.autoregressive",
        ),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"sampling": {"top_k": 0}}}), "lacuna.sampling.top_k"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"sampling": {"top_p": 0.5}}}), "lacuna.sampling.top_p"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"priority": 11}}), "lacuna.priority"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"template": ["a", -1]}}), "lacuna.template[1]"),
        ("/v1/completions", json!({"prompt": TASK, "lacuna": {"template": ["a"]}}), "lacuna.template"),
        ("/v1/completions", json!({"prompt": TASK, "suffix": "b", "lacuna": {"template": [1]}}), "suffix"),
        (
            "/v1/completions",
            json!({"prompt": TASK, "model": "nano-ar", "lacuna": {"autoregressive": {"draft_length": 3}}}),
            "lacuna.autoregressive.draft_length",
        ),
        ("/v1/fim/completions", json!({"prompt": TASK}), "suffix"),
        ("/v1/chat/completions", json!({}), "messages"),
        ("/v1/chat/completions", chat(json!([])), "messages"),
        ("/v1/chat/completions", chat(json!([{"content": "x"}])), "messages[0].role"),
        ("/v1/chat/completions", chat(json!([{"role": "user"}])), "messages[0].content"),
        (
            "/v1/chat/completions",
            chat(json!([{"role": "user", "content": "x"}, {"role": "user", "content": 3}])),
            "messages[1].content",
        ),
        (
            "/v1/chat/completions",
            chat(json!([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}])),
            "messages[0].content[1].type",
        ),
        ("/v1/chat/completions", chat(json!([{"role": "user", "content": "x", "tool_calls": []}])), "messages[0].tool_calls"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}), "top_logprobs"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "suffix": "y"}), "suffix"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}),
            "tools",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}),
            "response_format",
        ),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "audio": {}}), "audio"),
    ];
    for (path, body, param) in &cases {
        let answer = client.post(path, body).await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        let error = error(&answer);
        assert_eq!((&error["param"], &error["type"]), (&json!(param), &json!("invalid_request_error")), "{body}: {error}");
        assert!(error["message"].as_str().unwrap().starts_with(param), "{error}");
    }
    assert_eq!(server.engine.active(), 0, "none of them got to the engine");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_cannot_be_read() {
    let server = start(Limits::default(), ServeOptions { message_bytes_max: 2000, ..ServeOptions::default() }).await;
    server.serving().await;
    let client = Client::new(&server);
    let json = [("content-type", "application/json")];
    let big = json!({"prompt": "x".repeat(2000)}).to_string().into_bytes();
    let nested = "[".repeat(1500).into_bytes();
    for (method, path, headers, body, status, code) in [
        (Method::POST, "/v1/completions", &json[..], b"{".to_vec(), 400, json!(null)),
        (Method::POST, "/v1/completions", &json, b"[]".to_vec(), 400, json!(null)),
        (Method::POST, "/v1/completions", &json, b"{\"prompt\": \"\xff\"}".to_vec(), 400, json!(null)),
        (Method::POST, "/v1/completions", &json, nested, 400, json!(null)),
        (Method::POST, "/v1/completions", &json, big, 413, json!(null)),
        (Method::POST, "/v1/completions", &[], b"{}".to_vec(), 415, json!(null)),
        (Method::POST, "/v1/completions", &[("content-type", "text/plain")], b"{}".to_vec(), 415, json!(null)),
        (Method::POST, "/v1/completions", &json, br#"{"prompt": "x", "model": "gpt"}"#.to_vec(), 404, json!("model_not_found")),
        (Method::GET, "/v1/completions", &[], vec![], 405, json!(null)),
        (Method::POST, "/v1/embeddings", &json, b"{}".to_vec(), 404, json!("unknown_url")),
    ] {
        let answer = client.ask(method, path, headers, body).await;
        assert_eq!(answer.status.as_u16(), status, "{path}: {answer:?}");
        assert_eq!(error(&answer)["code"], code);
    }
    let elsewhere = client.get("/nowhere").await;
    assert_eq!((elsewhere.status.as_u16(), &elsewhere.json()["error"]["code"]), (404, &json!("unknown_url")));
    let chunked = client.post("/v1/completions", &json!({"prompt": TASK, "max_tokens": 4})).await;
    assert_eq!(chunked.status, 200, "the server is none the worse: {chunked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue() {
    let server = start(Limits { resident: 1, queued: 1, ..Limits::default() }, ServeOptions::default()).await;
    server.serving().await;
    let client = Client::new(&server);
    let mut grpc = server.client().await;
    let mut first = grpc.generate(long(4000)).await.expect("it gets its place").into_inner();
    started(&mut first).await.expect("it has its place");
    let short = json!({"prompt": TASK, "max_tokens": 4});
    // Two choices are two requests: together they are one too many, and neither stays behind.
    let mut two = short.clone();
    two["n"] = json!(2);
    for stream in [false, true] {
        two["stream"] = json!(stream);
        let refused = client.post("/v1/completions", &two).await;
        assert_eq!(refused.status, 429, "{refused:?}");
        let told = error(&refused);
        assert_eq!((&told["type"], &told["code"]), (&json!("rate_limit_error"), &json!("queue_full")));
        // The first choice leaves with the engine's next round.
        while server.engine.active() > 1 {
            tokio::task::yield_now().await;
        }
        assert!(refused.header("retry-after").and_then(|after| after.parse::<u32>().ok()) >= Some(1), "{refused:?}");
    }
    drop(first);
    server.idle().await;
    assert_eq!(client.post("/v1/completions", &short).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_would_be_late() {
    let options = ServeOptions { request_time_max: Duration::from_millis(1500), ..ServeOptions::default() };
    let server = start(Limits { resident: 4, queued: 4, ..Limits::default() }, options).await;
    server.serving().await;
    let client = Client::new(&server);
    let steps = json!({"diffusion": {"steps": 4000, "block_length": 200, "finish_early": false, "suppress_end": true}});
    let mut long = json!({"prompt": TASK, "max_tokens": 200, "n": 2, "lacuna": steps});
    let late = client.post("/v1/completions", &long).await;
    assert_eq!(late.status, 504, "{late:?}");
    assert_eq!(error(&late)["code"], "deadline_exceeded");
    // A stream has its status by then: it ends with the error, and without [DONE].
    long["stream"] = json!(true);
    let mut events = client.stream("/v1/completions", &long).await;
    let mut last = String::new();
    while let Some(data) = events.next().await {
        last = data;
    }
    let last: Value = serde_json::from_str(&last).expect("JSON");
    assert_eq!(last["error"]["code"], "deadline_exceeded");
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_and_bounds_all_choices_together() {
    let (token, entry) = make("playground", false);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), format!("{entry}\nmax-new-tokens = 10\n")).expect("it is written");
    let tokens = Some(Arc::new(Tokens::open(file.path()).expect("it is read")));
    let server = start(crate::client::LIMITS, ServeOptions { tokens, ..ServeOptions::default() }).await;
    server.serving().await;
    let client = Client::new(&server);
    let asked = |choices: u64| json!({"prompt": TASK, "max_tokens": 4, "n": choices}).to_string().into_bytes();
    let bearer = format!("Bearer {token}");
    let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
    for (headers, choices, status, code) in
        [(&headers[..1], 1, 401, json!("invalid_api_key")), (&headers[..], 3, 403, json!("permission_denied"))]
    {
        let refused = client.ask(Method::POST, "/v1/completions", headers, asked(choices)).await;
        assert_eq!((refused.status.as_u16(), &error(&refused)["code"]), (status, &code), "{refused:?}");
    }
    let taken = client.ask(Method::POST, "/v1/completions", &headers, asked(2)).await;
    assert_eq!(taken.status, 200, "{taken:?}");
}
