//! Every way to attend comes to the same, and what can be one operation is one.

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

/// Caches of our own kernel's order have no rows to write to.
#[test]
fn keys_go_to_caches_of_either_order() {
    let (config, placement) = (config(), Placement::CPU_F32);
    let mut model = Transformer::new(&config, placement, 64, &mut RandomWeights { placement }).unwrap();
    model.fused = Some(crate::tensor::fused::tests::emulated());
    let kept = [false, true].map(|own| {
        let mut cache = KvCache::of(&config, placement, 24, own).unwrap();
        let segment = Segment { tokens: &[3, 5, 7, 9], layout: Layout::Causal, cache: Some(&cache) };
        let _states = tch::no_grad(|| model.forward_by(&[segment], Way::Libtorch)).unwrap();
        cache.keep(&[0, 1, 2, 3]).unwrap();
        cache.kept().unwrap()
    });
    assert!(kept[0].allclose(&kept[1], 1e-5, 1e-6, false) && kept[0].abs().min().double_value(&[]) > 0.0);
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
