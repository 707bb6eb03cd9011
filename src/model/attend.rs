//! Attention by libtorch, where our own kernel does not run: on a GPU, mostly.
//!
//! A GPU is told of each operation by itself, and in a small step the telling is what takes time. So whatever can be is done once
//! for the rows of all segments: norms, rotation and the writing of keys to all caches by one kernel where the device has it; and sequences
//! that need no mask attend in one operation, whole ones of one length ([`Work::One`]) or any with a kernel for many lengths
//! ([`Work::Ragged`]). What remains of each other segment is one attention. No mask is made where rows see all that is visible, or each one more
//! than the row before it; what masks remain are made on the device, once for all layers.

use std::ops::Range;

use super::cache::KvCache;
use super::forward::{Plan, Sight};
use super::{Layer, ModelError, Transformer};
use crate::tensor::flash::{self, Ragged};
use crate::tensor::fused::{Fused, Turn};
use crate::tensor::{Kind, Tensor};

/// Who sees what, among one segment's rows.
pub(super) enum View {
    /// Every row all that is visible.
    Full,
    /// The last row all that is visible, each row before it one position less.
    Causal,
    /// `[groups · rows, visible]`: 0 where a row sees a position, else −∞; once for each query head that shares a key head.
    Masked(Tensor),
}

/// Rows that attend in one operation.
pub(super) enum Work<'a> {
    One(Share<'a>),
    Ragged(Group<'a>),
}

/// The rows of one segment, or of several whole sequences of one length.
pub(super) struct Share<'a> {
    /// First row, and rows of each sequence.
    pub first: usize,
    pub length: usize,
    /// More than one only without a cache.
    pub sequences: usize,
    /// And the position of the first row.
    pub cache: Option<(&'a KvCache, usize)>,
    pub visible: usize,
    pub view: View,
}

/// The rows of several segments that lie side by side: all with a cache, or all without.
pub(super) struct Group<'a> {
    pub plans: &'a [Plan<'a>],
    pub causal: bool,
    /// On the device, in i32: where each segment's rows begin among the group's, and the last one's end; how many positions each sees; and for
    /// each layer where its positions begin, in rows of all caches from the first one's address on, or among the group's rows.
    pub rows: Tensor,
    pub visible: Tensor,
    pub positions: Tensor,
    /// All caches' keys and values as one tensor, `[positions, kv_heads, dim]` each, from the first one in memory on; none without caches.
    pub kept: Option<(Tensor, Tensor)>,
}

/// What segments must agree in to attend together, if they need no mask.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Kinship {
    pub causal: bool,
    pub cached: bool,
}

impl Kinship {
    pub fn of(plan: &Plan) -> Option<Self> {
        let view = view(&plan.seen, plan.visible).filter(|_| !plan.canonical)?;
        // A single row sees the same either way.
        Some(Self { causal: matches!(view, View::Causal) || plan.rows.len() == 1, cached: plan.cache.is_some() })
    }
}

