//! How probable a model finds given tokens: exactly where it predicts from left to right, by a bound where it fills masks.
//!
//! A text longer than the window is cut into windows that overlap: every token behind the first ones given is scored once, the later
//! windows' with at least `overlap` tokens before it. A bound is estimated as LLaDA's authors do (`get_log_likelihood.py` in
//! github.com/ML-GSAI/LLaDA; Nie et al., arXiv 2502.09992, appendix B.5): so many targets are masked, from 1 to all of them, and each
//! masked one's cross-entropy counts by the inverse of their share; the counts of a batch are spread evenly, which takes most of the
//! variance out. A block-causal model's targets are masked so in each block, over the clean blocks before it (BD3-LM, arXiv 2503.09573).
//! What is computed here needs no engine: evaluation has the model to itself.

use std::ops::Range;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thiserror::Error;

use crate::model::family::Attention;
use crate::model::{ModelError, Transformer};
use crate::tensor::{Kind, Tensor};

/// Logits held at a time, in numbers: 64 MiB in f32.
const LOGITS_MAX: i64 = 16 << 20;

/// A likelihood that cannot be told.
#[derive(Debug, Error)]
pub enum LikelihoodError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{0}")]
    Unsupported(&'static str),
    #[error(
        "a window of {window} tokens with {overlap} of the one before it: the window must be the larger, and the overlap above 0"
    )]
    Window { window: usize, overlap: usize },
}

/// How a text is cut.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Tokens that a forward sees.
    pub window: usize,
    /// Of them, in every window but the first, from the one before.
    pub overlap: usize,
}

/// A part of a text, as ranges of its tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What a forward sees.
    pub seen: Range<usize>,
    /// What of that it scores.
    pub targets: Range<usize>,
}

/// Effort of an estimate.
#[derive(Clone, Copy, Debug)]
pub struct MonteCarlo {
    /// Masked copies of each window; rounded up to whole batches.
    pub samples: usize,
    /// Copies in one forward. Their numbers of masked tokens depend on one another, so a batch is one draw; for an error there must be
    /// two.
    pub batch: usize,
    pub seed: u64,
}

/// What some tokens come to, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Negative log-likelihood, or an upper bound's estimate.
    pub nats: f64,
    /// Of the estimate, squared; 0 of an exact number.
    pub variance: f64,
    pub tokens: usize,
}

impl Score {
    pub fn add(&mut self, other: Score) {
        self.nats += other.nats;
        self.variance += other.variance;
        self.tokens += other.tokens;
    }
}

/// Tokens at the beginning that cannot be scored, as nothing stands before them that they could be predicted from.
pub fn given(model: &Transformer) -> usize {
    usize::from(model.config().attention == Attention::Causal || model.config().shift)
}

impl Windows {
    /// The parts of `length` tokens, that together score all from `first` on.
    pub fn cut(self, length: usize, first: usize) -> Result<Vec<Cut>, LikelihoodError> {
        let Self { window, overlap } = self;
        if overlap == 0 || window <= overlap {
            return Err(LikelihoodError::Window { window, overlap });
        }
        let (mut cuts, mut from) = (vec![], first);
        while from < length {
            let start = if cuts.is_empty() && from < window { 0 } else { from.saturating_sub(overlap) };
            let end = (start + window).min(length);
            cuts.push(Cut { seen: start..end, targets: from..end });
            from = end;
        }
        Ok(cuts)
    }
}

/// Scores `tokens` from `first` on; under a model that fills masks by the mask token and a Monte Carlo estimate. `done` is called after
/// each window.
pub fn score(
    model: &Transformer,
    mask: Option<u32>,
    tokens: &[u32],
    first: usize,
    windows: Windows,
    effort: MonteCarlo,
    done: &mut dyn FnMut(),
) -> Result<Score, LikelihoodError> {
    let mut total = Score::default();
    for (index, Cut { seen, targets }) in windows.cut(tokens.len(), first.max(given(model)))?.into_iter().enumerate() {
        let targets = targets.start - seen.start..targets.end - seen.start;
        let score = tch::no_grad(|| match model.config().attention {
            Attention::Causal => exact(model, &tokens[seen], targets),
            _ => bound(model, mask, &tokens[seen], targets, effort, index as u64),
        })?;
        total.add(score);
        done();
    }
    Ok(total)
}

