//! Each kernel's arguments and its call on tensors.

use super::Fused;
use crate::tensor::{Kind, TchError, Tensor};

/// Numbers of a head, at most: `turned.cu` holds them in registers.
pub(super) const DIM_MAX: usize = 256;

/// `enum Type`.
fn code(kind: Kind) -> i32 {
    i32::from(kind == Kind::BFloat16)
}

fn address(tensor: &Tensor) -> *mut u8 {
    tensor.data_ptr().cast()
}

/// The size of rows, and how many there are.
fn rows(tensor: &Tensor) -> (i64, i64) {
    let width = tensor.size().last().copied().unwrap_or(1);
    (tensor.numel() as i64 / width.max(1), width)
}

#[repr(C)]
pub(super) struct AddNorm {
    x: *const u8,
    more: *const u8,
    weight: *const u8,
    sum: *mut u8,
    normed: *mut u8,
    rows: i64,
    width: i64,
    eps: f32,
    kind: i32,
}

#[repr(C)]
pub(super) struct Gated {
    gate_up: *const u8,
    out: *mut u8,
    rows: i64,
    width: i64,
    kind: i32,
}

#[repr(C)]
pub(super) struct Rounded {
    x: *const u8,
    codes: *mut u8,
    scales: *mut f32,
    rows: i64,
    width: i64,
    kind: i32,
    floats: i32,
}

#[repr(C)]
pub(super) struct Turned {
    qkv: *mut u8,
    cosines: *const f32,
    sines: *const f32,
    positions: *const i64,
    places: *const i64,
    query_norm: *const u8,
    key_norm: *const u8,
    rows: i64,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    layer: i32,
    eps: f32,
    kind: i32,
}

#[repr(C)]
pub(super) struct Statistics {
    logits: *const u8,
    picks: *const f64,
    edits: *const f64,
    table: *mut f64,
    rows: i64,
    vocab: i64,
    stride: i64,
    edit_count: i32,
    pick: i32,
    drawn: f32,
    judged: f32,
    margin: i32,
    entropy: i32,
    kind: i32,
}

/// Queries, keys and values on their way to attention: who they are and where keys and values go.
pub struct Turn<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub layer: usize,
    pub eps: f64,
    /// Weights of the norms of queries and keys, `[dim]`.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    /// `[positions, dim]` in f32.
    pub tables: (&'a Tensor, &'a Tensor),
    /// `[rows]` of i64.
    pub positions: &'a Tensor,
    /// `[rows, 3]` of i64: address of the row's cache, `[layers, capacity, 2, kv_heads, dim]`, or 0; its capacity; the row's slot in it.
    pub places: &'a Tensor,
}

/// How the tokens of rows are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    Best,
    Given,
    /// Where a number from 0 to 1 falls in the cumulated distribution.
    Drawn,
}

/// What is asked of rows of logits.
pub struct Rows<'a> {
    pub pick: Pick,
    /// On the device: a number for each row unless the best is picked, a token or one from 0 to 1; then for each token that is
    /// treated apart, rising, three: the token, what is added to its logit, and 1 if no confidence is taken from it.
    pub numbers: Option<&'a Tensor>,
    pub edits: usize,
    /// What logits are multiplied by for draws, and for confidence.
    pub drawn: f64,
    pub judged: f64,
    pub margin: bool,
    pub entropy: bool,
}

