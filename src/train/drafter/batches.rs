//! From texts to batches: which places of a text heads learn from, and what each of a head's steps sees and should say there.
//!
//! When the network has chosen token `t + 1` from its state at place `t`, a drafter gets that state and goes on: its step `i`
//! (from 0) reads token `t + 1 + i` and foresees token `t + 2 + i`. What the network itself would say there follows from its
//! state at place `t + 1 + i`. Contexts are the places behind which the teacher wrote.

use anyhow::Result;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::texts::Text;
use crate::tensor::Tensor;
use crate::train::data::POOL;

/// One step of the heads, for the first so many contexts: those whose text goes on for long enough.
pub struct Step {
    pub live: i64,
    /// The token before the one foreseen, `[live]`.
    pub seen: Tensor,
    /// The token to foresee, as the text has it, `[live]`.
    pub said: Tensor,
    /// Which row of [`Batch::judges`] says what the teacher would, `[live]`.
    pub judge: Tensor,
}

/// Texts side by side.
pub struct Batch {
    /// `[batch, seq]`
    pub tokens: Tensor,
    /// Flat places of the contexts, those with the most behind them first.
    pub contexts: Tensor,
    /// Flat places of the states that say what the teacher would: one behind each context.
    pub judges: Tensor,
    pub steps: Vec<Step>,
}

impl Batch {
    /// Takes texts of at least two written tokens each; `filling` stands behind the shorter ones. Empty where there is no such text.
    pub fn new(texts: &[&Text], steps: usize, filling: u32) -> Result<Self> {
        // A multiple of eight: oneDNN prepares kernels anew for every length it meets.
        let length = texts.iter().map(|text| text.tokens.len()).max().unwrap_or(0).next_multiple_of(8);
        let mut tokens = vec![i64::from(filling); texts.len() * length];
        // Each context: its place, and how many tokens behind it a head may foresee.
        let mut contexts: Vec<(usize, usize)> = vec![];
        for (row, text) in texts.iter().enumerate() {
            let first = row * length;
            tokens[first..first + text.tokens.len()].iter_mut().zip(&text.tokens).for_each(|(to, id)| *to = i64::from(*id));
            let places = text.prompt.saturating_sub(1)..text.tokens.len().saturating_sub(2);
            contexts.extend(places.map(|place| (first + place, text.tokens.len() - 2 - place)));
        }
        contexts.sort_by_key(|(place, behind)| (std::cmp::Reverse(*behind), *place));
        let mut order = vec![0; tokens.len()];
        contexts.iter().enumerate().for_each(|(at, (place, _))| order[*place] = at as i64);
        let step = |step: usize| -> Result<Step> {
            let live: Vec<usize> = contexts.iter().take_while(|(_, left)| *left > step).map(|(place, _)| *place).collect();
            let pick = |from: &[i64], ahead: usize| -> Result<Tensor> {
                Ok(Tensor::f_from_slice(&live.iter().map(|place| from[place + ahead]).collect::<Vec<_>>())?)
            };
            Ok(Step {
                live: live.len() as i64,
                seen: pick(&tokens, step + 1)?,
                said: pick(&tokens, step + 2)?,
                judge: pick(&order, step)?,
            })
        };
        let longest = contexts.first().map_or(0, |(_, left)| *left);
        let steps = (0..steps.min(longest)).map(step).collect::<Result<_>>()?;
        let flat = |ahead: usize| Tensor::f_from_slice(&contexts.iter().map(|c| (c.0 + ahead) as i64).collect::<Vec<_>>());
        let shape = [texts.len() as i64, length as i64];
        let (contexts, judges) = (flat(0)?, flat(1)?);
        Ok(Self { tokens: Tensor::f_from_slice(&tokens)?.f_view(shape)?, contexts, judges, steps })
    }
}

/// An endless order of the texts that is a pure function of the seed.
pub struct Order {
    /// Tokens of each text.
    pub lengths: Vec<usize>,
    pub size: usize,
    pub seed: u64,
}

impl Order {
    /// Batches in one pass over all texts.
    pub fn batches(&self) -> u64 {
        self.lengths.len().div_ceil(self.size) as u64
    }

    /// The texts of each batch of a pass: shuffled, but of like lengths within a batch.
    pub fn pass(&self, pass: u64) -> Vec<Vec<usize>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(pass);
        let mut order: Vec<usize> = (0..self.lengths.len()).collect();
        order.shuffle(&mut rng);
        let mut batches = vec![];
        for pool in order.chunks_mut(self.size * POOL as usize) {
            pool.sort_by_key(|text| (self.lengths[*text], *text));
            let first = batches.len();
            batches.extend(pool.chunks(self.size).map(<[usize]>::to_vec));
            batches[first..].shuffle(&mut rng);
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(&tensor.f_view(-1).unwrap()).unwrap()
    }

    /// Held to the drafter's own use: state at `t`, the token behind it as root, and then the tokens two, three, … behind.
    #[test]
    fn steps_see_and_foresee_what_a_draft_will() {
        let text = |prompt, tokens: &[u32]| Text { prompt, tokens: tokens.to_vec() };
        let (long, short) = (text(2, &[10, 11, 12, 13, 14, 15]), text(3, &[20, 21, 22, 23, 24]));
        let batch = Batch::new(&[&short, &long], 5, 9).unwrap();
        assert_eq!(batch.tokens.size(), [2, 8]);
        assert_eq!(flat(&batch.tokens)[5..8], [9, 9, 9]);
        // Contexts from the prompt's last token to the last but two; the long text's first has the most behind it.
        assert_eq!(flat(&batch.contexts), [9, 10, 2, 11]);
        assert_eq!(flat(&batch.judges), [10, 11, 3, 12]);
        let steps: Vec<_> = batch.steps.iter().map(|s| (flat(&s.seen), flat(&s.said), flat(&s.judge))).collect();
        assert_eq!(steps[0], (vec![12, 13, 23, 14], vec![13, 14, 24, 15], vec![0, 1, 2, 3]));
        assert_eq!(steps[1], (vec![13, 14], vec![14, 15], vec![1, 3]));
        assert_eq!(steps[2], (vec![14], vec![15], vec![3]));
        assert_eq!(steps.len(), 3);
    }

    #[test]
    fn a_pass_takes_every_text_once() {
        let order = Order { lengths: (0..103).map(|text| text % 7).collect(), size: 4, seed: 1 };
        let (first, second) = (order.pass(0), order.pass(1));
        assert_eq!(first.len() as u64, order.batches());
        assert_ne!(first, second);
        for pass in [first, second] {
            let mut all: Vec<usize> = pass.into_iter().flatten().collect();
            all.sort();
            assert_eq!(all, (0..103).collect::<Vec<_>>());
        }
    }
}
