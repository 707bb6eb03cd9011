//! Plain decoding and every drafter on the same prompts, interleaved: how fast each is, how much of its drafts is accepted, and
//! whether the text stays the same.
//!
//! Each round runs every prompt once by every method, in an order that turns from round to round, so that a machine that slows
//! down slows all of them. A short text is decoded several times in a round, as its time says little by itself. A prompt's time is the
//! median of all its runs; a drafter keeps what it learnt, as it does in a server.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::nano::{self, Split};
use crate::decode::autoregressive::{Autoregressive, DrafterKind, Speculation};
use crate::draft::Drafters;
use crate::engine::request::{
    AutoregressiveOptions, DiffusionOptions, DrafterChoice, GenerateOptions, MethodKind, ModelInfo, Prompt, SamplingOptions,
    validate,
};
use crate::engine::runner::{self, Residence};
use crate::engine::sequence::Sequence;
use crate::engine::{Event, Method, Usage};
use crate::model::Transformer;

/// A text is decoded again within a round until plain decoding has taken so long, but not more often than [`TIMES_MAX`].
const ROUND: Duration = Duration::from_millis(50);
const TIMES_MAX: usize = 10;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    pub drafters: Vec<DrafterKind>,
    pub rounds: usize,
    pub max_new_tokens: Option<u64>,
    pub sampling: SamplingOptions,
    /// Settings that all drafters share.
    pub autoregressive: AutoregressiveOptions,
}

/// One method's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Lane {
    /// Tokens of all prompts by the medians of their times, both behind a text's first token, which prefill yields.
    pub tokens_per_second: f64,
    /// All tokens by all of the time, prefill included.
    pub whole_tokens_per_second: f64,
    pub whole_speedup: f64,
    /// Against plain decoding in the same run: of all prompts together, and the least of any prompt (of each, the median of its
    /// runs).
    pub speedup: f64,
    pub speedup_least: f64,
    pub speedup_least_prompt: String,
    pub acceptance_length: f64,
    pub acceptance_by_position: Vec<f64>,
    pub drafts: usize,
    pub drafted_tokens: usize,
    pub accepted_tokens: usize,
    pub deduplicated_share: f64,
    /// Shares of the decoding time.
    pub draft_share: f64,
    pub verify_share: f64,
    pub commit_share: f64,
    /// Prompts whose text is plain decoding's.
    pub same_text: usize,
    pub by_prompt: Vec<OfPrompt>,
}

/// What one prompt came to: medians of its runs.
#[derive(Clone, Debug, Serialize)]
pub struct OfPrompt {
    pub prompt: String,
    /// Behind the first, which prefill yields; and the milliseconds that they took.
    pub tokens: usize,
    pub plain_milliseconds: f64,
    pub milliseconds: f64,
    /// How often it was run.
    pub runs: usize,
    /// Of each run, plain decoding's time by this one's.
    pub speedup: f64,
    /// Of the last round.
    pub forwards: usize,
    pub drafts: usize,
    pub accepted_tokens: usize,
}

/// Cost of one forward of several tokens.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Cost {
    pub tokens: usize,
    pub milliseconds: f64,
    /// By the cost of one token.
    pub ratio: f64,
}

/// The whole comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub prompts: usize,
    pub rounds: usize,
    pub tokens: usize,
    pub plain_tokens_per_second: f64,
    pub plain_whole_tokens_per_second: f64,
    #[serde(flatten)]
    pub lanes: BTreeMap<&'static str, Lane>,
    pub cost_curve: Vec<Cost>,
}

/// Prompts that the small model knows, from held-out compositions, and some that it does not.
pub fn nano_prompts(count: usize, seed: u64) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let strange = [
        "import os\n\nclass Reader:\n    def __init__(self, path):\n",
        "The quick brown fox jumps over the lazy dog. The quick",
        "{\"name\": \"lacuna\", \"kind\": [1, 2, 3], \"next\": ",
        "# Prüfe, ob die Zahl eine Primzahl ist.\ndef solve(n):\n",
    ];
    let known = (0..count.saturating_sub(strange.len())).map(|_| nano::sample(&mut rng, Split::HeldOut).prompt);
    known.chain(strange.into_iter().take(count).map(String::from)).collect()
}

/// What one run of one prompt came to.
struct Run {
    text: String,
    usage: Usage,
    /// Whether it was not the first of its prompt in its round: what is counted, not timed, is counted once a round.
    again: bool,
}

