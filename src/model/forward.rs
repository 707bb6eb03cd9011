//! One forward for many sequences: their new tokens stand side by side as rows, so that norms, projections and gated units run once
//! for all of them, and only attention keeps them apart.
//!
//! A [`Segment`] is one sequence's share. No row is filled up to another's length, and on the CPU each row is computed in one order
//! whatever rows are beside it ([`crate::tensor::kernels`]): what a sequence gets does not depend on its neighbours.

use std::ops::Range;

use super::attend::{Group, Kinship, Outline, Share, Turning, View, Work, view};
use super::cache::KvCache;
use super::family::Attention;
use super::{Layer, ModelError, Transformer};
use crate::tensor::kernels::attention::{self as kernel, Seen};
use crate::tensor::{Kind, Tensor, upload};

/// How the tokens of a [`Segment`] stand to one another and to what its cache holds.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// A whole sequence; nothing is kept.
    Whole(Attention),
    /// Each follows the one before it, the first what is kept.
    Causal,
    /// Each follows its parent (an index before its own; the first token is the root). It sees its ancestors and itself.
    Tree(&'a [usize]),
    /// Causal for so many tokens, with filling behind them: a forward whose every shape, its view of the cache included, is the
    /// same for one token as for several, so that the rows agree to the bit where the products' rows depend on one another.
    Canonical(usize),
    /// From position `start` on, whatever is kept: each sees the cache's first so many positions, those written now included.
    Span { start: usize, sees: &'a [usize] },
}

/// One sequence's share of a forward.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    pub tokens: &'a [u32],
    pub layout: Layout<'a>,
    /// `None` for whole sequences.
    pub cache: Option<&'a KvCache>,
}

/// How a forward is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By our own kernels, all in one launch if every product can be.
    AtOnce,
    /// Operation by operation, attention by our own kernel.
    Kernels,
    /// Attention by libtorch.
    Libtorch,
}

/// A segment made ready: its rows, and who sees what.
pub(super) struct Plan<'a> {
    pub cache: Option<&'a KvCache>,
    pub rows: Range<usize>,
    /// Slot of the first row's key, and of the first that no row looks at.
    pub start: usize,
    pub visible: usize,
    pub seen: Sight<'a>,
    /// Shapes are to be the same whatever is asked.
    pub canonical: bool,
    scratch: Option<kernel::Slots>,
}

impl Plan<'_> {
    /// Where a row's key and value go: address and capacity of the cache, and a slot in it.
    fn place(&self, row: usize) -> [i64; 3] {
        let slot = self.start + row - self.rows.start;
        self.cache.map_or([0; 3], |cache| [cache.address() as i64, cache.capacity() as i64, slot as i64])
    }
}

pub(super) enum Sight<'a> {
    /// Each row sees so many positions from the left.
    First(Vec<usize>),
    Ancestors(&'a [usize]),
}

/// Tokens, what turns their rows, and which of these attend together.
type Ready<'a> = (Tensor, Turning, Vec<Work<'a>>);

impl Transformer {
    /// Final hidden states (after the last norm) of all segments' tokens in order, `[rows, hidden]`. Their keys are written to their
    /// caches; [`KvCache::keep`] then says which stay.
    pub fn forward(&self, segments: &[Segment]) -> Result<Tensor, ModelError> {
        match self.shares(segments) {
            Some(shares) => self.forward_apart(segments, &shares),
            None => self.forward_together(segments),
        }
    }

    /// Every operation once, for all segments.
    pub(super) fn forward_together(&self, segments: &[Segment]) -> Result<Tensor, ModelError> {
        let way = match (self.rows_are_independent(), &self.graphs) {
            (false, _) => Way::Libtorch,
            (true, None) => Way::AtOnce,
            // Where the layers are recorded, the recording is the list.
            (true, Some(_)) => Way::Kernels,
        };
        self.forward_by(segments, way)
    }

