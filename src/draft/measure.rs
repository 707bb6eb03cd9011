//! What forwards of several tokens, and drafts, cost on this device: a few runs of each, the best of which counts, since whatever
//! disturbs a run only lengthens it.

use std::time::Instant;

use super::{Context, Drafter, shapes};
use crate::decode::Drafting;
use crate::decode::autoregressive::DrafterKind;
use crate::decode::autoregressive::adaptation::{DraftCost, Shape};
use crate::model::cache::KvCache;
use crate::model::{Layout, ModelError, Transformer};
use crate::tensor::{Kind, Tensor};

/// Numbers of tokens that are measured; what lies between is taken from straight lines.
const TOKENS: [usize; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 32];
/// Positions in the cache while measuring.
const PAST: usize = 32;
const RUNS: usize = 5;

/// Seconds of a forward of so many tokens over a cache, head included, ascending and never falling.
pub fn verify(model: &Transformer) -> Result<Vec<(usize, f64)>, ModelError> {
    tch::no_grad(|| {
        let past = PAST.min(model.context().saturating_sub(TOKENS[TOKENS.len() - 1]));
        let mut cache = KvCache::new(model.config(), model.placement(), 1, past + TOKENS[TOKENS.len() - 1])?;
        let run = |tokens: usize, cache: &KvCache| -> Result<(), ModelError> {
            let tokens = Tensor::f_zeros([1, tokens as i64], (Kind::Int64, model.placement().device))?;
            let hidden = model.extend(&tokens, Layout::Causal, cache)?;
            // Taking a number off the device waits for it.
            model.logits(&hidden.f_get(0)?)?.f_argmax(-1, false)?.f_int64_value(&[0]).map(drop)?;
            Ok(())
        };
        if past > 0 {
            run(past, &cache)?;
            cache.keep(&(0..past).collect::<Vec<_>>())?;
        }
        let mut costs: Vec<(usize, f64)> = vec![];
        for tokens in TOKENS.into_iter().filter(|tokens| past + tokens <= model.context()) {
            let best = best_of(|| run(tokens, &cache))?;
            costs.push((tokens, best.max(costs.last().map_or(0.0, |last| last.1))));
        }
        Ok(costs)
    })
}

/// Seconds of drafting in every shape that the drafter may be asked for.
pub fn draft(model: &Transformer, drafter: &dyn Drafter, kind: DrafterKind) -> Result<Vec<DraftCost>, ModelError> {
    tch::no_grad(|| {
        let placement = model.placement();
        let hidden = Tensor::f_zeros([1, model.config().hidden_size as i64], (placement.dtype.kind(), placement.device))?;
        // Text that repeats itself, so that there is something to look up.
        let tokens: Vec<u32> = (0..PAST as u32).map(|at| at % 2).collect();
        let time = |shape: Shape| {
            let asked = Drafting { drafter: kind, row: 0, shape, temperature: 0.0, seed: 0 };
            best_of(|| drafter.draft(&Context { model, tokens: &tokens, hidden: &hidden, asked }).map(drop))
        };
        let cost = |shape| Ok(DraftCost { shape, candidates: drafter.nodes(shape), seconds: time(shape)? });
        shapes(drafter.limit()).into_iter().map(cost).collect()
    })
}

fn best_of(mut run: impl FnMut() -> Result<(), ModelError>) -> Result<f64, ModelError> {
    run()?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let started = Instant::now();
        run()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}
