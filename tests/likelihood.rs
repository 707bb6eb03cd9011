//! Likelihoods against `transformers`' logits, and bounds against their exact value on texts short enough to mask in every way.

use std::path::{Path, PathBuf};

use lacuna::checkpoint::config::ModelConfig;
use lacuna::checkpoint::weights::{WeightFiles, WeightSource};
use lacuna::eval::likelihood::{Cut, LikelihoodError, MonteCarlo, Score, Windows, score};
use lacuna::model::Transformer;
use lacuna::model::family::Attention;
use lacuna::tensor::{Kind, Placement, Tensor};

const EFFORT: MonteCarlo = MonteCarlo { samples: 8192, batch: 16, seed: 3 };
const WHOLE: Windows = Windows { window: 64, overlap: 32 };

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(name: &str) -> (Transformer, u32) {
    let config = ModelConfig::read(&fixture(name).join("config.json")).unwrap();
    let files = WeightFiles::open(&fixture(name)).unwrap();
    let mut source = WeightSource { files: &files, placement: Placement::CPU_F32, loaded: &mut |_| {} };
    (Transformer::new(&config, Placement::CPU_F32, 4096, &mut source).unwrap(), config.mask_token_id.unwrap_or(0))
}

/// The fixture's first sequence of input, and what `transformers` made of it: `[seq, vocab]`.
fn reference(name: &str, logits: &str) -> (Vec<u32>, Tensor) {
    let tensors = Tensor::read_safetensors(fixture(name).join("reference.safetensors")).unwrap();
    let find = |wanted: &str| tensors.iter().find(|(name, _)| name == wanted).unwrap().1.get(0);
    let ids = Vec::<i64>::try_from(&find("input_ids")).unwrap().into_iter().map(|id| id as u32).collect();
    (ids, find(logits))
}

/// −Σ log p of the tokens at `places`, by rows of logits.
fn nats(logits: &Tensor, places: &[(i64, u32)]) -> f64 {
    let table = logits.to_kind(Kind::Double).log_softmax(-1, Kind::Double);
    places.iter().map(|(row, token)| -table.double_value(&[*row, i64::from(*token)])).sum()
}

fn near(found: &Score, exact: f64) {
    let (nats, error) = (found.nats, found.variance.sqrt());
    println!("{nats:.4} ± {error:.4}, exactly {exact:.4}");
    assert!(error > 0.0 && error < 0.02 * exact, "{nats} ± {error}");
    assert!((nats - exact).abs() < 4.0 * error, "{nats} ± {error} is not {exact}");
}

#[test]
fn every_token_is_scored_once_with_enough_before_it() {
    for (length, first, window, overlap) in
        [(100, 1, 10, 4), (100, 30, 10, 4), (9, 1, 10, 4), (10, 0, 10, 1), (5, 5, 4, 2), (0, 1, 4, 2)]
    {
        let cuts = Windows { window, overlap }.cut(length, first).unwrap();
        let scored: Vec<usize> = cuts.iter().flat_map(|cut| cut.targets.clone()).collect();
        assert_eq!(scored, (first..length).collect::<Vec<_>>());
        for (index, Cut { seen, targets }) in cuts.iter().enumerate() {
            assert!(seen.len() <= window && seen.end == targets.end && seen.start <= targets.start, "{cuts:?}");
            assert!((index == 0 && seen.start == 0) || targets.start - seen.start == overlap, "{cuts:?}");
        }
    }
    for (window, overlap) in [(4, 4), (4, 0)] {
        assert!(matches!(Windows { window, overlap }.cut(9, 1), Err(LikelihoodError::Window { .. })));
    }
}

#[test]
fn a_perplexity_is_that_of_transformers_logits() {
    for name in ["llama", "llama-rope", "qwen2", "qwen3"] {
        let (model, _) = load(name);
        let (ids, logits) = reference(name, "logits");
        let places: Vec<(i64, u32)> = (1..ids.len()).map(|position| (position as i64 - 1, ids[position])).collect();
        let mut windows = 0;
        let found = score(&model, None, &ids, 0, WHOLE, EFFORT, &mut || windows += 1).unwrap();
        let exact = nats(&logits, &places);
        assert!((found.nats - exact).abs() < 1e-4 * exact, "{name}: {} is not {exact}", found.nats);
        assert_eq!((found.tokens, found.variance, windows), (ids.len() - 1, 0.0, 1));
        // A prompt is not scored.
        let behind = score(&model, None, &ids, 10, WHOLE, EFFORT, &mut || ()).unwrap();
        let exact = nats(&logits, &places[9..]);
        assert!((behind.nats - exact).abs() < 1e-4 * exact && behind.tokens == ids.len() - 10, "{name}");
        // Windows: the second sees its overlap and nothing before.
        let cut = score(&model, None, &ids, 0, Windows { window: 14, overlap: 4 }, EFFORT, &mut || ()).unwrap();
        let first = score(&model, None, &ids[..14], 0, WHOLE, EFFORT, &mut || ()).unwrap();
        let second = score(&model, None, &ids[10..24], 4, WHOLE, EFFORT, &mut || ()).unwrap();
        assert!((cut.nats - first.nats - second.nats).abs() < 1e-9 && cut.tokens == 23, "{name}");
    }
}

