//! From tasks to batches, for every objective.
//!
//! A diffusion example is `prompt | answer | end | end …`: the canvas behind the prompt is filled up with end-of-text, as LLaDA
//! trains it, so that a model learns where a text ends on a canvas of any length. A share of the canvas, drawn anew per example,
//! is replaced by the mask token; the loss is the plain mean over masked positions (in a probe on this task it learned several
//! times faster than the 1/t-weighted bound).
//!
//! An autoregressive example is the same text with nothing masked; every token of the answer, and the one end behind it, is
//! predicted from the row before it. What block diffusion learns from is in [`super::blocks`]. The same seed draws the same examples
//! for all, in the same pools.

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::blocks::Copies;
use super::vocabulary::{END, MASK};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::eval::nano::{self, Split};

/// Canvas that the model is used with, in tokens.
pub const CANVAS: usize = 48;
/// Batches that are drawn, sorted by length and shuffled together: little padding, still random order.
pub const POOL: u64 = 32;
/// Share of examples (of blocks, where each has its own) that start from nothing, as decoding does; the others keep a part.
const FULLY_MASKED: f64 = 0.3;
const MASKED_MIN: f64 = 0.15;
/// Share of batches with a canvas of up to [`CANVAS`] tokens, mostly end-of-text; the others end soon after the longest answer.
const LONG_CANVAS: f64 = 0.25;
/// Share of masked fill positions (behind the first end-of-text) that count in the loss: they are many and easy.
const FILL_IN_LOSS: f64 = 0.15;

/// What a network learns to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Objective {
    /// Masked tokens from everything else (LLaDA).
    Diffusion,
    /// Each token from those before it.
    Autoregressive,
    /// Masked tokens from the rest of their block and the blocks before it (BD3-LM, SDAR).
    Block,
}

/// Token ids of `batch × length` and the rows in them to predict.
pub struct Batch {
    pub size: usize,
    /// `[size × length]`, masked where the objective says so.
    pub tokens: Vec<i64>,
    /// Flat indices into `tokens`.
    pub rows: Vec<i64>,
    /// The right token of each row.
    pub targets: Vec<i64>,
    /// How the tokens stand to one another, where they are two copies of the texts.
    pub copies: Option<Copies>,
}

/// A stream of batches that is a pure function of the seed.
pub struct Batches<'a> {
    pub tokenizer: &'a Tokenizer,
    pub seed: u64,
    pub size: usize,
    pub split: Split,
    pub objective: Objective,
    /// Of [`Objective::Block`].
    pub block_length: usize,
}

pub(super) struct Example {
    pub prompt: Vec<u32>,
    pub answer: Vec<u32>,
}