/// Scores the targets from left to right.
fn exact(model: &Transformer, tokens: &[u32], targets: Range<usize>) -> Result<Score, LikelihoodError> {
    let input = tensor(model, tokens)?.f_view([1, -1])?;
    let hidden = model.hidden(&input, Attention::Causal)?.f_squeeze_dim(0)?;
    let rows: Vec<i64> = targets.clone().map(|position| position as i64 - 1).collect();
    let wanted: Vec<u32> = tokens[targets].to_vec();
    let nats = cross_entropy(model, &hidden, &rows, &wanted)?.iter().sum();
    Ok(Score { nats, variance: 0.0, tokens: wanted.len() })
}

/// Estimates the bound on the targets' likelihood given all tokens before them.
fn bound(
    model: &Transformer,
    mask: Option<u32>,
    tokens: &[u32],
    targets: Range<usize>,
    effort: MonteCarlo,
    window: u64,
) -> Result<Score, LikelihoodError> {
    let mask = mask.ok_or(LikelihoodError::Unsupported("the model has no mask token"))?;
    let blocks = blocks(model, &targets)?;
    let mut rng = ChaCha8Rng::seed_from_u64(effort.seed);
    rng.set_stream(window);
    let batches = effort.samples.div_ceil(effort.batch.max(1)).max(2);
    let mut draws = Vec::with_capacity(batches);
    for _ in 0..batches {
        let masked = draw(&mut rng, &blocks, effort.batch.max(1));
        draws.push(batch(model, mask, tokens, &masked)? / effort.batch.max(1) as f64);
    }
    let count = batches as f64;
    let nats = draws.iter().sum::<f64>() / count;
    let spread = draws.iter().map(|draw| (draw - nats).powi(2)).sum::<f64>() / (count - 1.0);
    Ok(Score { nats, variance: spread / count, tokens: targets.len() })
}

/// The targets in the parts that are filled one after another.
fn blocks(model: &Transformer, targets: &Range<usize>) -> Result<Vec<Range<usize>>, LikelihoodError> {
    if model.config().attention != Attention::BlockCausal {
        return Ok(vec![targets.clone()]);
    }
    if model.config().shift {
        return Err(LikelihoodError::Unsupported("a block-causal model that predicts the next token has no bound here"));
    }
    let length = model.config().block_length.unwrap_or(targets.end).max(1);
    let (mut blocks, mut from) = (vec![], targets.start);
    while from < targets.end {
        let end = (from / length * length + length).min(targets.end);
        blocks.push(from..end);
        from = end;
    }
    Ok(blocks)
}

/// For each copy of a batch the masked positions, each with its weight: the inverse of the masked share of its block. In every block the
/// copies' counts are spread evenly over 1 to its length, from a place that is drawn.
fn draw(rng: &mut ChaCha8Rng, blocks: &[Range<usize>], copies: usize) -> Vec<Vec<(usize, f64)>> {
    let mut masked = vec![vec![]; copies];
    for block in blocks {
        let length = block.len();
        let start = rng.random_range(1..=length);
        for (copy, masked) in masked.iter_mut().enumerate() {
            let spread = start as f64 + copy as f64 * length as f64 / copies as f64;
            let count = (spread.round() as usize - 1) % length + 1;
            let mut positions: Vec<usize> = block.clone().collect();
            let (chosen, _) = positions.partial_shuffle(rng, count);
            masked.extend(chosen.iter().map(|position| (*position, length as f64 / count as f64)));
        }
    }
    masked
}

