//! A step's attention in one pass: queries and keys normalised and rotated, keys and values put into the cache, and each query's
//! weighted sum over what it sees.
//!
//! One launch serves the rows of many sequences, each with its own cache; rows of one sequence go through its keys in tiles. Yet
//! every query's sums run over its keys in the order of their positions, wherever in the cache they lie, and over no others. So a
//! token's numbers are the same whether it was run alone, as a node of a tree of drafts, or beside other sequences.

use std::ffi::c_void;
use std::ops::Range;
use std::rc::Rc;

use tch::TchError;

use super::attend::{Place, Room, ask};
use super::attention_split;
use super::fixed::Fixed;
use super::lanes::{Lanes, Stored};
use super::pointwise::normalise;
use super::turns::{Rows, Turns};
use super::{Kernel, plain};
use crate::tensor::{Kind, Tensor};

/// Largest size of a head.
const DIM_MAX: usize = 256;
/// Rows of one sequence that go through its keys together.
const TILE: usize = 16;
/// Bytes of keys, and of values, that are asked for before they are used; longer pieces come by themselves.
const FETCHED: usize = 16 * 1024;
/// Attention over fewer keys, all heads and queries together, is not worth other threads; nor are fewer keys to be stored.
const PARALLEL_FROM: usize = 256;
const STORE_PARALLEL_FROM: usize = 64;

/// What all rows of a forward share.
pub struct Shared<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// Cosines and sines of all positions, `[positions, dim]` each, f32, and the position of every row.
    pub angles: (&'a Fixed, &'a Fixed),
    pub positions: &'a [usize],
    /// RMSNorm over each head of queries and of keys, `[dim]`, and its epsilon.
    pub norms: Option<(&'a Fixed, &'a Fixed)>,
    pub eps: f64,
}

/// One sequence's keys and values of one layer, `[kv_heads, capacity, dim]` each, with all that the kernel has to know of them: looked up
/// once, and not anew for every forward.
pub struct Slots {
    /// Where the keys and values are, and what keeps them there.
    keys: *mut c_void,
    values: *mut c_void,
    _memory: (Tensor, Option<Tensor>),
    kind: Kind,
    kv_heads: usize,
    capacity: usize,
    dim: usize,
    /// From one head's keys to the next one's, in elements.
    head_stride: usize,
}

// SAFETY: the pointers lead into the tensors, which may go to another thread.
unsafe impl Send for Slots {}

impl Slots {
    /// Of every layer of a cache, `[layers, 2, kv_heads, capacity, dim]`; none if the kernel cannot read it.
    pub fn of_layers(data: &Tensor) -> Vec<Self> {
        let (&[layers, 2, kv_heads, capacity, dim], true) = (data.size().as_slice(), plain(data)) else { return vec![] };
        let half = (kv_heads * capacity * dim) as usize * data.kind().elt_size_in_bytes();
        let first = data.data_ptr().cast::<u8>();
        let layer = |layer: usize| Self {
            keys: first.wrapping_add(2 * layer * half).cast(),
            values: first.wrapping_add((2 * layer + 1) * half).cast(),
            _memory: (data.shallow_clone(), None),
            kind: data.kind(),
            kv_heads: kv_heads as usize,
            capacity: capacity as usize,
            dim: dim as usize,
            head_stride: (capacity * dim) as usize,
        };
        (0..layers as usize).map(layer).collect()
    }

    /// Those of `[kv_heads, capacity, dim]` tensors, if the kernel can read them.
    pub fn of(keys: &Tensor, values: &Tensor) -> Option<Self> {
        let (&[kv_heads, capacity, dim], &[head_stride, row, 1]) = (keys.size().as_slice(), keys.stride().as_slice()) else {
            return None;
        };
        let alike = values.size() == keys.size() && values.stride() == keys.stride() && values.kind() == keys.kind();
        let here = keys.device() == tch::Device::Cpu && values.device() == tch::Device::Cpu;
        (alike && here && row == dim).then(|| Self {
            keys: keys.data_ptr(),
            values: values.data_ptr(),
            _memory: (keys.shallow_clone(), Some(values.shallow_clone())),
            kind: keys.kind(),
            kv_heads: kv_heads as usize,
            capacity: capacity as usize,
            dim: dim as usize,
            head_stride: head_stride as usize,
        })
    }
}

