//! What forwards of several tokens, and drafts, cost on this device: some rounds of all sizes in turn, so that a slow moment meets all
//! of them, and of each size the median: what it usually takes.

use std::time::Instant;

use super::{Context, Drafter, shapes};
use crate::decode::Drafting;
use crate::decode::autoregressive::DrafterKind;
use crate::decode::autoregressive::adaptation::{DraftCost, Shape};
use crate::model::cache::KvCache;
use crate::model::{Layout, ModelError, Segment, Transformer};
use crate::tensor::Tensor;

/// Numbers of tokens that are measured; what lies between is taken from straight lines.
const TOKENS: [usize; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 32];
/// Positions in the cache while measuring.
const PAST: usize = 32;
const ROUNDS: usize = 9;

/// Seconds of a forward of so many tokens over a cache, head included, ascending and never falling.
pub fn verify(model: &Transformer) -> Result<Vec<(usize, f64)>, ModelError> {
    tch::no_grad(|| {
        let past = PAST.min(model.context().saturating_sub(TOKENS[TOKENS.len() - 1]));
        let mut cache = KvCache::new(model.config(), model.placement(), past + TOKENS[TOKENS.len() - 1])?;
        let run = |tokens: usize, cache: &KvCache| -> Result<(), ModelError> {
            let segment = Segment { tokens: &vec![0; tokens], layout: Layout::Causal, cache: Some(cache) };
            let hidden = model.forward(&[segment])?;
            // Taking a number off the device waits for it.
            model.logits(&hidden)?.f_argmax(-1, false)?.f_int64_value(&[0]).map(drop)?;
            Ok(())
        };
        if past > 0 {
            run(past, &cache)?;
            cache.keep(&(0..past).collect::<Vec<_>>())?;
        }
        let sizes: Vec<usize> = TOKENS.into_iter().filter(|tokens| past + tokens <= model.context()).collect();
        let usual = medians(sizes.len(), |size| run(sizes[size], &cache))?;
        let mut costs: Vec<(usize, f64)> = vec![];
        for (tokens, seconds) in sizes.into_iter().zip(usual) {
            costs.push((tokens, seconds.max(costs.last().map_or(0.0, |last| last.1))));
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
        let shapes = shapes(drafter.limit());
        let usual = medians(shapes.len(), |shape| {
            let asked = Drafting { drafter: kind, row: 0, shape: shapes[shape], least: 0.0, temperature: 0.0, seed: 0 };
            drafter.draft(&Context { model, tokens: &tokens, hidden: &hidden, asked }).map(drop)
        })?;
        let cost = |(shape, seconds): (Shape, f64)| DraftCost { shape, candidates: drafter.nodes(shape), seconds };
        Ok(shapes.into_iter().zip(usual).map(cost).collect())
    })
}

/// The median seconds of each of `count` things to run, over [`ROUNDS`] after one that does not count.
fn medians(count: usize, mut run: impl FnMut(usize) -> Result<(), ModelError>) -> Result<Vec<f64>, ModelError> {
    let mut times = vec![vec![]; count];
    for round in 0..=ROUNDS {
        for (thing, times) in times.iter_mut().enumerate() {
            let started = Instant::now();
            run(thing)?;
            if round > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(times.into_iter().map(median).collect())
}