    /// One way or another.
    pub(super) fn forward_by(&self, segments: &[Segment], way: Way) -> Result<Tensor, ModelError> {
        let own = way != Way::Libtorch;
        let (mut tokens, mut positions, mut plans) = (vec![], vec![], Vec::with_capacity(segments.len()));
        for segment in segments {
            let plan = self.plan(segment, tokens.len(), own, &mut positions)?;
            tokens.extend(segment.tokens.iter().map(|id| i64::from(*id)));
            plans.push(plan);
        }
        if let Some(id) = tokens.iter().copied().find(|id| *id >= self.config.vocab_size as i64) {
            return Err(ModelError::TokenOutOfRange { id, vocab_size: self.config.vocab_size });
        }
        if own {
            let listed = if way == Way::AtOnce { self.at_once(&tokens, &positions, &plans)? } else { None };
            if let Some(hidden) = listed {
                return Ok(hidden);
            }
            let tokens = Tensor::f_from_slice(&tokens)?;
            return self.through(&tokens, |index, layer, qkv| self.attend_few(index, layer, qkv, &positions, &plans));
        }
        let (tokens, turning, works) = self.ready(tokens, &positions, &plans)?;
        self.through(&tokens, |index, layer, qkv| self.attend(index, layer, qkv, &turning, &works))
    }

    /// The layers over `tokens: [rows]`, replayed where they have been recorded.
    fn through(
        &self,
        tokens: &Tensor,
        mix: impl Fn(usize, &Layer, &Tensor) -> Result<Tensor, ModelError> + Copy,
    ) -> Result<Tensor, ModelError> {
        let replayed = self.graphs.as_ref().map(|graphs| graphs.stack(self, tokens, mix)).transpose()?.flatten();
        replayed.map_or_else(|| self.stack(tokens, mix), Ok)
    }