/// The bound of `targets` (indices into `tokens`) by every way to mask them: Σ over k of 1/n · the mean over all masks of k of n/k · Σ of
/// the masked tokens' cross-entropies.
fn exactly(tokens: &[u32], targets: &[usize], mask: u32, shift: usize, logits: impl Fn(&[u32]) -> Tensor) -> f64 {
    let n = targets.len();
    let mut by_count = vec![(0.0, 0.0); n + 1];
    for subset in 1_u32..1 << n {
        let chosen: Vec<usize> = (0..n).filter(|bit| subset >> bit & 1 == 1).map(|bit| targets[bit]).collect();
        let mut noisy = tokens.to_vec();
        chosen.iter().for_each(|position| noisy[*position] = mask);
        let places: Vec<(i64, u32)> = chosen.iter().map(|position| ((position - shift) as i64, tokens[*position])).collect();
        by_count[chosen.len()].0 += nats(&logits(&noisy), &places);
        by_count[chosen.len()].1 += 1.0;
    }
    (1..=n).map(|k| by_count[k].0 / by_count[k].1 / k as f64).sum()
}

fn tensor(tokens: &[u32]) -> Tensor {
    Tensor::from_slice(&tokens.iter().map(|id| i64::from(*id)).collect::<Vec<_>>()).view([1, -1])
}

#[test]
fn a_bound_by_monte_carlo_is_the_exact_one_within_its_error() {
    for (name, shift) in [("llada", 0), ("llada-tied", 0), ("dream", 1)] {
        let (model, mask) = load(name);
        let ids: Vec<u32> = reference(name, "logits").0[..11].to_vec();
        let targets: Vec<usize> = (5..11).collect();
        let exact = tch::no_grad(|| {
            exactly(&ids, &targets, mask, shift, |noisy| {
                model.logits(&model.hidden(&tensor(noisy), Attention::Full).unwrap().squeeze_dim(0)).unwrap()
            })
        });
        let found = score(&model, Some(mask), &ids, 5, WHOLE, EFFORT, &mut || ()).unwrap();
        near(&found, exact);
        assert_eq!(found.tokens, 6);
        // Of a single token there is nothing to draw: it is masked, and that is all.
        let one = score(&model, Some(mask), &ids, 10, WHOLE, EFFORT, &mut || ()).unwrap();
        let hidden = tch::no_grad(|| model.hidden(&tensor(&[&ids[..10], &[mask]].concat()), Attention::Full).unwrap());
        let alone = nats(&tch::no_grad(|| model.logits(&hidden.squeeze_dim(0)).unwrap()), &[(10 - shift as i64, ids[10])]);
        assert!((one.nats - alone).abs() < 1e-4 && one.variance < 1e-8, "{name}: {one:?} is not {alone}");
        let again = score(&model, Some(mask), &ids, 5, WHOLE, EFFORT, &mut || ()).unwrap();
        assert_eq!(again, found, "the same seed draws the same masks");
    }
    let (model, _) = load("llada");
    assert!(matches!(score(&model, None, &[5; 9], 0, WHOLE, EFFORT, &mut || ()), Err(LikelihoodError::Unsupported(_))));
}

/// A block-causal model's blocks are bounded one by one, each over the clean ones before it.
#[test]
fn the_bound_of_blocks_is_the_sum_of_theirs() {
    let (model, mask) = load("sdar");
    let block = model.config().block_length.unwrap();
    assert_eq!(block, 4);
    let ids: Vec<u32> = (0..10).map(|i| (i * 37 + 11) % 150).collect();
    let row_sees = |row: usize, column: usize| column / block <= row / block;
    let logits = |noisy: &[u32]| {
        let sees: Vec<bool> =
            (0..noisy.len()).flat_map(|row| (0..noisy.len()).map(move |column| row_sees(row, column))).collect();
        let sees = Tensor::from_slice(&sees).view([noisy.len() as i64, noisy.len() as i64]);
        let positions: Vec<usize> = (0..noisy.len()).collect();
        model.logits(&model.hidden_where(&tensor(noisy), &positions, &sees).unwrap().squeeze_dim(0)).unwrap()
    };
    // Of the first block two tokens are prompt, the last block has two tokens.
    let exact = tch::no_grad(|| {
        [2..4, 4..8, 8..10]
            .map(|targets| exactly(&ids[..targets.end], &targets.collect::<Vec<_>>(), mask, 0, logits))
            .iter()
            .sum()
    });
    near(&score(&model, Some(mask), &ids, 2, WHOLE, EFFORT, &mut || ()).unwrap(), exact);
    let (model, mask) = load("fast-dllm-v2");
    assert!(matches!(score(&model, Some(mask), &ids, 2, WHOLE, EFFORT, &mut || ()), Err(LikelihoodError::Unsupported(_))));
}
