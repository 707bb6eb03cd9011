//! What each kernel is asked before it is used: a few rows, in both types, whose answers are compared with libtorch's on the same device.

use super::calls::{Pick, Rows, Turn};
use super::{Fused, TchError};
use crate::tensor::{Kind, Tensor, upload};

type Ask = fn(&Fused) -> Result<bool, TchError>;
type Forget = fn(&mut Fused);

pub(super) const ALL: [(&str, Ask, Forget); 5] = [
    ("add_norm", add_norm, |fused| fused.add_norm = None),
    ("gated", gated, |fused| fused.gated = None),
    ("rounded", rounded, |fused| fused.rounded = None),
    ("turned", turned, |fused| fused.turned = None),
    ("statistics", statistics, |fused| fused.statistics = None),
];

const EPS: f64 = 1e-6;
/// Types, and how far apart results may be: two roundings of numbers up to 4.
const TYPES: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::BFloat16, 0.04)];

/// Numbers of all sizes up to 2 that depend on nothing.
fn wave(fused: &Fused, shape: &[i64], step: f64, kind: Kind) -> Result<Tensor, TchError> {
    let count = shape.iter().product::<i64>();
    let numbers = Tensor::f_arange(count, (Kind::Float, fused.device))?.f_mul_scalar(step)?.f_sin()?;
    numbers.f_mul_scalar(2.0)?.f_view(shape)?.f_to_kind(kind)
}

fn near(found: &Tensor, right: &Tensor, tolerance: f64) -> Result<bool, TchError> {
    if found.size() != right.size() {
        return Ok(false);
    }
    let error = found.f_to_kind(Kind::Float)?.f_sub(&right.f_to_kind(Kind::Float)?)?.f_abs()?.f_max()?;
    Ok(error.f_double_value(&[])? <= tolerance)
}

