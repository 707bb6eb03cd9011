//! What a stream tells adds up: commits are the text, edits are the canvas, usage is what happened.

use lacuna::service::proto::{Diffusion, FinishReason, Stopping};

use crate::harness::{PROMPT, collect, generate, long, request, server, with_diffusion};

#[tokio::test(flavor = "multi_thread")]
async fn commits_join_to_the_text_and_edits_replay_to_the_canvas() {
    let server = server().await;
    let mut client = server.client().await;
    let small_blocks = Diffusion { block_length: Some(8), threshold: Some(0.7), ..Diffusion::default() };
    for request in [request(PROMPT), with_diffusion(small_blocks), long(10)] {
        let done = generate(&mut client, request).await.expect("it generates");
        let canvas = done.replayed();
        let ids = done.token_ids();
        let given: Vec<_> = ids.iter().copied().map(Some).collect();
        assert_eq!(given, canvas[..ids.len()], "what was given out is the canvas's beginning");
        let shown = server_text(&server, &ids).await;
        assert_eq!(done.text(), shown, "the commits' texts are the tokens' text");
        if done.finished.reason() == FinishReason::Length {
            assert_eq!(ids.len(), canvas.len());
        }
    }
}

async fn server_text(server: &crate::harness::TestServer, ids: &[u32]) -> String {
    use lacuna::service::proto::DetokenizeRequest;
    use lacuna::service::proto::tokenization_client::TokenizationClient;
    let request = DetokenizeRequest { token_ids: ids.to_vec(), ..DetokenizeRequest::default() };
    TokenizationClient::new(server.channel().await).detokenize(request).await.expect("they are tokens").into_inner().text
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_what_was_seen() {
    let server = server().await;
    let done = generate(&mut server.client().await, long(10)).await.expect("it generates");
    assert_eq!(done.finished.reason(), FinishReason::Length);
    let usage = done.finished.usage.expect("usage");
    assert_eq!(usage.steps, 10);
    assert_eq!(done.steps.len(), 10);
    assert_eq!(usage.forwards.expect("forwards").denoise, 10);
    assert_eq!(usage.generated_tokens, 200);
    assert_eq!(usage.prompt_tokens, done.started.prompt_tokens);
    assert!((usage.tokens_per_forward - 20.0).abs() < 1e-9);
    let first = usage.first_committed_seconds.expect("something was committed");
    assert!(0.0 < first && first <= usage.decoding_seconds);
    assert!(0.0 < usage.end_to_end_tokens_per_second);
    assert!(usage.end_to_end_tokens_per_second <= usage.decoding_tokens_per_second);
}

#[tokio::test(flavor = "multi_thread")]
async fn step_events_can_be_left_out() {
    let server = server().await;
    let mut client = server.client().await;
    let with = generate(&mut client, request(PROMPT)).await.expect("it generates");
    let mut quiet = request(PROMPT);
    quiet.step_events = Some(false);
    let without = generate(&mut client, quiet).await.expect("it generates");
    assert!(!with.steps.is_empty());
    assert!(without.steps.is_empty());
    assert_eq!(with.text(), without.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_text_ends_before_a_stop_string() {
    let server = server().await;
    let mut client = server.client().await;
    let whole = generate(&mut client, long(10)).await.expect("it generates").text();
    // Any string inside the text will do; one that is not at its beginning shows that the rest is kept.
    let at = whole.char_indices().nth(whole.chars().count() / 2).expect("a text").0;
    let stop: String = whole[at..].chars().take(3).collect();
    let mut stopped = long(10);
    stopped.stopping = Some(Stopping { max_new_tokens: Some(200), stop: vec![stop.clone()] });
    let stream = client.generate(stopped).await.expect("it generates").into_inner();
    let done = collect(stream).await.expect("it generates");
    assert_eq!(done.finished.reason(), FinishReason::Stop);
    assert_eq!(done.text(), whole[..whole.find(&stop).expect("it is in there")]);
}
