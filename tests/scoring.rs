//! Likelihoods of given texts, against logits that `transformers` computed (tests/reference/make_transformers.py).

mod common;

use std::time::Duration;

use common::{F32, TOKENIZER, fixture, load, tensors};
use lacuna::decode::Sampling;
use lacuna::decode::autoregressive::scoring::{Parameters, Scoring};
use lacuna::draft::Drafters;
use lacuna::engine::runner::{self, Residence};
use lacuna::engine::scoring::Likelihood;
use lacuna::engine::sequence::Sequence;
use lacuna::model::Transformer;
use lacuna::tensor::{Kind, Tensor};

/// Scores `tokens` from `given` on, as the engine does, `chunk` at a time.
fn scored(model: &Transformer, tokens: &[u32], given: usize, chunk: usize) -> (Likelihood, usize) {
    let parameters = Parameters { text: tokens[given..].to_vec(), chunk, sampling: Sampling::default() };
    let decoder = Scoring::new(parameters, &tokens[..given]);
    let mut sequence = Sequence::new(Box::new(decoder), vec![], vec![], Duration::ZERO).with_logprobs();
    let mut residence = Residence::new(model, &sequence).unwrap();
    let mut found = Likelihood::default();
    while sequence.window().is_some() {
        let events = runner::step(model, &Drafters::default(), &mut sequence, &mut residence, &TOKENIZER).unwrap();
        events.iter().for_each(|event| found.take(event));
    }
    (found, sequence.usage().forwards.prefill)
}

#[test]
fn likelihoods_are_those_of_the_originals_logits() {
    for name in ["llama", "qwen2", "qwen3"] {
        let model = load(name, F32);
        let reference = tensors(&fixture(name).join("reference.safetensors"));
        let (ids, logits) = (reference("input_ids"), reference("logits"));
        for row in 0..2 {
            let tokens: Vec<i64> = Vec::try_from(ids.get(row)).unwrap();
            let tokens: Vec<u32> = tokens.into_iter().map(|id| id as u32).collect();
            let logs: Tensor = logits.get(row).to_kind(Kind::Double).log_softmax(-1, Kind::Double);
            for given in [1, 5, 23] {
                let own = |at: usize| -logs.double_value(&[at as i64 - 1, i64::from(tokens[at])]);
                let expected: f64 = (given..tokens.len()).map(own).sum();
                for chunk in [1, 3, 16, 512] {
                    let (found, forwards) = scored(&model, &tokens, given, chunk);
                    assert_eq!((found.tokens, forwards), (24 - given, 23_usize.div_ceil(chunk)), "{name} from {given}");
                    let error = (found.negative_log - expected).abs() / expected;
                    assert!(error < 1e-5, "{name} from {given}: {} is not {expected}", found.negative_log);
                    let perplexity = (expected / found.tokens as f64).exp();
                    assert!((found.perplexity().unwrap() / perplexity - 1.0).abs() < 1e-3, "{name} from {given}");
                }
            }
        }
    }
}
