//! Drafts change how fast a text comes, and nothing else.
//!
//! In the deterministic mode that is exact: the same tokens, probabilities and alternatives to the bit, whoever drafts. Otherwise a
//! forward of several tokens may round differently from a forward of one, so there the promise is a margin: no token is emitted
//! that the network, asked again about the same text, likes less than its best by more than a rounding. Distributions are
//! tests/distribution.rs's.

mod common;

use common::*;
use lacuna::checkpoint::Checkpoint;
use lacuna::decode::autoregressive::{Autoregressive, DrafterKind, Parameters, Speculation};
use lacuna::decode::canvas::{Canvas, Piece};
use lacuna::decode::{Decoder, FinishReason, Purpose, Sampling};
use lacuna::draft::Drafters;
use lacuna::engine::request::{
    AutoregressiveOptions, DiffusionOptions, GenerateOptions, ModelInfo, Prompt, SamplingOptions, validate,
};
use lacuna::engine::{Engine, Event, Failure, Limits};
use lacuna::model::Transformer;
use lacuna::model::family::Attention;
use lacuna::tensor::{Kind, Placement};

/// Prompts of tokens that have nothing to do with one another, of many lengths.
fn prompts(count: u32) -> Vec<Vec<u32>> {
    (0..count).map(|n| (0..1 + n * 7 % 23).map(|at| (n * 53 + at * 31 + at * at * 17) % 160).collect()).collect()
}

/// What the shipped model was made for.
fn questions() -> Vec<Vec<u32>> {
    let numbers = (0..22u32).map(|n| match n % 4 {
        0 => format!("# Return the sum of the numbers in xs that are greater than {n}.\ndef solve(xs):\n"),
        1 => format!("# Return how many numbers in xs are equal to {n}.\ndef solve(xs):\n"),
        2 => format!("# Return the largest number in xs, or {n} if there is none.\ndef solve(xs):\n    "),
        _ => format!("# Return x times {n}.\ndef solve(x):\n    return"),
    });
    numbers.map(|text| TOKENIZER.encode(&text, false).unwrap()).collect()
}

