//! Started tells the settings in force: the request's own, else the model's, else the documented ones.

use lacuna::service::proto::{Diffusion, DiffusionCache, GenerateRequest, Order, Sampling, Schedule, Stopping};

use crate::harness::{generate, request, server, with_diffusion};

#[tokio::test(flavor = "multi_thread")]
async fn started_tells_the_settings_in_force() {
    let server = server().await;
    let mut client = server.client().await;
    let defaults = generate(&mut client, request("x")).await.expect("it generates").started;
    assert_eq!(defaults.model, "nano");
    assert_eq!(defaults.request_id.len(), 32);
    let diffusion = defaults.diffusion.expect("diffusion");
    assert!(diffusion.steps.is_some() || diffusion.threshold.is_some(), "the model's rule");
    assert_eq!(diffusion.finish_early, Some(true));

    let asked = Diffusion {
        steps: Some(6),
        schedule: Schedule::Timesteps.into(),
        eps: Some(0.01),
        independent: Some(false),
        block_length: Some(4),
        order: Order::Entropy.into(),
        order_temperature: Some(0.5),
        cfg_scale: Some(0.0),
        finish_early: Some(false),
        suppress_end: Some(true),
        late_end: Some(false),
        cache: DiffusionCache::Off.into(),
        deterministic: Some(false),
        ..Diffusion::default()
    };
    let sampling = Sampling {
        temperature: Some(0.5),
        top_p: Some(0.9),
        top_k: Some(20),
        min_p: Some(0.01),
        logit_bias: [(7, 0.5), (9, -1.0)].into(),
        seed: Some(u64::MAX),
        logprobs: Some(2),
        ..Sampling::default()
    };
    let asked_for = GenerateRequest {
        request_id: Some("my.request:1_a-b".into()),
        sampling: Some(sampling.clone()),
        stopping: Some(Stopping { max_new_tokens: Some(12), stop: vec![] }),
        ..with_diffusion(asked)
    };
    let started = generate(&mut client, asked_for).await.expect("it generates").started;
    assert_eq!(started.request_id, "my.request:1_a-b");
    assert_eq!(started.diffusion, Some(asked));
    assert_eq!(started.sampling, Some(sampling));
    assert_eq!(started.canvas.len(), 12);
    assert!(started.canvas.iter().all(|cell| cell.masked));
}
