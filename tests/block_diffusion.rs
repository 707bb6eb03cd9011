//! Block diffusion: the logits and decodings of SDAR and Fast-dLLM v2 as their authors' code has them (see tests/reference), and the
//! decoder as a pure state machine.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use lacuna::checkpoint::config::{GenerationConfig, ModelConfig};
use lacuna::checkpoint::tokenizer::Tokenizer;
use lacuna::decode::canvas::{Canvas, Cell, Piece};
use lacuna::decode::diffusion::block::{BlockDiffusion, SubBlocks};
use lacuna::decode::diffusion::select::Order;
use lacuna::decode::diffusion::{self, Commit, EndOfText, Parameters};
use lacuna::decode::{Decoder, FinishReason, Pattern, Purpose, RowStatistics, Sampling, Status, Step, Wanted, Window};
use lacuna::draft::Drafters;
use lacuna::engine::request::{CacheChoice, GenerateOptions, Invalid, MethodKind, ModelInfo, Prompt, TemplatePiece, validate};
use lacuna::engine::runner::{self, Residence};
use lacuna::engine::sequence::Sequence;
use lacuna::engine::{Engine, Event, Limits, Method, Request, Usage};
use lacuna::model::cache::KvCache;
use lacuna::model::{Layout, Segment, Transformer};
use lacuna::tensor::{Kind, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};

const MASK: u32 = 99;
const END: u32 = 98;

// ------------------------------------------------------------------------------------------------- the originals

/// Hidden states and logits of `tokens: [1, seq]` at the positions from `start` on, in blocks of `block`.
fn run(model: &Transformer, cache: &KvCache, tokens: &Tensor, start: usize, block: usize) -> (Tensor, Tensor) {
    let tokens: Vec<i64> = Vec::try_from(tokens.squeeze_dim(0)).unwrap();
    let tokens: Vec<u32> = tokens.iter().map(|id| *id as u32).collect();
    let sees: Vec<usize> = (start..start + tokens.len()).map(|position| (position / block + 1) * block).collect();
    tch::no_grad(|| {
        let segment = Segment { tokens: &tokens, layout: Layout::Span { start, sees: &sees }, cache: Some(cache) };
        let hidden = model.forward(&[segment]).unwrap();
        let logits = model.logits(&hidden).unwrap();
        (hidden.to_kind(Kind::Float).unsqueeze(0), logits.to_kind(Kind::Float).unsqueeze(0))
    })
}

fn near(ours: &Tensor, original: &Tensor, what: &str) {
    let error = relative_error(ours, original);
    println!("{what}: {error:.1e}");
    assert!(error <= 1e-5, "{what}: relative error {error}");
}

#[test]
fn logits_over_a_cache_of_blocks_agree_with_the_originals() {
    let (model, reference) = (load("sdar", F32), tensors(&fixture("sdar/reference.safetensors")));
    for block in [4, 8] {
        let mut cache = KvCache::new(model.config(), model.placement(), 32).unwrap();
        let (hidden, logits) = run(&model, &cache, &reference("input_ids"), 0, block);
        near(&hidden, &reference(&format!("hidden_b{block}")), "sdar prefill, hidden");
        near(&logits, &reference(&format!("logits_b{block}")), "sdar prefill");
        cache.keep(&(0..24).collect::<Vec<_>>()).unwrap();
        let (_, logits) = run(&model, &cache, &reference(&format!("step_ids_b{block}")), 24, block);
        near(&logits, &reference(&format!("step_logits_b{block}")), "sdar step");
    }
    let (model, reference) = (load("fast-dllm-v2", F32), tensors(&fixture("fast-dllm-v2/reference.safetensors")));
    let mut cache = KvCache::new(model.config(), model.placement(), 96).unwrap();
    let (hidden, logits) = run(&model, &cache, &reference("input_ids"), 0, 32);
    near(&hidden, &reference("hidden"), "fast-dllm-v2 prefill, hidden");
    near(&logits, &reference("logits"), "fast-dllm-v2 prefill");
    cache.keep(&(0..64).collect::<Vec<_>>()).unwrap();
    let (_, logits) = run(&model, &cache, &reference("step_ids"), 64, 32);
    near(&logits, &reference("step_logits"), "fast-dllm-v2 step");
    // Amid what the step before left of the block.
    let (_, logits) = run(&model, &cache, &reference("refine_ids"), 72, 32);
    near(&logits, &reference("refine_logits"), "fast-dllm-v2 sub-block");
}

/// A block-causal sequence sees another when it is run in other blocks, so the agreement above is not for want of a difference.
#[test]
fn other_blocks_are_another_network() {
    let (model, reference) = (load("sdar", F32), tensors(&fixture("sdar/reference.safetensors")));
    let cache = KvCache::new(model.config(), model.placement(), 32).unwrap();
    let (_, logits) = run(&model, &cache, &reference("input_ids"), 0, 8);
    assert!(relative_error(&logits, &reference("logits_b4")) > 0.05);
}

