//! Bad requests get a precise status, and do no harm.

use lacuna::service::proto::generate_request::Prompt;
use lacuna::service::proto::template_piece::Piece;
use lacuna::service::proto::{Chat, Diffusion, GenerateRequest, Message, Sampling, Stopping, TemplatePiece, TokenIds};
use tonic::Code;

use crate::harness::{PROMPT, assert_refused, generate, request, server, with_diffusion};

fn diffusion(change: impl FnOnce(&mut Diffusion)) -> GenerateRequest {
    let mut diffusion = Diffusion::default();
    change(&mut diffusion);
    with_diffusion(diffusion)
}

fn sampling(change: impl FnOnce(&mut Sampling)) -> GenerateRequest {
    let mut sampling = Sampling::default();
    change(&mut sampling);
    GenerateRequest { sampling: Some(sampling), ..request(PROMPT) }
}

fn stopping(max_new_tokens: Option<u64>, stop: Vec<String>) -> GenerateRequest {
    GenerateRequest { stopping: Some(Stopping { max_new_tokens, stop }), ..request(PROMPT) }
}

fn prompt(prompt: Prompt) -> GenerateRequest {
    GenerateRequest { prompt: Some(prompt), ..GenerateRequest::default() }
}

fn template(pieces: Vec<Option<Piece>>) -> GenerateRequest {
    let template = pieces.into_iter().map(|piece| TemplatePiece { piece }).collect();
    GenerateRequest { template, ..request(PROMPT) }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

/// A request, and the field that its refusal must name.
fn cases() -> Vec<(GenerateRequest, &'static str)> {
    let hole = || Some(Piece::Hole(4));
    let id = |id: &str| GenerateRequest { request_id: Some(id.into()), ..request(PROMPT) };
    let suffix = |request| GenerateRequest { suffix: Some("end".into()), ..request };
    vec![
        (GenerateRequest::default(), "prompt"),
        (id(""), "request_id"),
        (id("two words"), "request_id"),
        (id("\u{e9}"), "request_id"),
        (id(&"x".repeat(129)), "request_id"),
        (sampling(|s| s.temperature = Some(f64::NAN)), "sampling.temperature"),
        (sampling(|s| s.temperature = Some(f64::INFINITY)), "sampling.temperature"),
        (sampling(|s| s.temperature = Some(-0.5)), "sampling.temperature"),
        (sampling(|s| s.top_p = Some(0.0)), "sampling.top_p"),
        (sampling(|s| s.top_k = Some(0)), "sampling.top_k"),
        (sampling(|s| s.min_p = Some(1.5)), "sampling.min_p"),
        (sampling(|s| s.repetition_penalty = Some(1.2)), "sampling.repetition_penalty"),
        (sampling(|s| s.repetition_penalty = Some(f64::NAN)), "sampling.repetition_penalty"),
        (sampling(|s| s.presence_penalty = Some(0.5)), "sampling.presence_penalty"),
        (sampling(|s| s.frequency_penalty = Some(-0.5)), "sampling.frequency_penalty"),
        (sampling(|s| s.logprobs = Some(21)), "sampling.logprobs"),
        (sampling(|s| s.logit_bias = [(u32::MAX, 1.0)].into()), "sampling.logit_bias"),
        (sampling(|s| s.logit_bias = [(5, f32::NAN)].into()), "sampling.logit_bias"),
        (sampling(|s| s.logit_bias = (0..1025).map(|id| (id, 0.0)).collect()), "sampling.logit_bias"),
        (diffusion(|d| d.steps = Some(0)), "diffusion.steps"),
        (diffusion(|d| d.steps = Some(u64::MAX)), "diffusion.steps"),
        (diffusion(|d| d.block_length = Some(0)), "diffusion.block_length"),
        (diffusion(|d| d.block_length = Some(u64::MAX)), "diffusion.block_length"),
        (diffusion(|d| d.schedule = 99), "diffusion.schedule"),
        (diffusion(|d| d.order = -1), "diffusion.order"),
        (diffusion(|d| d.threshold = Some(f64::NAN)), "diffusion.threshold"),
        (diffusion(|d| d.cfg_scale = Some(1e300)), "diffusion.cfg_scale"),
        (diffusion(|d| (d.steps, d.threshold) = (Some(4), Some(0.5))), "diffusion"),
        (diffusion(|d| (d.threshold, d.schedule) = (Some(0.5), 2)), "diffusion.schedule"),
        (stopping(Some(0), vec![]), "stopping.max_new_tokens"),
        (stopping(Some(u64::MAX), vec![]), "stopping.max_new_tokens"),
        (stopping(None, vec![String::new()]), "stopping.stop"),
        (stopping(None, vec!["x".into(); 17]), "stopping.stop"),
        (stopping(None, vec!["x".repeat(257)]), "stopping.stop"),
        (template(vec![None, hole()]), "template[0]"),
        (template(vec![Some(Piece::Text("fixed".into()))]), "template"),
        (template(vec![Some(Piece::Hole(0))]), "template"),
        (template(vec![Some(Piece::Hole(u64::MAX))]), "template"),
        (template(vec![hole(); 257]), "template"),
        (template(vec![hole(), Some(Piece::TokenIds(TokenIds { token_ids: vec![u32::MAX] }))]), "template"),
        (suffix(template(vec![hole()])), "suffix"),
        (suffix(stopping(Some(0), vec![])), "stopping.max_new_tokens"),
        (GenerateRequest { suffix: Some("x ".repeat(300)), ..stopping(Some(8), vec![]) }, "suffix"),
        (prompt(Prompt::TokenIds(TokenIds { token_ids: vec![u32::MAX] })), "token_ids"),
        (prompt(Prompt::Chat(Chat { messages: vec![] })), "chat"),
        (request(&"many words ".repeat(200)), "stopping.max_new_tokens"),
        (request(&"x".repeat((1 << 20) + 1)), "text"),
        (GenerateRequest { priority: Some(i32::MIN), ..request(PROMPT) }, "priority"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_field_is_named_and_harms_nothing() {
    let server = server().await;
    let mut client = server.client().await;
    let good = generate(&mut client, request(PROMPT)).await.expect("a good request").text();
    for (request, field) in cases() {
        let status = client.generate(request).await.expect_err(field);
        assert_refused(&status, Code::InvalidArgument, Some(field));
    }
    let still = generate(&mut client, request(PROMPT)).await.expect("a good request").text();
    assert_eq!(still, good);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_not_found() {
    let server = server().await;
    let mut client = server.client().await;
    for name in ["gpt", &"long".repeat(100_000)] {
        let asked = GenerateRequest { model: name.into(), ..request(PROMPT) };
        let status = client.generate(asked).await.expect_err("no such model");
        assert_refused(&status, Code::NotFound, None);
        assert!(status.message().len() < 2048, "a client's words must not flood the headers");
    }
    let known = GenerateRequest { model: "nano".into(), ..request(PROMPT) };
    generate(&mut client, known).await.expect("this one is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn values_at_the_bounds_are_taken() {
    let server = server().await;
    let mut client = server.client().await;
    let chat = Chat { messages: vec![message("user", "Add two numbers.")] };
    for request in [
        GenerateRequest { request_id: Some("x".repeat(128)), ..request(PROMPT) },
        sampling(|s| (s.temperature, s.top_p, s.top_k) = (Some(10.0), Some(1.0), Some(u32::MAX))),
        sampling(|s| s.repetition_penalty = Some(1.0)),
        sampling(|s| s.logit_bias = [(5, 1000.0), (6, -1000.0)].into()),
        diffusion(|d| d.steps = Some(4096)),
        diffusion(|d| d.threshold = Some(0.0)),
        diffusion(|d| d.factor = Some(0.0)),
        diffusion(|d| d.entropy_bound = Some(1000.0)),
        diffusion(|d| d.cfg_scale = Some(1.0)),
        stopping(Some(1), vec!["x".repeat(256); 16]),
        prompt(Prompt::Text(String::new())),
        prompt(Prompt::Chat(chat)),
        GenerateRequest { suffix: Some(String::new()), ..GenerateRequest::default() },
    ] {
        let shown = format!("{request:?}");
        if let Err(status) = generate(&mut client, request).await {
            panic!("{shown}: {status:?}");
        }
    }
}