/// What turns queries and keys, and brings keys and values to their places.
pub(super) enum Turning {
    /// Cosines and sines of each row; keys are written sequence by sequence.
    Angles((Tensor, Tensor)),
    /// One kernel does it all: positions, and [`Turn::places`].
    Fused { kernels: &'static Fused, positions: Tensor, places: Tensor },
}

/// What a [`Group`] is made of: where its first cache begins, how many rows of caches there are from there on, and its numbers (`rows`, `visible` and `positions`, one behind the other), some of those that go to the device.
pub(super) struct Outline {
    pub causal: bool,
    pub address: usize,
    pub span: usize,
    pub numbers: Range<usize>,
}

impl Outline {
    /// Puts the numbers behind the others; `None`, and none of them, where caches are no whole rows apart, or too far.
    pub fn of(causal: bool, plans: &[Plan], layers: usize, row_bytes: usize, numbers: &mut Vec<i64>) -> Option<Self> {
        let begun = numbers.len();
        let mut all = vec![];
        let (first, last) = (plans.first()?.rows.start, plans.last()?.rows.end);
        let ends: Vec<i64> = plans.iter().map(|plan| plan.rows.start).chain([last]).map(|row| (row - first) as i64).collect();
        all.extend(&ends);
        all.extend(plans.iter().map(|plan| plan.visible as i64));
        let (mut address, mut span) = (0, 0);
        match plans.iter().map(|plan| plan.cache).collect::<Option<Vec<_>>>() {
            None => all.extend(&ends),
            Some(caches) => {
                address = caches.iter().map(|cache| cache.address()).min().filter(|address| *address > 0)?;
                let apart = |cache: &&KvCache| {
                    let bytes = cache.address() - address;
                    bytes.is_multiple_of(row_bytes).then_some(bytes / row_bytes)
                };
                let begins = caches.iter().map(apart).collect::<Option<Vec<usize>>>()?;
                span = begins.iter().zip(&caches).map(|(begin, cache)| begin + layers * cache.capacity()).max()?;
                i32::try_from(span).ok()?;
                for layer in 0..layers {
                    all.extend(begins.iter().zip(&caches).map(|(begin, cache)| (begin + layer * cache.capacity()) as i64));
                    all.push(span as i64);
                }
            }
        }
        numbers.extend(&all);
        Some(Self { causal, address, span, numbers: begun..numbers.len() })
    }
}

impl Share<'_> {
    /// Takes in the rows right behind it, if they can be had in the same operation.
    pub fn absorbs(&mut self, next: &Self) -> bool {
        let plain = matches!((&self.view, &next.view), (View::Full, View::Full) | (View::Causal, View::Causal));
        let joins = plain && self.cache.is_none() && next.cache.is_none() && self.length == next.length;
        self.sequences += if joins { next.sequences } else { 0 };
        joins
    }
}

/// Whether rows that see so many positions each, the last of which is `visible`, need a mask.
pub(super) fn view(seen: &Sight, visible: usize) -> Option<View> {
    match seen {
        Sight::First(sees) if sees.iter().all(|sees| *sees == visible) => Some(View::Full),
        Sight::First(sees) => {
            sees.iter().rev().zip((0..=visible).rev()).all(|(sees, causal)| *sees == causal).then_some(View::Causal)
        }
        Sight::Ancestors(parents) if parents.len() == 1 => Some(View::Full),
        Sight::Ancestors(parents) => (1..parents.len()).all(|row| parents[row] == row - 1).then_some(View::Causal),
    }
}

impl Transformer {
    /// Whether a causal view needs no mask: for whole sequences and from their beginning on, and where the flash kernel runs.
    pub(super) fn causal_is_plain(&self, rows: usize, visible: usize) -> bool {
        rows == visible || flash::fits(self.placement.dtype.kind(), self.placement.device, self.config.head_dim)
    }

    /// The mask of rows that see the first so many positions each; `sees: [rows]`, on the device.
    pub(super) fn mask_of_first(&self, sees: &Tensor, visible: usize) -> Result<Tensor, ModelError> {
        let columns = Tensor::f_arange(padded(visible), (Kind::Int64, sees.device()))?;
        self.mask(&columns.f_lt_tensor(&sees.f_unsqueeze(1)?)?, visible)
    }

    /// The mask of rows that see what is kept and, among themselves, their ancestors: `ancestors: [rows, rows]`, 1 or 0, on the device.
    pub(super) fn mask_of_tree(&self, ancestors: &Tensor, start: usize) -> Result<Tensor, ModelError> {
        let (rows, _) = ancestors.size2()?;
        let visible = start + rows as usize;
        let edge =
            |columns: i64, sees: bool| Tensor::f_full([rows, columns], i64::from(sees), (Kind::Bool, ancestors.device()));
        let parts =
            [edge(start as i64, true)?, ancestors.f_to_kind(Kind::Bool)?, edge(padded(visible) - visible as i64, false)?];
        self.mask(&Tensor::f_cat(&parts, 1)?, visible)
    }

