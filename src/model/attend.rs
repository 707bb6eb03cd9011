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
use crate::tensor::fused::Turn;
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
    /// Of the first cache in memory, and how many rows of caches there are from there on; 0 without caches.
    pub address: usize,
    pub span: usize,
}

/// What turns queries and keys, and brings keys and values to their places.
pub(super) enum Turning {
    /// Cosines and sines of each row; keys are written sequence by sequence.
    Angles((Tensor, Tensor)),
    /// One kernel does it all: positions, and [`Turn::places`].
    Fused { positions: Tensor, places: Tensor },
}

/// What a [`Group`] is made of: its numbers (`rows`, `visible` and `positions`, one behind the other) are some of those that go to the device.
pub(super) struct Outline {
    pub address: usize,
    pub span: usize,
    pub numbers: Range<usize>,
}

impl Outline {
    /// Puts the numbers behind the others; `None`, and none of them, where caches are no whole rows apart, or too far.
    pub fn of(plans: &[Plan], layers: usize, row_bytes: usize, numbers: &mut Vec<i64>) -> Option<Self> {
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
        Some(Self { address, span, numbers: begun..numbers.len() })
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
        let angles = match (turning, self.fused) {
            (Turning::Fused { positions, places }, Some(fused)) => {
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
                return match unsafe { fused.turned(&qkv, &turn)? } {
                    true => Ok((qkv, true)),
                    false => Err(ModelError::Torch("a forward was given tensors that its kernels do not take".into())),
                };
            }
            (Turning::Fused { .. }, None) => return Err(ModelError::Torch("a forward's kernels are gone".into())),
            (Turning::Angles(angles), _) => angles,
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
        let (key, value, layer) = if group.address == 0 {
            (part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?, 0)
        } else {
            for (plan, cache) in group.plans.iter().filter_map(|plan| Some((plan, plan.cache?))).filter(|_| !written) {
                let new = qkv.f_narrow(0, plan.rows.start as i64, plan.rows.len() as i64)?.f_narrow(1, heads, 2 * kv_heads)?;
                let _seen = cache.write(index, plan.start, &new.f_view_([-1, 2, kv_heads, dim])?, plan.visible)?;
            }
            let kind = qkv.f_kind()?;
            let of = |skipped: i64| {
                let begins = (group.address + skipped as usize * kind.elt_size_in_bytes()) as *const u8;
                let (size, strides) = ([group.span as i64, kv_heads, dim], [2 * kv_heads * dim, dim, 1]);
                // SAFETY: nobody reads of it but the rows of the group's caches, which outlive it: they lie at whole rows from the first one.
                unsafe { Tensor::f_from_blob(begins, &size, &strides, kind, qkv.device()) }
            };
            (of(0)?, of(kv_heads * dim)?, index as i64)
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
mod tests {
    use super::*;
    use crate::checkpoint::config::ModelConfig;
    use crate::model::family::Attention;
    use crate::model::forward::Way;
    use crate::model::{Layout, RandomWeights, Segment};
    use crate::tensor::{Device, Dtype, Placement};

    /// Grouped queries, and norms of queries and keys.
    fn config() -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "vocab_size": 100,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": true,
        });
        ModelConfig::from_json(&json).unwrap()
    }

    /// Every layout, in one forward: what our kernels make of it, at once and one by one, and libtorch.
    #[test]
    fn every_layout_is_attended_alike_by_both() {
        let config = config();
        let (tree, chain) = ([0, 0, 0, 1, 1, 2], [0, 0, 1, 2]);
        let blocks = [4, 4, 4, 4, 8, 8, 8, 8];
        let cases: Vec<(usize, usize, Layout)> = vec![
            (0, 7, Layout::Whole(Attention::Full)),
            (0, 7, Layout::Whole(Attention::Full)),
            (0, 5, Layout::Whole(Attention::Full)),
            (0, 5, Layout::Whole(Attention::Causal)),
            (0, 9, Layout::Causal),
            (9, 5, Layout::Causal),
            (11, 1, Layout::Causal),
            (9, 6, Layout::Tree(&tree)),
            (9, 4, Layout::Tree(&chain)),
            (9, 5, Layout::Canonical(3)),
            (12, 4, Layout::Span { start: 12, sees: &[16; 4] }),
            (12, 4, Layout::Span { start: 4, sees: &[12; 4] }),
            (12, 8, Layout::Span { start: 0, sees: &blocks }),
        ];
        for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 0.06)] {
            let placement = Placement { device: Device::Cpu, dtype };
            let mut model = Transformer::new(&config, placement, 64, &mut RandomWeights { placement }).unwrap();
            assert!(model.rows_are_independent());
            let run = |way: Way, model: &Transformer| {
                let begun = |(kept, rows, layout): &(usize, usize, Layout)| {
                    let own = way != Way::Libtorch;
                    let mut cache = KvCache::of(&config, placement, 24, own).unwrap();
                    // What is masked must be a number.
                    cache.append(&Tensor::zeros([2, 2, 2, 24, 16], (dtype.kind(), Device::Cpu)), 24).unwrap();
                    cache.truncate(0);
                    let before: Vec<u32> = (0..*kept as u32).map(|at| (at * 7 + *rows as u32) % 100).collect();
                    if *kept > 0 {
                        let segment = Segment { tokens: &before, layout: Layout::Causal, cache: Some(&cache) };
                        let _written = model.forward_by(&[segment], if own { Way::AtOnce } else { way }).unwrap();
                        cache.keep(&(0..*kept).collect::<Vec<_>>()).unwrap();
                    }
                    let tokens: Vec<u32> = (0..*rows as u32).map(|at| (at * 13 + 5 * *kept as u32) % 100).collect();
                    (cache, tokens, matches!(layout, Layout::Whole(_)))
                };
                tch::no_grad(|| {
                    let mut begun: Vec<(KvCache, Vec<u32>, bool)> = cases.iter().map(begun).collect();
                    let segments = begun.iter().zip(&cases).map(|((cache, tokens, whole), (_, _, layout))| Segment {
                        tokens,
                        layout: *layout,
                        cache: (!whole).then_some(cache),
                    });
                    let hidden = model.forward_by(&segments.collect::<Vec<_>>(), way).unwrap();
                    let caches = begun.iter_mut().map(|(cache, tokens, _)| {
                        cache.keep(&(0..tokens.len()).collect::<Vec<_>>()).unwrap();
                        cache.kept().unwrap().reshape([-1])
                    });
                    (hidden.to_kind(Kind::Float), Tensor::cat(&caches.collect::<Vec<_>>(), 0))
                })
            };
            let (ours, our_keys) = run(Way::AtOnce, &model);
            let (single, single_keys) = run(Way::Kernels, &model);
            assert!(ours.equal(&single) && our_keys.equal(&single_keys), "{dtype:?}: one launch gives other numbers than many");
            // As it is, and with what a GPU has: the many at once, fused kernels, both.
            for (ragged, fused) in [(false, false), (true, false), (false, true), (true, true)] {
                model.ragged = ragged.then_some(flash::one_by_one);
                model.fused = fused.then(crate::tensor::fused::tests::emulated);
                let (theirs, their_keys) = run(Way::Libtorch, &model);
                let with = format!("{dtype:?}, ragged {ragged}, fused {fused}");
                let mut first = 0;
                for (case, (_, rows, layout)) in cases.iter().enumerate() {
                    let part = |hidden: &Tensor| hidden.narrow(0, first, *rows as i64);
                    let error = (part(&ours) - part(&theirs)).abs().max().double_value(&[]);
                    assert!(error < tolerance, "{with}, case {case}, {layout:?}: off by {error}");
                    first += *rows as i64;
                }
                let error = (&our_keys - their_keys).abs().max().double_value(&[]);
                assert!(error < tolerance, "{with}: keys and values are off by {error}");
            }
            (model.ragged, model.fused) = (None, None);
        }
    }

    #[test]
    fn masks_are_for_those_who_need_one() {
        let first = |sees: &[usize], visible| view(&Sight::First(sees.to_vec()), visible);
        assert!(matches!(first(&[9; 3], 9), Some(View::Full)));
        assert!(matches!(first(&[7, 8, 9], 9), Some(View::Causal)));
        assert!(matches!(first(&[9], 9), Some(View::Full)));
        assert!(first(&[7, 8, 9], 10).is_none() && first(&[4, 4, 8], 8).is_none() && first(&[8, 9, 9], 9).is_none());
        assert!(matches!(view(&Sight::Ancestors(&[0, 0, 1, 2]), 12), Some(View::Causal)));
        assert!(matches!(view(&Sight::Ancestors(&[0]), 12), Some(View::Full)));
        assert!(view(&Sight::Ancestors(&[0, 0, 0]), 12).is_none());
    }

    /// Whole sequences side by side are one operation where they are of one length and kind.
    #[test]
    fn whole_sequences_of_one_length_attend_together() {
        let share = |first, length, view| Share { first, length, sequences: 1, cache: None, visible: length, view };
        let mut share_of = share(0, 4, View::Full);
        assert!(share_of.absorbs(&share(4, 4, View::Full)) && share_of.absorbs(&share(8, 4, View::Full)));
        assert_eq!(share_of.sequences, 3);
        assert!(!share_of.absorbs(&share(12, 5, View::Full)) && !share_of.absorbs(&share(12, 4, View::Causal)));
    }

    /// What attends together: sequences that agree in a diagonal and in having a cache, where they stand side by side.
    #[test]
    fn sequences_of_many_lengths_are_one_attention_if_they_need_no_mask() {
        let (config, placement) = (config(), Placement::CPU_F32);
        let mut model = Transformer::new(&config, placement, 64, &mut RandomWeights { placement }).unwrap();
        model.ragged = Some(flash::one_by_one);
        let caches: Vec<KvCache> = [9, 17, 24, 12].map(|room| KvCache::of(&config, placement, room, false).unwrap()).into();
        let tokens = [7u32; 8];
        let whole = |length| (length, Layout::Whole(Attention::Full), None);
        let next = |length, cache: usize| (length, Layout::Causal, Some(&caches[cache]));
        let span = |sees: &'static [usize], cache: usize| (sees.len(), Layout::Span { start: 0, sees }, Some(&caches[cache]));
        let tree = (3, Layout::Tree(&[0, 0, 0]), Some(&caches[0]));
        let found = |asked: &[(usize, Layout, Option<&KvCache>)]| {
            let (mut positions, mut rows, mut plans) = (vec![], 0, vec![]);
            for (length, layout, cache) in asked {
                let segment = Segment { tokens: &tokens[..*length], layout: *layout, cache: *cache };
                plans.push(model.plan(&segment, rows, false, &mut positions).unwrap());
                rows += length;
            }
            let (_, _, works) = model.ready(vec![7; rows], &positions, &plans).unwrap();
            let told = works.iter().map(|work| match work {
                Work::One(share) => share.sequences.to_string(),
                Work::Ragged(group) => format!("{} {}", group.plans.len(), if group.causal { "causal" } else { "full" }),
            });
            told.collect::<Vec<_>>().join(", ")
        };
        assert_eq!(found(&[whole(3), whole(3), whole(3)]), "3", "of one length");
        assert_eq!(found(&[whole(3), whole(5), whole(3)]), "3 full");
        assert_eq!(found(&[next(1, 0), next(1, 1), next(4, 2)]), "3 causal", "a single row sees the same either way");
        assert_eq!(found(&[span(&[4; 4], 0), span(&[6; 6], 1), next(3, 2), next(2, 3)]), "2 full, 2 causal");
        assert_eq!(found(&[whole(3), next(2, 0), next(2, 1), tree, next(1, 2)]), "1, 2 causal, 1, 1", "masks go alone");
        assert_eq!(found(&[next(2, 3)]), "1", "one alone is split over the device otherwise");
    }
}
