//! Settings do what they say, OpenAI's and the extension's.

use serde_json::{Value, json};

use crate::client::{Client, TASK, pair, text};

fn with(model: &str, settings: &Value) -> Value {
    let mut body = json!({"model": model, "prompt": TASK, "seed": 4});
    body.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn the_extension_reaches_the_decoder() {
    let server = pair().await;
    let client = Client::new(&server);
    let steps = json!({"lacuna": {"diffusion": {"steps": 6, "finish_early": false}, "priority": 3}});
    let answer = client.well("/v1/completions", &with("nano", &steps)).await;
    assert_eq!(answer["usage"]["lacuna"]["steps"], 6);
    assert_eq!(answer["usage"]["lacuna"]["forwards"]["denoise"], 6);
    let plain = client.well("/v1/completions", &with("nano-ar", &json!({"lacuna": {"autoregressive": {}}}))).await;
    let forwards = |answer: &Value, kind: &str| answer["usage"]["lacuna"]["forwards"][kind].as_u64().unwrap();
    assert!(forwards(&plain, "decode") > 4 && forwards(&plain, "verify") == 0, "{plain}");
    let drafted = json!({"lacuna": {"autoregressive": {"drafter": "redrafter", "adapt": false}}});
    let drafted = client.well("/v1/completions", &with("nano-ar", &drafted)).await;
    assert!(forwards(&drafted, "verify") > 0, "{drafted}");
    assert_eq!(text(&drafted, 0), text(&plain, 0), "drafts never change a text");
    // One token to choose from is greedy, whatever the temperature.
    let one = json!({"temperature": 2, "lacuna": {"sampling": {"top_k": 1}}});
    let one = client.well("/v1/completions", &with("nano-ar", &one)).await;
    assert_eq!(text(&one, 0), text(&plain, 0));
    let guided = json!({"diffusion": {"cfg_scale": 1.0, "steps": 2, "order": "margin", "schedule": "linear"}});
    let guided = client.well("/v1/completions", &with("nano", &json!({"lacuna": guided}))).await;
    assert!(forwards(&guided, "denoise") == 2 * guided["usage"]["lacuna"]["steps"].as_u64().unwrap(), "{guided}");
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_settings_reach_the_decoder() {
    let server = pair().await;
    let client = Client::new(&server);
    let plain = client.well("/v1/completions", &with("nano-ar", &json!({"logprobs": 0}))).await;
    let first = plain["choices"][0]["logprobs"]["tokens"][1].as_str().expect("a token").to_owned();
    let ids = client.well("/v1/completions", &with("nano-ar", &json!({"max_tokens": 2}))).await;
    assert!(text(&ids, 0).ends_with(&first));
    // What is biased away does not come, and what is penalised comes less.
    let token = crate::same::token(&server, &first).await.to_string();
    let biased = client.well("/v1/completions", &with("nano-ar", &json!({"logit_bias": {token: -100}}))).await;
    assert!(!text(&biased, 0).contains(&first), "{biased}");
    let penalties = with("nano-ar", &json!({"frequency_penalty": 10, "presence_penalty": 10}));
    let penalised = client.well("/v1/completions", &penalties).await;
    assert_ne!(text(&penalised, 0), text(&plain, 0));
    let neutral = json!({"frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "best_of": 1, "echo": false, "user": "me",
                         "response_format": {"type": "text"}, "stream": false, "logprobs": null, "suffix": null});
    assert_eq!(text(&client.well("/v1/completions", &with("nano-ar", &neutral)).await, 0), text(&plain, 0));
    // A seed may be negative, as OpenAI's may.
    let negative = json!({"seed": -3, "temperature": 1});
    let negative = client.well("/v1/completions", &with("nano", &negative)).await;
    assert_eq!(negative["choices"][0]["lacuna"]["seed"], u64::MAX - 2);
}
