//! Queries of one sequence and one head over its keys: scores, their softmax, and the weighted sums of the values.
//!
//! Keys that all queries of a tile see are loaded once for several of them. Nothing else depends on the tile: scores are products
//! ([`super::product`]), a softmax and a weighted sum belong to one query and run over its keys in order.

use super::attention::Row;
use super::lanes::{LANES, Lanes, Stored, dot, exp, fold};
use super::product::Product;

/// Queries whose weighted sums are in registers together.
const TOGETHER: usize = 4;

/// A thread's working memory.
#[derive(Default)]
pub struct Room {
    queries: Vec<f32>,
    scores: Vec<f32>,
    /// Of each query's weights.
    totals: Vec<f32>,
}

impl Room {
    /// Room for so many queries, `[count, dim]`.
    pub fn queries(&mut self, count: usize, dim: usize) -> &mut [f32] {
        self.queries.resize(count * dim, 0.0);
        &mut self.queries
    }
}

/// One head of one sequence's cache, and of the result.
pub struct Place<T> {
    /// `[slots, dim]` each.
    pub keys: *const T,
    pub values: *const T,
    pub slots: usize,
    pub out: *mut T,
    /// From one row's result to the next one's.
    pub stride: usize,
    pub dim: usize,
}

/// One query's weights, before they are divided by their sum, and what they belong to.
struct Weighted<'a> {
    row: &'a Row,
    weights: &'a [f32],
    total: f32,
}

impl Weighted<'_> {
    fn slot(&self, at: usize) -> usize {
        if at < self.row.before { at } else { self.row.line[at - self.row.before] }
    }
}

impl<T: Stored> Place<T> {
    /// Writes the result of each row's query in `room`.
    #[inline(always)]
    pub unsafe fn attend<V: Lanes>(&self, rows: &[Row], room: &mut Room) {
        let counts = rows.iter().map(|row| row.before + row.line.len());
        let shared = rows.iter().map(|row| row.before).max().unwrap_or(0);
        let width = counts.fold(shared, usize::max).next_multiple_of(LANES);
        room.scores.resize(rows.len() * width, 0.0);
        // Rows that see fewer keys than others get scores that are never looked at.
        let product = Product {
            input: room.queries.as_ptr().cast(),
            weight: self.keys.cast(),
            out: room.scores.as_mut_ptr().cast(),
            stride: width,
            rows: rows.len(),
            inputs: self.dim,
            // Whole vectors of keys take no copies. Scores of slots that hold none yet are never looked at.
            outputs: shared.next_multiple_of(LANES).min(self.slots),
            half: false,
            paired: false,
        };
        unsafe { product.alone::<V, T>() };
        let scale = 1.0 / (self.dim as f32).sqrt();
        room.totals.clear();
        for ((row, query), scores) in
            rows.iter().zip(room.queries.chunks_exact(self.dim)).zip(room.scores.chunks_exact_mut(width))
        {
            for (score, slot) in scores[row.before..].iter_mut().zip(&row.line) {
                *score = unsafe { dot::<V, T>(self.keys.add(slot * self.dim), query.as_ptr(), self.dim) };
            }
            let count = row.before + row.line.len();
            room.totals.push(soften(&mut scores[..count.next_multiple_of(LANES)], count, scale));
        }
        let mut at = 0;
        while at < rows.len() {
            let weighted = |at: usize| {
                let (row, scores) = (&rows[at], &room.scores[at * width..(at + 1) * width]);
                Weighted { row, weights: &scores[..row.before + row.line.len()], total: room.totals[at] }
            };
            at += match rows.len() - at {
                TOGETHER.. => unsafe { self.mix::<V, TOGETHER>(&std::array::from_fn(|next| weighted(at + next))) },
                _ => unsafe { self.mix::<V, 1>(&[weighted(at)]) },
            };
        }
    }