impl Fused {
    /// `x + more` (or `x`) and its RMSNorm, `[..., width]` each.
    pub fn add_norm(
        &self,
        x: &Tensor,
        more: Option<&Tensor>,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Option<(Tensor, Tensor)>, TchError> {
        let Some(launch) = self.add_norm else { return Ok(None) };
        let (count, width) = rows(x);
        let fits = |tensor: &Tensor| self.takes(tensor) && tensor.kind() == x.kind();
        let like = |more: &Tensor| fits(more) && more.size() == x.size();
        if !fits(x) || !fits(weight) || weight.size() != [width] || !more.is_none_or(like) {
            return Ok(None);
        }
        let (sum, normed) = (if more.is_some() { x.f_empty_like()? } else { x.shallow_clone() }, x.f_empty_like()?);
        let arguments = AddNorm {
            x: address(x),
            more: more.map_or(std::ptr::null(), |more| address(more).cast_const()),
            weight: address(weight),
            sum: address(&sum),
            normed: address(&normed),
            rows: count,
            width,
            eps: eps as f32,
            kind: code(x.kind()),
        };
        // SAFETY: all are contiguous, of one type, and as large as `x`, the weight as a row of it.
        unsafe { self.launch(launch, &arguments)? };
        Ok(Some((sum, normed)))
    }

    /// `silu(gate) · up` of `[..., 2 · width]`, gates first.
    pub fn gated(&self, gate_up: &Tensor) -> Result<Option<Tensor>, TchError> {
        let (count, both) = rows(gate_up);
        let Some(launch) = self.gated.filter(|_| self.takes(gate_up) && both % 2 == 0) else { return Ok(None) };
        let mut shape = gate_up.size();
        if let Some(last) = shape.last_mut() {
            *last = both / 2;
        }
        let out = Tensor::f_empty(&shape, (gate_up.kind(), gate_up.device()))?;
        let (gates, into) = (address(gate_up), address(&out));
        let arguments = Gated { gate_up: gates, out: into, rows: count, width: both / 2, kind: code(gate_up.kind()) };
        // SAFETY: contiguous, and half as large.
        unsafe { self.launch(launch, &arguments)? };
        Ok(Some(out))
    }

    /// Rows of `x: [..., n]` in 8 bits (e4m3 where `floats`, else whole numbers), and the scale of each, `[..., 1]` in f32.
    pub fn rounded(&self, x: &Tensor, floats: bool) -> Result<Option<(Tensor, Tensor)>, TchError> {
        let Some(launch) = self.rounded.filter(|_| self.takes(x)) else { return Ok(None) };
        let (count, width) = rows(x);
        let kind = if floats { Kind::Float8e4m3fn } else { Kind::Int8 };
        let mut shape = x.size();
        let codes = Tensor::f_empty(&shape, (kind, x.device()))?;
        if let Some(last) = shape.last_mut() {
            *last = 1;
        }
        let scales = Tensor::f_empty(&shape, (Kind::Float, x.device()))?;
        let arguments = Rounded {
            x: address(x),
            codes: address(&codes),
            scales: address(&scales).cast(),
            rows: count,
            width,
            kind: code(x.kind()),
            floats: i32::from(floats),
        };
        // SAFETY: a code for each number, a scale for each row.
        unsafe { self.launch(launch, &arguments)? };
        Ok(Some((codes, scales)))
    }

    /// Turns `qkv: [rows, heads + 2 · kv_heads, dim]`: queries in place, keys and values to their caches, or keys in place where they have
    /// none. Whether it was done.
    ///
    /// # Safety
    /// Each of `places` must be 0 or lead to a cache on this device of the type of `qkv` and of `turn`'s sizes, with room for its slot in
    /// `turn`'s layer; positions must lie within the tables.
    pub unsafe fn turned(&self, qkv: &Tensor, turn: &Turn) -> Result<bool, TchError> {
        let (count, all, dim) = qkv.size3()?;
        let (heads, kv_heads) = (turn.heads as i64, turn.kv_heads as i64);
        let numbers = |tensor: &Tensor, kind: Kind, least: i64| {
            tensor.kind() == kind
                && tensor.device() == self.device
                && tensor.is_contiguous()
                && tensor.numel() as i64 >= least
                && !tensor.requires_grad()
        };
        let norm = |weight: &Tensor| numbers(weight, qkv.kind(), dim);
        let fits = self.takes(qkv)
            && all == heads + 2 * kv_heads
            && self.turns(qkv.kind(), dim as usize)
            && turn.norms.is_none_or(|(query, key)| norm(query) && norm(key))
            && numbers(turn.tables.0, Kind::Float, dim)
            && numbers(turn.tables.1, Kind::Float, dim)
            && numbers(turn.positions, Kind::Int64, count)
            && numbers(turn.places, Kind::Int64, 3 * count);
        let Some(launch) = self.turned.filter(|_| fits) else { return Ok(false) };
        let null = std::ptr::null();
        let (query_norm, key_norm) = turn.norms.map_or((null, null), |(query, key)| {
            let (query, key) = (address(query), address(key));
            (query.cast_const(), key.cast_const())
        });
        let arguments = Turned {
            qkv: address(qkv),
            cosines: address(turn.tables.0).cast(),
            sines: address(turn.tables.1).cast(),
            positions: address(turn.positions).cast(),
            places: address(turn.places).cast(),
            query_norm,
            key_norm,
            rows: count,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            dim: dim as i32,
            layer: turn.layer as i32,
            eps: turn.eps as f32,
            kind: code(qkv.kind()),
        };
        // SAFETY: sizes were compared; the places are the caller's.
        unsafe { self.launch(launch, &arguments)? };
        Ok(true)
    }

    /// What is asked of `logits: [rows, vocab]`, `[rows, 2 to 4]` in f64: token, confidence, margin and entropy, the last two if they are
    /// asked for. Rows whose numbers have no best (NaN, infinity, nothing admitted) have no number for a confidence.
    pub fn statistics(&self, logits: &Tensor, asked: &Rows) -> Result<Option<Tensor>, TchError> {
        let (count, vocab) = logits.size2()?;
        let stride = logits.stride();
        let dense = stride.get(1) == Some(&1) && logits.device() == self.device && !logits.requires_grad();
        let typed = matches!(logits.kind(), Kind::Float | Kind::BFloat16);
        let Some(launch) = self.statistics.filter(|_| dense && typed && count > 0 && vocab > 0) else { return Ok(None) };
        let picks = if asked.pick == Pick::Best { 0 } else { count as usize };
        let given = |numbers: &Tensor| {
            let ours = numbers.kind() == Kind::Double && numbers.device() == self.device && numbers.is_contiguous();
            ours && numbers.numel() == picks + 3 * asked.edits
        };
        if !asked.numbers.map_or(picks + asked.edits == 0, given) {
            return Ok(None);
        }
        let columns = 2 + i64::from(asked.margin) + i64::from(asked.entropy);
        let table = Tensor::f_empty([count, columns], (Kind::Double, self.device))?;
        let numbers: *const f64 = asked.numbers.map_or(std::ptr::null(), |numbers| address(numbers).cast());
        let arguments = Statistics {
            logits: address(logits),
            picks: numbers,
            edits: numbers.wrapping_add(picks),
            table: address(&table).cast(),
            rows: count,
            vocab,
            stride: stride[0],
            edit_count: asked.edits as i32,
            pick: asked.pick as i32,
            drawn: asked.drawn as f32,
            judged: asked.judged as f32,
            margin: i32::from(asked.margin),
            entropy: i32::from(asked.entropy),
            kind: code(logits.kind()),
        };
        // SAFETY: sizes were compared.
        unsafe { self.launch(launch, &arguments)? };
        Ok(Some(table))
    }
}
