//! Queries of one sequence over one head's keys: scores, their softmax, and the weighted sums of the values.
//!
//! Keys and values are loaded once for several queries, those of a tile's rows and of all heads that share keys. Nothing else depends on
//! what is done together: scores are products ([`super::product`]), a softmax and a weighted sum belong to one query and run over its
//! keys in order. So threads may share one head's keys, some scoring these and some those, and then its values' lanes.

use std::ops::Range;

use super::attention::Row;
use super::lanes::{LANES, Lanes, Stored, dot, exp, fold};
use super::product::Product;

/// Keys that are scored at a time; those behind them are asked for meanwhile.
const KEYS: usize = 64;
/// So many queries or fewer are done with keys before the next ones have come from memory.
const FEW: usize = 16;

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

    /// The queries put there.
    pub fn given(&self) -> &[f32] {
        &self.queries
    }

    /// With a copy of these scores.
    pub fn with(&mut self, scores: &[f32]) -> &mut Self {
        self.scores.clear();
        self.scores.extend_from_slice(scores);
        self
    }
}

/// One head of one sequence's cache, and the results of the query heads that share it.
pub struct Place<T> {
    /// `[slots, dim]` each.
    pub keys: *const T,
    pub values: *const T,
    pub slots: usize,
    /// Of the first of these query heads.
    pub out: *mut T,
    /// From one row's result to the next one's.
    pub stride: usize,
    pub dim: usize,
    /// How many query heads: a row has as many queries, one behind the other.
    pub heads: usize,
}

/// One query's weights, before they are divided by their sum, and what they belong to.
struct Weighted<'a> {
    row: &'a Row,
    weights: &'a [f32],
    total: f32,
    /// Where its result goes.
    out: usize,
}

impl Weighted<'_> {
    fn slot(&self, at: usize) -> usize {
        if at < self.row.before { at } else { self.row.line[at - self.row.before] }
    }
}

/// Slots from the first on that some of the rows see.
pub fn shared(rows: &[Row]) -> usize {
    rows.iter().map(|row| row.before).max().unwrap_or(0)
}

/// Scores of a query, as many as the row with the most keys has, in whole vectors.
pub fn width(rows: &[Row]) -> usize {
    rows.iter().map(Row::sees).fold(shared(rows), usize::max).next_multiple_of(LANES)
}

impl<T: Stored> Place<T> {
    /// Writes the results of all queries in `room`.
    #[inline(always)]
    pub unsafe fn attend<V: Lanes>(&self, rows: &[Row], room: &mut Room) {
        room.scores.resize(rows.len() * self.heads * width(rows), 0.0);
        let scores = room.scores.as_mut_ptr();
        unsafe {
            self.score::<V>(rows, &room.queries, scores, 0..shared(rows));
            self.score_lines::<V>(rows, &room.queries, scores);
            self.mix::<V>(rows, room, 0..self.dim.div_ceil(LANES));
        }
    }

    /// Scores of the keys in `slots`, from a whole vector on, for `queries: [rows, heads, dim]`, into `scores: [rows, heads, width]`. Rows that see
    /// fewer keys than others get scores that are never looked at.
    #[inline(always)]
    pub unsafe fn score<V: Lanes>(&self, rows: &[Row], queries: &[f32], scores: *mut f32, slots: Range<usize>) {
        let (count, width) = (rows.len() * self.heads, width(rows));
        for first in slots.clone().step_by(KEYS) {
            let last = (first + KEYS).min(slots.end);
            if count <= FEW {
                ask(self.keys.wrapping_add(last * self.dim), (slots.end - last).min(KEYS) * self.dim);
            }
            let product = Product {
                input: queries.as_ptr().cast(),
                weight: self.keys.wrapping_add(first * self.dim).cast(),
                out: scores.wrapping_add(first).cast(),
                stride: width,
                rows: count,
                inputs: self.dim,
                // Whole vectors of keys take no copies. Scores of slots that hold none yet are never looked at.
                outputs: (last.next_multiple_of(LANES).min(self.slots)) - first,
                half: false,
                paired: false,
                early: false,
            };
            unsafe { product.alone::<V, T>() };
        }
    }

