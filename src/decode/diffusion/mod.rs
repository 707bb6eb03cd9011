//! Masked diffusion: a [`Decoder`] that fills the holes of a canvas, block by block, a few cells a step.
//!
//! [`Diffusion`] serves LLaDA's `generate.py`, Dream's `diffusion_generate` and Fast-dLLM's parallel rules; they differ in
//! [`Parameters`] only. Forwards are whole sequences, so that the machine is exact for fully bidirectional models. It spends no
//! forward on a complete canvas, and none on a step whose schedule commits nothing. [`block`] serves block-causal models over a cache.

pub mod block;
pub mod cache;
mod pace;
pub mod schedule;
pub mod select;

use std::ops::Range;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::canvas::Canvas;
use super::{
    Decoder, Edit, FinishReason, Guidance, Noise, Pattern, Purpose, RowStatistics, Sampling, Status, Step, Wanted, Window, mix,
};
use crate::model::family::Attention;
use block::{BlockDiffusion, SubBlocks};
use cache::{Cache, over_all};
use pace::Pace;
use select::{Candidate, Order, Rule, select};

/// How many cells a step commits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Commit {
    /// LLaDA: every block's masked cells in equal parts over its share of `steps`, which counts for the whole canvas.
    Linear {
        steps: usize,
    },
    /// Dream: timesteps from 1 to `eps`. With `independent`, each cell is revealed on its own (`origin`).
    Timesteps {
        steps: usize,
        eps: f64,
        independent: bool,
    },
    Threshold(f64),
    /// SDAR's `low_confidence_dynamic`: by threshold, and at least what the linear schedule would.
    Dynamic {
        threshold: f64,
        steps: usize,
    },
    Factor(f64),
    EntropyBound(f64),
}

/// What becomes of end-of-text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndOfText {
    /// Tokens that end the text.
    pub ids: Vec<u32>,
    /// Finish once everything left of a committed end-of-text is committed, and leave what is right of it masked.
    pub finish_early: bool,
}

/// Settings of one diffusion request, already validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// Cells of a block; blocks are filled from left to right.
    pub block_length: usize,
    /// Of block-causal models alone.
    pub sub_blocks: Option<SubBlocks>,
    pub order: Order,
    /// Draws the order by softmax(score / temperature) rather than taking the best (Dream's `alg_temp`); 0 is off.
    pub order_temperature: f64,
    pub commit: Commit,
    /// Scale of classifier-free guidance; 0 is off.
    pub cfg_scale: f64,
    /// Keys are used again within a block; `None` is exact.
    pub cache: Option<Cache>,
    /// A block-causal model computes finished blocks anew in every step, as if it could not keep them: the same text, for comparison.
    pub anew: bool,
    /// Run every step in a forward of its own where rows that are run together depend on one another.
    pub deterministic: bool,
    pub sampling: Sampling,
    pub end_of_text: EndOfText,
    pub seed: u64,
}

/// The decoder for a network of this kind; `shift` says that logits predict the token behind them.
pub fn decoder(parameters: Parameters, canvas: Canvas, attention: Attention, shift: bool) -> Box<dyn Decoder> {
    match attention {
        Attention::BlockCausal => Box::new(BlockDiffusion::new(parameters, canvas, shift)),
        Attention::Full | Attention::Causal => Box::new(Diffusion::new(parameters, canvas, attention)),
    }
}

/// Commits what `rule` chooses of the `open` cells and tells what each of them has become. `uniforms` has a number for every cell of
/// the canvas.
fn fill(
    canvas: &mut Canvas,
    parameters: &Parameters,
    open: &[usize],
    rows: &[RowStatistics],
    rule: Rule,
    uniforms: &[f64],
) -> Vec<Edit> {
    assert_eq!(open.len(), rows.len(), "one row of statistics for each wanted position");
    let candidates: Vec<Candidate> = open
        .iter()
        .zip(rows)
        .map(|(cell, row)| Candidate::new(parameters.order, row, uniforms[*cell], *cell, parameters.order_temperature))
        .collect();
    let draws: Vec<f64> = open.iter().map(|cell| uniforms[*cell]).collect();
    let mut status = vec![Status::Provisional; open.len()];
    for chosen in select(&candidates, rule, &draws) {
        status[chosen] = Status::Committed;
        canvas.commit(open[chosen], rows[chosen].token);
    }
    let edit = |((cell, row), status): ((&usize, &RowStatistics), Status)| Edit {
        position: *cell,
        token: row.token,
        status,
        confidence: row.confidence,
        alternatives: row.alternatives.clone(),
    };
    open.iter().zip(rows).zip(status).map(edit).collect()
}

/// Whether a canvas is filled, or filled up to where its text ends.
fn finished(canvas: &Canvas, end: &EndOfText) -> Option<FinishReason> {
    let frontier = canvas.frontier();
    match canvas.first_end(&end.ids) {
        Some(first) if end.finish_early && frontier >= first => Some(FinishReason::Stop),
        Some(_) if frontier == canvas.len() => Some(FinishReason::Stop),
        _ => (frontier == canvas.len()).then_some(FinishReason::Length),
    }
}