/// All that came of a decoding.
struct Decoded {
    windows: Vec<Window>,
    /// What each forward committed, `(position, token)` by position; forwards that committed nothing left out.
    commits: Vec<Vec<(usize, u32)>>,
    sequence: Vec<u32>,
    reason: FinishReason,
}

/// Decodes as the engine does, step by step over a cache.
fn decode(model: &Transformer, parameters: Parameters, prompt: &[u32], pieces: &[Piece]) -> Decoded {
    let ends = parameters.end_of_text.ids.clone();
    let mask = model.config().mask_token_id.unwrap();
    let (canvas, config) = (Canvas::new(prompt, pieces, mask), model.config());
    let decoder = diffusion::decoder(parameters, canvas, config.attention, config.shift);
    let mut sequence = Sequence::new(decoder, ends, vec![], Duration::ZERO);
    let mut residence = Residence::new(model, &sequence).unwrap();
    let (mut windows, mut commits, mut reason) = (vec![], vec![], None);
    while let Some(window) = sequence.window() {
        windows.push(window);
        assert!(windows.len() < 1000, "decoding does not end");
        for event in runner::step(model, &Drafters::default(), &mut sequence, &mut residence, &TOKENIZER).unwrap() {
            match event {
                Event::Step(step) => commits.push(committed(&step, prompt.len())),
                Event::Finished { reason: found, .. } => reason = Some(found),
                _ => {}
            }
        }
    }
    commits.retain(|step| !step.is_empty());
    let sequence = sequence.decoder().canvas().sequence().to_vec();
    Decoded { windows, commits, sequence, reason: reason.unwrap() }
}

fn committed(step: &Step, prompt: usize) -> Vec<(usize, u32)> {
    let committed = step.edits.iter().filter(|edit| edit.status == Status::Committed);
    let sorted: BTreeMap<usize, u32> = committed.map(|edit| (prompt + edit.position, edit.token)).collect();
    sorted.into_iter().collect()
}

fn greedy(model: &Transformer, block_length: usize, commit: Commit, order: Order) -> Parameters {
    let sampling =
        Sampling { forbidden: vec![model.config().mask_token_id.unwrap()], filtered_confidence: true, ..Sampling::default() };
    Parameters { block_length, commit, order, sampling, ..parameters(commit) }
}

/// What a record says its forwards committed within `length` tokens, forwards that committed nothing left out.
fn recorded(case: &Value, length: usize) -> Vec<Vec<(usize, u32)>> {
    let forwards = case["forwards"].as_array().unwrap();
    let edits = forwards.iter().map(|forward| parse::<Vec<(usize, u32)>>(&forward["edits"]));
    let within = edits.map(|edits| edits.into_iter().filter(|(position, _)| *position < length).collect::<Vec<_>>());
    within.filter(|edits| !edits.is_empty()).collect()
}

fn count(case: &Value, kind: &str) -> usize {
    case["kinds"][kind].as_u64().unwrap_or(0) as usize
}

#[test]
fn sdar_is_decoded_as_its_authors_do_token_for_token() {
    let model = load("sdar", F32);
    let cases = cases("sdar/decode.json");
    for case in &cases {
        let (name, settings) = (case["name"].as_str().unwrap(), &case["params"]);
        let (prompt, output): (Vec<u32>, Vec<u32>) = (parse(&case["prompt"]), parse(&case["output"]));
        let number = |field: &str| settings[field].as_u64().unwrap() as usize;
        let block = number("block_length");
        // Ours counts steps for all blocks that have something to fill.
        let steps = number("denoising_steps") * (output.len() / block - prompt.len() / block);
        let threshold = settings["confidence_threshold"].as_f64().unwrap();
        let (commit, order) = match settings["remasking_strategy"].as_str().unwrap() {
            "low_confidence_static" => (Commit::Linear { steps }, Order::Confidence),
            "sequential" => (Commit::Linear { steps }, Order::LeftToRight),
            "low_confidence_dynamic" if number("denoising_steps") == block => (Commit::Threshold(threshold), Order::Confidence),
            _ => (Commit::Dynamic { threshold, steps }, Order::Confidence),
        };
        let mut parameters = greedy(&model, block, commit, order);
        let stop: Option<Vec<u32>> = settings.get("stopping_criteria_idx").map(parse);
        parameters.end_of_text.ids = stop.clone().unwrap_or_default();
        let ours = decode(&model, parameters, &prompt, &[Piece::Hole(output.len() - prompt.len())]);
        let original = recorded(case, output.len());
        assert_eq!(ours.sequence[..prompt.len()], prompt, "{name}: a prompt is never rewritten");
        if case.get("defect").is_some() {
            let same = ours.commits.iter().zip(&original).take_while(|(a, b)| a == b).count();
            assert!(same > 0 && ours.sequence != output, "{name}: the recorded defect should make a difference");
            continue;
        }
        if let Some(stop) = stop {
            // Ours ends with the stop; the original completes the block that has it.
            assert_eq!(ours.reason, FinishReason::Stop);
            assert_eq!(ours.commits, original[..ours.commits.len()], "{name}");
            let end = output.iter().skip(prompt.len()).position(|token| stop.contains(token)).unwrap() + prompt.len();
            assert_eq!(ours.sequence[..=end], output[..=end], "{name}");
            continue;
        }
        assert_eq!(ours.commits, original, "{name}");
        assert_eq!(ours.sequence, output, "{name}");
        // No forward only stores, and at most one block of the prompt goes with the first step.
        let prefill = usize::from(prompt.len() / block > 1);
        assert_eq!(ours.windows.len(), count(case, "denoise") + prefill, "{name}");
        assert_eq!(ours.windows.iter().filter(|window| window.purpose == Purpose::Prefill).count(), prefill, "{name}");
    }
    assert_eq!(cases.len(), 34);
}

