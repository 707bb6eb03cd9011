//! One request, three ways to ask it: whole, streamed and by gRPC give the same text.

use lacuna::service::proto::generate_request::Prompt;
use lacuna::service::proto::{Sampling, Stopping};
use serde_json::{Value, json};

use crate::client::{Client, TASK, joined, pair, text};
use crate::harness::{TestServer, generate, request};

/// Requests as bodies, and the same for gRPC.
async fn by_grpc(server: &TestServer, body: &Value) -> String {
    let mut asked = request(body["prompt"].as_str().unwrap());
    asked.model = body["model"].as_str().unwrap().into();
    asked.prompt = Some(Prompt::Text(body["prompt"].as_str().unwrap().into()));
    let bias = body["logit_bias"].as_object().into_iter().flatten();
    asked.sampling = Some(Sampling {
        seed: body["seed"].as_u64(),
        temperature: body["temperature"].as_f64(),
        top_p: body["top_p"].as_f64(),
        logit_bias: bias.map(|(id, bias)| (id.parse().unwrap(), bias.as_f64().unwrap() as f32)).collect(),
        ..Sampling::default()
    });
    let stop = body["stop"].as_array().map(|stops| stops.iter().map(|stop| stop.as_str().unwrap().into()).collect());
    asked.stopping = Some(Stopping { max_new_tokens: body["max_tokens"].as_u64(), stop: stop.unwrap_or_default() });
    generate(&mut server.client().await, asked).await.expect("it generates").text()
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_streamed_and_by_grpc() {
    let server = pair().await;
    let client = Client::new(&server);
    // Two tokens of a byte each, which alone are no character.
    let bytes = tokens(&server, "é").await;
    assert_eq!(bytes.len(), 2);
    let [lead, tail] = [bytes[0].to_string(), bytes[1].to_string()];
    let characters = json!({
        "model": "nano-ar", "prompt": TASK, "seed": 11, "temperature": 1, "max_tokens": 32,
        "logit_bias": {lead.as_str(): 200, tail.as_str(): 200},
    });
    let cases = [
        json!({"model": "nano", "prompt": TASK}),
        json!({"model": "nano", "prompt": TASK, "seed": 5, "temperature": 1.5, "top_p": 0.95, "max_tokens": 20}),
        json!({"model": "nano", "prompt": TASK, "stop": ["in xs if"]}),
        json!({"model": "nano-ar", "prompt": TASK, "seed": 5, "temperature": 1.2, "max_tokens": 20}),
        json!({"model": "nano-ar", "prompt": TASK, "stop": ["nothing like it", "if x"]}),
        characters.clone(),
    ];
    for body in &cases {
        let expected = by_grpc(&server, body).await;
        assert!(!expected.is_empty());
        let whole = client.well("/v1/completions", body).await;
        assert_eq!(text(&whole, 0), expected, "{body}");
        let chunks = client.chunks("/v1/completions", body).await;
        assert_eq!(joined(&chunks, 0), expected, "{body}");
        let mut chat = body.clone();
        let prompt = chat.as_object_mut().unwrap().remove("prompt").unwrap();
        // The template of the models that ship hands the last message on as it is.
        chat["messages"] = json!([{"role": "user", "content": prompt}]);
        assert_eq!(text(&client.well("/v1/chat/completions", &chat).await, 0), expected, "{chat}");
        assert_eq!(joined(&client.chunks("/v1/chat/completions", &chat).await, 0), expected, "{chat}");
        if let Some(stops) = body["stop"].as_array() {
            assert_eq!(whole["choices"][0]["finish_reason"], "stop");
            assert!(stops.iter().all(|stop| !expected.contains(stop.as_str().unwrap())), "{expected}");
        }
    }
    // Two bytes of one character come in two steps, and leave in one chunk.
    let text = joined(&client.chunks("/v1/completions", &characters).await, 0);
    assert!(text.contains('é'), "{text}");
    // Ids of tokens are a prompt too.
    let ids = json!({"model": "nano-ar", "prompt": bytes, "max_tokens": 4});
    let spelt = json!({"model": "nano-ar", "prompt": "é", "max_tokens": 4});
    let answers = [client.well("/v1/completions", &ids).await, client.well("/v1/completions", &spelt).await];
    assert_eq!(crate::client::text(&answers[0], 0), crate::client::text(&answers[1], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_are_so_many_requests() {
    let server = pair().await;
    let client = Client::new(&server);
    for model in ["nano", "nano-ar"] {
        let one = |seed: u64| json!({"model": model, "prompt": TASK, "seed": seed, "temperature": 5, "max_tokens": 16});
        let mut several = one(7);
        several["n"] = json!(3);
        let whole = client.well("/v1/completions", &several).await;
        let chunks = client.chunks("/v1/completions", &several).await;
        let mut tokens = 0;
        for index in 0..3 {
            let alone = client.well("/v1/completions", &one(7 + index as u64)).await;
            tokens += alone["usage"]["completion_tokens"].as_u64().unwrap();
            assert_eq!(text(&whole, index), text(&alone, 0), "choice {index} has the seed of its own");
            assert_eq!(joined(&chunks, index), text(&alone, 0));
            assert_eq!(whole["choices"][index]["index"], index);
            assert_eq!(whole["choices"][index]["lacuna"]["seed"], 7 + index);
            let ends =
                |chunk: &&Value| chunk["choices"][0]["index"] == index && chunk["choices"][0]["finish_reason"].is_string();
            assert_eq!(chunks.iter().filter(ends).count(), 1);
        }
        assert_eq!(whole["usage"]["completion_tokens"], tokens);
        assert_ne!(text(&whole, 0), text(&whole, 1), "at this temperature texts differ");
    }
    // Without a seed one is drawn, and told.
    let drawn = json!({"model": "nano-ar", "prompt": TASK, "temperature": 1.5, "max_tokens": 16});
    let whole = client.well("/v1/completions", &drawn).await;
    let mut again = drawn.clone();
    again["seed"] = whole["choices"][0]["lacuna"]["seed"].clone();
    assert_eq!(text(&client.well("/v1/completions", &again).await, 0), text(&whole, 0));
}

/// The id of a text that is one token.
pub async fn token(server: &TestServer, text: &str) -> u32 {
    let [found] = tokens(server, text).await[..] else { panic!("'{text}' is not one token") };
    found
}

async fn tokens(server: &TestServer, text: &str) -> Vec<u32> {
    use lacuna::service::proto::TokenizeRequest;
    use lacuna::service::proto::tokenization_client::TokenizationClient;
    let mut client = TokenizationClient::new(server.channel().await);
    let asked = TokenizeRequest { model: "nano-ar".into(), text: text.into(), add_special_tokens: None };
    let tokens = client.tokenize(asked).await.expect("it tokenizes").into_inner().tokens;
    tokens.into_iter().map(|token| token.token_id).collect()
}
