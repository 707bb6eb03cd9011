//! A step's attention in one pass: queries and keys normalised and rotated, keys and values put into the cache, and each query's
//! weighted sum over what it sees.
//!
//! One launch serves the rows of many sequences, each with its own cache. A query goes through its keys in the order of their positions,
//! wherever in the cache they lie. So a token's numbers are the same whether it was run alone, as a node of a tree of drafts, or
//! beside other sequences.

use std::ffi::c_void;
use std::ops::Range;

use tch::TchError;

use super::lanes::{LANES, Lanes, Stored, dot, exp, fold};
use super::pointwise::normalise;
use super::{Kernel, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Largest size of a head.
const DIM_MAX: usize = 256;
/// Attention over fewer keys, all heads and queries together, is not worth other threads.
const PARALLEL_FROM: usize = 1024;

/// What all rows of a forward share.
pub struct Shared<'a> {
    /// `[rows, (heads + 2 · kv_heads) · dim]`: queries, keys and values of each row.
    pub qkv: &'a Tensor,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// `[rows, 1, dim]` each, f32.
    pub angles: &'a (Tensor, Tensor),
    /// RMSNorm over each head of queries and of keys, `[dim]`, and its epsilon.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    pub eps: f64,
}

/// One sequence's rows and where its keys and values are.
pub struct Span<'a> {
    pub rows: Range<usize>,
    /// `[kv_heads, capacity, dim]`; the rows' own are written from `start` on.
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    pub start: usize,
    pub seen: Seen<'a>,
}

/// Slots that each row of a [`Span`] sees.
#[derive(Clone, Copy)]
pub enum Seen<'a> {
    /// So many from the first on.
    First(&'a [usize]),
    /// Those before the span, and of its own rows the row's ancestors and itself, by the row that each row follows.
    Ancestors(&'a [usize]),
}

/// The result for every row, `[rows, heads · dim]`, with the keys and values of every span written; or `None` where libtorch should
/// do it. Slots must be within the capacity, and parents before their children.
pub fn attention(shared: &Shared, spans: &[Span]) -> Result<Option<Tensor>, TchError> {
    let (Shared { qkv, heads, kv_heads, dim, .. }, kind) = (shared, shared.qkv.kind());
    let width = (heads + 2 * kv_heads) * dim;
    let plain_cache = |tensor: &Tensor| {
        let (stride, sizes) = (tensor.stride(), tensor.size());
        tensor.kind() == kind
            && tensor.device() == tch::Device::Cpu
            && stride.len() == 3
            && stride[2] == 1
            && stride[1] == *dim as i64
            && sizes[0] == *kv_heads as i64
            && sizes[2] == *dim as i64
    };
    let inside = |span: &Span| {
        let capacity = span.keys.size()[1] as usize;
        let sees = match span.seen {
            Seen::First(sees) => sees.len() == span.rows.len() && sees.iter().all(|sees| (1..=capacity).contains(sees)),
            Seen::Ancestors(parents) => parents.len() == span.rows.len(),
        };
        sees && span.start + span.rows.len() <= capacity && span.values.size()[1] as usize == capacity
    };
    let fits = fits(kind, qkv.device(), *dim)
        && plain(qkv)
        && qkv.numel().is_multiple_of(width)
        && spans.iter().all(|span| {
            plain_cache(span.keys) && plain_cache(span.values) && span.keys.stride() == span.values.stride() && inside(span)
        })
        && shared.norms.is_none_or(|(q, k)| plain(q) && plain(k) && q.kind() == kind && k.kind() == kind);
    let rows = qkv.numel() / width;
    if !fits || spans.iter().map(|span| span.rows.len()).sum::<usize>() != rows || spans.iter().any(|s| s.rows.end > rows) {
        return Ok(None);
    }
    let out = Tensor::f_empty([rows as i64, (heads * dim) as i64], (kind, tch::Device::Cpu))?;
    let pointer = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null(), |tensor| tensor.data_ptr().cast_const());
    let step = Step {
        qkv: qkv.data_ptr(),
        cos: shared.angles.0.data_ptr().cast(),
        sin: shared.angles.1.data_ptr().cast(),
        query_norm: pointer(shared.norms.map(|norms| norms.0)),
        key_norm: pointer(shared.norms.map(|norms| norms.1)),
        eps: shared.eps as f32,
        out: out.data_ptr(),
        heads: *heads,
        kv_heads: *kv_heads,
        dim: *dim,
        rows: spans.iter().flat_map(rows_of).collect(),
        half: kind == Kind::BFloat16,
    };
    let looked_at: usize = step.rows.iter().map(|row| row.before + row.line.len()).sum();
    // SAFETY: contiguous tensors of these sizes and types, which outlive the calls; every slot is within its cache.
    unsafe {
        launch(&Store(&step), heads * rows >= PARALLEL_FROM);
        launch(&step, heads * looked_at >= PARALLEL_FROM);
    }
    Ok(Some(out))
}