#[test]
fn fast_dllm_v2_is_decoded_as_its_authors_do_token_for_token() {
    let model = load("fast-dllm-v2", F32);
    let cases = cases("fast-dllm-v2/decode.json");
    for case in &cases {
        let (name, settings) = (case["name"].as_str().unwrap(), &case["params"]);
        let (prompt, output): (Vec<u32>, Vec<u32>) = (parse(&case["prompt"]), parse(&case["output"]));
        let number = |field: &str| settings[field].as_i64().unwrap();
        let (block, small) = (number("block_size") as usize, number("small_block_size") as usize);
        let mut parameters =
            greedy(&model, block, Commit::Threshold(settings["threshold"].as_f64().unwrap()), Order::Confidence);
        parameters.sub_blocks = Some(SubBlocks { length: small, cached: settings["use_block_cache"] == true });
        let stop = u32::try_from(number("stop_token")).ok();
        parameters.end_of_text.ids = stop.into_iter().collect();
        let length = (prompt.len() / block + number("max_new_tokens") as usize / block) * block;
        let ours = decode(&model, parameters, &prompt, &[Piece::Hole(length - prompt.len())]);
        if case.get("defect").is_some() {
            assert_ne!(ours.sequence, output[..length], "{name}: the recorded defect should make a difference");
            continue;
        }
        assert_eq!(ours.commits, recorded(case, length), "{name}");
        let end = output.len().min(length);
        assert_eq!(ours.sequence[..end], output[..end], "{name}");
        assert_eq!(ours.reason, if stop.is_some() { FinishReason::Stop } else { FinishReason::Length }, "{name}");
        // The original stores the last block, too; we run one block of the prompt with the first step, where no token hangs on it.
        let stores = count(case, "store") - usize::from(stop.is_none());
        let prefill = usize::from(prompt.len() / block > 1 || prompt.len() % block == 0);
        assert_eq!(ours.windows.len(), count(case, "denoise") + count(case, "refine") + stores + prefill, "{name}");
        if small < block {
            let refined = ours.windows.iter().filter(|window| window.tokens.len() == small).count();
            assert_eq!(refined, count(case, "refine"), "{name}");
        }
    }
    assert_eq!(cases.len(), 18);
}

/// Keys of finished blocks, stored from their final tokens in the forward of the next block's first step, are what computing all of
/// it anew in every step would give.
#[test]
fn what_is_kept_is_what_would_be_computed_anew() {
    for (name, block, sub) in [("sdar", 4, None), ("fast-dllm-v2", 32, Some(SubBlocks { length: 8, cached: false }))] {
        let model = load(name, F32);
        for prompt in [&[20, 30, 40, 50, 60][..], &[9; 8], &[3]] {
            let mut parameters = greedy(&model, block, Commit::Threshold(0.6), Order::Confidence);
            parameters.sub_blocks = sub;
            let kept = decode(&model, parameters.clone(), prompt, &[Piece::Hole(43)]);
            parameters.anew = true;
            let anew = decode(&model, parameters, prompt, &[Piece::Hole(43)]);
            assert_eq!(kept.sequence, anew.sequence, "{name}");
            assert!(anew.windows.iter().all(|window| matches!(window.pattern, Pattern::Span { start: 0, .. })));
            let tokens = |windows: &[Window]| windows.iter().map(|window| window.tokens.len()).sum::<usize>();
            assert!(tokens(&kept.windows) < tokens(&anew.windows), "{name}: nothing was saved");
        }
    }
}

/// Text before a hole is seen by it, wherever it stands; text behind it is seen within the block.
#[test]
fn fixed_text_stands_and_is_seen_within_its_block() {
    let model = load("sdar", F32);
    let fill = |behind: [u32; 2]| {
        let pieces = [Piece::Fixed(vec![5, 6, 7]), Piece::Hole(3), Piece::Fixed(behind.to_vec()), Piece::Hole(4)];
        let parameters = greedy(&model, 4, Commit::Threshold(0.5), Order::Confidence);
        decode(&model, parameters, &[20, 30, 40], &pieces).sequence
    };
    let (one, other) = (fill([50, 60]), fill([51, 61]));
    assert_eq!((&one[..6], &one[9..11]), (&[20, 30, 40, 5, 6, 7][..], &[50, 60][..]));
    // Positions 6 and 7 are a block before the fixed text at 9 and 10.
    assert_eq!(one[6..8], other[6..8]);
    assert_ne!(one[11..], other[11..], "what follows the text depends on it");
}

