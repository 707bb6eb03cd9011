//! Drafts: each chunk is the whole text as it stands, and the last is the text.

use serde_json::json;

use crate::client::{Client, TASK, added, pair, text};

#[tokio::test(flavor = "multi_thread")]
async fn drafts_end_in_the_text() {
    let server = pair().await;
    let client = Client::new(&server);
    let slow = json!({"diffusion": {"steps": 24, "block_length": 4, "cache": "off"}});
    let asked = json!({"model": "nano", "prompt": TASK, "max_tokens": 24, "seed": 2, "temperature": 0.7, "lacuna": slow});
    for stop in [json!(null), json!("xs if")] {
        let mut asked = asked.clone();
        asked["stop"] = stop.clone();
        let expected = client.well("/v1/completions", &asked).await;
        asked["diffusing"] = json!(true);
        let chunks = client.chunks("/v1/completions", &asked).await;
        assert_eq!(added(&chunks[0], 0), "░".repeat(24), "nothing is known at first");
        let drafts: Vec<&str> = chunks.iter().map(|chunk| added(chunk, 0)).collect();
        assert!(drafts.len() > 4, "{drafts:?}");
        assert!(drafts[..drafts.len() - 1].windows(2).all(|pair| pair[0] != pair[1]), "no draft comes twice: {drafts:?}");
        let last = chunks.last().unwrap();
        assert_eq!(added(last, 0), text(&expected, 0), "the last draft is the text, stop string or not");
        assert_eq!(last["choices"][0]["finish_reason"], expected["choices"][0]["finish_reason"]);
        assert!(!added(last, 0).contains('░'));
    }
    // In a chat, and beside a given text that is no part of the answer.
    let chat = json!({"model": "nano", "messages": [{"role": "user", "content": TASK}], "diffusing": true});
    let chunks = client.chunks("/v1/chat/completions", &chat).await;
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(added(chunks.last().unwrap(), 0), "    return sum(x for x in xs if x > 17)\n");
    let gap = json!({"model": "nano", "prompt": TASK.to_owned() + "    return sum(", "suffix": " if x > 17)\n", "max_tokens": 5,
                     "diffusing": true});
    let chunks = client.chunks("/v1/fim/completions", &gap).await;
    assert_eq!((added(&chunks[0], 0), added(chunks.last().unwrap(), 0)), ("░░░░░", "x for x in xs"));
}