/// Copies the first `count` positions of `data: [layers, 2, kv_heads, positions, dim]` into the slots of all layers, from `start` on; false where it
/// is not of their kind. Many small pieces take libtorch, which starts threads for them, longer than they take to copy.
pub fn fill(layers: &[Slots], start: usize, data: &Tensor, count: usize) -> bool {
    let (&[count_of, 2, kv_heads, positions, dim], true) = (data.size().as_slice(), plain(data)) else { return false };
    let alike = |slots: &Slots| {
        let shape = slots.kv_heads == kv_heads as usize && slots.dim == dim as usize && slots.kind == data.kind();
        shape && start + count <= slots.capacity && count <= positions as usize
    };
    if layers.len() != count_of as usize || layers.is_empty() || !layers.iter().all(alike) {
        return false;
    }
    let size = data.kind().elt_size_in_bytes();
    let (piece, next) = (count * dim as usize * size, (positions * dim) as usize * size);
    let mut from = data.data_ptr().cast::<u8>().cast_const();
    for slots in layers {
        for to in [slots.keys, slots.values] {
            for head in 0..slots.kv_heads {
                let place = (head * slots.head_stride + start * slots.dim) * size;
                // SAFETY: the slots have room for so many positions, and the data has them.
                unsafe { std::ptr::copy_nonoverlapping(from, to.cast::<u8>().add(place), piece) };
                from = from.wrapping_add(next);
            }
        }
    }
    true
}

/// One sequence's rows and where its keys and values are.
pub struct Span<'a> {
    pub rows: Range<usize>,
    /// The rows' own are written from `start` on.
    pub slots: &'a Slots,
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

/// The result for every row of `qkv: [rows, (heads + 2 · kv_heads) · dim]` (queries, keys and values), `[rows, heads · dim]`, with the keys and
/// values of every span written; or `None` where libtorch should do it.
pub fn attention(shared: &Shared, qkv: &Tensor, spans: &[Span]) -> Result<Option<Tensor>, TchError> {
    let Some(from) = Rows::of(qkv) else { return Ok(None) };
    let out = Tensor::f_empty([from.count as i64, (shared.heads * shared.dim) as i64], (qkv.kind(), tch::Device::Cpu))?;
    let mut turns = Turns::default();
    if Rows::of(&out).and_then(|out| attend(shared, from, out, spans, &mut turns)).is_none() {
        return Ok(None);
    }
    // SAFETY: contiguous tensors of these sizes and types, which outlive the call.
    unsafe { turns.run() };
    Ok(Some(out))
}

/// [`attention`] into `out`. Slots must be within the capacity, and parents before their children; `None` if sizes or types do not fit.
pub fn attend(shared: &Shared, qkv: Rows, out: Rows, spans: &[Span], turns: &mut Turns) -> Option<()> {
    let Shared { heads, kv_heads, dim, positions, .. } = *shared;
    let kind = if qkv.half { Kind::BFloat16 } else { Kind::Float };
    let inside = |span: &Span| {
        let capacity = span.slots.capacity;
        let sees = match span.seen {
            Seen::First(sees) => sees.len() == span.rows.len() && sees.iter().all(|sees| (1..=capacity).contains(sees)),
            Seen::Ancestors(parents) => parents.len() == span.rows.len(),
        };
        let alike = span.slots.kind == kind && span.slots.kv_heads == kv_heads && span.slots.dim == dim;
        alike && sees && span.start + span.rows.len() <= capacity && span.rows.end <= qkv.count
    };
    let table = |table: &Fixed| table.rows().filter(|table| !table.half && table.width == dim);
    let (cos, sin) = (table(shared.angles.0)?, table(shared.angles.1)?);
    let turned = positions.len() == qkv.count && positions.iter().all(|position| *position < cos.count.min(sin.count));
    let norm = |norm: Option<&Fixed>| match norm {
        None => Some(std::ptr::null()),
        Some(norm) => norm.rows().filter(|norm| norm.half == qkv.half && norm.width == dim).map(|norm| norm.data.cast_const()),
    };
    let (query_norm, key_norm) = (norm(shared.norms.map(|norms| norms.0))?, norm(shared.norms.map(|norms| norms.1))?);
    let widths = qkv.width == (heads + 2 * kv_heads) * dim && out.width == heads * dim;
    let count: usize = spans.iter().map(|span| span.rows.len()).sum();
    let fits = fits(kind, tch::Device::Cpu, dim) && widths && turned && count == qkv.count && spans.iter().all(inside);
    qkv.beside(&out).filter(|()| fits)?;
    let rows: Vec<Row> = spans.iter().flat_map(|span| rows_of(span, positions)).collect();
    let looked_at: usize = rows.iter().map(Row::sees).sum();
    let tiles = tiles(spans);
    let parallel = heads * looked_at >= PARALLEL_FROM;
    // Whoever looks at a tile's keys can store them where the tile is all that its sequence has.
    let whole = spans.iter().all(|span| (1..=TILE).contains(&span.rows.len()));
    let split = whole && parallel && !even(tiles.len() * kv_heads);
    let step = Rc::new(Step {
        qkv: qkv.data,
        cos: cos.data.cast(),
        sin: sin.data.cast(),
        query_norm,
        key_norm,
        eps: shared.eps as f32,
        out: out.data,
        heads,
        kv_heads,
        dim,
        rows,
        stores: whole,
        tiles,
        half: qkv.half,
    });
    if split {
        attention_split::push(step, turns);
        return Some(());
    }
    if !step.stores {
        turns.push(Store(step.clone()), kv_heads * qkv.count >= STORE_PARALLEL_FROM);
    }
    turns.push(step, parallel);
    Some(())
}