    /// Brings tokens, positions and what rows see to the device in one copy: tokens, what turns the rows, and which of them attend together.
    pub(super) fn ready<'a>(
        &self,
        tokens: Vec<i64>,
        positions: &[usize],
        plans: &'a [Plan<'a>],
    ) -> Result<Ready<'a>, ModelError> {
        let rows = tokens.len() as i64;
        let mut numbers = tokens;
        numbers.extend(positions.iter().map(|position| *position as i64));
        // Its places are rows of caches.
        let by_rows = plans.iter().filter_map(|plan| plan.cache).all(|cache| cache.address() > 0);
        let (kind, dim) = (self.placement.dtype.kind(), self.config.head_dim);
        let fused = self.fused.filter(|fused| by_rows && fused.turns(kind, dim));
        if fused.is_some() {
            numbers.extend(plans.iter().flat_map(|plan| plan.rows.clone().flat_map(|row| plan.place(row))));
        }
        let mut views: Vec<(Option<View>, i64)> = plans.iter().map(|plan| self.view(plan, &mut numbers)).collect();
        let kinds: Vec<Option<Kinship>> = plans.iter().map(Kinship::of).collect();
        let (mut groups, mut first) = (vec![], 0);
        for alike in kinds.chunk_by(|a, b| a.is_some() && a == b) {
            let range = first..first + alike.len();
            first = range.end;
            let outline = alike[0].and_then(|kind| self.outline(kind, &plans[range.clone()], &mut numbers));
            groups.push((range, outline));
        }
        let numbers = upload(&numbers, self.placement.device)?;
        let mut works = Vec::with_capacity(groups.len());
        for (range, outline) in groups {
            let plans = &plans[range.clone()];
            match outline {
                Some(outline) => works.push(Work::Ragged(self.ragged_group(plans, outline, &numbers)?)),
                None => works.extend(self.shares_of(plans, views[range].iter_mut(), &numbers)?.into_iter().map(Work::One)),
            }
        }
        let positions = numbers.f_narrow(0, rows, rows)?;
        let turning = match fused {
            Some(kernels) => Turning::Fused { kernels, positions, places: numbers.f_narrow(0, 2 * rows, 3 * rows)? },
            None => Turning::Angles(self.rotary.turning(&positions, self.placement.dtype.kind())?),
        };
        Ok((numbers.f_narrow(0, 0, rows)?, turning, works))
    }

    /// One by one, but for whole sequences of one length.
    fn shares_of<'a, 'b>(
        &self,
        plans: &'a [Plan<'a>],
        views: impl Iterator<Item = &'b mut (Option<View>, i64)>,
        numbers: &Tensor,
    ) -> Result<Vec<Share<'a>>, ModelError> {
        let mut shares: Vec<Share> = vec![];
        for (plan, (view, at)) in plans.iter().zip(views) {
            let length = plan.rows.len() as i64;
            let view = match (view.take(), &plan.seen) {
                (Some(view), _) => view,
                (None, Sight::First(_)) => View::Masked(self.mask_of_first(&numbers.f_narrow(0, *at, length)?, plan.visible)?),
                (None, Sight::Ancestors(_)) => {
                    let ancestors = numbers.f_narrow(0, *at, length * length)?.f_view([length, length])?;
                    View::Masked(self.mask_of_tree(&ancestors, plan.start)?)
                }
            };
            let cache = plan.cache.map(|cache| (cache, plan.start));
            let share =
                Share { first: plan.rows.start, length: plan.rows.len(), sequences: 1, cache, visible: plan.visible, view };
            if !shares.last_mut().is_some_and(|last| last.absorbs(&share)) {
                shares.push(share);
            }
        }
        Ok(shares)
    }

    /// Of several such segments, if a kernel takes them; whole ones of one length are one attention anyway.
    fn outline(&self, kind: Kinship, plans: &[Plan], numbers: &mut Vec<i64>) -> Option<Outline> {
        self.ragged?;
        let [first, _, ..] = plans else { return None };
        let equal = !kind.cached && plans.iter().all(|plan| plan.rows.len() == first.rows.len());
        let c = &self.config;
        let row_bytes = 2 * c.kv_heads * c.head_dim * self.placement.dtype.size();
        if equal { None } else { Outline::of(kind.causal, plans, c.layers, row_bytes, numbers) }
    }

    fn ragged_group<'a>(&self, plans: &'a [Plan<'a>], outline: Outline, numbers: &Tensor) -> Result<Group<'a>, ModelError> {
        let (count, all) = (plans.len() as i64, outline.numbers.len() as i64);
        let numbers = numbers.f_narrow(0, outline.numbers.start as i64, all)?.f_to_kind(Kind::Int)?;
        let (kv_heads, dim, kind) = (self.config.kv_heads as i64, self.config.head_dim as i64, self.placement.dtype.kind());
        let all_of = |skipped: i64| {
            let begins = (outline.address + skipped as usize * kind.elt_size_in_bytes()) as *const u8;
            let (size, strides) = ([outline.span as i64, kv_heads, dim], [2 * kv_heads * dim, dim, 1]);
            // SAFETY: nobody reads of it but the rows of the plans' caches, which outlive it: they lie at whole rows from the first one.
            unsafe { Tensor::f_from_blob(begins, &size, &strides, kind, self.placement.device) }
        };
        Ok(Group {
            plans,
            causal: outline.causal,
            rows: numbers.f_narrow(0, 0, count + 1)?,
            visible: numbers.f_narrow(0, count + 1, count)?,
            positions: numbers.f_narrow(0, 2 * count + 1, all - 2 * count - 1)?.f_view([-1, count + 1])?,
            kept: if outline.address > 0 { Some((all_of(0)?, all_of(kv_heads * dim)?)) } else { None },
        })
    }

    /// How a segment's rows see; if that takes a mask, `None` and where in `numbers` stands what it is made of.
    fn view(&self, plan: &Plan, numbers: &mut Vec<i64>) -> (Option<View>, i64) {
        let (at, rows) = (numbers.len() as i64, plan.rows.len());
        match view(&plan.seen, plan.visible).filter(|_| !plan.canonical) {
            Some(View::Causal) if !self.causal_is_plain(rows, plan.visible) => {}
            Some(view) => return (Some(view), at),
            None => {}
        }
        match &plan.seen {
            Sight::First(sees) => numbers.extend(sees.iter().map(|sees| *sees as i64)),
            Sight::Ancestors(parents) => {
                numbers.resize(numbers.len() + rows * rows, 0);
                let bits = &mut numbers[at as usize..];
                (0..rows)
                    .for_each(|row| kernel::lineage(parents, row).into_iter().for_each(|node| bits[row * rows + node] = 1));
            }
        }
        (None, at)
    }

    /// Whether a row's numbers are the same to the bit whatever rows are computed beside it.
    pub fn rows_are_independent(&self) -> bool {
        kernel::fits(self.placement.dtype.kind(), self.placement.device, self.config.head_dim) && !self.norm.requires_grad()
    }

    /// Checks a segment and appends its rows' positions.
    pub(super) fn plan<'a>(
        &self,
        segment: &Segment<'a>,
        first: usize,
        own: bool,
        positions: &mut Vec<usize>,
    ) -> Result<Plan<'a>, ModelError> {
        let (length, kept) = (segment.tokens.len(), segment.cache.map_or(0, KvCache::len));
        let inside = |position: usize| match position <= self.context() {
            true => Ok(()),
            false => Err(ModelError::TooLong { length: position, limit: self.context() }),
        };
        let start = if let Layout::Span { start, .. } = segment.layout { start } else { kept };
        if let Some(cache) = segment.cache
            && start + length > cache.capacity()
        {
            return Err(ModelError::CacheFull { needed: start + length, capacity: cache.capacity() });
        }
        let mut visible = start + length;
        let seen = match segment.layout {
            Layout::Whole(Attention::BlockCausal) => return Err(ModelError::Torch(super::BY_SPANS.into())),
            Layout::Whole(attention) => {
                positions.extend(0..length);
                let full = attention == Attention::Full;
                Sight::First((0..length).map(|row| if full { length } else { row + 1 }).collect())
            }
            Layout::Causal => {
                positions.extend(start..start + length);
                Sight::First((0..length).map(|row| start + row + 1).collect())
            }
            Layout::Tree(parents) => {
                positions.extend(depths(parents, length)?.into_iter().map(|depth| start + depth));
                Sight::Ancestors(parents)
            }
            Layout::Canonical(used) => {
                // Rows behind `used` are filling: they see the first position only, and nobody sees them.
                let last = self.context().saturating_sub(1);
                positions.extend((0..length).map(|row| (start + row).min(last)));
                visible = segment.cache.map_or(visible, KvCache::capacity);
                Sight::First((0..length).map(|row| if row < used { start + row + 1 } else { 1 }).collect())
            }
            Layout::Span { sees, .. } => {
                positions.extend(start..start + length);
                visible = sees.iter().copied().fold(visible, usize::max);
                let capacity = segment.cache.map_or(0, KvCache::capacity);
                if sees.len() != length || sees.contains(&0) || visible > capacity {
                    return Err(ModelError::Torch(
                        "a span must say for each token which of the cache's positions it sees".into(),
                    ));
                }
                Sight::First(sees.to_vec())
            }
        };
        inside(positions[positions.len() - length..].iter().map(|position| position + 1).max().unwrap_or(0))?;
        if segment.cache.is_none() && !matches!(segment.layout, Layout::Whole(_)) {
            return Err(ModelError::Torch("tokens that follow a cache were run without one".into()));
        }
        let scratch = match segment.cache {
            None if own => {
                let shape = [2, self.config.kv_heads, length, self.config.head_dim].map(|n| n as i64);
                let data = Tensor::f_empty(shape, (self.placement.dtype.kind(), self.placement.device))?;
                kernel::Slots::of(&data.f_get(0)?, &data.f_get(1)?)
            }
            _ => None,
        };
        let canonical = matches!(segment.layout, Layout::Canonical(_));
        Ok(Plan { cache: segment.cache, rows: first..first + length, start, visible, seen, canonical, scratch })
    }

    /// Attention of all segments by our own kernel.
    fn attend_few(
        &self,
        index: usize,
        layer: &Layer,
        qkv: &Tensor,
        positions: &[usize],
        plans: &[Plan],
    ) -> Result<Tensor, ModelError> {
        let spans = spans(plans, index).ok_or_else(|| ModelError::Torch("a segment has no place for its keys".into()))?;
        match kernel::attention(&self.shared(layer, positions), qkv, &spans)? {
            Some(mixed) => Ok(mixed),
            None => Err(ModelError::Torch("a forward was given tensors that its attention kernel does not take".into())),
        }
    }
}

