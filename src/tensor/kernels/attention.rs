//! A step's attention in one pass: queries and keys normalised and rotated, keys and values put into the cache, and each query's
//! weighted sum over what it sees.
//!
//! A query goes through its keys in the order of their positions, wherever in the cache they lie. So a token's numbers are the same
//! whether it was run alone or as a node of a tree of drafts.

use std::ffi::c_void;

use tch::TchError;

use super::pointwise::normalise;
use super::{Kernel, LANES, Lanes, ROWS_MAX, Stored, dot, exp, fold, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Largest size of a head.
const DIM_MAX: usize = 256;
/// Attention over fewer keys, all heads and queries together, is not worth other threads.
const PARALLEL_FROM: usize = 1024;

/// What the queries of one forward look at.
pub struct Query<'a> {
    /// `[1, rows, (heads + 2 · kv_heads) · dim]`: queries, keys and values of each row.
    pub qkv: &'a Tensor,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// `[rows, 1, dim]` each, f32.
    pub angles: &'a (Tensor, Tensor),
    /// RMSNorm over each head of queries and of keys, `[dim]`, and its epsilon.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    pub eps: f64,
    /// Positions kept before the first row.
    pub past: usize,
    /// The row that each row follows; without it each follows the one before.
    pub parents: Option<&'a [usize]>,
}

/// The result for every row, `[1, rows, heads · dim]`, with `keys` and `values` (`[1, kv_heads, capacity, dim]`) written from `past`
/// on; or `None` where libtorch should do it. Written slots must be within the capacity, and parents before their children.
pub fn attention(query: &Query, keys: &Tensor, values: &Tensor) -> Result<Option<Tensor>, TchError> {
    let (Query { qkv, heads, kv_heads, dim, past, .. }, kind) = (query, query.qkv.kind());
    let width = (heads + 2 * kv_heads) * dim;
    let fits = fits(kind, qkv.device(), *dim)
        && qkv.numel().is_multiple_of(width)
        && qkv.size().first() == Some(&1)
        && plain(qkv)
        && keys.kind() == kind
        && values.kind() == kind
        && keys.stride() == values.stride()
        && keys.stride()[3] == 1
        && keys.stride()[2] == *dim as i64
        && query.norms.is_none_or(|(q, k)| plain(q) && plain(k) && q.kind() == kind && k.kind() == kind);
    let rows = qkv.numel() / width;
    if !fits || rows > ROWS_MAX || past + rows > keys.size()[2] as usize {
        return Ok(None);
    }
    let seen: Vec<Vec<usize>> = (0..rows).map(|row| lineage(query.parents, row)).collect();
    let out = Tensor::f_empty([1, rows as i64, (heads * dim) as i64], (kind, tch::Device::Cpu))?;
    let pointer = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null(), |tensor| tensor.data_ptr().cast_const());
    let step = Step {
        qkv: qkv.data_ptr(),
        cos: query.angles.0.data_ptr().cast(),
        sin: query.angles.1.data_ptr().cast(),
        query_norm: pointer(query.norms.map(|norms| norms.0)),
        key_norm: pointer(query.norms.map(|norms| norms.1)),
        eps: query.eps as f32,
        keys: keys.data_ptr(),
        values: values.data_ptr(),
        head_stride: keys.stride()[1] as usize,
        out: out.data_ptr(),
        rows,
        heads: *heads,
        kv_heads: *kv_heads,
        dim: *dim,
        past: *past,
        seen: &seen,
        half: kind == Kind::BFloat16,
    };
    // SAFETY: contiguous tensors of these sizes and types, which outlive the calls; the cache has room for the rows.
    unsafe {
        launch(&Store(&step), false);
        launch(&step, heads * rows * (past + rows) >= PARALLEL_FROM);
    }
    Ok(Some(out))
}

/// Whether heads of this size and type can be done here.
pub fn fits(kind: Kind, device: tch::Device, dim: usize) -> bool {
    *super::FAST
        && device == tch::Device::Cpu
        && matches!(kind, Kind::Float | Kind::BFloat16)
        && dim <= DIM_MAX
        && dim.is_multiple_of(2)
}

/// Rows that `row` sees beside what is kept: those it follows, the first of all first, and itself.
fn lineage(parents: Option<&[usize]>, row: usize) -> Vec<usize> {
    let Some(parents) = parents else { return (0..=row).collect() };
    let mut line = vec![row];
    let mut at = row;
    while at > 0 {
        at = parents[at];
        line.push(at);
    }
    line.reverse();
    line
}

/// One layer's attention, as plain memory.
struct Step<'a> {
    qkv: *const c_void,
    cos: *const f32,
    sin: *const f32,
    query_norm: *const c_void,
    key_norm: *const c_void,
    eps: f32,
    keys: *mut c_void,
    values: *mut c_void,
    /// From one head's keys to the next one's, in elements.
    head_stride: usize,
    out: *mut c_void,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    past: usize,
    seen: &'a [Vec<usize>],
    half: bool,
}

/// The part that must be complete before any query looks: keys and values into the cache.
struct Store<'a, 'b>(&'a Step<'b>);

impl Kernel for Store<'_, '_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _thread: usize, _threads: usize) {
        unsafe { if self.0.half { self.0.store::<V, u16>() } else { self.0.store::<V, f32>() } }
    }
}

impl Kernel for Step<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let tasks = self.rows * self.heads;
        let mut scores = vec![0f32; self.past + self.rows];
        for task in tasks * thread / threads..tasks * (thread + 1) / threads {
            let (head, row) = (task / self.rows, task % self.rows);
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

impl Step<'_> {
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
    unsafe fn store<V: Lanes, T: Stored>(&self) {
        let mut key = [0f32; DIM_MAX];
        for row in 0..self.rows {
            for head in 0..self.kv_heads {
                unsafe {
                    self.rotated::<V, T>(row, self.heads + head, self.key_norm, &mut key);
                    let slot = head * self.head_stride + (self.past + row) * self.dim;
                    let keys = std::slice::from_raw_parts_mut(self.keys.cast::<T>().add(slot), self.dim);
                    for (out, key) in keys.iter_mut().zip(key) {
                        *out = T::narrow(key);
                    }
                    let place = row * (self.heads + 2 * self.kv_heads) + self.heads + self.kv_heads + head;
                    let value = self.qkv.cast::<T>().add(place * self.dim);
                    std::ptr::copy_nonoverlapping(value, self.values.cast::<T>().add(slot), self.dim);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn attend<V: Lanes, T: Stored>(&self, row: usize, head: usize, scores: &mut [f32]) {
        let dim = self.dim;
        let first = head / (self.heads / self.kv_heads) * self.head_stride;
        let line = &self.seen[row];
        let count = self.past + line.len();
        let slot = |at: usize| if at < self.past { at } else { self.past + line[at - self.past] };
        let scores = &mut scores[..count];
        unsafe {
            let (keys, values) =
                (self.keys.cast::<T>().cast_const().add(first), self.values.cast::<T>().cast_const().add(first));
            let mut query = [0f32; DIM_MAX];
            self.rotated::<V, T>(row, head, self.query_norm, &mut query);
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
            let out = self.out.cast::<T>().add((row * self.heads + head) * dim);
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
