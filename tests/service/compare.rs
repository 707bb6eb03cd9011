//! Compare: lanes of both kinds on the pair that ships, in turn and racing; what their summaries say, and what happens to lanes that
//! are wrong, fail, or are left.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lacuna::checkpoint::Checkpoint;
use lacuna::draft::Drafters;
use lacuna::engine::request::{ModelInfo, Prompt as Given};
use lacuna::engine::scoring::{ScoreOptions, score};
use lacuna::engine::{Engine, Limits};
use lacuna::service::proto::compare_event::Event as Told;
use lacuna::service::proto::compare_request::Prompt;
use lacuna::service::proto::generate_event::Event;
use lacuna::service::proto::generate_request::Method as GenerateMethod;
use lacuna::service::proto::lane::Method;
use lacuna::service::proto::{
    Autoregressive, Chat, CompareEvent, CompareRequest, Diffusion, Drafter, GenerateRequest, Lane, LaneOrder, LaneSummary,
    Message, Sampling, Stopping, TokenIds,
};
use lacuna::service::{ServeOptions, Served};
use lacuna::tensor::Placement;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{PATIENCE, TestServer, assert_refused, engine, generate, request, serve_models};

const LIMITS: Limits = Limits { resident: 4, queued: 16, tokens: None, queued_tokens: None, prefix_tokens: None };
const TASK: &str = "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n";

/// The model that decodes from left to right, with the heads that ship.
fn causal(limits: Limits) -> Served {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar");
    let checkpoint = Checkpoint::open(&folder).expect("the model opens");
    let network = checkpoint.load(Placement::CPU_F32, 4096, &mut |_| {}).expect("the model loads");
    let drafters = Drafters::load(&folder.join("drafters"), network.config(), Placement::CPU_F32).expect("drafters");
    let info = ModelInfo::new(checkpoint, &network, drafters.infos());
    let engine = Engine::start(network, drafters, info.tokenizer.clone(), limits).expect("the engine starts");
    Served { info: Arc::new(info), engine }
}

struct Pair {
    server: TestServer,
    causal: Served,
}

async fn pair_within(limits: Limits) -> Pair {
    let (info, engine) = engine(limits);
    let causal = causal(LIMITS);
    Pair { server: serve_models(vec![Served { info, engine }, causal.clone()], ServeOptions::default()).await, causal }
}

async fn pair() -> Pair {
    pair_within(LIMITS).await
}

fn diffusion(name: &str, change: impl FnOnce(&mut Diffusion)) -> Lane {
    let mut diffusion = Diffusion::default();
    change(&mut diffusion);
    Lane { name: name.into(), method: Some(Method::Diffusion(diffusion)), ..Lane::default() }
}

fn autoregressive(name: &str, change: impl FnOnce(&mut Autoregressive)) -> Lane {
    let mut autoregressive = Autoregressive::default();
    change(&mut autoregressive);
    Lane { name: name.into(), method: Some(Method::Autoregressive(autoregressive)), ..Lane::default() }
}

fn drafted(name: &str) -> Lane {
    autoregressive(name, |a| {
        a.set_drafter(Drafter::Redrafter);
        a.adapt = Some(false);
    })
}

fn compare(lanes: Vec<Lane>) -> CompareRequest {
    CompareRequest { prompt: Some(Prompt::Text(TASK.into())), lanes, ..CompareRequest::default() }
}

/// Lanes that take seconds each.
fn long(lanes: usize) -> CompareRequest {
    let slow = |d: &mut Diffusion| {
        (d.steps, d.suppress_end, d.finish_early) = (Some(200), Some(true), Some(false));
        d.block_length = Some(200);
    };
    let lanes = (0..lanes).map(|_| diffusion("", slow)).collect();
    CompareRequest { stopping: Some(Stopping { max_new_tokens: Some(200), stop: vec![] }), ..compare(lanes) }
}

async fn next(stream: &mut Streaming<CompareEvent>) -> Result<Option<(usize, Told)>, Status> {
    let event = tokio::time::timeout(PATIENCE, stream.message()).await.expect("an event in time")?;
    Ok(event.map(|event| (event.lane as usize, event.event.expect("an event that is known"))))
}

/// Events in their order, and the summaries by lane.
type Compared = (Vec<(usize, Told)>, BTreeMap<usize, LaneSummary>);