/// Runs the comparison; `done` is called after each prompt of each round.
pub fn run(
    info: &ModelInfo,
    model: &Transformer,
    drafters: &mut Drafters,
    prompts: &[String],
    options: &Options,
    done: &mut dyn FnMut(),
) -> Result<Report> {
    ensure!(!prompts.is_empty() && options.rounds > 0, "there must be at least one prompt and one round");
    let lanes: Vec<Option<DrafterKind>> = std::iter::once(None).chain(options.drafters.iter().copied().map(Some)).collect();
    // Costs are measured and kernels chosen before the clock counts.
    for lane in &lanes {
        one(info, model, drafters, &prompts[0], options, *lane)?;
    }
    let mut times = vec![];
    for prompt in prompts {
        let seconds = behind_first(&one(info, model, drafters, prompt, options, None)?).1;
        times.push(((ROUND.as_secs_f64() / seconds.max(1e-9)).ceil() as usize).clamp(1, TIMES_MAX));
    }
    let mut runs: Vec<Vec<Vec<Run>>> = lanes.iter().map(|_| prompts.iter().map(|_| vec![]).collect()).collect();
    for round in 0..options.rounds {
        for (at, prompt) in prompts.iter().enumerate() {
            for time in 0..times[at] {
                let shift = round + at + time;
                for turn in 0..lanes.len() {
                    // Backwards every other time, so that nobody always finds the caches as the same one left them.
                    let turn = if shift % 2 == 1 { lanes.len() - 1 - turn } else { turn };
                    let lane = (turn + shift) % lanes.len();
                    let run = one(info, model, drafters, prompt, options, lanes[lane])?;
                    runs[lane][at].push(Run { again: time > 0, ..run });
                }
            }
            done();
        }
    }
    let plain = &runs[0];
    let tokens = plain.iter().map(|runs| runs[0].usage.generated_tokens).sum();
    let mut report = Report {
        prompts: prompts.len(),
        rounds: options.rounds,
        tokens,
        plain_tokens_per_second: rate(plain, behind_first),
        plain_whole_tokens_per_second: rate(plain, whole),
        lanes: BTreeMap::new(),
        cost_curve: vec![],
    };
    for (lane, runs) in lanes.iter().zip(&runs).skip(1) {
        if let Some(kind) = lane {
            report.lanes.insert(kind.name(), figures(prompts, plain, runs));
        }
    }
    let costs = drafters.costs();
    let first = costs.first().map_or(1.0, |cost| cost.1);
    let cost = |(tokens, seconds): &(usize, f64)| Cost { tokens: *tokens, milliseconds: seconds * 1e3, ratio: seconds / first };
    report.cost_curve = costs.iter().map(cost).collect();
    Ok(report)
}

fn one(
    info: &ModelInfo,
    model: &Transformer,
    drafters: &mut Drafters,
    prompt: &str,
    options: &Options,
    drafter: Option<DrafterKind>,
) -> Result<Run> {
    let plain = AutoregressiveOptions { drafter: Some(DrafterChoice::Off), ..AutoregressiveOptions::default() };
    let asked = GenerateOptions {
        id: "bench".into(),
        prompt: Prompt::Text(prompt.into()),
        template: vec![],
        max_new_tokens: options.max_new_tokens,
        method: Some(MethodKind::Autoregressive),
        diffusion: DiffusionOptions::default(),
        autoregressive: match drafter {
            Some(kind) => AutoregressiveOptions { drafter: Some(DrafterChoice::Use(kind)), ..options.autoregressive.clone() },
            None => AutoregressiveOptions { deterministic: options.autoregressive.deterministic, ..plain },
        },
        sampling: SamplingOptions { seed: options.sampling.seed.or(Some(1)), ..options.sampling.clone() },
        stops: vec![],
        steps: true,
        deadline: None,
        priority: 0,
    };
    let request = validate(info, asked)?;
    let Method::Autoregressive(parameters) = request.method else {
        return Err(anyhow!("a model that decodes from left to right is needed"));
    };
    let adaptation = match parameters.drafts.filter(|drafts| drafts.adapt) {
        Some(drafts) => drafters.adaptation(drafts.drafter, model)?,
        None => None,
    };
    let ends = parameters.ends.clone();
    let decoder = Autoregressive::new(parameters, request.canvas, adaptation);
    let mut sequence = Sequence::new(Box::new(decoder), ends, vec![], Duration::ZERO);
    let mut residence = Residence::new(model, &sequence)?;
    let mut text = String::new();
    let mut events = sequence.begin(&info.tokenizer).map_err(anyhow::Error::msg)?;
    loop {
        for event in events.drain(..) {
            match event {
                Event::Committed { text: more, .. } => text.push_str(&more),
                Event::Finished { usage, .. } => {
                    if let (Some(kind), Some(seen)) = (drafter, sequence.decoder().adaptation()) {
                        drafters.learn(kind, seen);
                    }
                    return Ok(Run { text, usage, again: false });
                }
                Event::Started { .. } | Event::Step(_) => {}
            }
        }
        events = runner::step(model, drafters, &mut sequence, &mut residence, &info.tokenizer)?;
    }
}

