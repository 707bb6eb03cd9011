//! Autoregressive requests end to end: a server with both kinds of models, drafts and what is told of them.

use std::path::Path;
use std::sync::Arc;

use lacuna::checkpoint::Checkpoint;
use lacuna::decode::autoregressive::DrafterKind;
use lacuna::draft::Drafters;
use lacuna::draft::chain::Chain;
use lacuna::draft::redrafter::{Beams, Redrafter, Settings};
use lacuna::engine::request::ModelInfo;
use lacuna::engine::{Engine, Limits};
use lacuna::model::RandomWeights;
use lacuna::service::proto::generate_request::{Method, Prompt};
use lacuna::service::proto::models_client::ModelsClient;
use lacuna::service::proto::template_piece::Piece;
use lacuna::service::proto::{
    Autoregressive, Diffusion, Drafter, FinishReason, GenerateRequest, GetModelRequest, Sampling, Stopping, TemplatePiece,
    TokenIds,
};
use lacuna::service::{ServeOptions, Served};
use lacuna::tensor::Placement;
use tonic::Code;

use crate::harness::{TestServer, assert_refused, engine, generate, request, serve_models};

const LIMITS: Limits = Limits { resident: 4, queued: 16, tokens: None, queued_tokens: None, prefix_tokens: None };
const TASK: &str = "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n";

/// The model that decodes from left to right, with heads that nobody has trained beside the lookup.
fn causal() -> Served {
    lacuna::tensor::set_threads(1);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar");
    let checkpoint = Checkpoint::open(&folder).expect("the model opens");
    let network = checkpoint.load(Placement::CPU_F32, 4096, &mut |_| {}).expect("the model loads");
    let config = network.config();
    let settings = Settings {
        hidden_size: config.hidden_size,
        exit_dim: 2 * config.hidden_size,
        layers: 1,
        rows: config.vocab_size,
        trimmed: false,
        recurrent: true,
    };
    let head = Redrafter::new(settings, &mut RandomWeights { placement: Placement::CPU_F32 }).expect("weights");
    let mut drafters = Drafters::default();
    drafters.add(DrafterKind::Chain, Box::new(Chain::exact(head.shallow_clone())));
    drafters.add(DrafterKind::Redrafter, Box::new(Beams::exact(head)));
    let info = ModelInfo::new(checkpoint, &network, drafters.infos());
    let engine = Engine::start(network, drafters, info.tokenizer.clone(), LIMITS).expect("the engine starts");
    Served { info: Arc::new(info), engine }
}

async fn server() -> TestServer {
    let (info, engine) = engine(LIMITS);
    serve_models(vec![Served { info, engine }, causal()], ServeOptions::default()).await
}

fn with(change: impl FnOnce(&mut Autoregressive)) -> GenerateRequest {
    let mut autoregressive = Autoregressive::default();
    change(&mut autoregressive);
    GenerateRequest { model: "nano-ar".into(), method: Some(Method::Autoregressive(autoregressive)), ..request(TASK) }
}

fn sampled(change: impl FnOnce(&mut Sampling), request: GenerateRequest) -> GenerateRequest {
    let mut sampling = Sampling::default();
    change(&mut sampling);
    GenerateRequest { sampling: Some(sampling), ..request }
}

const DRAFTERS: [Drafter; 4] = [Drafter::None, Drafter::Redrafter, Drafter::Chain, Drafter::Lookup];