    /// Scores of the keys that a row sees by themselves, behind those of the others.
    #[inline(always)]
    pub unsafe fn score_lines<V: Lanes>(&self, rows: &[Row], queries: &[f32], scores: *mut f32) {
        let width = width(rows);
        for (at, query) in queries.chunks_exact(self.dim).enumerate() {
            let row = &rows[at / self.heads];
            for (next, slot) in row.line.iter().enumerate() {
                let score = unsafe { dot::<V, T>(self.keys.add(slot * self.dim), query.as_ptr(), self.dim) };
                unsafe { *scores.add(at * width + row.before + next) = score };
            }
        }
    }

    /// Turns the scores in `room`, `[rows, heads, width]`, into weights, and writes the results of these vectors of the head.
    #[inline(always)]
    pub unsafe fn mix<V: Lanes>(&self, rows: &[Row], room: &mut Room, vectors: Range<usize>) {
        let (width, scale) = (width(rows), 1.0 / (self.dim as f32).sqrt());
        let Room { scores, totals, .. } = room;
        totals.clear();
        for (at, scores) in scores.chunks_exact_mut(width).enumerate() {
            let count = rows[at / self.heads].sees();
            totals.push(soften(&mut scores[..count.next_multiple_of(LANES)], count, scale));
        }
        let weighted = |at: usize| {
            let row = &rows[at / self.heads];
            let weights = &scores[at * width..at * width + row.sees()];
            Weighted { row, weights, total: totals[at], out: row.row * self.stride + at % self.heads * self.dim }
        };
        let (mut at, count) = (0, rows.len() * self.heads);
        while at < count {
            let lanes = vectors.start * LANES..(vectors.end * LANES).min(self.dim);
            at += match count - at {
                4.. => unsafe { self.mix_lanes::<V, 4>(&std::array::from_fn(|next| weighted(at + next)), lanes) },
                3 => unsafe { self.mix_lanes::<V, 3>(&std::array::from_fn(|next| weighted(at + next)), lanes) },
                2 => unsafe { self.mix_lanes::<V, 2>(&std::array::from_fn(|next| weighted(at + next)), lanes) },
                _ => unsafe { self.mix_lanes::<V, 1>(&[weighted(at)], lanes) },
            };
        }
    }

