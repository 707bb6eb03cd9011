//! The same seed gives the same text, whatever else is running.

use std::sync::Arc;

use lacuna::engine::Limits;
use lacuna::engine::request::ModelInfo;
use lacuna::service::proto::{GenerateRequest, Sampling};
use lacuna::service::{ServeOptions, Served};

use crate::harness::{PROMPT, engine, generate, long, request, serve_models, server, started};

fn sampled(seed: Option<u64>) -> GenerateRequest {
    let sampling = Sampling { temperature: Some(1.0), seed, ..Sampling::default() };
    GenerateRequest { sampling: Some(sampling), ..long(12) }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_texts_are_alike() {
    let server = server().await;
    let mut client = server.client().await;
    let first = generate(&mut client, request(PROMPT)).await.expect("it generates");
    let second = generate(&mut client, request(PROMPT)).await.expect("it generates");
    assert_eq!(first.token_ids(), second.token_ids());
    assert_eq!(first.steps, second.steps);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_repeats_a_text_beside_other_work() {
    let server = server().await;
    let mut client = server.client().await;
    let alone = generate(&mut client, sampled(Some(7))).await.expect("it generates");
    let mut other = client.generate(long(200)).await.expect("it generates").into_inner();
    started(&mut other).await.expect("it starts");
    let beside = generate(&mut client, sampled(Some(7))).await.expect("it generates");
    assert_eq!(alone.token_ids(), beside.token_ids());
    let different = generate(&mut client, sampled(Some(8))).await.expect("it generates");
    assert_ne!(alone.token_ids(), different.token_ids());
}

#[tokio::test(flavor = "multi_thread")]
async fn started_tells_a_seed_that_the_server_drew() {
    let server = server().await;
    let mut client = server.client().await;
    let drawn = generate(&mut client, sampled(None)).await.expect("it generates");
    let seed = drawn.started.sampling.clone().expect("sampling").seed;
    assert!(seed.is_some());
    let again = generate(&mut client, sampled(seed)).await.expect("it generates");
    assert_eq!(drawn.token_ids(), again.token_ids());
}

/// Two engines are two threads, and libtorch has one generator of random numbers for both.
#[tokio::test(flavor = "multi_thread")]
async fn a_seed_repeats_a_text_beside_another_model() {
    let limits = Limits { resident: 4, queued: 16, ..Limits::default() };
    let served = ["first", "second"].map(|name| {
        let (info, engine) = engine(limits);
        let info = ModelInfo { name: name.into(), ..info.as_ref().clone() };
        Served { info: Arc::new(info), engine }
    });
    let server = serve_models(served.into(), ServeOptions::default()).await;
    let mut client = server.client().await;
    let of = |model: &str| GenerateRequest { model: model.into(), ..sampled(Some(7)) };
    let alone = generate(&mut client, of("first")).await.expect("it generates");
    assert_eq!(alone.started.model, "first");
    for _ in 0..3 {
        let mut second = client.clone();
        let mut first = client.clone();
        let (beside, other) = tokio::join!(generate(&mut first, of("first")), generate(&mut second, of("second")));
        assert_eq!(beside.expect("it generates").token_ids(), alone.token_ids());
        let other = other.expect("it generates");
        assert_eq!(other.started.model, "second");
        assert_eq!(other.token_ids(), alone.token_ids(), "the models have the same weights");
    }
}