#[tokio::test(flavor = "multi_thread")]
async fn drafts_are_told_and_change_nothing() {
    let server = server().await;
    let mut client = server.client().await;
    // Without a method the model's kind decides.
    let plain =
        generate(&mut client, GenerateRequest { model: "nano-ar".into(), ..request(TASK) }).await.expect("it generates");
    let settings = plain.started.autoregressive.expect("autoregressive settings");
    assert_eq!(plain.started.diffusion, None);
    assert_eq!((settings.drafter(), settings.draft_length, settings.adapt), (Drafter::None, None, None));
    assert_eq!((settings.deterministic, settings.suppress_end, settings.prefill_chunk), (Some(false), Some(false), Some(512)));
    assert_eq!(plain.started.canvas.len(), 48);
    assert!(plain.started.canvas.iter().all(|cell| cell.masked));
    for drafter in DRAFTERS {
        let asked = with(|a| {
            a.set_drafter(drafter);
            a.adapt = (drafter != Drafter::None).then_some(false);
        });
        let done = generate(&mut client, asked).await.expect("it generates");
        assert_eq!((done.text(), done.finished.reason()), (plain.text(), plain.finished.reason()), "{drafter:?}");
        // Every step's edits are the next cells, and the canvas is the text.
        let ids = done.token_ids();
        assert_eq!(done.replayed()[..ids.len()], ids.iter().copied().map(Some).collect::<Vec<_>>());
        let positions: Vec<u64> = done.steps.iter().flat_map(|step| &step.edits).map(|edit| edit.position).collect();
        assert_eq!(positions, (0..positions.len() as u64).collect::<Vec<_>>());
        let usage = done.finished.usage.clone().expect("usage");
        let forwards = usage.forwards.expect("forwards");
        assert_eq!((forwards.denoise, forwards.prefill), (0, 1));
        assert_eq!(usage.steps, 1 + forwards.decode + forwards.verify);
        // A client that is slow for a moment gets several steps as one, with the number of the last.
        let numbers: Vec<u64> = done.steps.iter().map(|step| step.step + 1).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b) && numbers.last() == Some(&usage.steps), "{numbers:?} of {}", usage.steps);
        let all = (forwards.prefill + forwards.decode + forwards.verify) as f64;
        assert!((usage.tokens_per_forward - usage.generated_tokens as f64 / all).abs() < 1e-9);
        let Some(seen) = usage.speculation else {
            assert_eq!(drafter, Drafter::None);
            continue;
        };
        assert_ne!(drafter, Drafter::None);
        assert_eq!(seen.drafts, forwards.verify);
        assert!(seen.drafts > 0 && seen.accepted_tokens <= seen.drafted_tokens && seen.drafted_tokens <= seen.candidate_tokens);
        assert_eq!(seen.accepted_exactly.iter().sum::<u64>(), seen.drafts);
        let tokens: u64 = seen.accepted_exactly.iter().zip(1..).map(|(drafts, tokens)| drafts * tokens).sum();
        assert_eq!(tokens, seen.accepted_tokens + seen.drafts);
        assert_eq!(positions.len() as u64, 1 + forwards.decode + tokens);
        assert!((seen.acceptance_length - tokens as f64 / seen.drafts as f64).abs() < 1e-9);
        assert_eq!(seen.acceptance_by_position.len() + 1, seen.accepted_exactly.len());
        let removed = 1.0 - seen.drafted_tokens as f64 / seen.candidate_tokens as f64;
        assert!((seen.deduplicated_share - removed).abs() < 1e-9);
        assert!(seen.draft_seconds > 0.0 && seen.verify_seconds > 0.0 && seen.commit_seconds > 0.0);
        assert!(seen.draft_seconds + seen.verify_seconds + seen.commit_seconds <= usage.decoding_seconds);
        assert_eq!(forwards.draft > 0, drafter != Drafter::Lookup);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn started_tells_the_drafts_in_force() {
    let server = server().await;
    let mut client = server.client().await;
    let asked = Autoregressive {
        drafter: Drafter::Redrafter.into(),
        draft_length: Some(3),
        beam_width: Some(2),
        adapt: Some(false),
        deterministic: Some(true),
        suppress_end: Some(true),
        prefill_chunk: Some(7),
    };
    let sampling = Sampling {
        temperature: Some(0.5),
        top_k: Some(9),
        repetition_penalty: Some(1.25),
        presence_penalty: Some(-0.5),
        frequency_penalty: Some(0.25),
        logit_bias: [(7, 0.5)].into(),
        seed: Some(12),
        logprobs: Some(3),
        ..Sampling::default()
    };
    let request = GenerateRequest {
        sampling: Some(sampling.clone()),
        stopping: Some(Stopping { max_new_tokens: Some(12), stop: vec![] }),
        ..with(|a| *a = asked)
    };
    let done = generate(&mut client, request).await.expect("it generates");
    assert_eq!(done.started.autoregressive, Some(asked));
    assert_eq!(done.started.sampling, Some(sampling));
    assert_eq!(done.finished.reason(), FinishReason::Length);
    assert_eq!(done.finished.usage.expect("usage").forwards.expect("forwards").prefill, done.started.prompt_tokens.div_ceil(7));
    // What is left unset is filled in: the longest drafts, and adapting.
    let done = generate(&mut client, with(|a| a.set_drafter(Drafter::Redrafter))).await.expect("it generates");
    let told = done.started.autoregressive.expect("settings");
    assert_eq!((told.draft_length, told.beam_width, told.adapt), (Some(8), Some(4), Some(true)));
    // Drawn chains are as long as they always are.
    let drawn = sampled(|s| s.temperature = Some(1.0), with(|a| a.set_drafter(Drafter::Chain)));
    let told = generate(&mut client, drawn).await.expect("it generates").started.autoregressive.expect("settings");
    assert_eq!((told.draft_length, told.beam_width, told.adapt), (Some(4), Some(1), Some(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_with_their_tokens() {
    let server = server().await;
    let mut client = server.client().await;
    let asked = sampled(|s| s.logprobs = Some(4), with(|a| a.set_drafter(Drafter::Lookup)));
    let done = generate(&mut client, asked).await.expect("it generates");
    for commit in &done.commits {
        assert_eq!(commit.logprobs.iter().map(|told| told.token_id).collect::<Vec<_>>(), commit.token_ids);
        for told in &commit.logprobs {
            let logprob = told.logprob.expect("it was chosen");
            assert!(logprob <= 0.0);
            let [first, .., last] = told.alternatives.as_slice() else { panic!("four alternatives") };
            assert_eq!(told.alternatives.len(), 4);
            assert_eq!(first.token_id, told.token_id, "the best is what greedy decoding takes");
            assert!((first.logprob - logprob).abs() < 1e-9 && last.logprob <= first.logprob);
            assert!(!first.text.is_empty() || first.token_id == 0);
        }
    }
    let quiet = generate(&mut client, with(|_| ())).await.expect("it generates");
    assert!(quiet.commits.iter().all(|commit| commit.logprobs.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_repeats_a_drawn_text_beside_others() {
    let server = server().await;
    let client = server.client().await;
    let ask = |drafter: Drafter, seed: u64| {
        let mut client = client.clone();
        let asked = with(|a| {
            a.set_drafter(drafter);
            a.adapt = (drafter != Drafter::None).then_some(false);
            a.deterministic = Some(true);
        });
        let asked = sampled(|s| (s.temperature, s.seed) = (Some(3.0), Some(seed)), asked);
        async move { generate(&mut client, asked).await.expect("it generates").token_ids() }
    };
    let alone = ask(Drafter::None, 7).await;
    let (a, b, c, d) =
        tokio::join!(ask(Drafter::None, 7), ask(Drafter::Lookup, 7), ask(Drafter::Redrafter, 7), ask(Drafter::None, 8));
    assert_eq!([&a, &b, &c], [&alone; 3]);
    assert_ne!(d, alone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_field_is_named() {
    let server = server().await;
    let mut client = server.client().await;
    let good = generate(&mut client, with(|_| ())).await.expect("a good request").text();
    let drafting = |change: &dyn Fn(&mut Autoregressive)| {
        with(|a| {
            a.set_drafter(Drafter::Redrafter);
            change(a);
        })
    };
    let plain = || with(|_| ());
    let hole = |length| TemplatePiece { piece: Some(Piece::Hole(length)) };
    let fixed = || TemplatePiece { piece: Some(Piece::Text("x".into())) };
    let to = |model: &str, request: GenerateRequest| GenerateRequest { model: model.into(), ..request };
    let cases = [
        (with(|a| a.drafter = 77), "autoregressive.drafter"),
        // Not there; and nothing to draft for.
        (with(|a| a.set_drafter(Drafter::Medusa)), "autoregressive.drafter"),
        (to("nano", with(|a| a.set_drafter(Drafter::Lookup))), "autoregressive.drafter"),
        (drafting(&|a| a.draft_length = Some(0)), "autoregressive.draft_length"),
        (drafting(&|a| a.draft_length = Some(9)), "autoregressive.draft_length"),
        (drafting(&|a| a.draft_length = Some(u64::MAX)), "autoregressive.draft_length"),
        (drafting(&|a| a.beam_width = Some(5)), "autoregressive.beam_width"),
        (with(|a| a.draft_length = Some(3)), "autoregressive.draft_length"),
        (with(|a| a.beam_width = Some(3)), "autoregressive.beam_width"),
        (with(|a| a.adapt = Some(true)), "autoregressive.adapt"),
        (with(|a| a.prefill_chunk = Some(0)), "autoregressive.prefill_chunk"),
        (sampled(|s| s.repetition_penalty = Some(0.0), plain()), "sampling.repetition_penalty"),
        (sampled(|s| s.presence_penalty = Some(f64::NAN), plain()), "sampling.presence_penalty"),
        (sampled(|s| s.frequency_penalty = Some(10.5), plain()), "sampling.frequency_penalty"),
        (sampled(|s| s.logprobs = Some(21), plain()), "sampling.logprobs"),
        (GenerateRequest { prompt: Some(Prompt::TokenIds(TokenIds::default())), ..with(|_| ()) }, "prompt"),
        (GenerateRequest { template: vec![hole(4), fixed()], ..with(|_| ()) }, "template"),
        (GenerateRequest { suffix: Some("end".into()), ..with(|_| ()) }, "suffix"),
    ];
    for (request, field) in cases {
        let shown = format!("{request:?}");
        let status = client.generate(request).await.err().unwrap_or_else(|| panic!("{field} was taken: {shown}"));
        assert_refused(&status, Code::InvalidArgument, Some(field));
    }
    assert_eq!(generate(&mut client, with(|_| ())).await.expect("a good request").text(), good);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_method_fails_its_precondition() {
    let server = server().await;
    let mut client = server.client().await;
    let status =
        client.generate(GenerateRequest { model: "nano".into(), ..with(|_| ()) }).await.expect_err("it is bidirectional");
    assert_refused(&status, Code::FailedPrecondition, None);
    let diffusion = Some(Method::Diffusion(Diffusion::default()));
    let status = client.generate(GenerateRequest { method: diffusion, ..with(|_| ()) }).await.expect_err("it is causal");
    assert_refused(&status, Code::FailedPrecondition, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_tell_who_drafts_for_them() {
    let server = server().await;
    let mut client = ModelsClient::new(server.channel().await);
    let mut get = async |name: &str| {
        let request = GetModelRequest { name: name.into() };
        client.get(request).await.expect("it is there").into_inner().model.expect("a model")
    };
    let causal = get("nano-ar").await;
    let capabilities = causal.capabilities.expect("capabilities");
    assert!(capabilities.autoregressive && !capabilities.diffusion && !capabilities.infill);
    let told: Vec<_> = causal.drafters.iter().map(|d| (d.drafter(), d.draft_length_max, d.beam_width_max)).collect();
    assert_eq!(told, [(Drafter::Redrafter, 8, 4), (Drafter::Chain, 8, 1), (Drafter::Lookup, 10, 1)]);
    for drafter in &causal.drafters {
        assert!((1..=drafter.draft_length_max).contains(&drafter.usual_draft_length));
        assert!((1..=drafter.beam_width_max).contains(&drafter.usual_beam_width));
    }
    assert!(causal.default_autoregressive.is_some());
    let diffusion = get("nano").await;
    assert!(diffusion.drafters.is_empty(), "nobody drafts for diffusion");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_adds_up_what_drafts_came_to() {
    let server = server().await;
    let mut client = server.client().await;
    let mut models = ModelsClient::new(server.channel().await);
    let mut drafted = async || {
        let request = GetModelRequest { name: "nano-ar".into() };
        let model = models.get(request).await.expect("it is there").into_inner().model.expect("a model");
        model.drafted.expect("counts")
    };
    let before = drafted().await;
    let mut sum = before.clone();
    for adapt in [false, true] {
        let asked = with(|a| {
            a.set_drafter(Drafter::Lookup);
            a.adapt = Some(adapt);
        });
        let usage = generate(&mut client, asked).await.expect("it generates").finished.usage.expect("usage");
        let seen = usage.speculation.expect("drafts");
        assert_eq!(seen.estimated_speedup.is_some(), adapt, "the cost of a plain step is known where drafts adapt");
        assert!(seen.estimated_speedup.is_none_or(|ratio| ratio > 0.0 && ratio.is_finite()));
        sum.drafts += seen.drafts;
        sum.drafted_tokens += seen.drafted_tokens;
        sum.accepted_tokens += seen.accepted_tokens;
        sum.verify_seconds += seen.verify_seconds;
    }
    server.idle().await;
    let after = drafted().await;
    assert!(after.drafts > before.drafts);
    assert_eq!(
        (after.drafts, after.drafted_tokens, after.accepted_tokens),
        (sum.drafts, sum.drafted_tokens, sum.accepted_tokens)
    );
    assert!((after.verify_seconds - sum.verify_seconds).abs() < 1e-6);
}
