//! From outcomes to figures: pass@k with its uncertainty, what the texts cost, and whether they are all alike.

use std::collections::{BTreeMap, BTreeSet};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::sandbox;
use super::task::Form;
use crate::engine::Forwards;

/// Resamplings of the tasks behind an interval.
const RESAMPLINGS: usize = 1000;
/// The interval holds so much of them.
const LEVEL: f64 = 0.95;

/// What became of one sample of one task. Texts of others can be read too: all but task and text may be missing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub task: String,
    #[serde(default)]
    pub sample: usize,
    #[serde(default)]
    pub seed: u64,
    /// As the model saw it, chat template and all.
    #[serde(default)]
    pub prompt: String,
    pub text: String,
    /// Unset until the text has been judged.
    #[serde(default)]
    pub passed: Option<bool>,
    #[serde(default)]
    pub why: Option<String>,
    /// "stop" or "length".
    #[serde(default)]
    pub finish_reason: String,
    #[serde(default)]
    pub generated_tokens: usize,
    #[serde(default)]
    pub forwards: Forwards,
    #[serde(default)]
    pub decoding_seconds: f64,
    /// From the request to its first committed token and to its end, the wait for a place included.
    #[serde(default)]
    pub seconds_to_first: Option<f64>,
    #[serde(default)]
    pub seconds: f64,
    /// Of the text's tokens, see [`entropy`].
    #[serde(default)]
    pub entropy: f64,
}

/// pass@k with the interval in which it lies when the tasks are drawn anew.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PassAt {
    pub k: usize,
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// Sums over all tasks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub suite: String,
    pub form: Form,
    pub tasks: usize,
    /// Texts for each task.
    pub samples: usize,
    /// Texts that are right, of all tasks and samples.
    pub passed: usize,
    pub pass_at_1: f64,
    /// With bootstrap intervals over the tasks (95 %).
    pub pass_at: Vec<PassAt>,
    pub seed: u64,
    pub generated_tokens: usize,
    pub forwards: Forwards,
    /// Generated tokens over forwards of any kind but the drafter's own.
    pub tokens_per_forward: f64,
    /// Summed over the requests, each from the moment that it became resident.
    pub decoding_seconds: f64,
    /// Generated tokens over that: the speed that one request sees.
    pub tokens_per_second: f64,
    /// Requests in flight as asked for, and the most that were decoded together.
    pub concurrency: usize,
    pub concurrency_peak: usize,
    /// From the first request to the end of the last; judging is not in it, nor what was taken over.
    pub wall_seconds: f64,
    /// Tokens generated in that time over it: the speed of all requests together.
    pub wall_tokens_per_second: f64,
    /// Texts that an earlier run had decoded.
    pub taken_over: usize,
    /// Mean of the texts' entropies, in nats: near 0 where a model repeats one token.
    pub entropy: f64,
    /// Texts that differ from each other; far fewer than texts where a model says the same to everything.
    pub distinct_texts: usize,
    /// Texts that ended by the limit on their length.
    pub cut_off: usize,
    /// What of the sandbox does not hold on this machine.
    pub sandbox_gaps: Vec<String>,
    /// In the order of the tasks, and of a task's samples.
    #[serde(skip)]
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// Counts judged outcomes, in the order of tasks and samples. How long it all took is for the caller to add.
    pub fn of(suite: &str, form: Form, ks: &[usize], seed: u64, outcomes: Vec<Outcome>) -> Self {
        let mut right: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for outcome in &outcomes {
            let (samples, passed) = right.entry(&outcome.task).or_default();
            *samples += 1;
            *passed += usize::from(outcome.passed == Some(true));
        }
        let right: Vec<(usize, usize)> = right.into_values().collect();
        let samples = right.iter().map(|(samples, _)| *samples).min().unwrap_or(0);
        let ks: BTreeSet<usize> = ks.iter().copied().chain([1]).filter(|k| *k <= samples.max(1)).collect();
        let pass_at: Vec<PassAt> = ks.into_iter().map(|k| pass_at(k, &right, seed)).collect();
        let mut forwards = Forwards::default();
        outcomes.iter().for_each(|outcome| forwards.add(&outcome.forwards));
        let generated_tokens: usize = outcomes.iter().map(|outcome| outcome.generated_tokens).sum();
        let decoding_seconds: f64 = outcomes.iter().map(|outcome| outcome.decoding_seconds).sum();
        let texts: BTreeSet<&str> = outcomes.iter().map(|outcome| outcome.text.as_str()).collect();
        Self {
            suite: suite.into(),
            form,
            tasks: right.len(),
            samples,
            passed: right.iter().map(|(_, passed)| passed).sum(),
            pass_at_1: pass_at[0].value,
            pass_at,
            seed,
            generated_tokens,
            forwards,
            tokens_per_forward: rate(generated_tokens, forwards.model() as f64),
            decoding_seconds,
            tokens_per_second: rate(generated_tokens, decoding_seconds),
            concurrency: 0,
            concurrency_peak: 0,
            wall_seconds: 0.0,
            wall_tokens_per_second: 0.0,
            taken_over: 0,
            entropy: outcomes.iter().map(|outcome| outcome.entropy).sum::<f64>() / outcomes.len().max(1) as f64,
            distinct_texts: texts.len(),
            cut_off: outcomes.iter().filter(|outcome| outcome.finish_reason == "length").count(),
            sandbox_gaps: sandbox::capabilities(),
            outcomes,
        }
    }
}