// ---------------------------------------------------------------------------------------------- the state machine

fn parameters(commit: Commit) -> Parameters {
    Parameters {
        block_length: 4,
        sub_blocks: None,
        anew: false,
        order: Order::Confidence,
        order_temperature: 0.0,
        commit,
        cfg_scale: 0.0,
        cache: None,
        deterministic: false,
        sampling: Sampling::default(),
        end_of_text: EndOfText { ids: vec![END], finish_early: true },
        seed: 1,
    }
}

fn decoder(parameters: Parameters, prompt: &[u32], pieces: &[Piece], shift: bool) -> BlockDiffusion {
    BlockDiffusion::new(parameters, Canvas::new(prompt, pieces, MASK), shift)
}

/// A forward as the tests below tell it: purpose, positions run, positions wanted, positions kept.
type Told = (Purpose, std::ops::Range<usize>, Vec<u32>, usize);

/// Runs to the end with made-up answers by position; checks what every window must be like.
fn drive(decoder: &mut BlockDiffusion, row: impl Fn(usize) -> (u32, f64)) -> (Vec<Told>, Vec<Step>) {
    let (mut told, mut steps, mut kept) = (vec![], vec![], 0);
    while decoder.finished().is_none() {
        let window = decoder.window();
        let Pattern::Span { start, sees } = &window.pattern else { panic!("a block is a span") };
        let Wanted::Positions(wanted) = &window.wanted else { panic!("cells are asked for by position") };
        let range = *start..start + window.tokens.len();
        assert!(range.end <= decoder.cache_room() && sees.iter().all(|sees| *sees <= decoder.cache_room()));
        for (token, position) in window.tokens.iter().zip(range.clone()) {
            let known = decoder.canvas().sequence().get(position).copied().unwrap_or(MASK);
            assert_eq!(*token, known, "position {position}");
        }
        let statistics = |position: &u32| {
            let (token, confidence) = row(*position as usize);
            RowStatistics { token, confidence, ..RowStatistics::default() }
        };
        let rows: Vec<RowStatistics> = wanted.iter().map(statistics).collect();
        let step = decoder.advance(&rows);
        // What stays follows what was kept before, from the window's first token on.
        if !decoder.kept().is_empty() {
            assert_eq!(range.start, kept);
            assert_eq!(decoder.kept(), (0..decoder.kept().len()).collect::<Vec<_>>());
            kept += decoder.kept().len();
        }
        told.push((window.purpose, range, wanted.clone(), kept));
        steps.push(step);
        assert!(told.len() < 1000, "decoding does not end");
    }
    (told, steps)
}

const DENOISE: Purpose = Purpose::Denoise;
const PREFILL: Purpose = Purpose::Prefill;

#[test]
fn a_finished_block_is_stored_in_the_first_step_of_the_next() {
    let mut sdar = decoder(parameters(Commit::Linear { steps: 6 }), &[1; 10], &[Piece::Hole(10)], false);
    let window = sdar.window();
    assert_eq!(window.pattern, Pattern::Span { start: 0, sees: [[4; 4], [8; 4]].concat() }, "block by block");
    let (told, _) = drive(&mut sdar, |position| (10, 1.0 / (position + 1) as f64));
    let expected: [Told; 6] = [
        (PREFILL, 0..8, vec![], 8),
        // The prompt's last two tokens stand in the first block.
        (DENOISE, 8..12, vec![10, 11], 8),
        (DENOISE, 8..16, vec![12, 13, 14, 15], 12),
        (DENOISE, 12..16, vec![14, 15], 12),
        (DENOISE, 12..20, vec![16, 17, 18, 19], 16),
        (DENOISE, 16..20, vec![18, 19], 16),
    ];
    assert_eq!(told, expected);
}

#[test]
fn shifted_logits_give_the_first_token_of_the_next_block_when_a_block_is_stored() {
    let parameters = || parameters(Commit::Threshold(0.5));
    let mut fast = decoder(parameters(), &[1; 6], &[Piece::Hole(6)], true);
    let (told, steps) = drive(&mut fast, |_| (10, 0.9));
    let expected: [Told; 3] = [
        // The first block's first token is known, so that the prompt's one whole block goes with its first step.
        (DENOISE, 0..8, vec![6, 7], 4),
        (DENOISE, 4..8, vec![8], 8),
        (DENOISE, 8..12, vec![9, 10, 11], 8),
    ];
    assert_eq!(told, expected);
    assert_eq!(committed(&steps[1], 6), [(8, 10)]);
    // A prompt of whole blocks tells the first token, however unsure.
    let mut fast = decoder(parameters(), &[1; 8], &[Piece::Hole(4)], true);
    let (told, steps) = drive(&mut fast, |_| (10, 0.1));
    assert_eq!(told[0], (PREFILL, 0..8, vec![8], 8));
    assert_eq!((committed(&steps[0], 8), told.len()), (vec![(8, 10)], 4));
    // Without a prompt the first position is asked for like any other: there is no row before it.
    let mut fast = decoder(parameters(), &[], &[Piece::Hole(4)], true);
    assert_eq!(drive(&mut fast, |_| (10, 0.9)).0, [(DENOISE, 0..4, vec![0, 1, 2, 3], 0)]);
}