fn rows_of<'a>(span: &'a Span, positions: &'a [usize]) -> impl Iterator<Item = Row> + 'a {
    span.rows.clone().enumerate().map(|(index, row)| {
        let (before, line) = match span.seen {
            Seen::First(sees) => (sees[index], vec![]),
            Seen::Ancestors(parents) => (span.start, lineage(parents, index).into_iter().map(|at| span.start + at).collect()),
        };
        let Slots { keys, values, head_stride, .. } = *span.slots;
        let (slot, slots) = (span.start + index, span.slots.capacity);
        Row { row, position: positions[row], keys, values, head_stride, slots, slot, before, line }
    })
}

/// Places among all rows, in the order of the spans, of those that are done together.
fn tiles(spans: &[Span]) -> Vec<Range<usize>> {
    let mut tiles = vec![];
    let mut first = 0;
    for span in spans {
        let end = first + span.rows.len();
        tiles.extend((first..end).step_by(TILE).map(|start| start..(start + TILE).min(end)));
        first = end;
    }
    tiles
}

/// Whether so many tasks are even shares for all threads, or nearly.
fn even(tasks: usize) -> bool {
    let threads = tch::get_num_threads().max(1) as usize;
    tasks.is_multiple_of(threads) || tasks >= 8 * threads
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
pub(super) struct Row {
    pub row: usize,
    position: usize,
    keys: *mut c_void,
    values: *mut c_void,
    /// From one head's keys to the next one's, in elements.
    head_stride: usize,
    slots: usize,
    /// Where its own key goes.
    pub slot: usize,
    /// Slots that it sees: so many from the first on, then these.
    pub before: usize,
    pub line: Vec<usize>,
}

impl Row {
    /// How many slots it sees.
    pub fn sees(&self) -> usize {
        self.before + self.line.len()
    }
}

/// One layer's attention, as plain memory.
pub(super) struct Step {
    qkv: *const c_void,
    cos: *const f32,
    sin: *const f32,
    query_norm: *const c_void,
    key_norm: *const c_void,
    eps: f32,
    out: *mut c_void,
    heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub rows: Vec<Row>,
    /// Rows of one sequence that go through its keys together.
    pub tiles: Vec<Range<usize>>,
    /// Whether a tile's keys and values are stored by whoever looks at them: a tile is all that its sequence has in this forward.
    stores: bool,
    pub half: bool,
}

/// The part that must be complete before any query looks, where several tiles look at the same: keys and values into the cache.
struct Store(Rc<Step>);

impl Kernel for Store {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let rows = &self.0.rows;
        let rows = &rows[rows.len() * thread / threads..rows.len() * (thread + 1) / threads];
        (0..self.0.kv_heads).for_each(|head| unsafe { self.0.store::<V>(rows, head) });
    }
}

impl Kernel for Rc<Step> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let mut room = Room::default();
        // A task is a head of a tile, or all heads that share keys where these are stored as well.
        let (count, heads) = if self.stores { (self.kv_heads, self.group()) } else { (self.heads, 1) };
        // Tiles further down a sequence see more keys: threads take turns.
        for task in (thread..self.tiles.len() * count).step_by(threads) {
            let (rows, first) = (&self.rows[self.tiles[task / count].clone()], task % count * heads);
            if let Some(next) = self.tiles.get((task + threads) / count) {
                self.fetch(&self.rows[next.start], (task + threads) % count * heads);
            }
            unsafe {
                if self.stores {
                    self.store::<V>(rows, first / self.group());
                }
                if self.half {
                    self.attend::<V, u16>(rows, first, heads, &mut room)
                } else {
                    self.attend::<V, f32>(rows, first, heads, &mut room)
                }
            }
        }
    }
}

impl Step {
    /// Normalised, rotated and in f32: head `head` of row `row`.
    #[inline(always)]
    unsafe fn rotated<V: Lanes, T: Stored>(&self, row: &Row, head: usize, norm: *const c_void, out: &mut [f32]) {
        let (dim, half) = (self.dim, self.dim / 2);
        unsafe {
            let from = self.qkv.cast::<T>().add((row.row * (self.heads + 2 * self.kv_heads) + head) * dim);
            let x = std::slice::from_raw_parts(from, dim);
            if norm.is_null() {
                for (out, x) in out.iter_mut().zip(x) {
                    *out = x.widen();
                }
            } else {
                let weight = std::slice::from_raw_parts(norm.cast::<T>(), dim);
                normalise::<V, T>(x, weight, self.eps, |at, value| out[at] = value);
            }
            let (out, cos, sin) = (out.as_mut_ptr(), self.cos.add(row.position * dim), self.sin.add(row.position * dim));
            let whole = half / EIGHT * EIGHT;
            for at in (0..whole).step_by(EIGHT) {
                turn::<EIGHT>(out.add(at), cos.add(at), sin.add(at), half);
            }
            for at in whole..half {
                turn::<1>(out.add(at), cos.add(at), sin.add(at), half);
            }
        }
    }