fn rows_of<'a>(span: &'a Span) -> impl Iterator<Item = Row> + 'a {
    span.rows.clone().enumerate().map(|(index, row)| {
        let (before, line) = match span.seen {
            Seen::First(sees) => (sees[index], vec![]),
            Seen::Ancestors(parents) => (span.start, lineage(parents, index).into_iter().map(|at| span.start + at).collect()),
        };
        let (keys, values, head_stride) = (span.keys.data_ptr(), span.values.data_ptr(), span.keys.stride()[0] as usize);
        Row { row, keys, values, head_stride, slot: span.start + index, before, line }
    })
}

/// Whether heads of this size and type can be done here.
pub fn fits(kind: Kind, device: tch::Device, dim: usize) -> bool {
    *super::FAST
        && device == tch::Device::Cpu
        && matches!(kind, Kind::Float | Kind::BFloat16)
        && dim <= DIM_MAX
        && dim.is_multiple_of(2)
}

/// Rows that `row` follows, the first of all first, and itself.
pub fn lineage(parents: &[usize], row: usize) -> Vec<usize> {
    let mut line = vec![row];
    let mut at = row;
    while at > 0 {
        at = parents[at];
        line.push(at);
    }
    line.reverse();
    line
}

/// One row's place among the caches.
struct Row {
    row: usize,
    keys: *mut c_void,
    values: *mut c_void,
    /// From one head's keys to the next one's, in elements.
    head_stride: usize,
    /// Where its own key goes.
    slot: usize,
    /// Slots that it sees: so many from the first on, then these.
    before: usize,
    line: Vec<usize>,
}

/// One layer's attention, as plain memory.
struct Step {
    qkv: *const c_void,
    cos: *const f32,
    sin: *const f32,
    query_norm: *const c_void,
    key_norm: *const c_void,
    eps: f32,
    out: *mut c_void,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    rows: Vec<Row>,
    half: bool,
}

/// The part that must be complete before any query looks: keys and values into the cache.
struct Store<'a>(&'a Step);

impl Kernel for Store<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let rows = &self.0.rows;
        for row in &rows[rows.len() * thread / threads..rows.len() * (thread + 1) / threads] {
            unsafe { if self.0.half { self.0.store::<V, u16>(row) } else { self.0.store::<V, f32>(row) } }
        }
    }
}

impl Kernel for Step {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let tasks = self.rows.len() * self.heads;
        let mut scores = vec![];
        for task in tasks * thread / threads..tasks * (thread + 1) / threads {
            let (row, head) = (&self.rows[task / self.heads], task % self.heads);
            scores.resize(row.before + row.line.len(), 0.0);
            unsafe {
                if self.half {
                    self.attend::<V, u16>(row, head, &mut scores)
                } else {
                    self.attend::<V, f32>(row, head, &mut scores)
                }
            }
        }
    }
}

impl Step {
    /// Normalised, rotated and in f32: head `head` of row `row`.
    #[inline(always)]
    unsafe fn rotated<V: Lanes, T: Stored>(&self, row: usize, head: usize, norm: *const c_void, out: &mut [f32; DIM_MAX]) {
        let (dim, half) = (self.dim, self.dim / 2);
        unsafe {
            let from = self.qkv.cast::<T>().add((row * (self.heads + 2 * self.kv_heads) + head) * dim);
            let x = std::slice::from_raw_parts(from, dim);
            let mut plain = [0f32; DIM_MAX];
            if norm.is_null() {
                for (plain, x) in plain.iter_mut().zip(x) {
                    *plain = x.widen();
                }
            } else {
                let weight = std::slice::from_raw_parts(norm.cast::<T>(), dim);
                normalise::<V, T>(x, weight, self.eps, |at, value| plain[at] = value);
            }
            let cos = std::slice::from_raw_parts(self.cos.add(row * dim), dim);
            let sin = std::slice::from_raw_parts(self.sin.add(row * dim), dim);
            for at in 0..half {
                out[at] = plain[at] * cos[at] - plain[at + half] * sin[at];
                out[at + half] = plain[at + half] * cos[at + half] + plain[at] * sin[at + half];
            }
        }
    }