#[test]
fn a_sub_block_is_run_alone_once_its_first_token_is_known() {
    let run = |cached: bool| {
        let mut parameters = parameters(Commit::Linear { steps: 100 });
        (parameters.block_length, parameters.sub_blocks) = (8, Some(SubBlocks { length: 4, cached }));
        parameters.order = Order::LeftToRight;
        let mut fast = decoder(parameters, &[1; 2], &[Piece::Hole(7)], true);
        drive(&mut fast, |_| (10, 0.9)).0
    };
    let cached: [Told; 7] = [
        // A block that has not been run yet is run whole, and so is one whose next group begins with a mask.
        (DENOISE, 0..8, vec![2, 3], 0),
        (DENOISE, 0..4, vec![3], 0),
        (DENOISE, 0..8, vec![4, 5, 6, 7], 0),
        (DENOISE, 4..8, vec![5, 6, 7], 0),
        (DENOISE, 4..8, vec![6, 7], 0),
        (DENOISE, 4..8, vec![7], 0),
        (DENOISE, 0..8, vec![8], 8),
    ];
    assert_eq!(run(true), cached);
    let whole = cached.map(|(purpose, _, wanted, kept)| (purpose, 0..8, wanted, kept));
    assert_eq!(run(false), whole);
}

#[test]
fn a_long_prompt_is_run_in_chunks_of_whole_blocks() {
    let mut parameters = parameters(Commit::Threshold(0.5));
    parameters.block_length = 48;
    let mut sdar = decoder(parameters.clone(), &[1; 1000], &[Piece::Hole(3)], false);
    let (told, _) = drive(&mut sdar, |_| (10, 0.9));
    // Ten blocks are the most that 512 tokens hold.
    let runs: Vec<_> = told.iter().map(|(purpose, range, ..)| (*purpose, range.clone())).collect();
    assert_eq!(runs, [(PREFILL, 0..480), (PREFILL, 480..960), (DENOISE, 960..1008)]);
    let mut fast = decoder(parameters, &[1; 960], &[Piece::Hole(3)], true);
    let (told, _) = drive(&mut fast, |_| (10, 0.9));
    assert_eq!(told.iter().map(|(.., wanted, _)| wanted.clone()).collect::<Vec<_>>(), [vec![], vec![960], vec![961, 962]]);
}

#[test]
fn an_end_of_text_ends_once_nothing_before_it_is_masked() {
    let mut sdar = decoder(parameters(Commit::Linear { steps: 8 }), &[1; 4], &[Piece::Hole(8)], false);
    let row = |position: usize| if position == 6 { (END, 0.9) } else { (10, 0.1 * (position - 3) as f64) };
    let (told, _) = drive(&mut sdar, row);
    // 6, then 7 (which is surer than what stands before the end), 5 and 4; the second block is not begun.
    assert_eq!((told.len(), sdar.finished()), (4, Some(FinishReason::Stop)));
    assert_eq!(sdar.canvas().cells()[4..], [Cell::Masked; 4]);
    // In prompt and fixed text it ends nothing.
    let pieces = [Piece::Fixed(vec![END]), Piece::Hole(3)];
    let mut sdar = decoder(parameters(Commit::Threshold(0.5)), &[END], &pieces, false);
    drive(&mut sdar, |_| (10, 0.9));
    assert_eq!(sdar.finished(), Some(FinishReason::Length));
}

#[test]
fn a_mask_token_in_the_prompt_is_text() {
    let mut sdar =
        decoder(parameters(Commit::Threshold(0.5)), &[MASK, 1, MASK], &[Piece::Fixed(vec![MASK]), Piece::Hole(2)], false);
    let (told, _) = drive(&mut sdar, |_| (10, 0.9));
    assert_eq!(told, [(DENOISE, 0..8, vec![4, 5], 4)]);
    assert_eq!(sdar.canvas().sequence(), [MASK, 1, MASK, MASK, 10, 10]);
}

