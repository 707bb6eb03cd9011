//! A chain of tokens drawn from ReDrafter's head, one after another, which the ratio test verifies (Leviathan et al., arXiv
//! 2211.17192). At high temperatures a draw is right more often than any fixed candidate. Without a temperature there is nothing
//! to draw, and the chain is the head's best token at each place.

use super::redrafter::Redrafter;
use super::search::{self, Matrices};
use super::{Context, Draft, Drafter};
use crate::decode::autoregressive::adaptation::Shape;
use crate::decode::autoregressive::tree::Tree;
use crate::decode::autoregressive::uniform;
use crate::model::ModelError;
use crate::model::statistics::Proposal;
use crate::tensor::{Kind, Tensor};

pub struct Chain {
    head: Redrafter,
    /// As [`super::redrafter::Beams`] has them.
    matrices: Option<Matrices>,
}

/// Coins of the ratio test come from another stream than the draws.
const COINS: u64 = 0xc01_5eed;

impl Chain {
    pub fn new(head: Redrafter, matrices: Option<Matrices>) -> Self {
        Self { head, matrices }
    }

    /// Draws by the head's own numbers.
    pub fn exact(head: Redrafter) -> Self {
        Self { matrices: Matrices::exact(&head), head }
    }

    /// Tokens, and what they were drawn from, `[tokens, vocab]`, if they were.
    fn drawn(&self, context: &Context) -> Result<(Vec<u32>, Option<Tensor>), ModelError> {
        let (asked, mut all) = (context.asked, vec![]);
        let choose = |place: usize, logits: &[f32]| {
            if asked.temperature == 0.0 {
                return search::best(logits, 1).first().map(|best| best.1);
            }
            let distribution = softmax(logits, asked.temperature)?;
            let row = pick(&distribution, uniform(asked.seed, place));
            all.extend(distribution);
            Some(row)
        };
        let followed = self.matrices.as_ref().and_then(|matrices| {
            search::follow(&self.head, matrices, context.model, context.hidden, context.root(), asked.shape.length, choose)
        });
        let Some(tokens) = followed else { return self.drawn_by_tensors(context) };
        if all.is_empty() {
            return Ok((tokens, None));
        }
        let distributions = Tensor::f_from_slice(&all)?.f_view([tokens.len() as i64, -1])?;
        let distributions = self.head.spread(distributions, context.model.config().vocab_size)?;
        Ok((tokens, Some(distributions)))
    }

    /// The same on whatever device the head is.
    fn drawn_by_tensors(&self, context: &Context) -> Result<(Vec<u32>, Option<Tensor>), ModelError> {
        let (head, asked) = (&self.head, context.asked);
        let device = context.hidden.device();
        let embed =
            |token: u32| Redrafter::embed(context.model, &Tensor::f_from_slice(&[i64::from(token)])?.f_to_device(device)?);
        let mut state = head.advance(&embed(context.root())?, None)?;
        let (mut tokens, mut distributions) = (Vec::new(), Vec::new());
        for place in 0..asked.shape.length {
            let logits = head.logits(context.hidden, &state)?.f_to_kind(Kind::Float)?;
            let row = if asked.temperature == 0.0 {
                logits.f_argmax(-1, false)?
            } else {
                let q = logits.f_div_scalar(asked.temperature)?.f_softmax(-1, Kind::Double)?;
                let cumulated = q.f_cumsum(-1, Kind::Double)?;
                let total = cumulated.f_double_value(&[0, cumulated.size()[1] - 1])?;
                let place = (uniform(asked.seed, place) * total).min(total * (1.0 - 1e-12));
                let place = Tensor::f_from_slice(&[place])?.f_view([1, 1])?.f_to_device(device)?;
                distributions.push(head.spread(q, context.model.config().vocab_size)?);
                place.f_searchsorted(&cumulated, false, true, "right", None::<&Tensor>)?.f_view(-1)?
            };
            let token = head.tokens(&row)?.f_int64_value(&[0])? as u32;
            tokens.push(token);
            state = head.advance(&embed(token)?, Some(&state))?;
        }
        let distributions = if distributions.is_empty() { None } else { Some(Tensor::f_cat(&distributions, 0)?) };
        Ok((tokens, distributions))
    }
}

/// Probabilities at a temperature; `None` where logits are no numbers.
fn softmax(logits: &[f32], temperature: f64) -> Option<Vec<f64>> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (f64::from(logit - top) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    total.is_finite().then(|| weights.into_iter().map(|weight| weight / total).collect())
}

/// The place where the probabilities' sum passes `at`, from 0 to 1; where rounding has it never do so, the last place that can be.
fn pick(probabilities: &[f64], at: f64) -> usize {
    let mut sum = 0.0;
    let passes = |probability: &f64| {
        sum += probability;
        sum > at
    };
    let last = || probabilities.iter().rposition(|probability| *probability > 0.0);
    probabilities.iter().position(passes).or_else(last).unwrap_or(0)
}

impl Drafter for Chain {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        let asked = context.asked;
        let (tokens, distributions) = self.drawn(context)?;
        let tree = Tree::from_beams(context.root(), [tokens.as_slice()]);
        let forwards = tokens.len();
        let proposal = distributions.map(|probabilities| Proposal {
            uniforms: (0..tokens.len()).map(|place| uniform(asked.seed ^ COINS, place)).collect(),
            probabilities,
            tokens,
        });
        Ok(Draft { tree, proposal, forwards })
    }

    fn limit(&self) -> Shape {
        Shape { width: 1, length: 8 }
    }

    fn usual(&self) -> Shape {
        Shape { width: 1, length: 4 }
    }

    fn bytes(&self) -> usize {
        self.head.bytes() + self.matrices.as_ref().map_or(0, Matrices::bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_never_drawn() {
        let certain = softmax(&[-3.0, 2.0, f32::NEG_INFINITY], 1e-6).unwrap();
        assert_eq!(certain, [0.0, 1.0, 0.0]);
        for at in [0.0, 0.3, 1.0 - f64::EPSILON / 2.0, 1.0] {
            assert_eq!(pick(&certain, at), 1, "{at}");
        }
        assert_eq!((pick(&[0.25, 0.75], 0.24), pick(&[0.25, 0.75], 0.25)), (0, 1));
        for broken in [f32::NAN, f32::INFINITY] {
            assert_eq!(softmax(&[1.0, broken], 1.0), None);
        }
    }
}
