//! The engine on the shipped model: what a request gives does not depend on its neighbours, and nobody's trouble is another's.

use std::path::Path;
use std::time::{Duration, Instant};

use lacuna::checkpoint::Checkpoint;
use lacuna::decode::canvas::Canvas;
use lacuna::draft::Drafters;
use lacuna::engine::request::{
    AutoregressiveOptions, DiffusionOptions, GenerateOptions, Invalid, MethodKind, ModelInfo, Prompt, SamplingOptions,
    TemplatePiece, check_defaults, validate,
};
use lacuna::engine::{Engine, Event, Failure, Limits, Refused, Usage};
use lacuna::tensor::Placement;

const PROMPT: &str = "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n";

fn start(limits: Limits) -> (ModelInfo, Engine) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let network = checkpoint.load(Placement::CPU_F32, 4096, &mut |_| {}).unwrap();
    let model = ModelInfo::new(checkpoint, &network, vec![]);
    let engine = Engine::start(network, Drafters::default(), model.tokenizer.clone(), limits).unwrap();
    (model, engine)
}

fn options(prompt: &str) -> GenerateOptions {
    GenerateOptions {
        id: "test".into(),
        prompt: Prompt::Text(prompt.into()),
        template: vec![],
        max_new_tokens: None,
        method: None,
        diffusion: DiffusionOptions::default(),
        autoregressive: AutoregressiveOptions::default(),
        sampling: SamplingOptions { seed: Some(5), ..SamplingOptions::default() },
        stops: vec![],
        steps: true,
        deadline: None,
        priority: 0,
    }
}

type Events = tokio::sync::mpsc::Receiver<Result<Event, Failure>>;

fn collect(mut events: Events) -> (String, Usage, Vec<Event>) {
    let (mut text, mut all) = (String::new(), vec![]);
    while let Some(event) = events.blocking_recv() {
        let event = event.unwrap();
        if let Event::Committed { text: more, .. } = &event {
            text.push_str(more);
        }
        all.push(event);
    }
    match all.last() {
        Some(Event::Finished { usage, .. }) => (text, usage.clone(), all),
        other => panic!("the stream ended with {other:?}"),
    }
}

const ONE: Limits = Limits { resident: 1, queued: 64, tokens: None, queued_tokens: None, prefix_tokens: None };
const MANY: Limits = Limits { resident: 16, queued: 64, tokens: None, queued_tokens: None, prefix_tokens: None };

/// Requests of every kind: greedy, sampled, several rules and lengths.
fn mixed(model: &ModelInfo) -> Vec<lacuna::engine::Request> {
    let mut requests = vec![];
    for (index, temperature) in [0.0, 0.7, 1.0].into_iter().enumerate() {
        for (steps, threshold, block_length) in [(Some(12), None, 48), (None, Some(0.9), 48), (Some(16), None, 8)] {
            let mut options = options(PROMPT);
            options.sampling.temperature = Some(temperature);
            options.sampling.seed = Some(index as u64);
            options.diffusion =
                DiffusionOptions { steps, threshold, block_length: Some(block_length), ..DiffusionOptions::default() };
            options.max_new_tokens = Some(32 + 8 * index as u64);
            requests.push(validate(model, options).unwrap());
        }
    }
    requests
}

#[test]
fn a_request_gives_the_same_alone_and_among_others_early_or_late() {
    let (model, engine) = start(ONE);
    let alone: Vec<String> = mixed(&model).into_iter().map(|r| collect(engine.submit(r).unwrap()).0).collect();
    let (model, engine) = start(MANY);
    let together: Vec<_> = mixed(&model).into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let together: Vec<String> = together.into_iter().map(|events| collect(events).0).collect();
    assert_eq!(alone, together);
    let mut reversed: Vec<_> = mixed(&model).into_iter().rev().map(|request| engine.submit(request).unwrap()).collect();
    reversed.reverse();
    let reversed: Vec<String> = reversed.into_iter().map(|events| collect(events).0).collect();
    assert_eq!(alone, reversed);
}

#[test]
fn commits_join_to_the_text_and_edits_replay_to_the_canvas() {
    let (model, engine) = start(ONE);
    for request in mixed(&model) {
        let mut replayed: Canvas = request.canvas.clone();
        let ends = request.method.ends().to_vec();
        let (text, usage, events) = collect(engine.submit(request).unwrap());
        let mut ids = vec![];
        for event in &events {
            match event {
                Event::Step(step) => step.edits.iter().for_each(|edit| replayed.replay(edit)),
                Event::Committed { token_ids, .. } => ids.extend(token_ids),
                _ => {}
            }
        }
        let end = replayed.first_end(&ends).unwrap_or(replayed.len());
        assert_eq!(ids, &replayed.tokens()[..end]);
        assert_eq!(text, model.tokenizer.decode(&ids, false).unwrap());
        assert_eq!(usage.generated_tokens, ids.len());
        assert_eq!(usage.steps, events.iter().filter(|event| matches!(event, Event::Step(_))).count());
    }
}