#[test]
fn blocks_of_fixed_text_cost_no_step() {
    let pieces = [Piece::Hole(4), Piece::Fixed(vec![7; 9]), Piece::Hole(3)];
    let mut sdar = decoder(parameters(Commit::Threshold(0.5)), &[], &pieces, false);
    let (told, _) = drive(&mut sdar, |_| (10, 0.9));
    // Three blocks to store before the last one: more than goes with a step.
    assert_eq!(
        told,
        [(DENOISE, 0..4, vec![0, 1, 2, 3], 0), (DENOISE, 0..12, vec![], 12), (DENOISE, 12..16, vec![13, 14, 15], 12)]
    );
    let complete = decoder(parameters(Commit::Threshold(0.5)), &[1], &[Piece::Fixed(vec![3])], false);
    assert_eq!(complete.finished(), Some(FinishReason::Length));
}

#[test]
fn a_rule_by_threshold_is_no_slower_than_the_steps_beside_it() {
    let commit = Commit::Dynamic { threshold: 0.8, steps: 4 };
    let mut sdar = decoder(parameters(commit), &[], &[Piece::Hole(8)], false);
    // Two blocks, two steps for each: at least two cells a step, and three where three are sure enough.
    let (_, steps) = drive(&mut sdar, |position| (10, if (4..7).contains(&position) { 0.9 } else { 0.3 }));
    assert_eq!(steps.iter().map(|step| committed(step, 0).len()).collect::<Vec<_>>(), [2, 2, 3, 1]);
}

proptest! {
    /// Whatever the layout, the rule and the answers: it ends, keeps fixed text, and its edits rebuild the canvas.
    #[test]
    fn decoding_ends_and_replays(
        prompt in prop::collection::vec(90u32..100, 0..20),
        pieces in prop::collection::vec(
            prop_oneof![prop::collection::vec(90u32..100, 0..12).prop_map(Piece::Fixed), (1usize..14).prop_map(Piece::Hole)], 1..6),
        commit in prop_oneof![
            (1usize..60).prop_map(|steps| Commit::Linear { steps }),
            (1usize..60).prop_map(|steps| Commit::Timesteps { steps, eps: 1e-3, independent: false }),
            (0.0..=1.0f64).prop_map(Commit::Threshold),
            (0.0..=1.0f64, 1usize..60).prop_map(|(threshold, steps)| Commit::Dynamic { threshold, steps }),
        ],
        (block, sub) in prop_oneof![Just((1, None)), Just((4, None)), Just((8, Some(4))), Just((8, Some(2))), Just((6, Some(6)))],
        (shift, cached, finish_early) in any::<(bool, bool, bool)>(),
        tokens in prop::collection::vec(90u32..99, 128),
        confidences in prop::collection::vec(0.0..=1.0f64, 128),
    ) {
        let mut parameters = parameters(commit);
        parameters.block_length = block;
        parameters.sub_blocks = sub.map(|length| SubBlocks { length, cached });
        parameters.end_of_text.finish_early = finish_early;
        let start = Canvas::new(&prompt, &pieces, MASK);
        let mut decoder = BlockDiffusion::new(parameters, start.clone(), shift);
        let (told, steps) = drive(&mut decoder, |position| (tokens[position], confidences[position]));
        let mut replayed = start.clone();
        for edit in steps.iter().flat_map(|step| &step.edits) {
            prop_assert!(start.cells()[edit.position] == Cell::Masked);
            replayed.replay(edit);
        }
        prop_assert_eq!(replayed.sequence(), decoder.canvas().sequence());
        prop_assert_eq!(replayed.cells(), decoder.canvas().cells());
        for ((purpose, .., wanted, _), step) in told.iter().zip(&steps) {
            prop_assert!(wanted.is_empty() || !committed(step, prompt.len()).is_empty(), "a forward for nothing");
            prop_assert!(!wanted.is_empty() || step.edits.is_empty());
            prop_assert!(*purpose != PREFILL || wanted.len() <= 1);
        }
        if !finish_early {
            prop_assert_eq!(decoder.canvas().frontier(), start.len());
        }
    }
}

// --------------------------------------------------------------------------------------------- families and requests

fn info(name: &str, generation: Value, context: usize) -> ModelInfo {
    let config = ModelConfig::read(&fixture(name).join("config.json")).unwrap();
    let tokenizer = Tokenizer::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano")).unwrap();
    ModelInfo {
        name: name.into(),
        mask_token_id: Ok(config.mask_token_id.unwrap()),
        generation: GenerationConfig::from_json(&generation, &json!({"eos_token_id": 150})).unwrap(),
        config,
        tokenizer: Arc::new(tokenizer),
        context,
        placement: F32,
        quantization: None,
        weight_bytes: 0,
        drafters: vec![],
    }
}

fn ask(model: &ModelInfo, change: impl FnOnce(&mut GenerateOptions)) -> Result<Parameters, Invalid> {
    request(model, change).map(|request| match request.method {
        Method::Diffusion(parameters) => parameters,
        Method::Autoregressive(_) | Method::Scoring(_) => panic!("a block-causal model does diffusion"),
    })
}