fn nano(placement: Placement) -> Transformer {
    load_at(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar"), placement)
}

/// Knows `text`, and is wrong about every fifth of its tokens: beams of which the second is right where the first is not.
fn oracle(text: Vec<u32>) -> Drafters {
    let propose = move |known: &[u32], shape: lacuna::decode::autoregressive::adaptation::Shape| {
        let rest = &text[known.len().min(text.len())..];
        let right: Vec<u32> = rest.iter().take(shape.length).copied().collect();
        let wrong = right.iter().enumerate().map(|(at, token)| token ^ u32::from((known.len() + at) % 5 == 4)).collect();
        if right.is_empty() { vec![] } else { [wrong, right].into_iter().take(shape.width).collect() }
    };
    let mut drafters = Drafters::default();
    drafters.add(DrafterKind::Redrafter, Box::new(Made(propose)));
    drafters
}

const EVERYONE: [(DrafterKind, usize, usize); 4] =
    [(DrafterKind::Redrafter, 4, 4), (DrafterKind::Medusa, 3, 4), (DrafterKind::Chain, 1, 5), (DrafterKind::Lookup, 1, 6)];

fn deterministic(parameters: Parameters, sampling: &Sampling, seed: u64) -> Parameters {
    Parameters { deterministic: true, sampling: sampling.clone(), seed, ..parameters }
}

/// Decodes `prompt` plainly and with each of `drafters`; all that is told of the tokens must be the same to the bit.
fn assert_same(
    model: &Transformer,
    drafters: &Drafters,
    who: &[(DrafterKind, usize, usize)],
    sampling: &Sampling,
    prompt: &[u32],
    length: usize,
) -> usize {
    let seed = prompt.len() as u64;
    let alone = drive(model, drafters, deterministic(plain(), sampling, seed), prompt, length);
    let mut accepted = 0;
    for (kind, width, long) in who.iter().copied() {
        let told = drive(model, drafters, deterministic(drafted(kind, width, long), sampling, seed), prompt, length);
        assert_eq!(told.tokens(), alone.tokens(), "{} {prompt:?}", kind.name());
        let edits: Vec<_> = told.edits().collect();
        assert_eq!(edits, alone.edits().collect::<Vec<_>>(), "{}: probabilities to the bit, {prompt:?}", kind.name());
        accepted += told.usage.speculation.unwrap().accepted;
    }
    accepted
}

#[test]
fn deterministic_texts_are_the_same_to_the_bit_whoever_drafts() {
    let greedy = Sampling { alternatives: 3, entropy: true, ..Sampling::default() };
    for placement in [F32, BF16] {
        let model = load("llama", placement);
        let drafters = all_drafters(&model);
        let accepted: usize =
            prompts(20).iter().map(|prompt| assert_same(&model, &drafters, &EVERYONE, &greedy, prompt, 40)).sum();
        println!("{}: {accepted} drafted tokens accepted", placement.dtype.name());
        assert!(accepted > 300, "{accepted} accepted drafts test little");
    }
}

#[test]
fn the_shipped_models_texts_are_the_same_to_the_bit_whoever_drafts() {
    let greedy = Sampling { alternatives: 3, ..Sampling::default() };
    for placement in [F32, BF16] {
        let model = nano(placement);
        let mut accepted = 0;
        for prompt in questions() {
            let parameters = deterministic(plain(), &greedy, 0);
            let text = [prompt.clone(), drive(&model, &Drafters::default(), parameters, &prompt, 24).tokens()].concat();
            let mut drafters = oracle(text);
            drafters.add(DrafterKind::Medusa, Box::new(random_medusa(&model, 5)));
            let who = [(DrafterKind::Redrafter, 2, 7), (DrafterKind::Medusa, 3, 4), (DrafterKind::Lookup, 1, 6)];
            accepted += assert_same(&model, &drafters, &who, &greedy, &prompt, 24);
        }
        println!("{}: {accepted} drafted tokens accepted", placement.dtype.name());
        assert!(accepted > 200, "{accepted} accepted drafts test little");
    }
}

/// Candidates that the context alone decides leave even drawn texts as they are: a seed means one text.
#[test]
fn a_seed_means_one_text_whoever_drafts() {
    for (temperature, top_p) in [(0.7, None), (1.0, Some(0.9)), (1.3, None)] {
        let drawn = Sampling { temperature, top_p, alternatives: 2, ..Sampling::default() };
        let model = load("llama", F32);
        let drafters = all_drafters(&model);
        let who = EVERYONE.map(|who| if who.0 == DrafterKind::Chain { (DrafterKind::Redrafter, 1, 7) } else { who });
        let mut accepted = 0;
        for prompt in prompts(12) {
            accepted += assert_same(&model, &drafters, &who, &drawn, &prompt, 32);
            let text = drive(&model, &drafters, deterministic(plain(), &drawn, prompt.len() as u64), &prompt, 32);
            let oracle = oracle([prompt.clone(), text.tokens()].concat());
            accepted += assert_same(&model, &oracle, &[(DrafterKind::Redrafter, 1, 7)], &drawn, &prompt, 32);
        }
        println!("temperature {temperature}: {accepted} drafted tokens accepted");
        assert!(accepted > 150, "{accepted} accepted drafts test little");
    }
}

/// With penalties a row depends on the path before it as well.
#[test]
fn penalties_see_the_drafts_before_a_token() {
    let penalties = lacuna::decode::Penalties { repetition: 1.3, presence: 0.4, frequency: 0.3 };
    let model = load("llama", F32);
    let mut accepted = 0;
    for prompt in prompts(12) {
        let sampling = Sampling { penalties, alternatives: 2, ..Sampling::default() };
        let text = drive(&model, &Drafters::default(), deterministic(plain(), &sampling, 0), &prompt, 32).tokens();
        let unpenalised = Sampling { penalties: Default::default(), ..sampling.clone() };
        let without = drive(&model, &Drafters::default(), deterministic(plain(), &unpenalised, 0), &prompt, 32).tokens();
        assert_ne!(text, without, "the penalties make a difference");
        let drafters = oracle([prompt.clone(), text].concat());
        accepted += assert_same(&model, &drafters, &[(DrafterKind::Redrafter, 2, 7)], &sampling, &prompt, 32);
    }
    assert!(accepted > 150, "{accepted} accepted drafts test little");
}

/// The statistics of a deterministic forward are taken of the rows used, as many as there are; of large vocabularies, a few at a time.
#[test]
fn a_rows_statistics_do_not_depend_on_the_rows_beside_it() {
    use lacuna::decode::{Noise, RowStatistics};
    use lacuna::model::statistics::{Conditions, statistics};
    for (vocab, kind) in [(160, Kind::Float), (50_257, Kind::Float), (151_936, Kind::Float), (151_936, Kind::BFloat16)] {
        let _generator = lacuna::tensor::seeded(4);
        let logits =
            (lacuna::tensor::Tensor::randn([8, vocab], (Kind::Float, lacuna::tensor::Device::Cpu)) * 4.0).to_kind(kind);
        for (temperature, top_p) in [(0.0, None), (1.0, None), (0.8, Some(0.9))] {
            let sampling = Sampling { temperature, top_p, alternatives: 3, entropy: true, margin: true, ..Sampling::default() };
            let of = |rows: i64| -> Vec<RowStatistics> {
                let noise = Noise::Uniforms((0..rows).map(|row| row as f64 / 8.0).collect());
                let conditions = Conditions { sampling: &sampling, noise: &noise, histories: &[], proposal: None };
                statistics(&logits.narrow(0, 0, rows), &conditions).unwrap()
            };
            let all = of(8);
            for rows in 1..8 {
                assert_eq!(of(rows), all[..rows as usize], "{rows} rows of {vocab}, temperature {temperature}");
            }
        }
    }
}

/// The room of the cache is part of a deterministic forward's shape.
#[test]
fn deterministic_forwards_have_one_shape_with_drafts_and_without() {
    let room = |parameters: Parameters| {
        let canvas = Canvas::new(&[1, 2], &[Piece::Hole(10)], 0);
        Autoregressive::new(Parameters { deterministic: true, ..parameters }, canvas, None).cache_room()
    };
    for (kind, width, length) in EVERYONE {
        assert_eq!(room(drafted(kind, width, length)), room(plain()), "{}", kind.name());
    }
}

/// Teacher forcing: the network, run on the whole text at once, has each emitted token among its best to within a rounding.
#[test]
fn ordinary_greedy_tokens_are_the_best_to_within_a_rounding() {
    // bf16 keeps 8 bits, and a few roundings add up.
    for (placement, bound) in [(F32, 1e-5), (BF16, 1.0 / 32.0)] {
        let models = [load("llama", placement), load("qwen3", placement)];
        let (mut worst, mut positions, mut accepted) = (0f64, 0, 0);
        for model in &models {
            let mut drafters = Drafters::default();
            drafters.add(DrafterKind::Medusa, Box::new(random_medusa(model, 3)));
            let heads = model.config().hidden_size == 48 && model.config().vocab_size == 160;
            if heads {
                drafters = all_drafters(model);
            }
            for prompt in prompts(10) {
                let text = [prompt.clone(), drive(model, &drafters, plain(), &prompt, 40).tokens()].concat();
                let oracle = oracle(text);
                for (kind, width, length) in EVERYONE {
                    for drafters in [&drafters, &oracle].into_iter().filter(|drafters| drafters.get(kind).is_some()) {
                        let told = drive(model, drafters, drafted(kind, width, length), &prompt, 40);
                        let (error, count) = margin(model, &prompt, &told.tokens());
                        worst = worst.max(error);
                        positions += count;
                        accepted += told.usage.speculation.unwrap().accepted;
                    }
                }
            }
        }
        println!(
            "{}: {positions} positions, {accepted} from drafts, at most {worst:.1e} of the best below it",
            placement.dtype.name()
        );
        assert!(positions >= 3000 && accepted > 500, "{positions} positions, {accepted} accepted");
        assert!(worst <= bound, "{}: a token is {worst} of the best below it", placement.dtype.name());
    }
}

/// How far the worst of `tokens` lies below the best logit at its place, as a share of that, and how many there are.
fn margin(model: &Transformer, prompt: &[u32], tokens: &[u32]) -> (f64, usize) {
    let text = [prompt, tokens].concat();
    tch::no_grad(|| {
        let hidden = model.hidden(&ids(&text[..text.len() - 1]), Attention::Causal).unwrap().get(0);
        let rows = hidden.narrow(0, prompt.len() as i64 - 1, tokens.len() as i64);
        let logits = model.logits(&rows).unwrap().to_kind(Kind::Float);
        let emitted = logits.gather(1, &ids(tokens).view([-1, 1]), false).squeeze_dim(1);
        let best = logits.amax(-1, false);
        let below = (&best - emitted) / best.abs().clamp_min(1.0);
        (below.max().double_value(&[]), tokens.len())
    })
}

/// The plain text of a prompt, and someone who knows all of it.
fn known(model: &Transformer, prompt: &[u32], length: usize) -> (Vec<u32>, Drafters) {
    let plain = drive(model, &Drafters::default(), plain(), prompt, length).tokens();
    let text = [prompt, &plain].concat();
    let mut drafters = Drafters::default();
    drafters.add(
        DrafterKind::Redrafter,
        Box::new(Made(move |known: &[u32], shape: lacuna::decode::autoregressive::adaptation::Shape| {
            vec![text[known.len()..].iter().take(shape.length).copied().collect()]
        })),
    );
    (plain, drafters)
}

#[test]
fn a_wrong_first_draft_is_never_accepted() {
    let model = load("llama", F32);
    for prompt in prompts(6) {
        let (text, _) = known(&model, &prompt, 30);
        let whole = [prompt.clone(), text.clone()].concat();
        let mut drafters = Drafters::default();
        // Wrong, then right: what follows a wrong token must not count either.
        let wrong = move |known: &[u32], _: lacuna::decode::autoregressive::adaptation::Shape| {
            let right = &whole[known.len()..(known.len() + 4).min(whole.len())];
            vec![right.iter().enumerate().map(|(at, token)| if at == 0 { (token + 1) % 160 } else { *token }).collect()]
        };
        drafters.add(DrafterKind::Redrafter, Box::new(Made(wrong)));
        for deterministic in [false, true] {
            let parameters = Parameters { deterministic, ..drafted(DrafterKind::Redrafter, 1, 4) };
            let told = drive(&model, &drafters, parameters, &prompt, 30);
            assert_eq!(told.tokens(), text);
            let seen = told.usage.speculation.unwrap();
            // Neither the first token, which follows the prompt, nor the last, behind which nothing is left, is drafted for.
            assert_eq!((seen.drafts, seen.accepted), (28, 0));
            assert_eq!(seen.accepted_exactly[0], 28);
            assert_eq!(told.usage.forwards.verify, 28);
        }
    }
}

#[test]
fn right_drafts_are_accepted_whole() {
    let model = load("llama", F32);
    let (text, drafters) = known(&model, &[5, 6, 7], 31);
    let told = drive(&model, &drafters, drafted(DrafterKind::Redrafter, 1, 4), &[5, 6, 7], 31);
    assert_eq!(told.tokens(), text);
    let seen = told.usage.speculation.unwrap();
    // 1 + 6 · 5 tokens.
    assert_eq!((seen.drafts, seen.accepted, seen.drafted), (6, 24, 24));
    assert_eq!(seen.accepted_exactly, [0, 0, 0, 0, 6]);
    assert_eq!((seen.acceptance_length(), seen.acceptance_by_position()), (5.0, vec![1.0; 4]));
}

/// Σ (j + 1) · drafts of which j tokens were accepted = tokens that came from verifying forwards; and the other sums.
fn assert_adds_up(told: &Told, seen: &Speculation) {
    let verified = |at: &usize| told.windows[*at].purpose == Purpose::Verify;
    let yielded: usize = (0..told.steps.len()).filter(verified).map(|at| told.steps[at].edits.len()).sum();
    let histogram = seen.accepted_exactly.iter().enumerate();
    assert_eq!(histogram.clone().map(|(accepted, drafts)| (accepted + 1) * drafts).sum::<usize>(), yielded);
    assert_eq!(histogram.map(|(accepted, drafts)| accepted * drafts).sum::<usize>(), seen.accepted);
    assert_eq!(seen.accepted_exactly.iter().sum::<usize>(), seen.drafts);
    assert_eq!(seen.drafts, told.usage.forwards.verify);
    let nodes: usize = (0..told.steps.len()).filter(verified).map(|at| told.windows[at].tokens.len() - 1).sum();
    assert_eq!(seen.drafted, nodes);
    assert!(seen.drafted <= seen.candidates && seen.accepted <= seen.drafted);
}

#[test]
fn the_counts_of_drafts_add_up() {
    let model = load("llama", F32);
    let drafters = all_drafters(&model);
    let mut removed = 0;
    for prompt in prompts(8) {
        for temperature in [0.0, 1.0] {
            for (kind, width, length) in EVERYONE {
                let mut parameters = drafted(kind, width, length);
                (parameters.sampling.temperature, parameters.seed) = (temperature, prompt.len() as u64);
                let told = drive(&model, &drafters, parameters, &prompt, 40);
                let seen = told.usage.speculation.clone().unwrap();
                assert_adds_up(&told, &seen);
                if kind == DrafterKind::Redrafter {
                    removed += seen.candidates - seen.drafted;
                }
            }
        }
    }
    assert!(removed > 0, "beams share prefixes");
}

#[test]
fn joined_prefixes_are_counted_before_they_were_joined() {
    let model = load("llama", F32);
    let mut drafters = Drafters::default();
    let shape =
        |_: &[u32], _: lacuna::decode::autoregressive::adaptation::Shape| vec![vec![1, 2, 3], vec![1, 2, 4], vec![1, 5, 6]];
    drafters.add(DrafterKind::Redrafter, Box::new(Made(shape)));
    let told = drive(&model, &drafters, drafted(DrafterKind::Redrafter, 3, 3), &[9, 8], 6);
    let seen = told.usage.speculation.clone().unwrap();
    assert_adds_up(&told, &seen);
    let expected: Vec<_> = told.windows.iter().filter(|window| window.purpose == Purpose::Verify).collect();
    // Where the end is near, drafts are cut to what fits: 9 candidates on 6 nodes, 6 on 3, or 3 on 1.
    let candidates = |window: &&lacuna::decode::Window| match window.tokens.len() - 1 {
        6 => 9,
        3 => 6,
        1 => 3,
        other => panic!("{other} nodes"),
    };
    assert_eq!(seen.candidates, expected.iter().map(candidates).sum::<usize>());
}

#[test]
fn a_text_that_ends_inside_a_draft_ends_there() {
    let model = load("llama", F32);
    for prompt in prompts(8) {
        let (text, drafters) = known(&model, &prompt, 30);
        for at in [0, 1, 2, 5, 9, 17] {
            let ends = vec![text[at]];
            let first = text.iter().position(|token| *token == text[at]).unwrap();
            for deterministic in [false, true] {
                let parameters = Parameters { ends: ends.clone(), deterministic, ..drafted(DrafterKind::Redrafter, 1, 8) };
                let told = drive(&model, &drafters, parameters.clone(), &prompt, 30);
                assert_eq!(told.tokens(), text[..=first], "the end itself is the last token");
                assert_eq!(told.reason, FinishReason::Stop);
                assert_eq!(told.usage.generated_tokens, first);
                let without = Parameters { drafts: None, ..parameters };
                assert_eq!(told.text, drive(&model, &drafters, without, &prompt, 30).text);
                assert_adds_up(&told, told.usage.speculation.as_ref().unwrap());
            }
        }
    }
}

#[test]
fn a_stop_string_inside_a_draft_ends_the_text_before_it() {
    let model = load("llama", F32);
    for prompt in prompts(8) {
        let (text, drafters) = known(&model, &prompt, 30);
        for at in [1, 4, 6, 13] {
            let stop = TOKENIZER.decode(&text[at..at + 2], false).unwrap();
            let stops = [stop.as_str(), "never to be seen"];
            let with = drive_until(&model, &drafters, drafted(DrafterKind::Redrafter, 1, 8), &prompt, 30, &stops);
            let without = drive_until(&model, &drafters, plain(), &prompt, 30, &stops);
            assert_eq!((&with.text, with.reason), (&without.text, without.reason), "stop {stop:?}");
            assert_eq!(with.reason, FinishReason::Stop);
            assert!(!with.text.contains(&stop));
            assert_eq!(with.usage.generated_tokens, without.usage.generated_tokens);
            assert!(with.usage.forwards.model() <= without.usage.forwards.model());
        }
    }
}

#[test]
fn no_draft_reaches_beyond_the_last_token() {
    let model = load("llama", F32);
    let prompt = [3, 1, 4];
    let (text, _) = known(&model, &prompt, 24);
    for length in 1..=12 {
        // It proposes more than it is asked for.
        let whole = [&prompt[..], &text].concat();
        let eager = move |known: &[u32], _: lacuna::decode::autoregressive::adaptation::Shape| {
            vec![whole[known.len()..].iter().take(8).copied().collect(), vec![7; 8]]
        };
        let mut drafters = Drafters::default();
        drafters.add(DrafterKind::Redrafter, Box::new(Made(eager)));
        for deterministic in [false, true] {
            let parameters = Parameters { deterministic, ..drafted(DrafterKind::Redrafter, 2, 8) };
            let told = drive(&model, &drafters, parameters, &prompt, length);
            assert_eq!(told.tokens(), text[..length]);
            assert_eq!(told.reason, FinishReason::Length);
            assert_eq!(told.usage.generated_tokens, length);
            assert_adds_up(&told, told.usage.speculation.as_ref().unwrap());
        }
    }
}

/// However the prompt is cut, drafts begin behind its last chunk.
#[test]
fn chunks_of_the_prompt_and_drafts_go_together() {
    let model = load("llama", F32);
    let drafters = all_drafters(&model);
    for length in 1..10 {
        let prompt: Vec<u32> = (0..length).map(|at| at * 13 + 2).collect();
        let alone = drive(&model, &drafters, plain(), &prompt, 12).tokens();
        for chunk in 1..6 {
            for (kind, width, long) in EVERYONE {
                let told = drive(&model, &drafters, Parameters { chunk, ..drafted(kind, width, long) }, &prompt, 12);
                assert_eq!(told.tokens(), alone, "{length} tokens in chunks of {chunk}, {}", kind.name());
                assert_eq!(told.usage.forwards.prefill, prompt.len().div_ceil(chunk));
            }
        }
    }
}

/// In the engine, over beginnings that others have left. Where rows depend on those beside them, what others ran is no part of a deterministic text.
#[test]
fn a_deterministic_text_takes_others_keys_only_where_that_changes_nothing() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar");
    let start = |prefix_tokens: usize| {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let network = checkpoint.load(F32, 256, &mut |_| {}).unwrap();
        let independent = network.rows_are_independent();
        let model = ModelInfo::new(checkpoint, &network, vec![]);
        let limits = Limits { resident: 8, prefix_tokens: Some(prefix_tokens), ..Limits::default() };
        let engine = Engine::start(network, Drafters::default(), model.tokenizer.clone(), limits).unwrap();
        (model, engine, independent)
    };
    let (model, warm, independent) = start(2048);
    let (_, cold, _) = start(0);
    let requests = |deterministic: bool| {
        let ask = |prompt: Vec<u32>| {
            let options = GenerateOptions {
                id: "test".into(),
                prompt: Prompt::Tokens(prompt),
                template: vec![],
                max_new_tokens: Some(16),
                method: None,
                diffusion: DiffusionOptions::default(),
                autoregressive: AutoregressiveOptions {
                    deterministic: Some(deterministic),
                    ..AutoregressiveOptions::default()
                },
                sampling: SamplingOptions::default(),
                stops: vec![],
                steps: false,
                deadline: None,
                priority: 0,
            };
            validate(&model, options).unwrap()
        };
        questions().into_iter().take(8).map(ask).collect::<Vec<_>>()
    };
    let told = |engine: &Engine, deterministic: bool| -> Vec<(Vec<u32>, usize)> {
        let events: Vec<_> = requests(deterministic).into_iter().map(|request| engine.submit(request).unwrap()).collect();
        let collect = |mut events: tokio::sync::mpsc::Receiver<Result<Event, Failure>>| {
            let mut ids = vec![];
            while let Some(event) = events.blocking_recv() {
                match event.unwrap() {
                    Event::Committed { token_ids, .. } => ids.extend(token_ids),
                    Event::Finished { usage, .. } => return (ids, usage.reused_tokens),
                    _ => {}
                }
            }
            panic!("the stream ended without a finish");
        };
        events.into_iter().map(collect).collect()
    };
    let _left = told(&warm, false);
    assert!(told(&warm, false).iter().all(|(_, reused)| *reused > 0), "the beginnings are known");
    for ((alone, none), (beside, reused)) in told(&cold, true).into_iter().zip(told(&warm, true)) {
        assert_eq!((alone, none, reused > 0), (beside, 0, independent));
    }
}

#[test]
fn all_of_this_holds_on_libtorch_alone() {
    again_without_kernels("all_of_this_holds");
}

#[test]
fn the_quick_ones_hold_by_the_kernels_of_gpus() {
    let quick = ["deterministic", "penalties", "a_rows_statistics", "a_wrong_first", "right_drafts", "a_text_that", "no_draft"];
    again_with_fused_kernels("hold", &quick);
}