    /// Weighted sums for `M` queries, some vectors of the head at a time. Gives `M`.
    #[inline(always)]
    unsafe fn mix<V: Lanes, const M: usize>(&self, queries: &[Weighted; M]) -> usize {
        let whole = self.dim / LANES * LANES;
        let mut lane = 0;
        unsafe {
            while lane < whole {
                lane += match (whole - lane) / LANES {
                    4.. => self.mix_vectors::<V, M, 4>(queries, lane),
                    2.. => self.mix_vectors::<V, M, 2>(queries, lane),
                    _ => self.mix_vectors::<V, M, 1>(queries, lane),
                };
            }
            for query in queries {
                for lane in whole..self.dim {
                    let value = |at: usize| (*self.values.add(query.slot(at) * self.dim + lane)).widen();
                    let sum = query.weights.iter().enumerate().fold(0f32, |sum, (at, weight)| value(at).mul_add(*weight, sum));
                    *self.out.add(query.row.row * self.stride + lane) = T::narrow(sum / query.total);
                }
            }
        }
        M
    }

    #[inline(always)]
    unsafe fn mix_vectors<V: Lanes, const M: usize, const C: usize>(&self, queries: &[Weighted; M], lane: usize) -> usize {
        let common = queries.iter().map(|query| query.row.before).min().unwrap_or(0);
        // Two sums each, over every other key: additions that wait for one another would take longer than the loads.
        let mut sums = [[[unsafe { V::zero() }; 2]; C]; M];
        unsafe {
            let values = self.values.add(lane);
            let (pairs, mut at) = (common / 2 * 2, 0);
            while at < pairs {
                for odd in 0..2 {
                    let mut value = [V::zero(); C];
                    for (part, value) in value.iter_mut().enumerate() {
                        *value = T::load(values.add((at + odd) * self.dim + part * LANES));
                    }
                    for (query, sums) in queries.iter().zip(&mut sums) {
                        let weight = V::splat(*query.weights.as_ptr().add(at + odd));
                        for (sum, value) in sums.iter_mut().zip(value) {
                            sum[odd] = value.multiply_add(weight, sum[odd]);
                        }
                    }
                }
                at += 2;
            }
            for (query, sums) in queries.iter().zip(&mut sums) {
                for (at, weight) in query.weights.iter().enumerate().skip(pairs) {
                    let (value, weight) = (values.add(query.slot(at) * self.dim), V::splat(*weight));
                    for (part, sum) in sums.iter_mut().enumerate() {
                        sum[at % 2] = T::load::<V>(value.add(part * LANES)).multiply_add(weight, sum[at % 2]);
                    }
                }
                for (part, [even, odd]) in sums.iter().enumerate() {
                    let out = self.out.add(query.row.row * self.stride + lane + part * LANES).cast::<[T; LANES]>();
                    let sum = even.multiply_add(V::splat(1.0), *odd);
                    out.write(sum.store().map(|sum| T::narrow(sum / query.total)));
                }
            }
        }
        C * LANES
    }
}

