//! Autoregressive requests through the engine, on the model that ships: what a request may ask, what its settings do to the text,
//! and that neighbours, drafts and long prompts change nothing about it.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{F32, ids, random_medusa, relative_error};
use lacuna::checkpoint::Checkpoint;
use lacuna::decode::FinishReason;
use lacuna::decode::autoregressive::DrafterKind;
use lacuna::draft::Drafters;
use lacuna::draft::chain::Chain;
use lacuna::draft::redrafter::{Beams, Redrafter, Settings};
use lacuna::engine::request::{
    AutoregressiveOptions, DiffusionOptions, DrafterChoice, GenerateOptions, Invalid, MethodKind, ModelInfo, Prompt,
    SamplingOptions, TemplatePiece, check_defaults, validate,
};
use lacuna::engine::{Engine, Event, Failure, Limits, Logprob, Usage};
use lacuna::model::family::Attention;
use lacuna::model::{RandomWeights, Transformer};
use lacuna::tensor::{Kind, Tensor};

const PROMPT: &str = "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n";
const ALL: [DrafterKind; 4] = DrafterKind::ALL;

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)).unwrap()
}

/// Heads that nobody has trained: what they propose is seldom right, and must not matter.
fn heads(model: &Transformer) -> Drafters {
    let config = model.config();
    let settings = Settings {
        hidden_size: config.hidden_size,
        exit_dim: 2 * config.hidden_size,
        layers: 1,
        rows: config.vocab_size,
        trimmed: false,
        recurrent: true,
    };
    let medusa = random_medusa(model, 2);
    let _generator = lacuna::tensor::seeded(1);
    let head = Redrafter::new(settings, &mut RandomWeights { placement: F32 }).unwrap();
    let mut drafters = Drafters::default();
    drafters.add(DrafterKind::Chain, Box::new(Chain::exact(head.shallow_clone())));
    drafters.add(DrafterKind::Redrafter, Box::new(Beams::exact(head)));
    drafters.add(DrafterKind::Medusa, Box::new(medusa));
    drafters
}

fn start(resident: usize) -> (ModelInfo, Engine) {
    lacuna::tensor::set_threads(1);
    let checkpoint = checkpoint("nano-ar");
    let network = checkpoint.load(F32, 4096, &mut |_| {}).unwrap();
    let drafters = heads(&network);
    let model = ModelInfo::new(checkpoint, &network, drafters.infos());
    let limits = Limits { resident, queued: 64, prefix_tokens: Some(0), ..Limits::default() };
    let engine = Engine::start(network, drafters, model.tokenizer.clone(), limits).unwrap();
    (model, engine)
}

