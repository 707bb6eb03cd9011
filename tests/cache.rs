//! Decoding over a cache is decoding without one: tokens against `transformers`' greedy generation, hidden states and keys against
//! whole forwards, paths of trees against the same tokens run in order.

mod common;

use common::*;
use lacuna::checkpoint::config::ModelConfig;
use lacuna::model::cache::KvCache;
use lacuna::model::family::Attention;
use lacuna::model::{Layout, ModelError, RandomWeights, Segment, Transformer};
use lacuna::tensor::Tensor;
use serde_json::Value;

/// All share one key head between two query heads, so grouped attention is in each of them; qwen2 has biases, qwen3 norms of
/// queries and keys, llama-rope scaled rotations.
const FAMILIES: [&str; 4] = ["llama", "llama-rope", "qwen2", "qwen3"];

fn cache(model: &Transformer, capacity: usize) -> KvCache {
    KvCache::new(model.config(), model.placement(), capacity).unwrap()
}

/// One sequence's forward, `[1, tokens, hidden]`.
fn extend(model: &Transformer, tokens: &[u32], layout: Layout, cache: &KvCache) -> Result<Tensor, ModelError> {
    tch::no_grad(|| Ok(model.forward(&[Segment { tokens, layout, cache: Some(cache) }])?.unsqueeze(0)))
}

/// Runs `tokens` in chunks behind what the cache keeps; gives all hidden states, `[1, tokens, hidden]`.
fn run(model: &Transformer, cache: &mut KvCache, tokens: &[u32], chunk: usize) -> Tensor {
    let chunks = tokens.chunks(chunk).map(|chunk| {
        let hidden = extend(model, chunk, Layout::Causal, cache).unwrap();
        cache.keep(&(0..chunk.len()).collect::<Vec<_>>()).unwrap();
        hidden
    });
    Tensor::cat(&chunks.collect::<Vec<_>>(), 1)
}

/// Tokens that differ from their neighbours, whatever the vocabulary of 160.
fn text(length: u32) -> Vec<u32> {
    (0..length).map(|at| (at * 37 + at * at * 11 + 5) % 160).collect()
}

