//! Whether a kernel pays: its time beside that of the fewest operations that libtorch does the same with, on the device itself.
//!
//! What a kernel brings depends on the device and on libtorch's version, so nobody decides it once for all: each one that answers its question
//! runs against libtorch when it is opened, at the sizes of a model of eight billion weights, for the rows of one block and of several, and is used
//! only if it takes less. What a race does not know: what recorded graphs spare libtorch, whose launches it counts.

use std::time::Instant;

use serde::Serialize;

use super::calls::{Pick, Rows, Turn};
use super::{Fused, TchError, failed};
use crate::tensor::{Kind, Tensor, synchronize, upload};

/// Times of one kernel and of libtorch's operations, for so many rows, in µs: the least of several.
#[derive(Clone, Debug, Serialize)]
pub struct Race {
    pub kernel: &'static str,
    pub rows: i64,
    pub ours: f64,
    pub libtorch: f64,
}

/// Whether it takes less, few rows and many together: who is half as fast for some must be more than twice as fast for others.
pub(super) fn pays(races: &[Race]) -> bool {
    !races.is_empty() && races.iter().map(|race| race.ours / race.libtorch).product::<f64>() < 1.0
}

/// What kernels are timed at.
pub(super) struct Sizes {
    pub hidden: i64,
    pub intermediate: i64,
    pub heads: i64,
    pub vocab: i64,
    pub rows: [i64; 2],
    /// As many calls as are timed together, and how often.
    pub calls: usize,
    pub rounds: usize,
}

/// LLaDA-8B's; a block of one sequence, and of eight.
pub(super) const REAL: Sizes =
    Sizes { hidden: 4096, intermediate: 12288, heads: 32, vocab: 126_464, rows: [32, 256], calls: 20, rounds: 5 };
const EPS: f64 = 1e-6;

type Run<'a> = Box<dyn Fn() -> Result<Vec<Tensor>, TchError> + 'a>;

/// The same by a kernel and by libtorch. Tensors come in the same order.
pub(super) struct Pair<'a> {
    pub ours: Run<'a>,
    pub libtorch: Run<'a>,
}

type Make = for<'a> fn(&'a Fused, &Sizes, i64) -> Result<Pair<'a>, TchError>;

pub(super) const ALL: [(&str, Make); 5] =
    [("add_norm", add_norm), ("gated", gated), ("rounded", rounded), ("turned", turned), ("statistics", statistics)];

/// The kernel's races, one for each number of rows.
pub(super) fn run(fused: &Fused, kernel: &'static str, make: Make, sizes: &Sizes) -> Result<Vec<Race>, TchError> {
    let race = |rows: i64| {
        let pair = make(fused, sizes, rows)?;
        let time = |run: &Run, calls: usize| -> Result<f64, TchError> {
            synchronize(fused.device);
            let began = Instant::now();
            for _ in 0..calls {
                run()?;
            }
            synchronize(fused.device);
            Ok(began.elapsed().as_secs_f64() * 1e6 / calls as f64)
        };
        let (mut ours, mut libtorch) = (f64::INFINITY, f64::INFINITY);
        for round in 0..=sizes.rounds {
            let (one, other) = (time(&pair.ours, sizes.calls)?, time(&pair.libtorch, sizes.calls)?);
            // The first round warms both up.
            if round > 0 {
                (ours, libtorch) = (ours.min(one), libtorch.min(other));
            }
        }
        Ok(Race { kernel, rows, ours, libtorch })
    };
    sizes.rows.into_iter().map(race).collect()
}

fn wave(fused: &Fused, shape: &[i64], step: f64) -> Result<Tensor, TchError> {
    let count = shape.iter().product::<i64>();
    let numbers = Tensor::f_arange(count, (Kind::Float, fused.device))?.f_mul_scalar(step)?.f_sin()?;
    numbers.f_view(shape)?.f_to_kind(Kind::BFloat16)
}

fn taken<T>(found: Option<T>) -> Result<T, TchError> {
    found.ok_or_else(|| failed("a fused kernel does not take what it is timed at"))
}

fn add_norm<'a>(fused: &'a Fused, sizes: &Sizes, rows: i64) -> Result<Pair<'a>, TchError> {
    let width = sizes.hidden;
    let (x, more) = (wave(fused, &[rows, width], 0.7)?, wave(fused, &[rows, width], 1.1)?);
    let weight = wave(fused, &[width], 0.3)?;
    let (xs, mores, weights) = (x.shallow_clone(), more.shallow_clone(), weight.shallow_clone());
    Ok(Pair {
        ours: Box::new(move || taken(fused.add_norm(&x, Some(&more), &weight, EPS)?).map(|(sum, normed)| vec![sum, normed])),
        libtorch: Box::new(move || {
            let sum = xs.f_add(&mores)?;
            let normed = sum.f_rms_norm([width], Some(&weights), EPS)?;
            Ok(vec![sum, normed])
        }),
    })
}