fn options(prompt: &str) -> GenerateOptions {
    GenerateOptions {
        id: "test".into(),
        prompt: Prompt::Text(prompt.into()),
        template: vec![],
        max_new_tokens: Some(40),
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

fn with(change: impl FnOnce(&mut GenerateOptions)) -> GenerateOptions {
    let mut options = options(PROMPT);
    change(&mut options);
    options
}

fn drafting(kind: DrafterKind) -> AutoregressiveOptions {
    AutoregressiveOptions { drafter: Some(DrafterChoice::Use(kind)), adapt: Some(false), ..AutoregressiveOptions::default() }
}

type Events = tokio::sync::mpsc::Receiver<Result<Event, Failure>>;

/// All that a stream told, read to its end.
struct Done {
    text: String,
    commits: Vec<(Vec<u32>, String, Vec<Option<Logprob>>)>,
    reason: FinishReason,
    usage: Usage,
}

impl Done {
    fn tokens(&self) -> Vec<u32> {
        self.commits.iter().flat_map(|(ids, ..)| ids.clone()).collect()
    }

    fn logprobs(&self) -> Vec<Option<Logprob>> {
        self.commits.iter().flat_map(|(.., logprobs)| logprobs.clone()).collect()
    }
}

fn collect(mut events: Events) -> Done {
    let (mut commits, mut last) = (vec![], None);
    while let Some(event) = events.blocking_recv() {
        match event.unwrap() {
            Event::Committed { token_ids, text, logprobs } => commits.push((token_ids, text, logprobs)),
            Event::Finished { reason, usage } => last = Some((reason, usage)),
            Event::Started { .. } | Event::Step(_) => {}
        }
    }
    let (reason, usage) = last.expect("a stream ends with Finished");
    Done { text: commits.iter().map(|(_, text, _)| text.as_str()).collect(), commits, reason, usage }
}

fn run(model: &ModelInfo, engine: &Engine, options: GenerateOptions) -> Done {
    collect(engine.submit(validate(model, options).unwrap()).unwrap())
}

/// The network beside the engine, for what a text should have been.
struct Judge(Transformer);

impl Judge {
    fn new() -> Self {
        Self(checkpoint("nano-ar").load(F32, 4096, &mut |_| {}).unwrap())
    }

    /// Logits of what predicts each of `text` behind `prompt`, the mask token ruled out: `[tokens][vocab]`.
    fn logits(&self, prompt: &[u32], text: &[u32]) -> Vec<Vec<f64>> {
        let all = [prompt, text].concat();
        tch::no_grad(|| {
            let hidden = self.0.hidden(&ids(&all[..all.len() - 1]), Attention::Causal).unwrap().get(0);
            let logits = self.0.logits(&hidden.narrow(0, prompt.len() as i64 - 1, text.len() as i64)).unwrap();
            (0..text.len() as i64)
                .map(|row| {
                    let mut row: Vec<f64> = Vec::try_from(&logits.get(row).to_kind(Kind::Double)).unwrap();
                    row[1] = f64::NEG_INFINITY;
                    row
                })
                .collect()
        })
    }
}

fn best(row: &[f64]) -> u32 {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let total = row.iter().map(|logit| logit.exp()).sum::<f64>().ln();
    row.iter().map(|logit| logit - total).collect()
}

#[test]
fn a_causal_model_decodes_autoregressively_unless_asked_otherwise() {
    let (model, engine) = start(1);
    assert_eq!(check_defaults(&model), Ok(()));
    let done = run(&model, &engine, options(PROMPT));
    let prompt = model.tokenizer.encode(PROMPT, false).unwrap();
    let rows = Judge::new().logits(&prompt, &done.tokens());
    assert_eq!(done.tokens(), rows.iter().map(|row| best(row)).collect::<Vec<_>>());
    assert_eq!(done.text, model.tokenizer.decode(&done.tokens(), false).unwrap());
    let asked = with(|o| o.method = Some(MethodKind::Autoregressive));
    assert_eq!(run(&model, &engine, asked).text, done.text);
    let forwards = done.usage.forwards;
    assert_eq!((forwards.prefill, forwards.denoise, forwards.verify, forwards.draft), (1, 0, 0, 0));
    // The end of the text is decoded, but not given out.
    let ended = usize::from(done.reason == FinishReason::Stop);
    assert_eq!(forwards.decode, done.usage.generated_tokens + ended - 1);
    assert_eq!(done.usage.steps, done.usage.generated_tokens + ended);
    assert_eq!(done.usage.speculation, None);
}

#[test]
fn whoever_drafts_and_however_the_text_is_that_of_plain_decoding() {
    let (model, engine) = start(1);
    let plain = run(&model, &engine, options(PROMPT));
    for kind in ALL {
        for adapt in [None, Some(false)] {
            let asked = with(|o| o.autoregressive = AutoregressiveOptions { adapt, ..drafting(kind) });
            let done = run(&model, &engine, asked);
            assert_eq!((&done.text, done.reason), (&plain.text, plain.reason), "{}", kind.name());
            assert_eq!(done.usage.generated_tokens, plain.usage.generated_tokens);
            let seen = done.usage.speculation.unwrap();
            assert_eq!(seen.drafts, done.usage.forwards.verify);
            assert!(adapt.is_none() || seen.drafts > 0, "{} was never asked", kind.name());
            let (asked, heads) = (done.usage.forwards.draft > 0, kind != DrafterKind::Lookup);
            // One that adapts may be asked and not be sure of anything.
            let in_vain = adapt.is_none() && asked && heads;
            assert_eq!(asked, in_vain || seen.drafts > 0 && heads, "{}", kind.name());
        }
    }
}

#[test]
fn filters_that_leave_one_token_leave_the_best() {
    let (model, engine) = start(1);
    let greedy = run(&model, &engine, options(PROMPT)).text;
    let hot = |change: &dyn Fn(&mut SamplingOptions)| {
        let mut asked = with(|o| o.sampling.temperature = Some(4.0));
        change(&mut asked.sampling);
        run(&model, &engine, asked).text
    };
    assert_eq!(hot(&|s| s.top_k = Some(1)), greedy);
    assert_eq!(hot(&|s| s.top_p = Some(1e-9)), greedy);
    assert_eq!(hot(&|s| s.min_p = Some(1.0)), greedy);
    assert_ne!(hot(&|_| {}), greedy);
    assert_eq!(hot(&|s| s.temperature = Some(0.0)), greedy);
}

#[test]
fn penalties_and_bias_do_what_they_say() {
    let (model, engine) = start(1);
    let judge = Judge::new();
    let prompt = model.tokenizer.encode(&format!("{PROMPT}    total"), false).unwrap();
    let given = model.tokenizer.encode(" = 0\n", false).unwrap();
    let biased = [(prompt[3], 2.5f32), (given[0], -3.0)];
    for (repetition, presence, frequency, bias) in [
        (1.4, 0.0, 0.0, false),
        (0.8, 0.0, 0.0, false),
        (1.0, 1.5, 0.0, false),
        (1.0, 0.0, 0.9, false),
        (1.0, 0.0, 0.0, true),
        (1.2, -0.7, 0.6, true),
    ] {
        let asked = with(|o| {
            o.prompt = Prompt::Tokens(prompt.clone());
            o.max_new_tokens = None;
            o.template = vec![TemplatePiece::Tokens(given.clone()), TemplatePiece::Hole(30)];
            o.autoregressive.suppress_end = Some(true);
            o.sampling.repetition_penalty = Some(repetition);
            o.sampling.presence_penalty = Some(presence);
            o.sampling.frequency_penalty = Some(frequency);
            o.sampling.logit_bias = if bias { biased.to_vec() } else { vec![] };
        });
        let mut drafted = asked.clone();
        drafted.autoregressive = AutoregressiveOptions { suppress_end: Some(true), ..drafting(DrafterKind::Medusa) };
        let text = run(&model, &engine, asked).tokens();
        assert_eq!(run(&model, &engine, drafted).tokens(), text);
        let (before, text) = ([prompt.clone(), given.clone()].concat(), text[given.len()..].to_vec());
        for (at, row) in judge.logits(&before, &text).iter().enumerate() {
            let mut row = row.clone();
            row[0] = f64::NEG_INFINITY;
            biased.iter().filter(|_| bias).for_each(|(token, amount)| row[*token as usize] += f64::from(*amount));
            for token in 0..row.len() as u32 {
                let logit = &mut row[token as usize];
                let times = text[..at].iter().filter(|id| **id == token).count();
                if times > 0 || before.contains(&token) {
                    *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
                }
                *logit -= frequency * times as f64 + if times > 0 { presence } else { 0.0 };
            }
            let (ours, theirs) = (row[text[at] as usize], row[best(&row) as usize]);
            assert!(theirs - ours < 1e-4, "token {at} of {text:?}: {ours} is not the best, {theirs}");
        }
    }
}

#[test]
fn a_bias_can_force_and_forbid() {
    let (model, engine) = start(1);
    let greedy = run(&model, &engine, options(PROMPT)).tokens();
    let forced = with(|o| o.sampling.logit_bias = vec![(greedy[3], 1000.0)]);
    assert_eq!(run(&model, &engine, forced).tokens(), [greedy[3]; 40]);
    let forbidden = with(|o| o.sampling.logit_bias = vec![(greedy[0], -1000.0)]);
    assert!(!run(&model, &engine, forbidden).tokens().contains(&greedy[0]));
    let mask = with(|o| o.sampling.logit_bias = vec![(1, 1000.0)]);
    assert!(!run(&model, &engine, mask).tokens().contains(&1), "the mask token is no text");
    let endless = with(|o| {
        o.autoregressive.suppress_end = Some(true);
        o.sampling.logit_bias = vec![(0, 1000.0)];
    });
    let done = run(&model, &engine, endless);
    assert_eq!((done.reason, done.tokens().len()), (FinishReason::Length, 40));
}

#[test]
fn log_probabilities_are_those_of_the_network() {
    let (model, engine) = start(1);
    let judge = Judge::new();
    let prompt = model.tokenizer.encode(PROMPT, false).unwrap();
    let given = model.tokenizer.encode("    return", false).unwrap();
    for temperature in [0.0, 1.2] {
        for drafter in [None, Some(DrafterKind::Redrafter), Some(DrafterKind::Lookup)] {
            let asked = with(|o| {
                o.max_new_tokens = None;
                o.template = vec![TemplatePiece::Tokens(given.clone()), TemplatePiece::Hole(24)];
                o.autoregressive = drafter.map_or_else(AutoregressiveOptions::default, drafting);
                o.sampling.temperature = Some(temperature);
                o.sampling.top_k = Some(30);
                o.sampling.repetition_penalty = Some(1.1);
                o.sampling.logprobs = Some(5);
            });
            let done = run(&model, &engine, asked);
            for (ids, _, logprobs) in &done.commits {
                assert_eq!(ids.len(), logprobs.len(), "one for each token");
            }
            let (tokens, told) = (done.tokens(), done.logprobs());
            assert!(told[..given.len()].iter().all(Option::is_none), "nobody chose the fixed text");
            let before = [prompt.clone(), given.clone()].concat();
            let text = &tokens[given.len()..];
            assert!(!text.is_empty());
            for ((token, row), told) in text.iter().zip(judge.logits(&before, text)).zip(&told[given.len()..]) {
                // Temperature, filters and penalties do not show in them.
                let (exact, told) = (log_softmax(&row), told.as_ref().unwrap());
                assert_eq!((told.token, told.alternatives.len()), (*token, 5));
                assert!(
                    (told.logprob - exact[*token as usize]).abs() < 1e-4,
                    "{} for {}",
                    told.logprob,
                    exact[*token as usize]
                );
                let mut order: Vec<f64> = exact.clone();
                order.sort_by(|a, b| b.total_cmp(a));
                for ((id, logprob), expected) in told.alternatives.iter().zip(&order) {
                    assert!((logprob - exact[*id as usize]).abs() < 1e-4 && (logprob - expected).abs() < 1e-4);
                }
                assert!(told.alternatives.iter().map(|(_, logprob)| logprob.exp()).sum::<f64>() <= 1.0 + 1e-9);
            }
        }
    }
    let silent = run(&model, &engine, options(PROMPT));
    assert!(silent.logprobs().is_empty());
}

/// At a high temperature bytes of many characters come and go: what is given out is whole characters, and joins to the text.
#[test]
fn characters_are_given_out_whole_and_stop_strings_end_the_text() {
    let (model, engine) = start(1);
    let mut halves = 0;
    for seed in 0..12 {
        let hot = |drafter: Option<DrafterKind>, stops: Vec<String>| {
            let asked = with(|o| {
                o.sampling.temperature = Some(8.0);
                o.sampling.seed = Some(seed);
                o.autoregressive = drafter.map_or_else(AutoregressiveOptions::default, drafting);
                // To the bit, so that a rounding cannot draw another token.
                o.autoregressive.deterministic = Some(true);
                o.autoregressive.suppress_end = Some(true);
                o.stops = stops;
            });
            run(&model, &engine, asked)
        };
        let plain = hot(None, vec![]);
        assert_eq!(plain.text, model.tokenizer.decode(&plain.tokens(), false).unwrap());
        // Some tokens were held back until their character was complete.
        halves += plain.commits.iter().filter(|(ids, ..)| ids.len() > 1).count();
        let characters: Vec<char> = plain.text.chars().collect();
        let stop: String = characters[characters.len() / 2..].iter().take(4).collect();
        let expected = &plain.text[..plain.text.find(&stop).unwrap()];
        for drafter in [None, Some(DrafterKind::Lookup), Some(DrafterKind::Medusa)] {
            assert_eq!(hot(drafter, vec![]).text, plain.text, "seed {seed}");
            let stopped = hot(drafter, vec!["never to be seen".into(), stop.clone()]);
            assert_eq!((stopped.text.as_str(), stopped.reason), (expected, FinishReason::Stop), "seed {seed}, stop {stop:?}");
            let ids = stopped.tokens();
            assert_eq!(ids, plain.tokens()[..ids.len()]);
            assert_eq!(stopped.usage.generated_tokens, ids.len());
        }
    }
    assert!(halves > 10, "only {halves} characters came in parts");
}

#[test]
fn the_smallest_and_the_largest_requests() {
    let (model, engine) = start(1);
    let token = Prompt::Tokens(vec![42]);
    for drafter in [None, Some(DrafterKind::Redrafter), Some(DrafterKind::Lookup)] {
        for deterministic in [None, Some(true)] {
            let asked = |length: u64| {
                with(|o| {
                    (o.prompt, o.max_new_tokens) = (token.clone(), Some(length));
                    o.autoregressive = drafter.map_or_else(AutoregressiveOptions::default, drafting);
                    (o.autoregressive.suppress_end, o.autoregressive.deterministic) = (Some(true), deterministic);
                })
            };
            let one = run(&model, &engine, asked(1));
            assert_eq!((one.tokens().len(), one.usage.forwards.model(), one.reason), (1, 1, FinishReason::Length));
            // All of the model's context.
            let all = run(&model, &engine, asked(255));
            assert_eq!((all.tokens().len(), all.reason), (255, FinishReason::Length));
            assert_eq!(all.tokens()[0], one.tokens()[0]);
            match validate(&model, asked(256)) {
                Err(Invalid::Field { field: "max_new_tokens", reason }) => assert!(reason.contains("257 tokens"), "{reason}"),
                other => panic!("{:?}", other.err()),
            }
        }
    }
    let long = with(|o| (o.prompt, o.max_new_tokens) = (Prompt::Tokens((0..255).map(|id| id % 900 + 2).collect()), Some(1)));
    assert_eq!(run(&model, &engine, long).usage.prompt_tokens, 255);
}

#[test]
fn what_a_request_may_not_ask_is_refused_by_name() {
    let (model, _engine) = start(1);
    let of = |model: &ModelInfo, change: &dyn Fn(&mut GenerateOptions)| {
        let mut options = options(PROMPT);
        change(&mut options);
        match validate(model, options) {
            Err(Invalid::Field { field, reason }) => (field, reason),
            Err(Invalid::Unsupported(reason)) => panic!("{reason}"),
            Ok(_) => panic!("the request was taken"),
        }
    };
    let field = |change: &dyn Fn(&mut GenerateOptions)| of(&model, change).0;
    let hole = TemplatePiece::Hole;
    let text = |text: &str| TemplatePiece::Text(text.into());
    assert_eq!(field(&|o| o.prompt = Prompt::Tokens(vec![])), "prompt");
    assert_eq!(field(&|o| o.prompt = Prompt::Text(String::new())), "prompt");
    for template in [vec![hole(4), text("x")], vec![text("x"), hole(4), text("y"), hole(4)], vec![hole(4), hole(4)]] {
        assert_eq!(field(&|o| (o.template, o.max_new_tokens) = (template.clone(), None)), "template");
    }
    assert_eq!(field(&|o| o.diffusion.steps = Some(4)), "diffusion");
    for (kind, too_long, too_wide) in
        [(DrafterKind::Redrafter, 9, 5), (DrafterKind::Chain, 9, 2), (DrafterKind::Medusa, 5, 11), (DrafterKind::Lookup, 11, 2)]
    {
        for length in [0, too_long, 17, 1 << 40, u64::MAX] {
            let change = |o: &mut GenerateOptions| {
                o.autoregressive = AutoregressiveOptions { draft_length: Some(length), ..drafting(kind) };
            };
            assert_eq!(field(&change), "draft_length", "{} {length}", kind.name());
        }
        for width in [0, too_wide, u64::MAX] {
            let change = |o: &mut GenerateOptions| {
                o.autoregressive = AutoregressiveOptions { beam_width: Some(width), ..drafting(kind) }
            };
            assert_eq!(field(&change), "beam_width", "{} {width}", kind.name());
        }
    }
    // Settings of drafts that nobody makes.
    assert_eq!(field(&|o| o.autoregressive.draft_length = Some(4)), "draft_length");
    assert_eq!(field(&|o| o.autoregressive.beam_width = Some(4)), "beam_width");
    assert_eq!(field(&|o| o.autoregressive.adapt = Some(true)), "adapt");
    let drawn = |o: &mut GenerateOptions| {
        o.autoregressive = AutoregressiveOptions { adapt: Some(true), ..drafting(DrafterKind::Chain) };
        o.sampling.temperature = Some(0.5);
    };
    assert_eq!(field(&drawn), "adapt");
    for chunk in [0, 513] {
        assert_eq!(field(&|o| o.autoregressive.prefill_chunk = Some(chunk)), "prefill_chunk");
    }
    for penalty in [f64::NAN, 0.0, -1.0, 11.0, f64::INFINITY] {
        assert_eq!(field(&|o| o.sampling.repetition_penalty = Some(penalty)), "repetition_penalty");
    }
    assert_eq!(field(&|o| o.sampling.presence_penalty = Some(-10.5)), "presence_penalty");
    assert_eq!(field(&|o| o.sampling.frequency_penalty = Some(f64::NAN)), "frequency_penalty");
    assert_eq!(field(&|o| o.sampling.logprobs = Some(21)), "logprobs");
    // Who is not there cannot draft; the refusal says who is.
    let mut lonely = model.clone();
    lonely.drafters.retain(|info| info.kind == DrafterKind::Lookup);
    let (name, reason) = of(&lonely, &|o| o.autoregressive = drafting(DrafterKind::Redrafter));
    assert_eq!(name, "drafter");
    assert!(reason.contains("has no redrafter") && reason.contains("lookup"), "{reason}");
    let mut endless = model.clone();
    endless.generation.eos_token_ids.clear();
    assert_eq!(of(&endless, &|o| o.autoregressive.suppress_end = Some(true)).0, "suppress_end");
}

#[test]
fn a_model_of_the_other_kind_says_so() {
    let (model, _engine) = start(1);
    let refused = validate(&model, with(|o| o.method = Some(MethodKind::Diffusion))).unwrap_err().to_string();
    assert!(refused.contains("model nano-ar cannot do diffusion") && refused.contains("causal"), "{refused}");
    let checkpoint = checkpoint("nano");
    let network = checkpoint.load(F32, 4096, &mut |_| {}).unwrap();
    let diffusion = ModelInfo::new(checkpoint, &network, Drafters::default().infos());
    let asked = with(|o| o.method = Some(MethodKind::Autoregressive));
    let refused = validate(&diffusion, asked).unwrap_err().to_string();
    assert!(refused.contains("model nano cannot decode autoregressively") && refused.contains("bidirectional"), "{refused}");
    let named = |options| match validate(&diffusion, options) {
        Err(Invalid::Field { field, .. }) => field,
        other => panic!("{:?}", other.err()),
    };
    let drafts = drafting(DrafterKind::Lookup);
    assert_eq!(named(with(|o| (o.method, o.autoregressive) = (Some(MethodKind::Autoregressive), drafts.clone()))), "drafter");
    // Beside its own method, the other's settings.
    assert_eq!(named(with(|o| o.autoregressive = drafts.clone())), "autoregressive");
    assert_eq!(named(with(|o| o.sampling.repetition_penalty = Some(1.1))), "repetition_penalty");
}

#[test]
fn the_models_own_settings_are_checked_when_it_is_loaded() {
    let (mut model, engine) = start(1);
    let with_default = |model: &mut ModelInfo, json: serde_json::Value| model.generation.autoregressive = Some(json);
    for (json, word) in [
        (serde_json::json!({ "draft_length": -1, "drafter": "lookup" }), "-1"),
        (serde_json::json!({ "drafter": "oracle" }), "oracle"),
        (serde_json::json!({ "draft_lenght": 3 }), "draft_lenght"),
    ] {
        with_default(&mut model, json);
        let reason = check_defaults(&model).unwrap_err();
        assert!(reason.starts_with("generation_config.json: autoregressive: ") && reason.contains(word), "{reason}");
    }
    with_default(&mut model, serde_json::json!({ "drafter": "lookup", "draft_length": 3, "adapt": false }));
    assert_eq!(check_defaults(&model), Ok(()));
    let drafts = validate(&model, options(PROMPT)).unwrap().method.drafts().unwrap();
    assert_eq!((drafts.drafter, drafts.shape.length, drafts.adapt), (DrafterKind::Lookup, 3, false));
    assert!(run(&model, &engine, options(PROMPT)).usage.speculation.is_some());
    // A request may still go without.
    let off = with(|o| o.autoregressive.drafter = Some(DrafterChoice::Off));
    assert_eq!(run(&model, &engine, off).usage.speculation, None);
}

/// Requests of every kind: greedy and drawn, with every drafter and without.
fn mixed(model: &ModelInfo) -> Vec<lacuna::engine::Request> {
    let mut requests = vec![];
    for (index, temperature) in [0.0, 1.0, 4.0].into_iter().enumerate() {
        for drafter in [None].into_iter().chain(ALL.map(Some)) {
            let asked = with(|o| {
                o.autoregressive = drafter.map_or_else(AutoregressiveOptions::default, drafting);
                o.autoregressive.prefill_chunk = Some(3 + 5 * index as u64);
                o.sampling.temperature = Some(temperature);
                o.sampling.seed = Some(index as u64);
                o.max_new_tokens = Some(16 + 8 * index as u64);
            });
            requests.push(validate(model, asked).unwrap());
        }
    }
    requests
}

#[test]
fn a_request_gives_the_same_alone_and_among_others() {
    let (model, engine) = start(1);
    let alone: Vec<String> = mixed(&model).into_iter().map(|request| collect(engine.submit(request).unwrap()).text).collect();
    let again: Vec<String> = mixed(&model).into_iter().map(|request| collect(engine.submit(request).unwrap()).text).collect();
    assert_eq!(alone, again);
    let (model, engine) = start(16);
    let together: Vec<_> = mixed(&model).into_iter().map(|request| engine.submit(request).unwrap()).collect();
    assert_eq!(alone, together.into_iter().map(|events| collect(events).text).collect::<Vec<_>>());
    let mut reversed: Vec<_> = mixed(&model).into_iter().rev().map(|request| engine.submit(request).unwrap()).collect();
    reversed.reverse();
    assert_eq!(alone, reversed.into_iter().map(|events| collect(events).text).collect::<Vec<_>>());
    let other = with(|o| (o.sampling.temperature, o.sampling.seed) = (Some(4.0), Some(77)));
    let drawn = with(|o| (o.sampling.temperature, o.sampling.seed) = (Some(4.0), Some(78)));
    assert_ne!(run(&model, &engine, other).text, run(&model, &engine, drawn).text, "another seed, another text");
}

#[test]
fn a_reader_that_leaves_frees_its_place() {
    let (model, engine) = start(1);
    for drafter in [None, Some(DrafterKind::Redrafter)] {
        let asked = with(|o| {
            o.max_new_tokens = Some(200);
            o.autoregressive = drafter.map_or_else(AutoregressiveOptions::default, drafting);
            o.autoregressive.suppress_end = Some(true);
        });
        let mut events = engine.submit(validate(&model, asked).unwrap()).unwrap();
        for _ in 0..6 {
            events.blocking_recv().unwrap().unwrap();
        }
        drop(events);
        let waited = Instant::now();
        while engine.active() > 0 {
            assert!(waited.elapsed() < Duration::from_secs(20), "the departed reader still holds its place");
            std::thread::yield_now();
        }
    }
    assert!(!run(&model, &engine, options(PROMPT)).text.is_empty());
}

#[test]
fn a_long_prompt_does_not_hold_up_its_neighbours() {
    let (model, engine) = start(2);
    let long = |chunk: u64| {
        let asked = with(|o| {
            o.prompt = Prompt::Tokens((0..200).map(|at| at * 7 % 900 + 2).collect());
            o.max_new_tokens = Some(8);
            o.autoregressive.prefill_chunk = Some(chunk);
        });
        validate(&model, asked).unwrap()
    };
    let alone = collect(engine.submit(long(512)).unwrap());
    // One token of the prompt a round: the neighbour's 24 tokens are there long before it is through.
    let mut slow = engine.submit(long(1)).unwrap();
    assert!(matches!(slow.blocking_recv(), Some(Ok(Event::Started { .. }))));
    let short = run(&model, &engine, with(|o| (o.max_new_tokens, o.autoregressive.suppress_end) = (Some(24), Some(true))));
    assert_eq!(short.usage.steps, 24);
    assert!(slow.try_recv().is_err(), "the prompt was run in one go");
    let slow = collect(slow);
    assert_eq!(slow.text, alone.text);
    assert_eq!((slow.usage.forwards.prefill, alone.usage.forwards.prefill), (200, 1));
    assert_eq!(slow.usage.steps, alone.usage.steps, "chunks are no steps");
}

/// The engine's hidden promise to drafters: what they are given is the network's state before the last token.
#[test]
fn drafters_are_shown_the_state_before_the_last_token() {
    use lacuna::decode::autoregressive::adaptation::Shape;
    use lacuna::decode::autoregressive::tree::Tree;
    use lacuna::draft::{Context, Draft, Drafter};
    use lacuna::model::ModelError;
    use std::sync::{Arc, Mutex};

    type Shown = Arc<Mutex<Vec<(Vec<u32>, Tensor)>>>;
    struct Spy(Shown);
    impl Drafter for Spy {
        fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
            self.0.lock().unwrap().push((context.tokens.into(), context.hidden.shallow_clone()));
            // Now and then something right, so that rows other than the first are chosen from.
            let first = context.tokens[context.tokens.len() % 4];
            let tree = Tree::from_beams(context.root(), [[first, first].as_slice(), &[context.root(), context.root()]]);
            Ok(Draft { tree, proposal: None, forwards: 0 })
        }
        fn limit(&self) -> Shape {
            Shape { width: 2, length: 2 }
        }
        fn usual(&self) -> Shape {
            self.limit()
        }
    }
    let shown = Shown::default();
    let model = common::load("llama", F32);
    let mut drafters = Drafters::default();
    drafters.add(DrafterKind::Redrafter, Box::new(Spy(shown.clone())));
    let mut accepted = 0;
    for deterministic in [false, true] {
        let parameters =
            lacuna::decode::autoregressive::Parameters { deterministic, ..common::drafted(DrafterKind::Redrafter, 2, 2) };
        let told = common::drive(&model, &drafters, parameters, &[100, 105, 80, 17], 40);
        accepted += told.usage.speculation.unwrap().accepted;
    }
    for (tokens, hidden) in shown.lock().unwrap().iter() {
        let states = tch::no_grad(|| model.hidden(&ids(tokens), Attention::Causal).unwrap().get(0));
        let error = relative_error(hidden, &states.narrow(0, tokens.len() as i64 - 2, 1));
        assert!(error < 1e-5, "behind {} tokens: {error}", tokens.len());
    }
    assert!(accepted > 5 && shown.lock().unwrap().len() > 20, "{accepted} accepted");
}