fn add_norm(fused: &Fused) -> Result<bool, TchError> {
    for (kind, tolerance) in TYPES {
        // Of packs, and of single numbers.
        for width in [1536, 70] {
            let (x, more) = (wave(fused, &[3, width], 0.7, kind)?, wave(fused, &[3, width], 1.1, kind)?);
            let weight = wave(fused, &[width], 0.3, kind)?;
            let Some((sum, normed)) = fused.add_norm(&x, Some(&more), &weight, EPS)? else { return Ok(false) };
            let right = x.f_add(&more)?;
            let norm = |x: &Tensor| x.f_rms_norm([width], Some(&weight), EPS);
            let Some((_, alone)) = fused.add_norm(&x, None, &weight, EPS)? else { return Ok(false) };
            if !near(&sum, &right, 0.0)? || !near(&normed, &norm(&right)?, tolerance)? || !near(&alone, &norm(&x)?, tolerance)?
            {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn gated(fused: &Fused) -> Result<bool, TchError> {
    for (kind, tolerance) in TYPES {
        for width in [1408, 70] {
            let both = wave(fused, &[3, 2 * width], 0.7, kind)?;
            let right = both.f_narrow(1, 0, width)?.f_silu()?.f_mul(&both.f_narrow(1, width, width)?)?;
            match fused.gated(&both)? {
                Some(found) if near(&found, &right, tolerance)? => {}
                _ => return Ok(false),
            }
        }
    }
    Ok(true)
}

fn rounded(fused: &Fused) -> Result<bool, TchError> {
    for (kind, _) in TYPES {
        for (floats, bound, codes_of) in [(false, 127.0, Kind::Int8), (true, 448.0, Kind::Float8e4m3fn)] {
            for width in [1536, 70] {
                let x = wave(fused, &[3, width], 0.7, kind)?;
                let Some((codes, scales)) = fused.rounded(&x, floats)? else { return Ok(false) };
                let wide = x.f_to_kind(Kind::Float)?;
                let right = wide.f_abs()?.f_amax(-1, true)?.f_div_scalar(bound)?;
                let scaled = wide.f_div(&right)?;
                let rounded = if floats { scaled } else { scaled.f_round()? };
                let rounded = rounded.f_clamp(-bound, bound)?.f_to_kind(codes_of)?.f_to_kind(Kind::Float)?;
                // A scale whose last bit differs moves a few numbers to the next code.
                let step = rounded.f_abs()?.f_mul_scalar(if floats { 0.13 } else { 0.0 })?.f_add_scalar(if floats {
                    0.002
                } else {
                    1.0
                })?;
                let far = codes.f_to_kind(Kind::Float)?.f_sub(&rounded)?.f_abs()?.f_gt_tensor(&step)?.f_any()?;
                let differ =
                    codes.f_to_kind(Kind::Float)?.f_ne_tensor(&rounded)?.f_to_kind(Kind::Float)?.f_mean(Kind::Float)?;
                if !near(&scales, &right, 1e-6)? || far.f_double_value(&[])? != 0.0 || differ.f_double_value(&[])? > 0.01 {
                    return Ok(false);
                }
            }
        }
    }
    Ok(true)
}

/// Five rows: two of one cache, two of another, one without; in the second of two layers.
fn turned(fused: &Fused) -> Result<bool, TchError> {
    let (heads, kv_heads, dim, positions, capacities) = (4, 2, 64, 40, [20i64, 12]);
    let angles = wave(fused, &[positions, dim], 0.1, Kind::Float)?;
    let (cosines, sines) = (angles.f_cos()?, angles.f_sin()?);
    for (kind, tolerance) in TYPES {
        for normed in [false, true] {
            let qkv = wave(fused, &[5, heads + 2 * kv_heads, dim], 0.7, kind)?;
            let caches: Vec<Tensor> = capacities
                .iter()
                .map(|capacity| Tensor::f_zeros([2, *capacity, 2, kv_heads, dim], (kind, fused.device)))
                .collect::<Result<_, _>>()?;
            let weights = (wave(fused, &[dim], 0.5, kind)?, wave(fused, &[dim], 0.9, kind)?);
            let rows = [(Some(0), 7, 7), (Some(0), 8, 8), (Some(1), 3, 5), (Some(1), 11, 11), (None, 31, 0)];
            let at: Vec<i64> = rows.iter().map(|(_, position, _)| *position).collect();
            let of = |cache: usize| [caches[cache].data_ptr() as i64, capacities[cache]];
            let places: Vec<i64> =
                rows.iter().flat_map(|(cache, _, slot)| cache.map_or([0, 0], of).into_iter().chain([*slot])).collect();
            let (at, places) = (upload(&at, fused.device)?, upload(&places, fused.device)?);
            let right = by_libtorch(&qkv, [heads, kv_heads], normed.then_some(&weights), (&cosines, &sines), &at)?;
            let found = qkv.f_detach_copy()?;
            let turn = Turn {
                heads: heads as usize,
                kv_heads: kv_heads as usize,
                layer: 1,
                eps: EPS,
                norms: normed.then_some((&weights.0, &weights.1)),
                tables: (&cosines, &sines),
                positions: &at,
                places: &places,
            };
            // SAFETY: the caches are there, and as large as is said.
            if !unsafe { fused.turned(&found, &turn)? } {
                return Ok(false);
            }
            let queries = |qkv: &Tensor| qkv.f_narrow(1, 0, heads);
            let mut holds = near(&queries(&found)?, &queries(&right)?, tolerance)?;
            let mut written = 0.0;
            for (row, (cache, _, slot)) in rows.into_iter().enumerate() {
                let keys = |qkv: &Tensor, first: i64, count: i64| qkv.f_get(row as i64)?.f_narrow(0, first, count);
                let right = keys(&right, heads, 2 * kv_heads)?;
                let found = match cache {
                    Some(cache) => caches[cache].f_get(1)?.f_get(slot)?.f_view([2 * kv_heads, dim])?,
                    None => keys(&found, heads, 2 * kv_heads)?,
                };
                holds &= near(&found, &right, tolerance)?;
                written += if cache.is_some() {
                    right.f_abs()?.f_to_kind(Kind::Float)?.f_sum(Kind::Float)?.f_double_value(&[])?
                } else {
                    0.0
                };
            }
            // Nothing was written anywhere else.
            let mut all = 0.0;
            for cache in &caches {
                all += cache.f_abs()?.f_to_kind(Kind::Float)?.f_sum(Kind::Float)?.f_double_value(&[])?;
            }
            if !holds || (all - written).abs() > 0.02 * written {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Norms, and rotation by halves, operation by operation.
fn by_libtorch(
    qkv: &Tensor,
    [heads, kv_heads]: [i64; 2],
    norms: Option<&(Tensor, Tensor)>,
    (cosines, sines): (&Tensor, &Tensor),
    positions: &Tensor,
) -> Result<Tensor, TchError> {
    let dim = qkv.size3()?.2;
    let (query, key) = (qkv.f_narrow(1, 0, heads)?, qkv.f_narrow(1, heads, kv_heads)?);
    let (query, key) = match norms {
        Some((q, k)) => (query.f_rms_norm([dim], Some(q), EPS)?, key.f_rms_norm([dim], Some(k), EPS)?),
        None => (query, key),
    };
    let x = Tensor::f_cat(&[query, key], 1)?.f_to_kind(Kind::Float)?;
    let table = |table: &Tensor| table.f_index_select(0, positions)?.f_unsqueeze(1);
    let turned = Tensor::f_cat(&[x.f_narrow(2, dim / 2, dim / 2)?.f_neg()?, x.f_narrow(2, 0, dim / 2)?], 2)?;
    let x = x.f_mul(&table(cosines)?)?.f_add(&turned.f_mul(&table(sines)?)?)?.f_to_kind(qkv.kind())?;
    Tensor::f_cat(&[x, qkv.f_narrow(1, heads + kv_heads, kv_heads)?], 1)
}

/// Every way to pick, with tokens that are treated apart.
fn statistics(fused: &Fused) -> Result<bool, TchError> {
    let edits = [2.0, f64::NEG_INFINITY, 0.0, 5.0, 3.0, 0.0, 9.0, 0.0, 1.0];
    let (ids, added, out) = ([2i64, 5], [f32::NEG_INFINITY, 3.0], [9i64]);
    for (kind, _) in TYPES {
        for vocab in [3072, 1001] {
            let logits = wave(fused, &[3, vocab], 0.37, kind)?.f_mul_scalar(3.0)?;
            let wide = logits.f_to_kind(Kind::Float)?;
            let wide = wide.f_index_add(
                1,
                &upload(&ids, fused.device)?,
                &upload(&added, fused.device)?.f_unsqueeze(0)?.f_expand([3, 2], false)?,
            )?;
            let judged = wide.f_index_fill(1, &upload(&out, fused.device)?, f64::NEG_INFINITY)?.f_to_kind(Kind::Double)?;
            let shares = judged.f_mul_scalar(0.7)?.f_softmax(-1, Kind::Double)?;
            let (top, _) = shares.f_topk(2, -1, true, true)?;
            let margin = top.f_narrow(1, 0, 1)?.f_sub(&top.f_narrow(1, 1, 1)?)?;
            let entropy =
                shares.f_mul(&shares.f_clamp_min(1e-300)?.f_log()?)?.f_sum_dim_intlist(-1, true, Kind::Double)?.f_neg()?;
            let cumulated = wide.f_mul_scalar(1.3)?.f_softmax(-1, Kind::Double)?.f_cumsum(-1, Kind::Double)?;
            for (pick, numbers) in
                [(Pick::Best, vec![]), (Pick::Given, vec![7.0, 0.0, 8.0]), (Pick::Drawn, vec![0.0, 0.31, 0.93])]
            {
                let token = match pick {
                    Pick::Best => wide.f_argmax(-1, true)?,
                    Pick::Given => upload(&[7i64, 0, 8], fused.device)?.f_view([3, 1])?,
                    Pick::Drawn => upload(&numbers, fused.device)?.f_view([3, 1])?.f_searchsorted(
                        &cumulated,
                        false,
                        true,
                        "right",
                        None::<&Tensor>,
                    )?,
                };
                let share = shares.f_gather(1, &token, false)?;
                let right = Tensor::f_cat(&[&token.f_to_kind(Kind::Double)?, &share, &margin, &entropy], 1)?;
                let numbers: Vec<f64> = numbers.into_iter().chain(edits).collect();
                let numbers = upload(&numbers, fused.device)?;
                let asked =
                    Rows { pick, numbers: Some(&numbers), edits: 3, drawn: 1.3, judged: 0.7, margin: true, entropy: true };
                match fused.statistics(&logits, &asked)? {
                    Some(found) if near(&found, &right, 1e-4)? => {}
                    _ => return Ok(false),
                }
            }
        }
    }
    Ok(true)
}