    /// Weighted sums for `M` queries, some vectors of the head at a time. Gives `M`.
    #[inline(always)]
    unsafe fn mix_lanes<V: Lanes, const M: usize>(&self, queries: &[Weighted; M], lanes: Range<usize>) -> usize {
        let whole = self.dim / LANES * LANES;
        let mut lane = lanes.start;
        unsafe {
            while lane < lanes.end.min(whole) {
                // As many sums as registers hold.
                lane += match (lanes.end.min(whole) - lane) / LANES {
                    4.. if M < 4 => self.mix_vectors::<V, M, 4>(queries, lane),
                    2.. => self.mix_vectors::<V, M, 2>(queries, lane),
                    _ => self.mix_vectors::<V, M, 1>(queries, lane),
                };
            }
            for query in queries {
                for lane in whole.max(lanes.start)..lanes.end {
                    let value = |at: usize| (*self.values.add(query.slot(at) * self.dim + lane)).widen();
                    let sum = query.weights.iter().enumerate().fold(0f32, |sum, (at, weight)| value(at).mul_add(*weight, sum));
                    *self.out.add(query.out + lane) = T::narrow(sum / query.total);
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
            // By value: sums that are pointed to here would be written to memory for every key above.
            for (query, mut sums) in queries.iter().zip(sums) {
                for (at, weight) in query.weights.iter().enumerate().skip(pairs) {
                    let (value, weight) = (values.add(query.slot(at) * self.dim), V::splat(*weight));
                    // The two take turns by changing places: an index would keep them in memory.
                    for (part, [next, other]) in sums.iter_mut().enumerate() {
                        (*next, *other) = (*other, T::load::<V>(value.add(part * LANES)).multiply_add(weight, *next));
                    }
                }
                for (part, [one, other]) in sums.iter().enumerate() {
                    let out = self.out.add(query.out + lane + part * LANES).cast::<[T; LANES]>();
                    let sum = one.multiply_add(V::splat(1.0), *other);
                    out.write(sum.store().map(|sum| T::narrow(sum / query.total)));
                }
            }
        }
        C * LANES
    }
}

/// Asks for so many numbers, which are used soon.
#[inline(always)]
pub fn ask<T>(from: *const T, count: usize) {
    // SAFETY: a hint, which does nothing where there is no such memory.
    #[cfg(target_arch = "x86_64")]
    for at in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, count);
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
    use crate::tensor::kernels::fixed::Fixed;
    use crate::tensor::{Kind, Tensor};

    const SLOTS: i64 = 90;

    const KV_HEADS: i64 = 2;
    /// Two for each of keys, and three: the sums of so many are kept differently.
    const HEADS: [i64; 2] = [2 * KV_HEADS, 3 * KV_HEADS];

    /// Queries, keys and values of `SLOTS` rows.
    struct Given {
        heads: i64,
        dim: i64,
        kind: Kind,
        qkv: Tensor,
        angles: (Fixed, Fixed),
    }

    impl Given {
        fn new(heads: i64, dim: i64, kind: Kind) -> Self {
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let turn = random(&[SLOTS, dim]);
            let angles = (Fixed::of(turn.cos()), Fixed::of(turn.sin()));
            Self { heads, dim, kind, qkv: random(&[SLOTS, (heads + 2 * KV_HEADS) * dim]).to_kind(kind), angles }
        }

        fn cache(&self) -> Tensor {
            Tensor::zeros([KV_HEADS, SLOTS, self.dim], (self.kind, Device::Cpu))
        }

        /// Results of so many rows from `start` on.
        fn run(&self, start: usize, seen: Seen, count: usize, keys: &Tensor, values: &Tensor) -> Tensor {
            let positions: Vec<usize> = (start..start + count).collect();
            let slots = &Slots::of(keys, values).unwrap();
            let qkv = self.qkv.narrow(0, start as i64, count as i64);
            self.run_spans(&qkv, &positions, &[Span { rows: 0..count, slots, start, seen }])
        }

        fn run_spans(&self, qkv: &Tensor, positions: &[usize], spans: &[Span]) -> Tensor {
            let shared = Shared {
                heads: self.heads as usize,
                kv_heads: KV_HEADS as usize,
                dim: self.dim as usize,
                angles: (&self.angles.0, &self.angles.1),
                positions,
                norms: None,
                eps: 0.0,
            };
            attention(&shared, qkv, spans).unwrap().unwrap()
        }
    }

    #[test]
    fn attention_is_exact_within_rounding() {
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            for (heads, dim) in HEADS.into_iter().flat_map(|heads| [32, 64, 80, 24].map(|dim| (heads, dim))) {
                let given = Given::new(heads, dim, kind);
                let (keys, values) = (given.cache(), given.cache());
                let ours = given.run(0, Seen::First(&[SLOTS as usize; SLOTS as usize]), SLOTS as usize, &keys, &values);
                let double = |tensor: &Tensor| tensor.to_kind(Kind::Double);
                let query = double(&given.qkv).view([SLOTS, heads + 2 * KV_HEADS, dim]).narrow(1, 0, heads);
                let half = query.narrow(2, dim / 2, dim / 2);
                let turned = Tensor::cat(&[-half, query.narrow(2, 0, dim / 2)], 2);
                let query = (query * double(&given.angles.0).unsqueeze(1) + turned * double(&given.angles.1).unsqueeze(1))
                    .transpose(0, 1);
                let spread = |tensor: &Tensor| double(tensor).repeat_interleave_self_int(heads / KV_HEADS, 0, None);
                let scores = query.matmul(&spread(&keys).transpose(1, 2)) / (dim as f64).sqrt();
                let right =
                    scores.softmax(-1, Kind::Double).matmul(&spread(&values)).transpose(0, 1).reshape([SLOTS, heads * dim]);
                let error = f64::try_from((double(&ours) - right).abs().max()).unwrap();
                assert!(error < tolerance, "{kind:?} {heads} heads of {dim}: {error}");
            }
        }
    }