/// Where each segment's keys and values of a layer are, and who sees which; `None` if one has no place.
pub(super) fn spans<'a>(plans: &'a [Plan<'a>], layer: usize) -> Option<Vec<kernel::Span<'a>>> {
    fn span<'a>(plan: &'a Plan, layer: usize) -> Option<kernel::Span<'a>> {
        let slots = match &plan.scratch {
            Some(scratch) => scratch,
            None => plan.cache?.slots(layer)?,
        };
        let seen = match &plan.seen {
            Sight::First(sees) => Seen::First(sees),
            Sight::Ancestors(parents) => Seen::Ancestors(parents),
        };
        Some(kernel::Span { rows: plan.rows.clone(), slots, start: plan.start, seen })
    }
    plans.iter().map(|plan| span(plan, layer)).collect()
}

/// Depth of every node of a tree.
fn depths(parents: &[usize], length: usize) -> Result<Vec<usize>, ModelError> {
    let ordered = parents.len() == length && parents.iter().enumerate().skip(1).all(|(node, parent)| *parent < node);
    if !ordered {
        return Err(ModelError::Torch("a tree's parents must stand before their children, one for each token".into()));
    }
    let mut depths = vec![0; length];
    for node in 1..length {
        depths[node] = depths[parents[node]] + 1;
    }
    Ok(depths)
}