/// Tokens behind the first and the seconds that they took.
fn behind_first(run: &Run) -> (f64, f64) {
    let first = run.usage.time_to_first_commit.unwrap_or(run.usage.decoding);
    (run.usage.generated_tokens.saturating_sub(1) as f64, run.usage.decoding.saturating_sub(first).as_secs_f64())
}

/// All tokens and all seconds.
fn whole(run: &Run) -> (f64, f64) {
    (run.usage.generated_tokens as f64, run.usage.decoding.as_secs_f64())
}

/// Tokens a second over all prompts; of each prompt's times the median counts.
fn rate(prompts: &[Vec<Run>], part: fn(&Run) -> (f64, f64)) -> f64 {
    let tokens: f64 = prompts.iter().map(|runs| part(&runs[0]).0).sum();
    let seconds = prompts.iter().map(|runs| median(runs.iter().map(|run| part(run).1).collect()));
    tokens / seconds.sum::<f64>().max(1e-9)
}

/// Tokens a second of one run, behind its first; texts of one token have no such rate. Plain decoding and a drafter may part at a
/// tie, and then have texts of different lengths.
fn speed(run: &Run) -> Option<f64> {
    let (tokens, seconds) = behind_first(run);
    (tokens > 0.0 && seconds > 0.0).then(|| tokens / seconds)
}

fn figures(prompts: &[String], plain: &[Vec<Run>], runs: &[Vec<Run>]) -> Lane {
    let by_prompt: Vec<OfPrompt> = prompts
        .iter()
        .zip(plain.iter().zip(runs))
        .filter_map(|(prompt, (plain, runs))| of_prompt(prompt, plain, runs))
        .collect();
    let least = by_prompt.iter().min_by(|a, b| a.speedup.total_cmp(&b.speedup));
    let (speedup_least, speedup_least_prompt) =
        least.map_or((0.0, String::new()), |least| (least.speedup, least.prompt.clone()));
    let all = || runs.iter().flatten().filter(|run| !run.again);
    let mut drafts = Speculation::default();
    all().filter_map(|run| run.usage.speculation.as_ref()).for_each(|found| drafts.add(found));
    let total: f64 = all().map(|run| run.usage.decoding.as_secs_f64()).sum();
    let share = |part: fn(&Usage) -> Duration| all().map(|run| part(&run.usage).as_secs_f64()).sum::<f64>() / total.max(1e-9);
    Lane {
        tokens_per_second: rate(runs, behind_first),
        whole_tokens_per_second: rate(runs, whole),
        whole_speedup: rate(runs, whole) / rate(plain, whole).max(1e-9),
        speedup: rate(runs, behind_first) / rate(plain, behind_first).max(1e-9),
        speedup_least,
        speedup_least_prompt,
        acceptance_length: drafts.acceptance_length(),
        acceptance_by_position: drafts.acceptance_by_position(),
        drafts: drafts.drafts,
        drafted_tokens: drafts.drafted,
        accepted_tokens: drafts.accepted,
        deduplicated_share: drafts.candidates.saturating_sub(drafts.drafted) as f64 / drafts.candidates.max(1) as f64,
        draft_share: share(|usage| usage.drafting),
        verify_share: share(|usage| usage.verifying),
        commit_share: share(|usage| usage.committing),
        same_text: plain.iter().zip(runs).filter(|(plain, runs)| runs.iter().all(|run| run.text == plain[0].text)).count(),
        by_prompt,
    }
}

/// `None` for a text of one token.
fn of_prompt(prompt: &str, plain: &[Run], runs: &[Run]) -> Option<OfPrompt> {
    let ratios: Vec<f64> = plain.iter().zip(runs).filter_map(|(p, r)| Some(speed(r)? / speed(p)?)).collect();
    let (usage, milliseconds) =
        (&runs.last()?.usage, |runs: &[Run]| 1e3 * median(runs.iter().map(|run| behind_first(run).1).collect()));
    let drafts = usage.speculation.as_ref();
    (!ratios.is_empty()).then(|| OfPrompt {
        prompt: prompt.into(),
        tokens: usage.generated_tokens.saturating_sub(1),
        plain_milliseconds: milliseconds(plain),
        milliseconds: milliseconds(runs),
        runs: runs.len(),
        speedup: median(ratios),
        forwards: usage.forwards.model(),
        drafts: drafts.map_or(0, |drafts| drafts.drafts),
        accepted_tokens: drafts.map_or(0, |drafts| drafts.accepted),
    })
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