async fn run(pair: &Pair, request: CompareRequest) -> Result<Compared, Status> {
    let mut stream = pair.server.client().await.compare(request).await?.into_inner();
    let (mut events, mut summaries) = (vec![], BTreeMap::new());
    while let Some((lane, event)) = next(&mut stream).await? {
        assert!(!summaries.contains_key(&lane), "something follows a summary");
        if let Told::Summary(summary) = &event {
            summaries.insert(lane, summary.clone());
        }
        events.push((lane, event));
    }
    Ok((events, summaries))
}

/// A lane's events are a generation's, and its summary says what they came to.
fn assert_summary(events: &[(usize, Told)], lane: usize, summary: &LaneSummary) {
    let own = events.iter().filter(|(at, _)| *at == lane);
    let own: Vec<&Event> =
        own.filter_map(|(_, event)| if let Told::Generation(e) = event { e.event.as_ref() } else { None }).collect();
    let [Event::Started(started), .., Event::Finished(finished)] = own.as_slice() else { panic!("{own:?}") };
    assert!(started.request_id.ends_with(&format!(".{lane}")));
    let text = own.iter().filter_map(|event| if let Event::Committed(one) = event { Some(one.text.as_str()) } else { None });
    assert_eq!(summary.text, text.collect::<String>());
    assert_eq!((summary.reason, &summary.usage), (finished.reason, &finished.usage));
    assert_eq!((&summary.error, &summary.judge_error, &summary.model), (&None, &None, &started.model));
    let usage = summary.usage.clone().expect("usage");
    let (provisional, committed) = (usage.first_provisional_seconds.unwrap(), usage.first_committed_seconds.unwrap());
    assert!(0.0 < provisional && provisional <= committed && committed <= usage.decoding_seconds);
    assert!(usage.tokens_per_forward > 0.0 && usage.decoding_tokens_per_second >= usage.end_to_end_tokens_per_second);
    assert_eq!(usage.reused_tokens, 0, "lanes do not live off one another");
}