#[test]
fn infilling_leaves_the_fixed_text_as_it_was() {
    let (model, engine) = start(ONE);
    let mut options = options(PROMPT);
    let (before, after) = ("    return sum(", " if x > 7)\n");
    options.template = vec![TemplatePiece::Text(before.into()), TemplatePiece::Hole(5), TemplatePiece::Text(after.into())];
    let (text, usage, _) = collect(engine.submit(validate(&model, options).unwrap()).unwrap());
    assert!(text.starts_with(before), "{text}");
    assert!(text.ends_with(after), "{text}");
    assert_eq!(usage.generated_tokens, 5);
}

#[test]
fn the_mask_token_in_a_prompt_is_text_and_is_never_predicted() {
    let (model, engine) = start(ONE);
    let mask = model.mask_token_id.clone().unwrap();
    let mut options = options(&format!("# Return <|mask|> <|mask|> the sum of xs.\n{PROMPT}"));
    // Nothing is likelier than the mask token now, were it allowed.
    options.sampling.logit_bias = vec![(mask, 1000.0)];
    let request = validate(&model, options).unwrap();
    let prompt = request.canvas.sequence()[..request.canvas.prompt_len()].to_vec();
    assert_eq!(prompt.iter().filter(|id| **id == mask).count(), 2);
    let (_, usage, events) = collect(engine.submit(request).unwrap());
    assert_eq!(usage.prompt_tokens, prompt.len());
    let edits = events.iter().filter_map(|event| if let Event::Step(step) = event { Some(&step.edits) } else { None });
    let edits: Vec<_> = edits.flatten().collect();
    assert!(!edits.is_empty() && edits.iter().all(|edit| edit.token != mask), "the mask token was predicted");
}

#[test]
fn an_end_of_text_cannot_cut_off_fixed_text_unless_a_request_insists() {
    let (model, engine) = start(ONE);
    let mut options = options(PROMPT);
    options.sampling.logit_bias = vec![(model.generation.eos_token_ids[0], 1000.0)];
    options.template = vec![TemplatePiece::Hole(4), TemplatePiece::Text("# end\n".into())];
    let (text, _, _) = collect(engine.submit(validate(&model, options.clone()).unwrap()).unwrap());
    assert!(text.ends_with("# end\n"), "{text}");
    options.diffusion.suppress_end = Some(false);
    let (text, _, _) = collect(engine.submit(validate(&model, options).unwrap()).unwrap());
    assert_eq!(text, "");
}

#[test]
fn the_defaults_of_the_model_are_checked_when_it_is_loaded() {
    let (mut model, _engine) = start(ONE);
    assert_eq!(check_defaults(&model), Ok(()));
    model.generation.diffusion = Some(serde_json::json!({ "thresold": 0.5 }));
    let reason = check_defaults(&model).unwrap_err();
    assert!(reason.starts_with("generation_config.json: diffusion: ") && reason.contains("thresold"), "{reason}");
    model.generation.diffusion = None;
    model.generation.top_p = Some(0.0);
    assert!(check_defaults(&model).unwrap_err().starts_with("generation_config.json: top_p: "));
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let (model, engine) = start(ONE);
    let mut options = options(PROMPT);
    options.stops = vec!["sum".into(), "never".into()];
    let (text, _, _) = collect(engine.submit(validate(&model, options).unwrap()).unwrap());
    assert!(!text.contains("sum"), "{text}");
    assert_eq!(text, "    return ");
}

/// 200 steps for a canvas of 200.
fn one_at_a_time() -> DiffusionOptions {
    DiffusionOptions { steps: Some(200), block_length: Some(200), finish_early: Some(false), ..DiffusionOptions::default() }
}

#[test]
fn a_full_queue_refuses_and_a_departed_reader_frees_its_place() {
    let (model, engine) = start(Limits { resident: 1, queued: 1, ..Limits::default() });
    // Nobody reads the first one, so it stays resident once its channel is full: 200 steps of one token each.
    let long = || {
        let mut options = options(PROMPT);
        options.max_new_tokens = Some(200);
        options.diffusion = one_at_a_time();
        validate(&model, options).unwrap()
    };
    let first = engine.submit(long()).unwrap();
    let mut others = vec![];
    let refused = loop {
        match engine.submit(long()) {
            Ok(events) => others.push(events),
            Err(refused) => break refused,
        }
        assert!(others.len() <= 2, "the queue is not bounded");
    };
    assert!(matches!(refused, Refused::QueueFull { waiting: 1, .. }), "{refused:?}");
    drop((first, others));
    let waited = Instant::now();
    while engine.active() > 0 {
        assert!(waited.elapsed() < Duration::from_secs(20), "departed readers still hold their places");
        std::thread::yield_now();
    }
}

