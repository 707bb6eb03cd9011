//! A chain of tokens drawn from ReDrafter's head, one after another, which the ratio test verifies (Leviathan et al., arXiv
//! 2211.17192). At high temperatures a draw is right more often than any fixed candidate. Without a temperature there is nothing
//! to draw, and the chain is the head's best token at each place.

use super::redrafter::Redrafter;
use super::{Context, Draft, Drafter};
use crate::decode::autoregressive::adaptation::Shape;
use crate::decode::autoregressive::tree::Tree;
use crate::decode::autoregressive::uniform;
use crate::model::ModelError;
use crate::model::statistics::Proposal;
use crate::tensor::{Kind, Tensor};

pub struct Chain(pub Redrafter);

/// Coins of the ratio test come from another stream than the draws.
const COINS: u64 = 0xc01_5eed;

impl Drafter for Chain {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        let (head, asked) = (&self.0, context.asked);
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
        let tree = Tree::from_beams(context.root(), [tokens.as_slice()]);
        let proposal = match distributions.is_empty() {
            true => None,
            false => Some(Proposal {
                uniforms: (0..tokens.len()).map(|place| uniform(asked.seed ^ COINS, place)).collect(),
                probabilities: Tensor::f_cat(&distributions, 0)?,
                tokens,
            }),
        };
        Ok(Draft { tree, proposal, forwards: asked.shape.length })
    }

    fn limit(&self) -> Shape {
        Shape { width: 1, length: 8 }
    }

    fn usual(&self) -> Shape {
        Shape { width: 1, length: 4 }
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }
}