/// 0 where nothing was measured, as of texts that someone else made.
pub fn rate(tokens: usize, by: f64) -> f64 {
    if by > 0.0 { tokens as f64 / by } else { 0.0 }
}

/// The share of tasks that k texts drawn from the n would solve, of which c are right: 1 − C(n − c, k) / C(n, k), unbiased (Chen et al.
/// 2021, arXiv 2107.03374). `n` is at least `k`.
fn estimate(n: usize, c: usize, k: usize) -> f64 {
    if n - c < k { 1.0 } else { 1.0 - (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>() }
}

fn pass_at(k: usize, tasks: &[(usize, usize)], seed: u64) -> PassAt {
    let each: Vec<f64> = tasks.iter().map(|(n, c)| estimate(*n, *c, k)).collect();
    let count = each.len().max(1);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resample = || (0..each.len()).map(|_| each[rng.random_range(0..each.len())]).sum::<f64>() / count as f64;
    let mut means: Vec<f64> = (0..RESAMPLINGS).map(|_| resample()).collect();
    means.sort_by(f64::total_cmp);
    let quantile = |share: f64| means[((RESAMPLINGS - 1) as f64 * share).round() as usize];
    let value = each.iter().sum::<f64>() / count as f64;
    PassAt { k, value, low: quantile((1.0 - LEVEL) / 2.0), high: quantile((1.0 + LEVEL) / 2.0) }
}

/// Entropy in nats of how often each token occurs in one text, as MDLM and BD3-LM (arXiv 2503.09573) tell it of samples: a text that
/// repeats itself has little, whatever its likelihood.
pub fn entropy(tokens: &[u32]) -> f64 {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    tokens.iter().for_each(|token| *counts.entry(*token).or_default() += 1);
    let share = |count: usize| count as f64 / tokens.len() as f64;
    counts.into_values().map(|count| -share(count) * share(count).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_at_k_counts_draws_without_putting_back() {
        assert_eq!([estimate(10, 0, 3), estimate(10, 10, 3), estimate(5, 3, 3)], [0.0, 1.0, 1.0]);
        assert!((estimate(10, 3, 1) - 0.3).abs() < 1e-12);
        // Against all C(6, 2) draws: of 6 texts 2 are right; 15 pairs, 6 of them without a right one.
        assert!((estimate(6, 2, 2) - 9.0 / 15.0).abs() < 1e-12);
    }

    #[test]
    fn intervals_hold_the_mean_and_narrow_with_more_tasks() {
        let tasks = |count: usize| (0..count).map(|i| (1, usize::from(i % 4 == 0))).collect::<Vec<_>>();
        let (few, many) = (pass_at(1, &tasks(40), 1), pass_at(1, &tasks(4000), 1));
        for found in [few, many] {
            assert!(found.value == 0.25 && found.low < 0.25 && found.high > 0.25, "{found:?}");
        }
        // Two standard errors to either side: 2 · 1.96 · √(0.25 · 0.75 / n).
        let width = |found: PassAt| found.high - found.low;
        assert!((width(few) - 0.268).abs() < 0.05 && (width(many) - 0.0268).abs() < 0.005, "{few:?} {many:?}");
        assert_eq!(pass_at(1, &tasks(40), 1), few);
        assert_eq!((pass_at(1, &[(1, 1); 9], 1).low, pass_at(1, &[], 1).value), (1.0, 0.0));
    }

    #[test]
    fn entropy_tells_repetition() {
        assert_eq!((entropy(&[]), entropy(&[7; 100])), (0.0, 0.0));
        assert!((entropy(&[1, 2, 3, 4]) - 4f64.ln()).abs() < 1e-12);
        assert!((entropy(&[1, 1, 1, 2]) - 0.562_335_144_618_808).abs() < 1e-12);
    }
}