fn gated<'a>(fused: &'a Fused, sizes: &Sizes, rows: i64) -> Result<Pair<'a>, TchError> {
    let width = sizes.intermediate;
    let both = wave(fused, &[rows, 2 * width], 0.7)?;
    let other = both.shallow_clone();
    Ok(Pair {
        ours: Box::new(move || Ok(vec![taken(fused.gated(&both)?)?])),
        libtorch: Box::new(move || Ok(vec![other.f_narrow(1, 0, width)?.f_silu()?.f_mul(&other.f_narrow(1, width, width)?)?])),
    })
}

fn rounded<'a>(fused: &'a Fused, sizes: &Sizes, rows: i64) -> Result<Pair<'a>, TchError> {
    const LARGEST: f64 = 448.0;
    let x = wave(fused, &[rows, sizes.intermediate], 0.7)?;
    let other = x.shallow_clone();
    Ok(Pair {
        ours: Box::new(move || taken(fused.rounded(&x, true)?).map(|(codes, scales)| vec![codes, scales])),
        libtorch: Box::new(move || {
            let x = other.f_to_kind(Kind::Float)?;
            let scales = x.f_abs()?.f_amax(-1, true)?.f_div_scalar(LARGEST)?;
            let codes = x.f_div(&scales)?.f_clamp(-LARGEST, LARGEST)?.f_to_kind(Kind::Float8e4m3fn)?;
            Ok(vec![codes, scales])
        }),
    })
}

/// Queries and keys turned, keys and values written to one cache. Both go on turning what they turned before, which takes the same time.
fn turned<'a>(fused: &'a Fused, sizes: &Sizes, rows: i64) -> Result<Pair<'a>, TchError> {
    const DIM: i64 = 128;
    let heads = sizes.heads;
    let angles =
        upload(&(0..rows * DIM).map(|at| (at / DIM * (1 + at % (DIM / 2))) as f32 * 0.01).collect::<Vec<_>>(), fused.device)?;
    let angles = angles.f_view([rows, DIM])?;
    let (cosines, sines) = (angles.f_cos()?, angles.f_sin()?);
    let qkv = wave(fused, &[rows, 3 * heads, DIM], 0.7)?;
    let other = qkv.f_detach_copy()?;
    let cache = || Tensor::f_zeros([1, rows, 2, heads, DIM], (Kind::BFloat16, fused.device));
    let (cache, others) = (cache()?, cache()?);
    let positions = upload(&(0..rows).collect::<Vec<_>>(), fused.device)?;
    let address = cache.data_ptr() as i64;
    let places = upload(&(0..rows).flat_map(|row| [address, rows, row]).collect::<Vec<_>>(), fused.device)?;
    // Sines with the first half negated, as whoever turns by libtorch has them.
    let half = sines.f_narrow(1, 0, DIM / 2)?;
    let signed = Tensor::f_cat(&[half.f_neg()?, half], 1)?.f_unsqueeze(1)?.f_to_kind(Kind::BFloat16)?;
    let cosine = cosines.f_unsqueeze(1)?.f_to_kind(Kind::BFloat16)?;
    Ok(Pair {
        ours: Box::new(move || {
            let (tables, positions, places) = ((&cosines, &sines), &positions, &places);
            let (heads, kv_heads) = (heads as usize, heads as usize);
            let turn = Turn { heads, kv_heads, layer: 0, eps: EPS, norms: None, tables, positions, places };
            // SAFETY: the cache is there, and as large as is said.
            taken(unsafe { fused.turned(&qkv, &turn)? }.then_some(()))?;
            Ok(vec![qkv.f_narrow(1, 0, heads as i64)?, cache.shallow_clone()])
        }),
        libtorch: Box::new(move || {
            let mut x = other.f_narrow(1, 0, 2 * heads)?;
            let swapped = x.f_roll([DIM / 2], [-1])?;
            let _ = x.f_mul_(&cosine)?.f_addcmul_(&swapped, &signed)?;
            let new = other.f_narrow(1, heads, 2 * heads)?.f_view([1, rows, 2, heads, DIM])?;
            others.shallow_clone().f_copy_(&new)?;
            Ok(vec![other.f_narrow(1, 0, heads)?, others.shallow_clone()])
        }),
    })
}

/// The best token and its probability.
fn statistics<'a>(fused: &'a Fused, sizes: &Sizes, rows: i64) -> Result<Pair<'a>, TchError> {
    let logits = wave(fused, &[rows, sizes.vocab], 0.37)?;
    let other = logits.shallow_clone();
    Ok(Pair {
        ours: Box::new(move || {
            let (pick, numbers) = (Pick::Best, None);
            let asked = Rows { pick, numbers, edits: 0, drawn: 1.0, judged: 1.0, margin: false, entropy: false };
            Ok(vec![taken(fused.statistics(&logits, &asked)?)?])
        }),
        libtorch: Box::new(move || {
            let wide = other.f_to_kind(Kind::Float)?;
            let (best, token) = wide.f_max_dim(1, true)?;
            let total = wide.f_sub(&best)?.f_exp()?.f_sum_dim_intlist(1, true, Kind::Double)?;
            Ok(vec![Tensor::f_cat(&[token.f_to_kind(Kind::Double)?, total.f_reciprocal()?], 1)?])
        }),
    })
}
