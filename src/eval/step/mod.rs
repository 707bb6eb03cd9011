//! Where a denoising step's time goes: network, vocabulary head, selection, events.
//!
//! Here one step of a fresh canvas is told by its parts; [`grid`] tells whole steps of many shapes beside what they cost at least, by the
//! [`ceilings`] of the device. Each run here is the first step of a fresh canvas, in which every cell is masked and every row wanted: the dearest step there is.

pub mod ceilings;
pub mod grid;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::canvas::{Canvas, Piece};
use crate::decode::diffusion::select::Order;
use crate::decode::diffusion::{Commit, Diffusion, EndOfText, Parameters};
use crate::decode::{Purpose, Sampling, Window};
use crate::engine::runner::{self, Ask, Residence};
use crate::engine::sequence::Sequence;
use crate::model::Transformer;
use crate::tensor::synchronize;

/// Shape and length of the measurement.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub prompt: usize,
    pub canvas: usize,
    /// Sequences that take a step in one round.
    pub batch: usize,
    pub warm_up: usize,
    pub runs: usize,
    pub seed: u64,
}

/// Milliseconds over the runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// Times of one round of `batch` steps, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub prompt: usize,
    pub canvas: usize,
    pub batch: usize,
    pub runs: usize,
    /// The network up to the final hidden states.
    pub forward: Spread,
    /// The vocabulary head on the wanted rows.
    pub head: Spread,
    /// Logits to statistics of the rows.
    pub selection: Spread,
    /// The rule that picks cells, canvas, text and events for the client; not their way over the wire.
    pub event: Spread,
    pub total: Spread,
    /// Share of the total that is neither forward nor head, 0 to 1: the median of the runs' shares.
    pub overhead_share: f64,
}

/// Measures `model`; `tokenizer` turns its tokens into text.
pub fn run(model: &Transformer, tokenizer: &Tokenizer, options: &Options) -> Result<Report> {
    ensure!(options.batch > 0 && options.canvas > 0 && options.runs > 0, "batch, canvas and runs must be above 0");
    let length = options.prompt + options.canvas;
    ensure!(length <= model.context(), "prompt and canvas have {length} tokens, the context {}", model.context());
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let vocab_size = model.config().vocab_size as u32;
    let prompt: Vec<u32> = (0..options.prompt).map(|_| rng.random_range(0..vocab_size)).collect();
    let mut parts: [Vec<Duration>; 5] = Default::default();
    let mut shares = Vec::with_capacity(options.runs);
    for run in 0..options.warm_up + options.runs {
        let times = round(model, tokenizer, options, &prompt)?;
        if run >= options.warm_up {
            shares.push(1.0 - (times[0] + times[1]).as_secs_f64() / times[4].as_secs_f64());
            parts.iter_mut().zip(times).for_each(|(part, time)| part.push(time));
        }
    }
    let [forward, head, selection, event, total] = parts.map(spread);
    shares.sort_by(f64::total_cmp);
    let overhead_share = shares[shares.len() / 2];
    let Options { prompt, canvas, batch, runs, .. } = *options;
    Ok(Report { prompt, canvas, batch, runs, forward, head, selection, event, total, overhead_share })
}

/// One round: forward, head, selection, event and total time.
fn round(model: &Transformer, tokenizer: &Tokenizer, options: &Options, prompt: &[u32]) -> Result<[Duration; 5]> {
    let mut sequences: Vec<Sequence> = (0..options.batch).map(|_| sequence(model, options, prompt)).collect();
    let started = Instant::now();
    let (mut forward, mut head, mut statistics, mut event) = (Duration::ZERO, Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let windows: Vec<Window> = sequences.iter().filter_map(Sequence::window).collect();
    let residence = Residence::default();
    let asks: Vec<Ask> = windows.iter().map(|window| Ask { window, residence: &residence }).collect();
    let outcomes = runner::run_parts(model, &asks, || synchronize(model.placement().device))?;
    for (sequence, outcome) in sequences.iter_mut().zip(outcomes) {
        let (outcome, advancing) = (outcome?, Instant::now());
        std::hint::black_box(sequence.advance(&outcome, Purpose::Denoise, tokenizer).map_err(anyhow::Error::msg)?);
        event += advancing.elapsed();
        forward += outcome.timing.forward;
        head += outcome.timing.head;
        statistics += outcome.timing.statistics;
    }
    Ok([forward, head, statistics, event, started.elapsed()])
}

fn sequence(model: &Transformer, options: &Options, prompt: &[u32]) -> Sequence {
    let mask = model.config().mask_token_id.unwrap_or(0);
    let parameters = Parameters {
        block_length: options.canvas,
        sub_blocks: None,
        anew: false,
        order: Order::Confidence,
        order_temperature: 0.0,
        commit: Commit::Threshold(0.9),
        cfg_scale: 0.0,
        cache: None,
        deterministic: false,
        sampling: Sampling { forbidden: vec![mask], ..Sampling::default() },
        end_of_text: EndOfText::default(),
        seed: options.seed,
    };
    let canvas = Canvas::new(prompt, &[Piece::Hole(options.canvas)], mask);
    let decoder = Diffusion::new(parameters, canvas, model.config().attention);
    Sequence::new(Box::new(decoder), vec![], vec![], Duration::ZERO)
}

fn spread(mut times: Vec<Duration>) -> Spread {
    times.sort();
    let milliseconds = |index: usize| times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    Spread { median: milliseconds(times.len() / 2), min: milliseconds(0), max: milliseconds(times.len().saturating_sub(1)) }
}