    fn mask(&self, sees: &Tensor, visible: usize) -> Result<Tensor, ModelError> {
        let mask = Tensor::f_zeros(sees.size(), (self.placement.dtype.kind(), sees.device()))?;
        let mask = mask.f_masked_fill(&sees.f_logical_not()?, f64::NEG_INFINITY)?;
        let groups = (self.config.heads / self.config.kv_heads) as i64;
        Ok(mask.f_repeat([groups, 1])?.f_narrow(1, 0, visible as i64)?)
    }

    /// Attention of all rows of `qkv: [rows, (heads + 2 · kv_heads) · dim]`, `[rows, heads · dim]`. Writes to `qkv`, and keys and values to
    /// the caches.
    pub(super) fn attend(
        &self,
        index: usize,
        layer: &Layer,
        qkv: &Tensor,
        turning: &Turning,
        works: &[Work],
    ) -> Result<Tensor, ModelError> {
        let c = &self.config;
        // A trainer keeps norms and stream in f32 where its projections are narrower; otherwise the conversions are free.
        let kind = self.placement.dtype.kind();
        let qkv = qkv.f_to_kind(kind)?.f_view([-1, (c.heads + 2 * c.kv_heads) as i64, c.head_dim as i64])?;
        let (qkv, written) = self.turn(index, layer, qkv, turning)?;
        let mix = |work: &Work| match work {
            Work::One(share) => self.attend_share(index, &qkv, share, written),
            Work::Ragged(group) => self.attend_group(index, &qkv, group, written),
        };
        let mixed: Vec<Tensor> = works.iter().map(mix).collect::<Result<_, _>>()?;
        match mixed.as_slice() {
            [one] => Ok(one.shallow_clone()),
            several => Ok(Tensor::f_cat(several, 0)?),
        }
    }

    /// Norms and rotates queries and keys of `qkv: [rows, heads + 2 · kv_heads, dim]`; and whether keys and values are in their caches by that.
    fn turn(&self, index: usize, layer: &Layer, qkv: Tensor, turning: &Turning) -> Result<(Tensor, bool), ModelError> {
        let c = &self.config;
        let (heads, kv_heads) = (c.heads as i64, c.kv_heads as i64);
        let angles = match turning {
            Turning::Fused { kernels, positions, places } => {
                let norms = layer.qk_norm.as_ref().map(|(query, key)| (&**query, &**key));
                let tables = self.rotary.tables();
                let turn = Turn {
                    heads: c.heads,
                    kv_heads: c.kv_heads,
                    layer: index,
                    eps: c.norm_eps,
                    norms,
                    tables: (tables.0, tables.1),
                    positions,
                    places,
                };
                // SAFETY: `plan` has seen to it that slots are within their caches, which are this model's, and positions within the context.
                return match unsafe { kernels.turned(&qkv, &turn)? } {
                    true => Ok((qkv, true)),
                    false => Err(ModelError::Torch("a forward was given tensors that its kernels do not take".into())),
                };
            }
            Turning::Angles(angles) => angles,
        };
        let kind = qkv.f_kind()?;
        let qkv = match &layer.qk_norm {
            None => qkv,
            Some((query, key)) => {
                let query = self.rms_norm(&qkv.f_narrow(1, 0, heads)?, &query.f_to_kind(kind)?)?;
                let key = self.rms_norm(&qkv.f_narrow(1, heads, kv_heads)?, &key.f_to_kind(kind)?)?;
                Tensor::f_cat(&[query, key, qkv.f_narrow(1, heads + kv_heads, kv_heads)?], 1)?
            }
        };
        turn(&qkv.f_narrow(1, 0, heads + kv_heads)?, angles)?;
        Ok((qkv, false))
    }