fn assert_near(ours: &Tensor, original: &Tensor, what: &str) {
    let error = relative_error(ours, original);
    assert!(error <= 1e-5, "{what}: relative error {error}");
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let mut compared = 0;
    for name in FAMILIES {
        let model = load(name, F32);
        assert!(model.config().heads > model.config().kv_heads, "{name} has no grouped attention to test");
        for case in cases(&format!("{name}/decode.json")) {
            let prompt: Vec<u32> = parse(&case["prompt"]);
            let output: Vec<u32> = parse(&case["output"]);
            let length = parse(&case["params"]["max_new_tokens"]);
            for chunk in [512, 3] {
                let parameters = lacuna::decode::autoregressive::Parameters { chunk, ..plain() };
                let told = drive(&model, &Default::default(), parameters, &prompt, length);
                assert_eq!(told.tokens(), output[prompt.len()..], "{name}, {}, chunks of {chunk}", case["name"]);
                assert_eq!(told.usage.forwards.prefill, prompt.len().div_ceil(chunk));
                assert_eq!(told.usage.forwards.decode, length - 1);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 24);
}

#[test]
fn chunks_of_any_size_give_the_states_and_keys_of_the_whole() {
    for name in FAMILIES {
        let model = load(name, F32);
        let tokens = text(41);
        let original = tch::no_grad(|| model.hidden(&ids(&tokens), Attention::Causal).unwrap());
        let mut whole = cache(&model, 48);
        assert_near(&run(&model, &mut whole, &tokens, 41), &original, name);
        for chunk in [1, 3, 7] {
            let mut parts = cache(&model, 48);
            let hidden = run(&model, &mut parts, &tokens, chunk);
            assert_near(&hidden, &original, &format!("{name} in chunks of {chunk}"));
            assert_eq!(parts.len(), 41);
            assert_near(&parts.kept().unwrap(), &whole.kept().unwrap(), &format!("{name}'s keys in chunks of {chunk}"));
        }
    }
}

/// Three candidates that share a beginning, as they follow 17 tokens: 0 - 1 - 2 - 3
///                                                                       \- 4 - 5   2 - 6
const PARENTS: [usize; 7] = [0, 0, 1, 2, 0, 4, 2];
const TREE: [u32; 7] = [9, 21, 33, 45, 57, 69, 81];

#[test]
fn a_tree_is_every_one_of_its_paths() {
    for name in FAMILIES {
        let model = load(name, F32);
        let (before, next) = (text(17), [101u32, 7]);
        for path in [vec![0], vec![0, 1, 2, 3], vec![0, 4, 5], vec![0, 1, 2, 6], vec![0, 1]] {
            let mut tree = cache(&model, 40);
            let _ = run(&model, &mut tree, &before, 5);
            let hidden = extend(&model, &TREE, Layout::Tree(&PARENTS), &tree).unwrap();
            let accepted: Vec<u32> = path.iter().map(|node| TREE[*node]).collect();
            let mut fresh = cache(&model, 40);
            let all = [before.as_slice(), &accepted].concat();
            let states = run(&model, &mut fresh, &all, all.len());
            let nodes = Tensor::from_slice(&path.iter().map(|node| *node as i64).collect::<Vec<_>>());
            let expected = states.narrow(1, 17, path.len() as i64);
            assert_near(&hidden.index_select(1, &nodes), &expected, &format!("{name}: states along {path:?}"));
            // Keeping the path leaves what those tokens in order would have left, and nothing of the others.
            tree.keep(&path).unwrap();
            assert_eq!(tree.len(), 17 + path.len());
            assert_near(&tree.kept().unwrap(), &fresh.kept().unwrap(), &format!("{name}: keys of {path:?}"));
            let (ours, theirs) = (run(&model, &mut tree, &next, 1), run(&model, &mut fresh, &next, 1));
            assert_near(&ours, &theirs, &format!("{name}: what follows {path:?}"));
        }
    }
}

/// What is rejected leaves no trace: other rejected tokens in the same places give the same bits afterwards.
#[test]
fn what_is_not_kept_is_out_of_reach() {
    let model = load("qwen3", F32);
    let after = |rejected: [u32; 3]| {
        let mut cache = cache(&model, 40);
        let _ = run(&model, &mut cache, &text(11), 4);
        let tokens = [9, rejected[0], 33, rejected[1], rejected[2]];
        let _ = extend(&model, &tokens, Layout::Tree(&[0, 0, 0, 1, 1]), &cache).unwrap();
        cache.keep(&[0, 2]).unwrap();
        let next = run(&model, &mut cache, &[7], 1);
        // Several tokens at a time look over the same places.
        Tensor::cat(&[next, run(&model, &mut cache, &[3, 4], 2)], 1)
    };
    assert_eq!(after([1, 2, 3]), after([150, 151, 152]));
    // And so does a fixed-width forward, whose filling sees and is seen by nobody.
    let canonical = |dirt: &[u32], used: &[u32]| {
        let mut cache = cache(&model, 40);
        let _ = run(&model, &mut cache, &text(11), 4);
        let _ = run(&model, &mut cache, dirt, dirt.len());
        cache.truncate(11);
        let mut tokens = used.to_vec();
        tokens.resize(8, 0);
        let hidden = extend(&model, &tokens, Layout::Canonical(used.len()), &cache).unwrap();
        hidden.narrow(1, 0, 1)
    };
    assert_eq!(canonical(&[1, 2, 3], &[9]), canonical(&[150, 151, 152, 153], &[9]));
    assert_eq!(canonical(&[1], &[9]), canonical(&[1], &[9, 8, 7, 6, 5, 4, 3, 2]), "a row does not see those behind it");
}

#[test]
fn a_truncated_cache_is_the_shorter_one() {
    let model = load("llama", F32);
    let tokens = text(20);
    let mut long = cache(&model, 32);
    let _ = run(&model, &mut long, &tokens, 20);
    long.truncate(40);
    assert_eq!(long.len(), 20, "it does not grow");
    long.truncate(12);
    let mut short = cache(&model, 32);
    let _ = run(&model, &mut short, &tokens[..12], 12);
    assert_eq!(long.len(), 12);
    assert_near(&long.kept().unwrap(), &short.kept().unwrap(), "keys");
    assert_near(&run(&model, &mut long, &[5, 6], 2), &run(&model, &mut short, &[5, 6], 2), "what follows");
    long.truncate(0);
    assert!(long.is_empty());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let model = load("llama", F32);
    let mut cache = cache(&model, 8);
    let _ = run(&model, &mut cache, &text(6), 6);
    let before = cache.kept().unwrap();
    let refused = |tokens: &[u32], layout: Layout| extend(&model, tokens, layout, &cache).unwrap_err();
    for layout in [Layout::Causal, Layout::Tree(&[0, 0, 1]), Layout::Canonical(1)] {
        let error = refused(&[1, 2, 3], layout);
        assert!(matches!(error, ModelError::CacheFull { needed: 9, capacity: 8 }), "{error}");
    }
    for parents in [&[0, 2][..], &[0, 1], &[0], &[0, 0, 0]] {
        assert!(matches!(refused(&[1, 2], Layout::Tree(parents)), ModelError::Torch(_)), "{parents:?}");
    }
    assert_eq!(cache.kept().unwrap(), before);
    assert_eq!(cache.len(), 6);
}

#[test]
fn positions_beyond_the_context_are_refused() {
    let placement = F32;
    let config = llama_config(20, 16, 1);
    let model = Transformer::new(&config, placement, 10, &mut RandomWeights { placement }).unwrap();
    let mut cache = cache(&model, 32);
    let _ = run(&model, &mut cache, &[1; 9], 9);
    let refused = |tokens: &[u32], layout: Layout| extend(&model, tokens, layout, &cache).unwrap_err();
    for (tokens, layout) in [(&[1, 2][..], Layout::Causal), (&[1, 2], Layout::Tree(&[0, 0]))] {
        let error = refused(tokens, layout);
        assert!(matches!(error, ModelError::TooLong { length: 11, limit: 10 }), "{error}");
    }
    // Siblings share a position, and filling needs none.
    cache.truncate(8);
    let _ = extend(&model, &[1, 2, 3], Layout::Tree(&[0, 0, 0]), &cache).unwrap();
    let _ = extend(&model, &[1; 8], Layout::Canonical(2), &cache).unwrap();
}

#[test]
fn a_cache_takes_the_room_that_its_heads_need() {
    let json: Value = serde_json::from_slice(&std::fs::read(fixture("llama/config.json")).unwrap()).unwrap();
    let config = ModelConfig::from_json(&json).unwrap();
    for placement in [F32, BF16] {
        let cache = KvCache::new(&config, placement, 10).unwrap();
        let numbers = config.layers * 2 * config.kv_heads * 10 * config.head_dim;
        assert_eq!(cache.bytes(), numbers * placement.dtype.size());
        assert_eq!((cache.capacity(), cache.len()), (10, 0));
    }
}

/// Windows of every kind and length in one forward are the windows alone: to the bit by our kernels, within rounding by libtorch.
#[test]
fn a_forward_for_many_sequences_is_each_of_them_alone() {
    for (name, placement) in FAMILIES.into_iter().flat_map(|name| [(name, F32), (name, BF16)]) {
        let model = load(name, placement);
        let texts: Vec<Vec<u32>> = [9, 1, 30, 17, 40, 5].into_iter().map(text).collect();
        let mut caches: Vec<KvCache> = (0..4).map(|_| cache(&model, 64)).collect();
        for (cache, length) in caches.iter_mut().zip([2, 21, 3, 11]) {
            let _ = run(&model, cache, &text(length), 8);
        }
        let sees: Vec<usize> = (0..17).map(|row| if row < 8 { 11 } else { 20 }).collect();
        let span = Layout::Span { start: 3, sees: &sees };
        let layouts = [Layout::Causal, Layout::Causal, Layout::Whole(Attention::Full), span, Layout::Whole(Attention::Causal)];
        let places = [Some(0), Some(1), None, Some(2), None];
        let mut segments: Vec<Segment> = (0..5)
            .map(|at| Segment { tokens: &texts[at], layout: layouts[at], cache: places[at].map(|place| &caches[place]) })
            .collect();
        let tree = Segment { tokens: &TREE, layout: Layout::Tree(&PARENTS), cache: Some(&caches[3]) };
        segments.insert(2, tree);
        tch::no_grad(|| {
            let together = model.forward(&segments).unwrap();
            let mut first = 0;
            for (index, segment) in segments.iter().enumerate() {
                let rows = segment.tokens.len() as i64;
                let (ours, alone) = (together.narrow(0, first, rows), model.forward(&[*segment]).unwrap());
                if model.rows_are_independent() {
                    assert_eq!(ours, alone, "{name}, {placement:?}, segment {index}");
                } else if placement == F32 {
                    assert_near(&ours, &alone, &format!("{name}, segment {index}"));
                }
                first += rows;
            }
            // And whole windows are what the plain form of the network gives.
            let whole = model.hidden(&ids(&texts[2]), Attention::Full).unwrap().squeeze_dim(0);
            let alone = model.forward(&[Segment { tokens: &texts[2], layout: layouts[2], cache: None }]).unwrap();
            if placement == F32 {
                assert_near(&alone, &whole, name);
            }
        });
    }
}

/// A block seen by all its tokens, over what is kept; then the block before it with its final tokens and the next one in one forward.
#[test]
fn spans_are_blocks_over_a_cache() {
    let model = load("qwen3", F32);
    let tokens = text(24);
    let by_blocks = |rows: usize| (0..rows).map(|row| row / 8 * 8 + 8).collect::<Vec<_>>();
    let mut whole = cache(&model, 24);
    let all = by_blocks(24);
    let expected = extend(&model, &tokens, Layout::Span { start: 0, sees: &all }, &whole).unwrap();
    whole.keep(&(0..24).collect::<Vec<_>>()).unwrap();
    let mut parts = cache(&model, 24);
    let first = extend(&model, &tokens[..8], Layout::Span { start: 0, sees: &[8; 8] }, &parts).unwrap();
    parts.keep(&[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    // A step whose keys are not kept leaves no trace.
    let _ = extend(&model, &[3; 8], Layout::Span { start: 8, sees: &[16; 8] }, &parts).unwrap();
    let sees: Vec<usize> = by_blocks(16).iter().map(|sees| sees + 8).collect();
    let rest = extend(&model, &tokens[8..], Layout::Span { start: 8, sees: &sees }, &parts).unwrap();
    parts.keep(&(0..16).collect::<Vec<_>>()).unwrap();
    assert_near(&Tensor::cat(&[first, rest], 1), &expected, "states");
    assert_near(&parts.kept().unwrap(), &whole.kept().unwrap(), "keys");
    for sees in [&[8, 8, 25][..], &[8, 8], &[8, 0, 8]] {
        let refused = extend(&model, &[1, 2, 3], Layout::Span { start: 0, sees }, &whole).unwrap_err();
        assert!(matches!(refused, ModelError::Torch(_)), "{sees:?}: {refused}");
    }
}

#[test]
fn all_of_this_holds_on_libtorch_alone() {
    again_without_kernels("all_of_this_holds");
}

#[test]
fn all_of_this_holds_by_the_kernels_of_gpus() {
    again_with_fused_kernels("all_of_this_holds", &[]);
}