/// Weighted cross-entropy of all masked tokens of all copies.
fn batch(model: &Transformer, mask: u32, tokens: &[u32], masked: &[Vec<(usize, f64)>]) -> Result<f64, LikelihoodError> {
    let blocks = model.config().attention == Attention::BlockCausal;
    // Beside the noisy copy a block-causal model sees the clean one.
    let stride = tokens.len() * (1 + usize::from(blocks));
    let mut input = Vec::with_capacity(stride * masked.len());
    let (mut rows, mut wanted, mut weights) = (vec![], vec![], vec![]);
    for (copy, masked) in masked.iter().enumerate() {
        input.extend_from_slice(tokens);
        for (position, weight) in masked {
            input[copy * stride + position] = mask;
            rows.push((copy * stride + position - usize::from(model.config().shift)) as i64);
            wanted.push(tokens[*position]);
            weights.push(*weight);
        }
        input.extend_from_slice(if blocks { tokens } else { &[] });
    }
    let input = tensor(model, &input)?.f_view([masked.len() as i64, stride as i64])?;
    let hidden = match blocks {
        true => {
            let (positions, sees) = two_copies(tokens.len(), model.config().block_length.unwrap_or(tokens.len()).max(1));
            let sees =
                Tensor::f_from_slice(&sees)?.f_view([stride as i64, stride as i64])?.f_to_device(model.placement().device)?;
            model.hidden_where(&input, &positions, &sees)?
        }
        false => model.hidden(&input, Attention::Full)?,
    };
    let hidden = hidden.f_view([(stride * masked.len()) as i64, -1])?;
    let each = cross_entropy(model, &hidden, &rows, &wanted)?;
    Ok(each.iter().zip(weights).map(|(nats, weight)| nats * weight).sum())
}

/// Positions of a noisy and a clean copy side by side, and who sees whom: a noisy block itself and the clean ones before it, a clean block
/// itself and those before.
fn two_copies(length: usize, block: usize) -> (Vec<usize>, Vec<bool>) {
    let positions: Vec<usize> = (0..length).chain(0..length).collect();
    let places: Vec<(bool, usize)> =
        positions.iter().enumerate().map(|(at, position)| (at < length, position / block)).collect();
    let sees = |row: (bool, usize), column: (bool, usize)| match (row.0, column.0) {
        (true, true) => row.1 == column.1,
        (true, false) => column.1 < row.1,
        (false, true) => false,
        (false, false) => column.1 <= row.1,
    };
    (positions, places.iter().flat_map(|row| places.iter().map(|column| sees(*row, *column))).collect())
}

/// Of chosen rows of `hidden: [rows, hidden]`, the negative log-probability of a token each.
fn cross_entropy(model: &Transformer, hidden: &Tensor, rows: &[i64], wanted: &[u32]) -> Result<Vec<f64>, LikelihoodError> {
    let chunk = (LOGITS_MAX / model.config().vocab_size as i64).max(1) as usize;
    let mut found = Vec::with_capacity(rows.len());
    for (rows, wanted) in rows.chunks(chunk).zip(wanted.chunks(chunk)) {
        let rows = Tensor::f_from_slice(rows)?.f_to_device(model.placement().device)?;
        let logits = model.logits(&hidden.f_index_select(0, &rows)?)?.f_to_kind(Kind::Float)?;
        let of_wanted = logits.f_gather(1, &tensor(model, wanted)?.f_view([-1, 1])?, false)?;
        let nats = logits.f_logsumexp([1], true)?.f_to_kind(Kind::Double)?.f_sub(&of_wanted.f_to_kind(Kind::Double)?)?;
        let nats = Vec::<f64>::try_from(&nats.f_view(-1)?.f_to_device(tch::Device::Cpu)?)?;
        if nats.iter().any(|nats| !nats.is_finite()) {
            return Err(ModelError::NotFinite.into());
        }
        found.extend(nats);
    }
    Ok(found)
}

fn tensor(model: &Transformer, tokens: &[u32]) -> Result<Tensor, LikelihoodError> {
    let vocab_size = model.config().vocab_size;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
        return Err(ModelError::TokenOutOfRange { id: i64::from(*id), vocab_size }.into());
    }
    let tokens: Vec<i64> = tokens.iter().map(|id| i64::from(*id)).collect();
    Ok(Tensor::f_from_slice(&tokens)?.f_to_device(model.placement().device)?)
}

impl From<tch::TchError> for LikelihoodError {
    fn from(error: tch::TchError) -> Self {
        Self::Model(error.into())
    }
}