#[test]
fn a_reader_that_does_not_read_holds_back_only_itself() {
    let (model, engine) = start(MANY);
    let mut options = options(PROMPT);
    options.max_new_tokens = Some(200);
    options.diffusion = one_at_a_time();
    let slow = engine.submit(validate(&model, options.clone()).unwrap()).unwrap();
    for _ in 0..3 {
        collect(engine.submit(validate(&model, self::options(PROMPT)).unwrap()).unwrap());
    }
    let (_, usage, _) = collect(slow);
    assert_eq!(usage.steps, 200, "the slow reader gets everything once it reads");
}

#[test]
fn a_deadline_ends_a_request_and_stopping_ends_all() {
    let (model, engine) = start(ONE);
    let mut late = options(PROMPT);
    late.deadline = Some(Instant::now());
    let mut events = engine.submit(validate(&model, late).unwrap()).unwrap();
    let last = std::iter::from_fn(|| events.blocking_recv()).last();
    assert!(matches!(last, Some(Err(Failure::DeadlineExceeded))), "{last:?}");
    engine.stop();
    assert_eq!(engine.submit(validate(&model, options(PROMPT)).unwrap()).err(), Some(Refused::Stopping));
}

#[test]
fn bad_requests_name_the_field() {
    let (model, _engine) = start(ONE);
    let field = |change: &dyn Fn(&mut GenerateOptions)| {
        let mut options = options(PROMPT);
        change(&mut options);
        match validate(&model, options) {
            Err(Invalid::Field { field, .. }) => field,
            Err(Invalid::Unsupported(reason)) => panic!("{reason}"),
            Ok(_) => panic!("the request was taken"),
        }
    };
    assert_eq!(field(&|o| o.sampling.temperature = Some(f64::NAN)), "temperature");
    assert_eq!(field(&|o| o.sampling.temperature = Some(-1.0)), "temperature");
    assert_eq!(field(&|o| o.sampling.temperature = Some(1e-30)), "temperature");
    assert_eq!(field(&|o| o.diffusion.order_temperature = Some(0.5)), "order_temperature");
    assert_eq!(field(&|o| (o.diffusion.steps, o.diffusion.block_length) = (Some(2), Some(8))), "steps");
    assert_eq!(field(&|o| o.sampling.top_p = Some(0.0)), "top_p");
    assert_eq!(field(&|o| o.sampling.top_p = Some(f64::INFINITY)), "top_p");
    assert_eq!(field(&|o| o.sampling.top_k = Some(0)), "top_k");
    assert_eq!(field(&|o| o.sampling.logit_bias = vec![(1_000_000, 1.0)]), "logit_bias");
    assert_eq!(field(&|o| o.sampling.logit_bias = vec![(1, f32::NAN)]), "logit_bias");
    assert_eq!(field(&|o| o.max_new_tokens = Some(0)), "max_new_tokens");
    assert_eq!(field(&|o| o.max_new_tokens = Some(u64::MAX)), "max_new_tokens");
    assert_eq!(field(&|o| o.max_new_tokens = Some(250)), "max_new_tokens");
    assert_eq!(field(&|o| o.diffusion.steps = Some(0)), "steps");
    assert_eq!(field(&|o| o.diffusion.steps = Some(1 << 40)), "steps");
    assert_eq!(field(&|o| o.diffusion.block_length = Some(0)), "block_length");
    assert_eq!(field(&|o| o.diffusion.threshold = Some(1.5)), "threshold");
    assert_eq!(field(&|o| (o.diffusion.threshold, o.diffusion.steps) = (Some(0.5), Some(3))), "diffusion");
    assert_eq!(field(&|o| o.diffusion.eps = Some(1e-3)), "eps");
    assert_eq!(field(&|o| o.diffusion.cfg_scale = Some(f64::NAN)), "cfg_scale");
    assert_eq!(field(&|o| o.stops = vec![String::new()]), "stop");
    assert_eq!(field(&|o| o.template = vec![TemplatePiece::Text("x".into())]), "template");
    assert_eq!(field(&|o| o.template = vec![TemplatePiece::Hole(0)]), "template");
    assert_eq!(field(&|o| o.prompt = Prompt::Tokens(vec![0, 1 << 30])), "token_ids");
    assert_eq!(field(&|o| o.prompt = Prompt::Chat(vec![])), "chat");
}

#[test]
fn a_model_without_a_mask_token_is_refused_with_the_reason() {
    let (mut model, _engine) = start(ONE);
    model.mask_token_id = Err("neither config.json nor the tokenizer nor the family (llama) names a mask token".into());
    let refused = validate(&model, options(PROMPT)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "model nano cannot do diffusion: neither config.json nor the tokenizer nor the family (llama) names a mask token"
    );
}

#[test]
fn a_causal_model_is_refused_for_diffusion() {
    let (mut model, _engine) = start(ONE);
    model.config.attention = lacuna::model::family::Attention::Causal;
    let mut options = options(PROMPT);
    options.method = Some(MethodKind::Diffusion);
    assert!(validate(&model, options).unwrap_err().to_string().contains("its attention is causal"));
}