impl Batches<'_> {
    /// The `index`-th pool of [`POOL`] batches.
    pub fn pool(&self, index: u64) -> Result<Vec<Batch>> {
        let mut rng = self.rng(index);
        let mut examples = self.examples(&mut rng, self.size * POOL as usize)?;
        examples.sort_by_key(|example| example.prompt.len() + example.answer.len());
        let mut batches = Vec::with_capacity(POOL as usize);
        for examples in examples.chunks(self.size) {
            batches.push(match self.objective {
                Objective::Diffusion => self.mask_some(&mut rng, examples)?,
                Objective::Autoregressive => self.continue_prompts(examples)?,
                Objective::Block => self.mask_blocks(&mut rng, examples, false)?,
            });
        }
        batches.shuffle(&mut rng);
        Ok(batches)
    }

    /// A batch for validation. For diffusion, every canvas or block is wholly masked and only the answer and its end count.
    pub fn validation(&self, index: u64) -> Result<Batch> {
        let mut rng = self.rng(index);
        let examples = self.examples(&mut rng, self.size)?;
        match self.objective {
            Objective::Diffusion => {
                let longest = examples.iter().map(|e| e.prompt.len()).max().unwrap_or(0);
                self.mask(&mut rng, &examples, longest + CANVAS, true)
            }
            Objective::Autoregressive => self.continue_prompts(&examples),
            Objective::Block => self.mask_blocks(&mut rng, &examples, true),
        }
    }

    fn rng(&self, stream: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream);
        rng
    }

    fn examples(&self, rng: &mut ChaCha8Rng, count: usize) -> Result<Vec<Example>> {
        let encode = |text: &str| self.tokenizer.encode(text, false).map_err(anyhow::Error::msg);
        let example = |_| {
            let task = nano::sample(rng, self.split);
            let example = Example { prompt: encode(&task.prompt)?, answer: encode(&task.solution)? };
            ensure!(example.answer.len() < CANVAS, "an answer of {} tokens does not fit the canvas", example.answer.len());
            Ok(example)
        };
        (0..count).map(example).collect()
    }

    pub(super) fn token(&self, name: &str) -> Result<i64> {
        self.tokenizer.token_id(name).map(i64::from).with_context(|| format!("no token {name}"))
    }

    /// Row `i` predicts token `i + 1`; rows within the prompt, and behind the first end, do not count.
    fn continue_prompts(&self, examples: &[Example]) -> Result<Batch> {
        let end = self.token(END)?;
        let needed = examples.iter().map(|e| e.prompt.len() + e.answer.len() + 1).max().unwrap_or(0);
        let length = needed.next_multiple_of(8);
        let mut batch = Batch { size: examples.len(), tokens: vec![], rows: vec![], targets: vec![], copies: None };
        for Example { prompt, answer } in examples {
            let first = batch.tokens.len() + prompt.len();
            batch.tokens.extend(prompt.iter().chain(answer).map(|id| i64::from(*id)));
            batch.rows.extend((first..=first + answer.len()).map(|position| position as i64 - 1));
            batch.targets.extend(answer.iter().map(|id| i64::from(*id)).chain([end]));
            batch.tokens.resize(first - prompt.len() + length, end);
        }
        Ok(batch)
    }

    fn mask_some(&self, rng: &mut impl Rng, examples: &[Example]) -> Result<Batch> {
        let shortest = examples.iter().map(|e| e.prompt.len()).min().unwrap_or(0);
        let needed = examples.iter().map(|e| e.prompt.len() + e.answer.len() + 1).max().unwrap_or(0);
        let spare = if rng.random_bool(LONG_CANVAS) { (shortest + CANVAS).saturating_sub(needed) } else { 3 };
        // A multiple of eight: oneDNN prepares kernels anew for every length it meets.
        let length = (needed + rng.random_range(0..=spare)).next_multiple_of(8);
        self.mask(rng, examples, length, false)
    }

    fn mask(&self, rng: &mut impl Rng, examples: &[Example], length: usize, all: bool) -> Result<Batch> {
        let (end, mask) = (self.token(END)?, self.token(MASK)?);
        let mut batch = Batch { size: examples.len(), tokens: vec![], rows: vec![], targets: vec![], copies: None };
        for Example { prompt, answer } in examples {
            let share = if all { 1.0 } else { masked_share(rng) };
            batch.tokens.extend(prompt.iter().map(|id| i64::from(*id)));
            for place in 0..length - prompt.len() {
                let token = answer.get(place).map_or(end, |id| i64::from(*id));
                if !rng.random_bool(share) {
                    batch.tokens.push(token);
                    continue;
                }
                if place <= answer.len() || (!all && fill_counts(rng)) {
                    batch.rows.push(batch.tokens.len() as i64);
                    batch.targets.push(token);
                }
                batch.tokens.push(mask);
            }
        }
        if batch.rows.is_empty() {
            // Possible only for tiny batches; one row keeps the mean defined.
            batch.rows.push(batch.tokens.len() as i64 - 1);
            batch.targets.push(end);
        }
        Ok(batch)
    }
}

/// How much of a canvas, or of a block, is masked.
pub(super) fn masked_share(rng: &mut impl Rng) -> f64 {
    if rng.random_bool(FULLY_MASKED) { 1.0 } else { rng.random_range(MASKED_MIN..1.0) }
}

/// Whether a masked cell behind the first end-of-text counts in the loss.
pub(super) fn fill_counts(rng: &mut impl Rng) -> bool {
    rng.random_bool(FILL_IN_LOSS)
}