    /// Keys and values of one head of some rows, into the cache.
    #[inline(always)]
    pub unsafe fn store<V: Lanes>(&self, rows: &[Row], head: usize) {
        unsafe { if self.half { self.store_as::<V, u16>(rows, head) } else { self.store_as::<V, f32>(rows, head) } }
    }

    #[inline(always)]
    unsafe fn store_as<V: Lanes, T: Stored>(&self, rows: &[Row], head: usize) {
        let mut key = [0f32; DIM_MAX];
        let key = &mut key[..self.dim];
        for row in rows {
            unsafe {
                self.rotated::<V, T>(row, self.heads + head, self.key_norm, key);
                let slot = head * row.head_stride + row.slot * self.dim;
                let keys = std::slice::from_raw_parts_mut(row.keys.cast::<T>().add(slot), self.dim);
                for (out, key) in keys.iter_mut().zip(&*key) {
                    *out = T::narrow(*key);
                }
                let place = row.row * (self.heads + 2 * self.kv_heads) + self.heads + self.kv_heads + head;
                let value = self.qkv.cast::<T>().add(place * self.dim);
                std::ptr::copy_nonoverlapping(value, row.values.cast::<T>().add(slot), self.dim);
            }
        }
    }

    /// Asks for a head's keys and values, while another's are used: sixteen sequences' lie in short pieces all over the memory, and a
    /// processor that sees each piece begin anew waits for it anew (docs/LOG.md).
    #[inline(always)]
    fn fetch(&self, row: &Row, head: usize) {
        let size = if self.half { size_of::<u16>() } else { size_of::<f32>() };
        let offset = head / self.group() * row.head_stride * size;
        let bytes = (row.before * self.dim * size).min(FETCHED);
        for from in [row.keys, row.values] {
            ask(from.cast::<u8>().cast_const().wrapping_add(offset), bytes);
        }
    }

    /// Heads of the rows of one tile, from `first` on, that share their keys.
    #[inline(always)]
    unsafe fn attend<V: Lanes, T: Stored>(&self, rows: &[Row], first: usize, heads: usize, room: &mut Room) {
        unsafe {
            self.queries::<V, T>(rows, first, heads, room);
            self.place::<T>(rows, first, heads).attend::<V>(rows, room);
        }
    }

    /// Puts their queries into `room`.
    #[inline(always)]
    pub unsafe fn queries<V: Lanes, T: Stored>(&self, rows: &[Row], first: usize, heads: usize, room: &mut Room) {
        let queries = room.queries(rows.len() * heads, self.dim);
        for (at, query) in queries.chunks_exact_mut(self.dim).enumerate() {
            unsafe { self.rotated::<V, T>(&rows[at / heads], first + at % heads, self.query_norm, query) };
        }
    }

    /// Where their keys and results are.
    #[inline(always)]
    pub unsafe fn place<T: Stored>(&self, rows: &[Row], first: usize, heads: usize) -> Place<T> {
        let row = &rows[0];
        let offset = first / self.group() * row.head_stride;
        Place {
            keys: row.keys.cast::<T>().cast_const().wrapping_add(offset),
            values: row.values.cast::<T>().cast_const().wrapping_add(offset),
            slots: row.slots,
            out: self.out.cast::<T>().wrapping_add(first * self.dim),
            stride: self.heads * self.dim,
            dim: self.dim,
            heads,
        }
    }

    /// Heads of queries that share one of keys.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Numbers that turn together: a count that is known becomes a vector.
const EIGHT: usize = 8;

/// Turns `N` numbers of a head's first half with those `half` behind them.
#[inline(always)]
unsafe fn turn<const N: usize>(out: *mut f32, cos: *const f32, sin: *const f32, half: usize) {
    unsafe {
        let pair = |from: *const f32| (from.cast::<[f32; N]>().read(), from.add(half).cast::<[f32; N]>().read());
        let ((x, y), (cos_x, cos_y), (sin_x, sin_y)) = (pair(out), pair(cos), pair(sin));
        out.cast::<[f32; N]>().write(std::array::from_fn(|at| x[at] * cos_x[at] - y[at] * sin_x[at]));
        out.add(half).cast::<[f32; N]>().write(std::array::from_fn(|at| y[at] * cos_y[at] + x[at] * sin_y[at]));
    }
}