fn lanes() -> Vec<Lane> {
    let plain = autoregressive("plain", |_| {});
    vec![diffusion("8 steps", |d| d.steps = Some(8)), Lane::default(), plain, drafted("drafted"), drafted("again")]
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_run_in_turn_and_are_summed_up() {
    let pair = pair().await;
    let asked = CompareRequest { request_id: Some("mine".into()), ..compare(lanes()) };
    let (events, summaries) = run(&pair, asked).await.expect("it compares");
    assert!(events.is_sorted_by_key(|(lane, _)| *lane), "one lane after another");
    summaries.iter().for_each(|(lane, summary)| assert_summary(&events, *lane, summary));
    let told: Vec<_> = summaries.values().map(|one| (one.name.as_str(), one.model.as_str())).collect();
    let (nano, ar) = ("nano", "nano-ar");
    assert_eq!(told, [("8 steps", nano), (nano, nano), ("plain", ar), ("drafted", ar), ("again", ar)]);
    // What a lane says is what Generate says.
    let mut client = pair.server.client().await;
    for (lane, summary) in lanes().into_iter().zip(summaries.values()) {
        let method = lane.method.map(|method| match method {
            Method::Diffusion(asked) => GenerateMethod::Diffusion(asked),
            Method::Autoregressive(asked) => GenerateMethod::Autoregressive(asked),
        });
        let alone = GenerateRequest { model: summary.model.clone(), method, ..request(TASK) };
        let alone = generate(&mut client, alone).await.expect("it generates");
        assert_eq!((&summary.text, summary.reason), (&alone.text(), alone.finished.reason));
    }
    let usage = |lane: usize| summaries[&lane].usage.clone().expect("usage");
    assert_eq!(usage(0).forwards.expect("forwards").denoise, usage(0).steps);
    assert_eq!((&summaries[&2].text, &summaries[&3].text), (&summaries[&3].text, &summaries[&4].text), "drafts change nothing");
    assert!(usage(3).speculation.expect("drafts").acceptance_length > 1.0);
    assert!(usage(3).tokens_per_forward > usage(2).tokens_per_forward);
    // The second of two equal lanes computes its prompt like the first.
    assert_eq!(usage(3).forwards, usage(4).forwards);
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_lanes_run_at_once_and_say_the_same() {
    let pair = pair().await;
    let (_, in_turn) = run(&pair, compare(lanes())).await.expect("it compares");
    let (events, racing) =
        run(&pair, CompareRequest { order: LaneOrder::Racing.into(), ..compare(lanes()) }).await.expect("it compares");
    for (lane, summary) in &racing {
        assert_summary(&events, *lane, summary);
        assert_eq!((&summary.text, &summary.likelihood), (&in_turn[lane].text, &in_turn[lane].likelihood));
    }
    // Two that take long enough: the second one has begun before the first one ends.
    let (events, summaries) =
        run(&pair, CompareRequest { order: LaneOrder::Racing.into(), ..long(2) }).await.expect("it compares");
    assert_eq!(summaries.len(), 2);
    let place = |wanted: usize, last: bool| {
        let of_lane = |(lane, event): &(usize, Told)| *lane == wanted && matches!(event, Told::Summary(_)) == last;
        events.iter().position(of_lane).expect("it is there")
    };
    assert!(place(0, false) < place(1, true) && place(1, false) < place(0, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_judge_is_the_model_that_would_have_written_it() {
    let pair = pair().await;
    let (_, summaries) = run(&pair, compare(lanes())).await.expect("it compares");
    // Greedy decoding tells how probable its own tokens were; without the end of the text they are what is judged.
    let sampling = Some(Sampling { logprobs: Some(1), ..Sampling::default() });
    let plain = GenerateRequest { model: "nano-ar".into(), sampling, ..request(TASK) };
    let plain = generate(&mut pair.server.client().await, plain).await.expect("it generates");
    let tokenizer = &pair.causal.info.tokenizer;
    assert_eq!(tokenizer.encode(&plain.text(), false).expect("tokens"), plain.token_ids(), "its tokens are the tokenizer's");
    let logprobs: Vec<f64> = plain.commits.iter().flat_map(|one| &one.logprobs).filter_map(|one| one.logprob).collect();
    for lane in [2, 3] {
        let found = summaries[&lane].likelihood.clone().expect("a judge");
        assert_eq!((found.model.as_str(), found.tokens), ("nano-ar", logprobs.len() as u64));
        let expected = -logprobs.iter().sum::<f64>();
        assert!((found.negative_log_likelihood - expected).abs() < 1e-6 * (1.0 + expected), "{found:?} is not {expected}");
        let each = found.negative_log_likelihood_per_token.expect("tokens");
        assert!((each * found.tokens as f64 - found.negative_log_likelihood).abs() < 1e-9);
    }
    // The same by the engine's own door, and an unlikely text is less likely.
    let scored = |text: &str| {
        let (prompt, text) = (Given::Text(TASK.into()), Given::Text(text.into()));
        let options = ScoreOptions { id: "score".into(), prompt, text, deadline: None };
        tokio::task::block_in_place(|| score(&pair.causal.info, &pair.causal.engine, options)).expect("it scores")
    };
    let diffused = summaries[&0].likelihood.clone().expect("a judge");
    assert!((scored(&summaries[&0].text).negative_log - diffused.negative_log_likelihood).abs() < 1e-9);
    assert!(scored("xs xs xs def def").per_token() > Some(4.0));

    let judged = async |judge: &str, prompt: Prompt| {
        let asked = CompareRequest { judge: Some(judge.into()), prompt: Some(prompt), ..compare(vec![Lane::default()]) };
        run(&pair, asked).await.map(|(_, mut summaries)| summaries.remove(&0).expect("a summary"))
    };
    let text = || Prompt::Text(TASK.into());
    assert_eq!(judged("", text()).await.expect("nobody judges").likelihood, None);
    assert!(judged("nano-ar", text()).await.expect("it judges").likelihood.is_some());
    assert_refused(&judged("nano", text()).await.expect_err("it is bidirectional"), Code::FailedPrecondition, None);
    assert_refused(&judged("gpt", text()).await.expect_err("it is not there"), Code::NotFound, None);
    let message = Message { role: "user".into(), content: TASK.into() };
    let chat = judged("nano-ar", Prompt::Chat(Chat { messages: vec![message] })).await.expect("it judges");
    assert_eq!((&chat.judge_error, chat.likelihood.is_some()), (&None, true));
    // The models have the same tokenizer, and a chat template each.
    let ids = tokenizer.encode(TASK, false).expect("tokens");
    let by_ids = judged("nano-ar", Prompt::TokenIds(TokenIds { token_ids: ids })).await.expect("it judges");
    assert_eq!(by_ids.likelihood, judged("nano-ar", text()).await.expect("it judges").likelihood);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_is_compared_with() {
    let pair = pair().await;
    let lanes = || vec![autoregressive("", |_| {})];
    let plain = run(&pair, compare(lanes())).await.expect("it compares").1.remove(&0).expect("a summary");
    assert_eq!(plain.reference_match, None);
    let against = async |reference: &str| {
        let asked = CompareRequest { reference: Some(reference.into()), ..compare(lanes()) };
        run(&pair, asked).await.expect("it compares").1[&0].reference_match.expect("a match")
    };
    let same = against(&format!("{}\n\n", plain.text)).await;
    assert_eq!((same.exact, same.edit_distance, same.normalized_edit_distance), (true, 0, 0.0));
    let body = plain.text.trim();
    let other = against(&body.replacen('r', "", 1)).await;
    assert_eq!((other.exact, other.edit_distance), (false, 1));
    assert!((other.normalized_edit_distance - 1.0 / body.chars().count() as f64).abs() < 1e-12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_lane_is_refused_by_its_path() {
    let pair = pair().await;
    let good = || diffusion("good", |_| {});
    let second = |lane| compare(vec![good(), lane]);
    let lane_sampling = |lane, sampling| Lane { sampling: Some(sampling), ..lane };
    let penalty = Sampling { repetition_penalty: Some(1.5), ..Sampling::default() };
    let common = |sampling, lanes| CompareRequest { sampling: Some(sampling), ..compare(lanes) };
    let stopping = |max| Some(Stopping { max_new_tokens: Some(max), stop: vec![] });
    let cases = [
        (compare(vec![]), "lanes"),
        (compare(vec![good(); 17]), "lanes"),
        (second(diffusion("x", |d| d.steps = Some(0))), "lanes[1].diffusion.steps"),
        (second(diffusion("x", |d| d.order = -1)), "lanes[1].diffusion.order"),
        (second(diffusion("x", |d| (d.steps, d.threshold) = (Some(4), Some(0.5)))), "lanes[1].diffusion"),
        (second(autoregressive("x", |a| a.draft_length = Some(3))), "lanes[1].autoregressive.draft_length"),
        (second(autoregressive("x", |a| a.drafter = 77)), "lanes[1].autoregressive.drafter"),
        (second(lane_sampling(good(), penalty.clone())), "lanes[1].sampling.repetition_penalty"),
        (common(penalty, vec![autoregressive("fine", |_| {}), good()]), "sampling.repetition_penalty"),
        (second(Lane { name: "x".repeat(129), ..good() }), "lanes[1].name"),
        (CompareRequest { prompt: None, ..compare(vec![good()]) }, "prompt"),
        (CompareRequest { prompt: Some(Prompt::Text("x".repeat((1 << 20) + 1))), ..compare(vec![good()]) }, "text"),
        (CompareRequest { prompt: Some(Prompt::Chat(Chat::default())), ..compare(vec![good()]) }, "chat"),
        (CompareRequest { stopping: stopping(0), ..compare(vec![good()]) }, "stopping.max_new_tokens"),
        (CompareRequest { reference: Some("x".repeat((16 << 10) + 1)), ..compare(vec![good()]) }, "reference"),
        (CompareRequest { order: 9, ..compare(vec![good()]) }, "order"),
        (CompareRequest { request_id: Some("two words".into()), ..compare(vec![good()]) }, "request_id"),
    ];
    let mut client = pair.server.client().await;
    for (request, field) in cases {
        let status = client.compare(request).await.expect_err(field);
        assert_refused(&status, Code::InvalidArgument, Some(field));
    }
    let told = client.compare(second(diffusion("late", |d| d.steps = Some(0)))).await.expect_err("no steps");
    assert!(told.message().contains("lane 1 (late)"), "{}", told.message());
    let status = client.compare(second(Lane { model: "gpt".into(), ..good() })).await.expect_err("it is not there");
    assert_refused(&status, Code::NotFound, None);
    let wrong = Lane { model: "nano".into(), ..autoregressive("", |_| {}) };
    let status = client.compare(second(wrong)).await.expect_err("it is bidirectional");
    assert_refused(&status, Code::FailedPrecondition, None);
    assert!(status.message().starts_with("lane 1"), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lanes_failure_is_its_own() {
    // Room for a canvas of the usual length, and for nothing that takes a cache beside it.
    let pair = pair_within(Limits { tokens: Some(120), ..LIMITS }).await;
    let lanes = || {
        let guided = diffusion("guided", |d| d.cfg_scale = Some(1.0));
        vec![diffusion("before", |_| {}), guided, autoregressive("after", |_| {})]
    };
    for order in [LaneOrder::InTurn, LaneOrder::Racing] {
        let asked = CompareRequest { order: order.into(), reference: Some("x".into()), ..compare(lanes()) };
        let (events, summaries) = run(&pair, asked).await.expect("it compares");
        for lane in [0, 2] {
            assert_summary(&events, lane, &summaries[&lane]);
        }
        let failed = &summaries[&1];
        let error = failed.error.clone().expect("it did not fit");
        assert_eq!((error.code, failed.name.as_str()), (Code::ResourceExhausted as i32, "guided"));
        assert!(error.message.contains("tokens"), "{}", error.message);
        assert_eq!((&failed.usage, &failed.likelihood, &failed.reference_match), (&None, &None, &None));
    }
    // Who cannot judge is no failure of the lane's.
    let narrow = causal(Limits { tokens: Some(20), ..LIMITS });
    let (info, engine) = engine(LIMITS);
    let server = serve_models(vec![Served { info, engine }, narrow.clone()], ServeOptions::default()).await;
    let (_, summaries) = run(&Pair { server, causal: narrow }, compare(vec![Lane::default()])).await.expect("it compares");
    assert_eq!((&summaries[&0].error, &summaries[&0].likelihood), (&None, &None));
    assert_eq!(summaries[&0].judge_error.as_ref().map(|error| error.code), Some(Code::ResourceExhausted as i32));
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_and_deadlines_free_every_lane() {
    let pair = pair().await;
    let mut client = pair.server.client().await;
    for order in [LaneOrder::InTurn, LaneOrder::Racing] {
        let asked = || CompareRequest { order: order.into(), ..long(3) };
        let mut stream = client.compare(asked()).await.expect("it begins").into_inner();
        next(&mut stream).await.expect("an event").expect("one");
        assert!(pair.server.engine.active() > 0);
        drop(stream);
        pair.server.idle().await;
        let mut late = tonic::Request::new(asked());
        late.set_timeout(Duration::from_millis(300));
        let mut stream = client.compare(late).await.expect("it begins").into_inner();
        let ended = loop {
            match next(&mut stream).await {
                Ok(event) => assert!(event.is_some(), "three lanes cannot be done yet"),
                Err(status) => break status,
            }
        };
        assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended:?}");
        drop(stream);
        pair.server.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_server_begins_nothing_and_says_so() {
    let mut pair = pair().await;
    pair.server.serving().await;
    let mut client = pair.server.client().await;
    let mut stream = client.compare(long(2)).await.expect("it begins").into_inner();
    next(&mut stream).await.expect("an event").expect("one");
    let everything = HealthCheckRequest { service: String::new() };
    let mut health = HealthClient::new(pair.server.channel().await).watch(everything).await.expect("health").into_inner();
    pair.server.signal_shutdown();
    while health.message().await.expect("a status").expect("one").status() == ServingStatus::Serving {}
    let refused = client.compare(compare(vec![Lane::default()])).await.expect_err("it stops");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    // The lane that runs ends well; the one whose turn has not come is told that it will not.
    let mut summaries = vec![];
    while let Some((_, event)) = next(&mut stream).await.expect("the stream runs on") {
        if let Told::Summary(summary) = event {
            summaries.push(summary.error.map(|error| error.code));
        }
    }
    assert_eq!(summaries, [None, Some(Code::Unavailable as i32)]);
    tokio::time::timeout(PATIENCE, pair.server.task).await.expect("it ends").expect("no panic").expect("no error");
}