/// A canvas being filled.
pub struct Diffusion {
    parameters: Parameters,
    canvas: Canvas,
    attention: Attention,
    rng: ChaCha8Rng,
    /// Forwards so far.
    step: usize,
    block: usize,
    /// The block for which the whole sequence has been run.
    refreshed: Option<usize>,
    pace: Pace,
}

impl Diffusion {
    pub fn new(parameters: Parameters, canvas: Canvas, attention: Attention) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(parameters.seed);
        let pace = Pace::new(parameters.commit, canvas.blocks_to_fill(parameters.block_length));
        let mut decoder = Self { parameters, canvas, attention, rng, step: 0, block: 0, refreshed: None, pace };
        decoder.enter_block();
        decoder.skip_idle_steps();
        decoder
    }

    /// Cells of the current block.
    fn block_range(&self) -> Range<usize> {
        let start = self.block * self.parameters.block_length;
        start..(start + self.parameters.block_length).min(self.canvas.len())
    }

    /// Masked cells that may be committed now. What lies behind an end-of-text will not be given out, so it is left alone.
    fn open_cells(&self) -> Vec<usize> {
        let mut range = self.block_range();
        let end = &self.parameters.end_of_text;
        if end.finish_early
            && let Some(first) = self.canvas.first_end(&end.ids)
        {
            range.end = range.end.min(first);
        }
        self.canvas.masked(range).collect()
    }

    /// Moves past blocks that have nothing to fill, and notes what the one it stops at has.
    fn enter_block(&mut self) {
        while self.finished().is_none() && self.open_cells().is_empty() {
            self.block += 1;
        }
        let masked = if self.finished().is_none() { self.canvas.masked(self.block_range()).count() } else { 0 };
        self.pace.begin(masked);
    }

    /// A forward whose result would not be used is not run. Only a schedule of counts can have such steps.
    fn skip_idle_steps(&mut self) {
        while self.finished().is_none() && self.pace.scheduled(self.open_cells().len()) == Some(0) {
            self.pace.advance();
        }
    }

    /// One draw for every cell of the canvas, in order, so that what a cell draws does not depend on which others are masked.
    fn draw(&mut self) -> Vec<f64> {
        (0..self.canvas.len()).map(|_| self.rng.random::<f64>()).collect()
    }

    /// [`Decoder::advance`] with the draws given (one for each cell of the canvas).
    pub fn advance_with(&mut self, rows: &[RowStatistics], uniforms: &[f64]) -> Step {
        self.refreshed = Some(self.block);
        let open = self.open_cells();
        let edits = fill(&mut self.canvas, &self.parameters, &open, rows, self.pace.rule(open.len()), uniforms);
        let step = Step { step: self.step, block: self.block, edits };
        self.step += 1;
        self.pace.advance();
        if self.finished().is_none() && self.open_cells().is_empty() {
            self.enter_block();
        }
        self.skip_idle_steps();
        step
    }
}

impl Decoder for Diffusion {
    fn window(&self) -> Window {
        let parameters = &self.parameters;
        let prompt = self.canvas.prompt_len();
        let guidance = (parameters.cfg_scale != 0.0)
            .then(|| Guidance { unconditional: self.canvas.unconditional(), scale: parameters.cfg_scale });
        let (sequence, block) = (self.canvas.sequence(), self.block_range());
        let (run, pattern) = match &parameters.cache {
            None => (0..sequence.len(), Pattern::Whole(self.attention)),
            Some(cache) => {
                let known = self.refreshed == Some(self.block);
                let run = if known {
                    cache.window(prompt + block.start..prompt + block.end, sequence.len())
                } else {
                    0..sequence.len()
                };
                let pattern = over_all(&run, sequence.len());
                (run, pattern)
            }
        };
        Window {
            tokens: sequence[run].to_vec(),
            pattern,
            purpose: Purpose::Denoise,
            wanted: Wanted::Positions(self.open_cells().iter().map(|cell| (prompt + cell) as u32).collect()),
            guidance,
            sampling: parameters.sampling.clone(),
            noise: Noise::Seed(mix(parameters.seed ^ mix(self.step as u64))),
            alone: parameters.deterministic,
            histories: vec![],
        }
    }

    fn advance(&mut self, rows: &[RowStatistics]) -> Step {
        let uniforms = self.draw();
        self.advance_with(rows, &uniforms)
    }

    fn finished(&self) -> Option<FinishReason> {
        finished(&self.canvas, &self.parameters.end_of_text)
    }

    fn canvas(&self) -> &Canvas {
        &self.canvas
    }

    fn cache_room(&self) -> usize {
        if self.parameters.cache.is_some() { self.canvas.sequence().len() } else { 0 }
    }
}