    fn attend_group(&self, index: usize, qkv: &Tensor, group: &Group, written: bool) -> Result<Tensor, ModelError> {
        let c = &self.config;
        let (heads, kv_heads, dim) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let first = group.plans.first().map_or(0, |plan| plan.rows.start) as i64;
        let count = group.plans.iter().map(|plan| plan.rows.len() as i64).sum::<i64>();
        let part = |first_head: i64, heads: i64| qkv.f_narrow(0, first, count)?.f_narrow(1, first_head, heads);
        let (key, value, layer) = match &group.kept {
            None => (part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?, 0),
            Some((keys, values)) => {
                for (plan, cache) in group.plans.iter().filter_map(|plan| Some((plan, plan.cache?))).filter(|_| !written) {
                    let new = qkv.f_narrow(0, plan.rows.start as i64, plan.rows.len() as i64)?;
                    let new = new.f_narrow(1, heads, 2 * kv_heads)?.f_view_([-1, 2, kv_heads, dim])?;
                    let _seen = cache.write(index, plan.start, &new, plan.visible)?;
                }
                (keys.shallow_clone(), values.shallow_clone(), index as i64)
            }
        };
        let (query, positions) = (part(0, heads)?, group.positions.f_get(layer)?);
        let most = |of: fn(&Plan) -> usize| group.plans.iter().map(of).max().unwrap_or(0);
        let asked = Ragged {
            query: &query,
            key: &key,
            value: &value,
            rows: &group.rows,
            positions: &positions,
            visible: &group.visible,
            longest: (most(|plan| plan.rows.len()), most(|plan| plan.visible)),
            causal: group.causal,
        };
        match self.ragged.and_then(|attend| attend(&asked)) {
            Some(mixed) => Ok(mixed.f_reshape([count, heads * dim])?),
            None => Err(ModelError::Torch("the flash kernel refused what it was asked".into())),
        }
    }

    fn attend_share(&self, index: usize, qkv: &Tensor, share: &Share, written: bool) -> Result<Tensor, ModelError> {
        let c = &self.config;
        let (heads, kv_heads, dim) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let (sequences, length) = (share.sequences as i64, share.length as i64);
        let qkv =
            qkv.f_narrow(0, share.first as i64, sequences * length)?.f_view([sequences, length, heads + 2 * kv_heads, dim])?;
        let part = |first: i64, count: i64| qkv.f_narrow(2, first, count)?.f_transpose(1, 2);
        let query = part(0, heads)?;
        let (key, value) = match share.cache {
            Some((cache, _)) if written => cache.seen(index, share.visible)?,
            Some((cache, start)) => {
                let new = qkv.f_narrow(2, heads, 2 * kv_heads)?.f_view_([length, 2, kv_heads, dim])?;
                cache.write(index, start, &new, share.visible)?
            }
            None => (part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?),
        };
        let attend = |query: &Tensor, mask: Option<&Tensor>, causal: bool, grouped: bool| {
            Tensor::f_scaled_dot_product_attention(query, &key, &value, mask, 0.0, causal, None::<f64>, grouped)
        };
        let grouped = heads != kv_heads;
        let mixed = match &share.view {
            View::Full => attend(&query, None, false, grouped)?,
            View::Causal if share.length == share.visible => attend(&query, None, true, grouped)?,
            View::Causal => match flash::causal(&query, &key, &value) {
                Some(mixed) => mixed,
                None => return Err(ModelError::Torch("the flash kernel refused what it was asked".into())),
            },
            // Kernels that take a mask want as many heads of keys as of queries: the heads of a group become further rows of the one
            // key head, since copying all cached keys for each of them would cost more than the attention itself.
            View::Masked(mask) => {
                let query = query.f_reshape([1, kv_heads, heads / kv_heads * length, dim])?;
                attend(&query, Some(mask), false, false)?.f_view([1, heads, length, dim])?
            }
        };
        Ok(mixed.f_transpose(1, 2)?.f_reshape([sequences * length, heads * dim])?)
    }
}

/// Columns of a mask in memory: kernels want rows to begin at multiples of 16 bytes, and would copy it in every layer otherwise.
fn padded(visible: usize) -> i64 {
    visible.next_multiple_of(8) as i64
}

/// Rotates `x: [rows, heads, dim]` in place, by cosines and by sines of which the first half is negated, `[rows, 1, dim]`.
fn turn(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<(), ModelError> {
    let halves = x.f_roll([x.size()[2] / 2], [2])?;
    let mut x = x.shallow_clone();
    let _ = x.f_mul_(cos)?.f_addcmul_(&halves, sin)?;
    Ok(())
}

#[cfg(test)]
#[path = "attend_tests.rs"]
mod tests;
