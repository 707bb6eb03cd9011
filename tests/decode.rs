//! The diffusion decoder as a pure state machine, fed with made-up statistics: no network, no tokenizer.

use std::collections::HashMap;

use lacuna::decode::canvas::{Canvas, Cell, Piece};
use lacuna::decode::diffusion::select::Order;
use lacuna::decode::diffusion::{Commit, Diffusion, EndOfText, Parameters};
use lacuna::decode::{Decoder, FinishReason, Noise, RowStatistics, Sampling, Status, Step, Wanted};
use lacuna::model::family::Attention;
use proptest::prelude::*;

const MASK: u32 = 99;
const END: u32 = 98;

fn parameters(commit: Commit) -> Parameters {
    Parameters {
        block_length: 1000,
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

fn decoder(parameters: Parameters, prompt: &[u32], pieces: &[Piece]) -> Diffusion {
    Diffusion::new(parameters, Canvas::new(prompt, pieces, MASK), Attention::Full)
}

/// Statistics for what the window wants, by canvas cell.
fn answer(decoder: &Diffusion, row: impl Fn(usize) -> (u32, f64)) -> Vec<RowStatistics> {
    let prompt = decoder.canvas().prompt_len();
    let statistics = |position: &u32| {
        let (token, confidence) = row(*position as usize - prompt);
        RowStatistics { token, confidence, margin: confidence, entropy: 1.0 - confidence, alternatives: vec![] }
    };
    wanted(decoder).iter().map(statistics).collect()
}

/// Positions that the next window asks about.
fn wanted(decoder: &Diffusion) -> Vec<u32> {
    match decoder.window().wanted {
        Wanted::Positions(positions) => positions,
        Wanted::Following(rows) => panic!("a whole canvas is asked for by position, not by rows {rows:?}"),
    }
}

fn run(decoder: &mut Diffusion, row: impl Fn(usize) -> (u32, f64)) -> Vec<Step> {
    let mut steps = vec![];
    while decoder.finished().is_none() {
        let rows = answer(decoder, &row);
        assert!(!rows.is_empty(), "a forward that wants nothing");
        steps.push(decoder.advance(&rows));
        assert!(steps.len() < 1000);
    }
    steps
}

fn committed(step: &Step) -> Vec<usize> {
    step.edits.iter().filter(|edit| edit.status == Status::Committed).map(|edit| edit.position).collect()
}

#[test]
fn an_end_of_text_waits_for_everything_before_it() {
    let mut decoder = decoder(parameters(Commit::Linear { steps: 6 }), &[1], &[Piece::Hole(6)]);
    // The end stands at cell 3 and is the surest; what is before it comes later, from right to left.
    let row = |cell: usize| if cell == 3 { (END, 0.99) } else { (10 + cell as u32, 0.1 * (cell + 1) as f64) };
    let rows = answer(&decoder, row);
    assert_eq!(committed(&decoder.advance(&rows)), [3]);
    assert_eq!(decoder.finished(), None, "cells 0 to 2 are still masked");
    // What lies behind the end is no longer asked for.
    assert_eq!(wanted(&decoder), [1, 2, 3]);
    let steps = run(&mut decoder, row);
    assert_eq!(decoder.finished(), Some(FinishReason::Stop));
    assert_eq!(steps.iter().flat_map(committed).collect::<Vec<_>>(), [2, 1, 0]);
    assert_eq!(decoder.canvas().cells()[4..], [Cell::Masked; 2]);
}

#[test]
fn an_end_of_text_in_fixed_text_or_prompt_ends_nothing() {
    let pieces = [Piece::Fixed(vec![END, 5]), Piece::Hole(2)];
    let mut decoder = decoder(parameters(Commit::Threshold(0.5)), &[END], &pieces);
    run(&mut decoder, |cell| (10 + cell as u32, 0.9));
    assert_eq!(decoder.finished(), Some(FinishReason::Length));
    assert_eq!(decoder.canvas().tokens(), [END, 5, 12, 13]);
}

#[test]
fn the_mask_token_in_prompt_and_fixed_text_stays_what_it_is() {
    let pieces = [Piece::Fixed(vec![MASK, 5]), Piece::Hole(2), Piece::Fixed(vec![MASK])];
    let mut decoder = decoder(parameters(Commit::Threshold(0.5)), &[MASK, 1], &pieces);
    assert_eq!(wanted(&decoder), [4, 5], "only the hole is asked for");
    run(&mut decoder, |cell| (10 + cell as u32, 0.9));
    assert_eq!(decoder.canvas().sequence(), [MASK, 1, MASK, 5, 12, 13, MASK]);
    assert_eq!(decoder.finished(), Some(FinishReason::Length));
}

#[test]
fn blocks_are_filled_from_left_to_right_and_those_without_holes_cost_nothing() {
    let mut parameters = parameters(Commit::Threshold(0.5));
    parameters.block_length = 2;
    let pieces = [Piece::Hole(2), Piece::Fixed(vec![7, 7]), Piece::Hole(2)];
    let mut decoder = decoder(parameters, &[], &pieces);
    let steps = run(&mut decoder, |_| (10, 0.9));
    assert_eq!(steps.iter().map(committed).collect::<Vec<_>>(), [vec![0, 1], vec![4, 5]]);
    assert_eq!(steps.iter().map(|step| step.block).collect::<Vec<_>>(), [0, 2]);
}

/// The steps count for the whole canvas: each block gets its share, and blocks of fixed text get none.
#[test]
fn steps_are_shared_among_the_blocks_that_have_something_to_fill() {
    let pieces = [Piece::Fixed(vec![7; 16]), Piece::Hole(32)];
    let all = Commit::Timesteps { steps: 16, eps: 1e-3, independent: false };
    for commit in [Commit::Linear { steps: 16 }, all, Commit::Timesteps { steps: 16, eps: 1e-3, independent: true }] {
        let mut parameters = parameters(commit);
        parameters.block_length = 8;
        let mut decoder = decoder(parameters, &[], &pieces);
        let steps = run(&mut decoder, |_| (10, 0.9));
        let in_block = |block| steps.iter().filter(|step| step.block == block).count();
        for block in 2..6 {
            assert!((1..=4).contains(&in_block(block)), "{commit:?}: {} steps in block {block}", in_block(block));
        }
        assert!(steps.len() > 8, "{commit:?}: {} steps", steps.len());
    }
}

#[test]
fn a_complete_canvas_takes_no_forward() {
    let decoder = decoder(parameters(Commit::Linear { steps: 8 }), &[1], &[Piece::Fixed(vec![3])]);
    assert_eq!(decoder.finished(), Some(FinishReason::Length));
}

#[test]
fn steps_that_commit_nothing_take_no_forward() {
    // 16 steps for 4 cells: only 4 forwards. Dream's first steps of 16 over 16 cells commit none.
    let mut linear = decoder(parameters(Commit::Linear { steps: 16 }), &[1], &[Piece::Hole(4)]);
    assert_eq!(run(&mut linear, |cell| (cell as u32, 0.5)).len(), 4);
    let timesteps = Commit::Timesteps { steps: 16, eps: 1e-3, independent: false };
    let mut dream = decoder(parameters(timesteps), &[1], &[Piece::Hole(16)]);
    let steps = run(&mut dream, |cell| (cell as u32, 0.5));
    assert!(steps.iter().all(|step| !committed(step).is_empty()));
}

#[test]
fn guidance_masks_the_prompt_and_nothing_else() {
    let mut parameters = parameters(Commit::Threshold(0.5));
    parameters.cfg_scale = 1.5;
    let decoder = decoder(parameters, &[1, 2], &[Piece::Fixed(vec![7]), Piece::Hole(1)]);
    let guidance = decoder.window().guidance.unwrap();
    assert_eq!((guidance.unconditional, guidance.scale), (vec![MASK, MASK, 7, MASK], 1.5));
}

#[test]
fn the_seed_decides_a_random_order_and_nothing_else_does() {
    let order = |seed: u64| {
        let mut parameters = parameters(Commit::Linear { steps: 12 });
        (parameters.order, parameters.seed) = (Order::Random, seed);
        let mut decoder = decoder(parameters, &[1], &[Piece::Hole(12)]);
        run(&mut decoder, |cell| (cell as u32, 0.5)).iter().flat_map(committed).collect::<Vec<_>>()
    };
    assert_eq!(order(3), order(3));
    assert_ne!(order(3), order(4));
}

/// libtorch's generator takes 32 bits of its seed; requests and steps must differ in those.
#[test]
fn noise_seeds_differ_in_their_low_half() {
    let mut seen = std::collections::HashSet::new();
    for seed in (0..50).chain((1..50).map(|n| n << 32)) {
        let mut parameters = parameters(Commit::Linear { steps: 4 });
        parameters.seed = seed;
        let mut decoder = decoder(parameters, &[1], &[Piece::Hole(4)]);
        while decoder.finished().is_none() {
            let Noise::Seed(noise) = decoder.window().noise else { panic!("diffusion draws from a seed") };
            assert!(seen.insert(noise as u32), "seed {seed}");
            let rows = answer(&decoder, |cell| (cell as u32, 0.5));
            decoder.advance(&rows);
        }
    }
}

fn any_commit() -> impl Strategy<Value = Commit> {
    prop_oneof![
        (1usize..40).prop_map(|steps| Commit::Linear { steps }),
        (1usize..40, any::<bool>()).prop_map(|(steps, independent)| Commit::Timesteps { steps, eps: 1e-3, independent }),
        (0.0..=1.0f64).prop_map(Commit::Threshold),
        (0.0..4.0f64).prop_map(Commit::Factor),
        (0.0..4.0f64).prop_map(Commit::EntropyBound),
    ]
}

fn any_pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = prop_oneof![prop::collection::vec(90u32..100, 0..5).prop_map(Piece::Fixed), (1usize..9).prop_map(Piece::Hole),];
    prop::collection::vec(piece, 1..6)
}

proptest! {
    /// Whatever the rule, the layout and the network's answers: it ends, fixed text survives, replaying the edits gives the
    /// canvas, and every forward commits something (save the rule that may commit none).
    #[test]
    fn decoding_ends_and_replays(
        commit in any_commit(),
        pieces in any_pieces(),
        prompt in prop::collection::vec(90u32..100, 0..6),
        block_length in 1usize..20,
        finish_early in any::<bool>(),
        tokens in prop::collection::vec(90u32..99, 64),
        confidences in prop::collection::vec(0.0..=1.0f64, 64),
    ) {
        let mut parameters = parameters(commit);
        (parameters.block_length, parameters.end_of_text.finish_early) = (block_length, finish_early);
        let start = Canvas::new(&prompt, &pieces, MASK);
        let mut decoder = Diffusion::new(parameters, start.clone(), Attention::Full);
        let steps = run(&mut decoder, |cell| (tokens[cell], confidences[cell]));
        let mut replayed = start.clone();
        let mut seen = HashMap::new();
        for step in &steps {
            for edit in &step.edits {
                prop_assert!(start.cells()[edit.position] == Cell::Masked);
                if edit.status == Status::Committed {
                    prop_assert!(seen.insert(edit.position, edit.token).is_none(), "committed twice");
                }
                replayed.replay(edit);
            }
            if !matches!(commit, Commit::Timesteps { independent: true, .. }) {
                prop_assert!(!committed(step).is_empty());
            }
        }
        prop_assert_eq!(replayed.sequence(), decoder.canvas().sequence());
        prop_assert_eq!(replayed.cells(), decoder.canvas().cells());
        if !finish_early {
            prop_assert_eq!(decoder.canvas().frontier(), start.len());
        }
    }
}