    #[test]
    fn a_query_does_not_depend_on_those_beside_it() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (heads, dim) in HEADS.into_iter().flat_map(|heads| [32, 64, 80, 24].map(|dim| (heads, dim))) {
                let given = Given::new(heads, dim, kind);
                let (keys, values) = (given.cache(), given.cache());
                let sees: Vec<usize> = (1..=SLOTS as usize).collect();
                let together = given.run(0, Seen::First(&sees), SLOTS as usize, &keys, &values);
                let (keys, values) = (given.cache(), given.cache());
                let mut start = 0;
                // A chunked prefill, steps of one row, and chains of drafts, also on threads that do not divide the heads.
                for (threads, count) in [(1, 37), (2, 20), (1, 1), (2, 1), (3, 2), (1, 5), (2, 7), (3, 1), (5, 4), (3, 9)] {
                    crate::tensor::set_threads(threads);
                    let chain: Vec<usize> = (0..count).map(|row: usize| row.saturating_sub(1)).collect();
                    let seen = if count >= 7 && start > 60 {
                        Seen::Ancestors(&chain)
                    } else {
                        Seen::First(&sees[start..start + count])
                    };
                    let some = given.run(start, seen, count, &keys, &values);
                    assert!(
                        together.narrow(0, start as i64, count as i64).equal(&some),
                        "{kind:?} {heads} heads of {dim}: {count} from {start} on"
                    );
                    start += count;
                }
            }
        }
    }

    /// Rows of sequences of several lengths, on threads that do not divide their heads, are what each of them gives on one.
    #[test]
    fn sequences_share_threads_and_nothing_else() {
        // Kept before, rows now, and those that each row follows.
        let sequences: [(usize, usize, &[usize]); 3] = [(70, 4, &[0, 0, 1, 0]), (33, 1, &[0]), (5, 2, &[0, 0])];
        for kind in [Kind::Float, Kind::BFloat16] {
            for (heads, dim) in HEADS.into_iter().flat_map(|heads| [64, 24].map(|dim| (heads, dim))) {
                let given = Given::new(heads, dim, kind);
                let sees: Vec<usize> = (1..=SLOTS as usize).collect();
                let filled = || {
                    sequences.map(|(kept, ..)| {
                        let (keys, values) = (given.cache(), given.cache());
                        let _filled = given.run(0, Seen::First(&sees[..kept]), kept, &keys, &values);
                        (keys, values)
                    })
                };
                crate::tensor::set_threads(1);
                let alone: Vec<Tensor> = (sequences.iter().zip(filled()))
                    .map(|((kept, rows, parents), (keys, values))| {
                        given.run(*kept, Seen::Ancestors(parents), *rows, &keys, &values)
                    })
                    .collect();
                let rows: Vec<Tensor> =
                    sequences.iter().map(|(kept, rows, _)| given.qkv.narrow(0, *kept as i64, *rows as i64)).collect();
                let positions: Vec<usize> = sequences.iter().flat_map(|(kept, rows, _)| *kept..kept + rows).collect();
                for threads in [1, 2, 4, 5] {
                    crate::tensor::set_threads(threads);
                    let slots = filled().map(|(keys, values)| Slots::of(&keys, &values).unwrap());
                    let mut first = 0;
                    let spans = sequences.iter().zip(&slots).map(|((kept, rows, parents), slots)| {
                        first += rows;
                        Span { rows: first - rows..first, slots, start: *kept, seen: Seen::Ancestors(parents) }
                    });
                    let spans: Vec<Span> = spans.collect();
                    let together = given.run_spans(&Tensor::cat(&rows, 0), &positions, &spans);
                    assert!(together.equal(&Tensor::cat(&alone, 0)), "{kind:?} {heads} heads of {dim}: {threads} threads");
                }
            }
        }
    }
}