/// Turns scores into `exp(scale · score - best)`, what lies behind them into zeros, and returns their sum.
#[inline(always)]
fn soften(scores: &mut [f32], count: usize, scale: f32) -> f32 {
    scores[count..].fill(f32::NEG_INFINITY);
    let (lines, _) = scores.as_chunks_mut::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for line in lines.iter_mut() {
        for (best, score) in best.iter_mut().zip(line) {
            *score *= scale;
            *best = if *score > *best { *score } else { *best };
        }
    }
    let best = best.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for line in lines.iter_mut() {
        line.iter_mut().for_each(|score| *score = exp(*score - best));
    }
    scores[count..].fill(0.0);
    let mut sums = [0f32; LANES];
    for line in scores.as_chunks::<LANES>().0 {
        sums.iter_mut().zip(line).for_each(|(sum, weight)| *sum += weight);
    }
    fold(sums)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use crate::tensor::kernels::attention::{Seen, Shared, Slots, Span, attention};
    use crate::tensor::{Kind, Tensor};

    const SLOTS: i64 = 90;

    /// Queries, keys and values of `SLOTS` rows with four query heads and two key heads.
    struct Given {
        dim: i64,
        kind: Kind,
        qkv: Tensor,
        angles: (Tensor, Tensor),
    }

    impl Given {
        fn new(dim: i64, kind: Kind) -> Self {
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let turn = random(&[SLOTS, dim]);
            Self { dim, kind, qkv: random(&[SLOTS, 8 * dim]).to_kind(kind), angles: (turn.cos(), turn.sin()) }
        }

        fn cache(&self) -> Tensor {
            Tensor::zeros([2, SLOTS, self.dim], (self.kind, Device::Cpu))
        }

        /// Results of so many rows from `start` on.
        fn run(&self, start: usize, seen: Seen, count: usize, keys: &Tensor, values: &Tensor) -> Tensor {
            let part = |tensor: &Tensor| tensor.narrow(0, start as i64, count as i64);
            let positions: Vec<usize> = (start..start + count).collect();
            let shared = Shared {
                heads: 4,
                kv_heads: 2,
                dim: self.dim as usize,
                angles: (&self.angles.0, &self.angles.1),
                positions: &positions,
                norms: None,
                eps: 0.0,
            };
            let slots = &Slots::of(keys, values).unwrap();
            attention(&shared, &part(&self.qkv), &[Span { rows: 0..count, slots, start, seen }]).unwrap().unwrap()
        }
    }

    #[test]
    fn attention_is_exact_within_rounding() {
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            for dim in [32, 64, 80, 24] {
                let given = Given::new(dim, kind);
                let (keys, values) = (given.cache(), given.cache());
                let ours = given.run(0, Seen::First(&[SLOTS as usize; SLOTS as usize]), SLOTS as usize, &keys, &values);
                let double = |tensor: &Tensor| tensor.to_kind(Kind::Double);
                let query = double(&given.qkv).view([SLOTS, 8, dim]).narrow(1, 0, 4);
                let half = query.narrow(2, dim / 2, dim / 2);
                let turned = Tensor::cat(&[-half, query.narrow(2, 0, dim / 2)], 2);
                let query = (query * double(&given.angles.0).unsqueeze(1) + turned * double(&given.angles.1).unsqueeze(1))
                    .transpose(0, 1);
                let spread = |tensor: &Tensor| double(tensor).repeat_interleave_self_int(2, 0, None);
                let scores = query.matmul(&spread(&keys).transpose(1, 2)) / (dim as f64).sqrt();
                let right = scores.softmax(-1, Kind::Double).matmul(&spread(&values)).transpose(0, 1).reshape([SLOTS, 4 * dim]);
                let error = f64::try_from((double(&ours) - right).abs().max()).unwrap();
                assert!(error < tolerance, "{kind:?} {dim}: {error}");
            }
        }
    }

    #[test]
    fn a_query_does_not_depend_on_those_beside_it() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for dim in [32, 64, 80, 24] {
                let given = Given::new(dim, kind);
                let (keys, values) = (given.cache(), given.cache());
                let sees: Vec<usize> = (1..=SLOTS as usize).collect();
                let together = given.run(0, Seen::First(&sees), SLOTS as usize, &keys, &values);
                let (keys, values) = (given.cache(), given.cache());
                let mut start = 0;
                // A chunked prefill, steps of one row, and a chain of drafts.
                for (threads, count) in [(1, 37), (2, 20), (1, 1), (2, 1), (3, 2), (1, 5), (2, 7)] {
                    crate::tensor::set_threads(threads);
                    let chain: Vec<usize> = (0..count).map(|row: usize| row.saturating_sub(1)).collect();
                    let seen = if count == 7 { Seen::Ancestors(&chain) } else { Seen::First(&sees[start..start + count]) };
                    let some = given.run(start, seen, count, &keys, &values);
                    assert!(
                        together.narrow(0, start as i64, count as i64).equal(&some),
                        "{kind:?} {dim}: {count} from {start} on"
                    );
                    start += count;
                }
            }
        }
    }
}