fn request(model: &ModelInfo, change: impl FnOnce(&mut GenerateOptions)) -> Result<Request, Invalid> {
    let mut options = GenerateOptions {
        id: String::new(),
        prompt: Prompt::Tokens(vec![1; 6]),
        template: vec![],
        max_new_tokens: Some(34),
        method: None,
        diffusion: Default::default(),
        autoregressive: Default::default(),
        sampling: Default::default(),
        stops: vec![],
        steps: true,
        deadline: None,
        priority: 0,
    };
    change(&mut options);
    validate(model, options)
}

fn refused(found: Result<Parameters, Invalid>) -> (&'static str, String) {
    match found {
        Err(Invalid::Field { field, reason }) => (field, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_family_decodes_by_its_authors_settings_unless_the_model_says_otherwise() {
    let sdar = ask(&info("sdar", json!({}), 256), |_| {}).unwrap();
    assert_eq!((sdar.block_length, sdar.sub_blocks, sdar.commit), (4, None, Commit::Threshold(0.85)));
    assert!(sdar.sampling.filtered_confidence && sdar.end_of_text.ids == [150]);
    let fast = ask(&info("fast-dllm-v2", json!({}), 256), |_| {}).unwrap();
    let usual = SubBlocks { length: 8, cached: false };
    assert_eq!((fast.block_length, fast.sub_blocks, fast.commit), (32, Some(usual), Commit::Threshold(0.9)));
    let own = json!({"diffusion": {"steps": 70, "cache": "dual"}, "sub_block_length": 16});
    let fast = ask(&info("fast-dllm-v2", own, 256), |_| {}).unwrap();
    let sub = SubBlocks { length: 16, cached: true };
    assert_eq!((fast.sub_blocks, fast.commit), (Some(sub), Commit::Linear { steps: 70 }));
}

#[test]
fn requests_of_block_causal_models_are_checked() {
    let model = info("sdar", json!({}), 256);
    let both = ask(&model, |options| (options.diffusion.steps, options.diffusion.threshold) = (Some(20), Some(0.7)));
    assert_eq!(both.unwrap().commit, Commit::Dynamic { threshold: 0.7, steps: 20 });
    assert!(ask(&model, |options| options.diffusion.block_length = Some(4)).is_ok());
    assert_eq!(refused(ask(&model, |options| options.diffusion.block_length = Some(8))).0, "block_length");
    assert_eq!(refused(ask(&model, |options| options.diffusion.cfg_scale = Some(1.0))).0, "cfg_scale");
    // 34 cells behind 6 tokens of prompt touch nine blocks.
    assert!(ask(&model, |options| options.diffusion.steps = Some(9)).is_ok());
    assert_eq!(refused(ask(&model, |options| options.diffusion.steps = Some(8))).0, "steps");
    // Whole blocks must fit: 40 tokens do, the 64 of two blocks do not.
    assert!(ask(&info("sdar", json!({}), 40), |_| {}).is_ok());
    let (field, reason) = refused(ask(&info("fast-dllm-v2", json!({}), 63), |_| {}));
    assert!(field == "max_new_tokens" && reason.contains("64"), "{field}: {reason}");
    let template = vec![TemplatePiece::Hole(30), TemplatePiece::Tokens(vec![5; 3])];
    let filled = ask(&model, |options| (options.template, options.max_new_tokens) = (template, None)).unwrap();
    assert!(filled.sampling.forbidden.contains(&150), "an end inside a hole would cut off the text behind it");
    for length in [0, 5, 64] {
        let own = info("fast-dllm-v2", json!({"sub_block_length": length}), 256);
        assert_eq!(refused(ask(&own, |_| {})).0, "sub_block_length", "{length}");
    }
    // The blocks before are kept in any case; only parts of a block can be run alone.
    let cached = |name: &str, choice| ask(&info(name, json!({}), 256), |options| options.diffusion.cache = Some(choice));
    assert_eq!(cached("fast-dllm-v2", CacheChoice::Dual).unwrap().sub_blocks, Some(SubBlocks { length: 8, cached: true }));
    assert_eq!(cached("fast-dllm-v2", CacheChoice::Off).unwrap().sub_blocks, Some(SubBlocks { length: 8, cached: false }));
    assert_eq!(refused(cached("fast-dllm-v2", CacheChoice::Prefix)).0, "cache");
    assert_eq!(refused(cached("sdar", CacheChoice::Dual)).0, "cache");
    assert!(cached("sdar", CacheChoice::Off).is_ok());
    let left_to_right = ask(&model, |options| options.method = Some(MethodKind::Autoregressive));
    assert!(matches!(left_to_right, Err(Invalid::Unsupported(_))));
    // Elsewhere the two rules exclude one another.
    let dream = info("dream", json!({}), 256);
    let both = ask(&dream, |options| (options.diffusion.steps, options.diffusion.threshold) = (Some(20), Some(0.7)));
    assert_eq!(refused(both).0, "diffusion");
}

#[test]
fn the_length_of_blocks_is_the_config_s() {
    let read = |name: &str, change: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
        change(&mut json);
        ModelConfig::from_json(&json).map(|config| config.block_length)
    };
    assert_eq!(read("sdar", &|_| {}), Ok(Some(4)));
    assert_eq!(read("sdar", &|json| json["block_size"] = json!(16)), Ok(Some(16)));
    assert_eq!(read("fast-dllm-v2", &|json| json["bd_size"] = json!(16)), Ok(Some(16)));
    assert_eq!(read("fast-dllm-v2", &|json| json["bd_size"] = Value::Null), Ok(Some(32)));
    assert_eq!(read("qwen3", &|json| json["block_size"] = json!(16)), Ok(None));
    for wrong in [json!(0), json!("4"), json!(512)] {
        assert!(read("sdar", &|json| json["block_size"] = wrong.clone()).is_err(), "{wrong}");
    }
}

/// Whole sequences have no place in these families: who tries is told, on either way through the network.
#[test]
fn a_block_causal_network_refuses_whole_sequences() {
    let model = load("sdar", F32);
    let attention = model.config().attention;
    let refused = tch::no_grad(|| model.hidden(&ids(&[1, 2, 3]), attention)).unwrap_err();
    assert!(refused.to_string().contains("spans"), "{refused}");
    let segment = Segment { tokens: &[1, 2, 3], layout: Layout::Whole(attention), cache: None };
    let refused = tch::no_grad(|| model.forward(&[segment])).unwrap_err();
    assert!(refused.to_string().contains("spans"), "{refused}");
}

/// What the engine tells of each request: the cells committed (a reader that is late gets several steps as one), and the cost.
fn collect(engine: &Engine, requests: Vec<Request>) -> Vec<(BTreeMap<usize, u32>, Usage)> {
    let running: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let told = running.into_iter().map(|mut events| {
        let (mut commits, mut cost) = (BTreeMap::new(), None);
        while let Some(event) = events.blocking_recv() {
            match event.unwrap() {
                Event::Step(step) => commits.extend(committed(&step, 0)),
                Event::Finished { usage, .. } => cost = Some(usage),
                _ => {}
            }
        }
        (commits, cost.unwrap())
    });
    told.collect()
}

/// In the engine, block by block beside others, over keys that others have left: the same as alone.
#[test]
fn sequences_share_forwards_and_beginnings_and_nothing_else() {
    for name in ["sdar", "fast-dllm-v2"] {
        let settings = if name == "sdar" { json!({}) } else { json!({"cache": "dual"}) };
        let model = info(name, json!({ "diffusion": settings }), 256);
        let requests = |deterministic: bool| -> Vec<Request> {
            let prompts = [1, 70, 64, 77, 100].map(|length| (0..length).map(|at| 3 + at * 7 % 140).collect::<Vec<u32>>());
            let ask = |prompt: Vec<u32>| {
                request(&model, |options| {
                    options.diffusion.threshold = Some(0.4);
                    options.diffusion.finish_early = Some(false);
                    options.diffusion.deterministic = Some(deterministic);
                    options.max_new_tokens = Some(20 + prompt.len() as u64 % 7);
                    options.prompt = Prompt::Tokens(prompt);
                })
            };
            prompts.into_iter().map(|prompt| ask(prompt).unwrap()).collect()
        };
        let start = |resident: usize, prefix_tokens: usize| {
            let limits = Limits { resident, prefix_tokens: Some(prefix_tokens), ..Limits::default() };
            Engine::start(load(name, F32), Drafters::default(), model.tokenizer.clone(), limits).unwrap()
        };
        let engine = start(1, 0);
        let alone = collect(&engine, requests(false));
        assert!(alone.iter().all(|(_, usage)| usage.reused_tokens == 0));
        let engine = start(8, 4096);
        let together = collect(&engine, requests(false));
        let again = collect(&engine, requests(false));
        for (((expected, cost), (beside, shared)), (reusing, usage)) in alone.iter().zip(&together).zip(&again) {
            assert_eq!((expected, expected), (beside, reusing), "{name}");
            assert_eq!((cost.steps, cost.forwards.denoise), (shared.steps, shared.forwards.denoise), "{name}");
            // The prompts begin alike; what is used of them is whole blocks, and the last token is always run.
            let block = model.config.block_length.unwrap();
            assert_eq!(usage.reused_tokens, usage.prompt_tokens.saturating_sub(1) / block * block, "{name}");
        }
        // Where rows depend on those beside them, what others ran is no part of a deterministic text.
        let independent = load(name, F32).rows_are_independent();
        let exact = collect(&start(1, 0), requests(true));
        for (((_, taken), (alone, _)), (beside, usage)) in again.iter().zip(&exact).zip(collect(&engine, requests(true))) {
            assert_eq!(beside, *alone, "{name}");
            assert_eq!(usage.reused_tokens, if independent { taken.reused_tokens } else { 0 }, "{name}");
        }
    }
}

#[test]
fn all_of_this_holds_on_libtorch_alone() {
    again_without_kernels("all_of_this_holds");
}

#[test]
fn all_of_this_holds_by_the_kernels_of_gpus() {
    again_with_fused_kernels("all_of_this_holds", &[]);
}