    #[inline(always)]
    unsafe fn store<V: Lanes, T: Stored>(&self, row: &Row) {
        let mut key = [0f32; DIM_MAX];
        for head in 0..self.kv_heads {
            unsafe {
                self.rotated::<V, T>(row.row, self.heads + head, self.key_norm, &mut key);
                let slot = head * row.head_stride + row.slot * self.dim;
                let keys = std::slice::from_raw_parts_mut(row.keys.cast::<T>().add(slot), self.dim);
                for (out, key) in keys.iter_mut().zip(key) {
                    *out = T::narrow(key);
                }
                let place = row.row * (self.heads + 2 * self.kv_heads) + self.heads + self.kv_heads + head;
                let value = self.qkv.cast::<T>().add(place * self.dim);
                std::ptr::copy_nonoverlapping(value, row.values.cast::<T>().add(slot), self.dim);
            }
        }
    }

    #[inline(always)]
    unsafe fn attend<V: Lanes, T: Stored>(&self, row: &Row, head: usize, scores: &mut [f32]) {
        let dim = self.dim;
        let first = head / (self.heads / self.kv_heads) * row.head_stride;
        let slot = |at: usize| if at < row.before { at } else { row.line[at - row.before] };
        unsafe {
            let (keys, values) = (row.keys.cast::<T>().cast_const().add(first), row.values.cast::<T>().cast_const().add(first));
            let mut query = [0f32; DIM_MAX];
            self.rotated::<V, T>(row.row, head, self.query_norm, &mut query);
            let scale = 1.0 / (dim as f32).sqrt();
            let mut best = f32::NEG_INFINITY;
            for (at, score) in scores.iter_mut().enumerate() {
                *score = dot::<V, T>(keys.add(slot(at) * dim), query.as_ptr(), dim) * scale;
                best = best.max(*score);
            }
            for score in scores.iter_mut() {
                *score = exp(*score - best);
            }
            let total = sum::<V>(scores);
            let out = self.out.cast::<T>().add((row.row * self.heads + head) * dim);
            let whole = dim / LANES * LANES;
            let mut lane = 0;
            // Four vectors of the head at a time: the sums do not wait for one another.
            while lane + 4 * LANES <= whole {
                let mut sums = [V::zero(); 4];
                for (at, score) in scores.iter().enumerate() {
                    let (value, weight) = (values.add(slot(at) * dim + lane), V::splat(*score));
                    for (part, sum) in sums.iter_mut().enumerate() {
                        *sum = T::load::<V>(value.add(part * LANES)).multiply_add(weight, *sum);
                    }
                }
                for (part, sum) in sums.iter().enumerate() {
                    put(out.add(lane + part * LANES), sum.store(), total);
                }
                lane += 4 * LANES;
            }
            while lane < whole {
                let mut sum = V::zero();
                for (at, score) in scores.iter().enumerate() {
                    sum = T::load::<V>(values.add(slot(at) * dim + lane)).multiply_add(V::splat(*score), sum);
                }
                put(out.add(lane), sum.store(), total);
                lane += LANES;
            }
            for lane in whole..dim {
                let mut sum = 0f32;
                for (at, score) in scores.iter().enumerate() {
                    sum = (*values.add(slot(at) * dim + lane)).widen().mul_add(*score, sum);
                }
                *out.add(lane) = T::narrow(sum / total);
            }
        }
    }
}

#[inline(always)]
unsafe fn put<T: Stored>(out: *mut T, sums: [f32; LANES], total: f32) {
    for (lane, sum) in sums.into_iter().enumerate() {
        unsafe { *out.add(lane) = T::narrow(sum / total) };
    }
}

#[inline(always)]
unsafe fn sum<V: Lanes>(numbers: &[f32]) -> f32 {
    let whole = numbers.len() / LANES * LANES;
    unsafe {
        let (mut sum, one) = (V::zero(), V::splat(1.0));
        let mut at = 0;
        while at < whole {
            sum = V::load(numbers.as_ptr().add(at)).multiply_add(one, sum);
            at += LANES;
        }
        numbers[whole..].iter().fold(fold(sum.store()), |total, number| total + number)
    }
}
