//! `lacuna eval likelihood`: perplexity and bits per byte of texts.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::checkpoint::tokenizer::Tokenizer;
use crate::cli::load::{ModelOptions, steps};
use crate::engine::request::ModelInfo;
use crate::eval::likelihood::{MonteCarlo, Score, Windows, given, score};
use crate::eval::problems;
use crate::model::Transformer;
use crate::model::family::Attention;

#[derive(Args, Debug)]
pub struct Options {
    /// A text, scored whole; or .jsonl (.jsonl.gz) with a text a line: {"text": …}, and {"prompt": …} for what stands before it unscored
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    model: ModelOptions,
    /// Tokens that a forward sees [default: the model's context, at most 1024]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Of them, from the window before [default: half]
    #[arg(long, value_name = "N")]
    overlap: Option<usize>,
    /// Masked copies of each window, under a model that fills masks
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    samples: u32,
    /// Copies in one forward
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: u16,
    /// Seed of the masks
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One text and what stands before it.
#[derive(Deserialize)]
pub(in crate::cli) struct Text {
    #[serde(default)]
    prompt: String,
    text: String,
}

#[derive(Serialize)]
struct Report {
    model: String,
    dtype: String,
    device: String,
    threads: i32,
    /// "exact", or "bound": then the likelihood is at least what is told, but for the error.
    kind: &'static str,
    texts: usize,
    /// Scored tokens and their bytes: all but the prompts, and but for each text's first token where nothing stands before it that it
    /// could be predicted from.
    tokens: usize,
    bytes: usize,
    /// Negative log-likelihood of all texts in nats, and the standard error of a bound's estimate.
    nats: f64,
    standard_error: f64,
    nats_per_token: f64,
    /// e to that.
    perplexity: f64,
    bits_per_byte: f64,
    window: usize,
    overlap: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    samples: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    command: String,
}

pub fn run(options: Options) -> Result<()> {
    let texts = read(&options.file)?;
    let (model, network, _) = options.model.load()?;
    let effort = MonteCarlo { samples: options.samples as usize, batch: usize::from(options.batch), seed: options.seed };
    let Total { score: total, bytes, windows, exact } =
        score_all(&model, &network, &texts, (options.window, options.overlap), effort)?;
    let nats_per_token = total.nats / total.tokens as f64;
    let report = Report {
        model: model.name,
        dtype: network.precision(),
        device: network.placement().device_name(),
        threads: tch::get_num_threads(),
        kind: if exact { "exact" } else { "bound" },
        texts: texts.len(),
        tokens: total.tokens,
        bytes,
        nats: total.nats,
        standard_error: total.variance.sqrt(),
        nats_per_token,
        perplexity: nats_per_token.exp(),
        bits_per_byte: total.nats / std::f64::consts::LN_2 / bytes as f64,
        window: windows.window,
        overlap: windows.overlap,
        samples: (!exact).then_some(effort.samples),
        seed: (!exact).then_some(effort.seed),
        command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
    };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let (least, error) = match exact {
        true => ("", String::new()),
        false => ("at most ", format!(" ± {:.4}", report.standard_error / report.tokens as f64)),
    };
    println!(
        "perplexity {least}{:.3}: {:.4}{error} nats a token, {:.4} bits a byte ({} tokens, {} bytes)",
        report.perplexity, report.nats_per_token, report.bits_per_byte, report.tokens, report.bytes
    );
    Ok(())
}

/// What texts come to under a model.
pub(in crate::cli) struct Total {
    pub score: Score,
    /// Of the scored tokens.
    pub bytes: usize,
    pub windows: Windows,
    /// No bound.
    pub exact: bool,
}

/// Scores all texts, in windows of that many tokens with so many of the one before, unless the usual ones are to be taken.
pub(in crate::cli) fn score_all(
    model: &ModelInfo,
    network: &Transformer,
    texts: &[Text],
    (window, overlap): (Option<usize>, Option<usize>),
    effort: MonteCarlo,
) -> Result<Total> {
    let window = window.unwrap_or(network.context().min(1024));
    ensure!(window <= network.context(), "a window of {window} tokens exceeds the model's context of {}", network.context());
    let windows = Windows { window, overlap: overlap.unwrap_or(window / 2) };
    let exact = network.config().attention == Attention::Causal;
    let mask = match &model.mask_token_id {
        Ok(mask) => Some(*mask),
        Err(reason) => {
            ensure!(exact, "model {} has no bound: {reason}", model.name);
            None
        }
    };
    let mut cut = vec![];
    for (number, text) in texts.iter().enumerate() {
        let (ids, first, bytes) =
            tokens(&model.tokenizer, text, given(network)).with_context(|| format!("text {}", number + 1))?;
        let parts = windows.cut(ids.len(), first)?.len();
        cut.push((ids, first, bytes, parts));
    }
    let bar = steps("scoring", cut.iter().map(|(.., parts)| parts).sum());
    let (mut total, mut bytes) = (Score::default(), 0);
    for (at, (ids, first, of_text, _)) in cut.iter().enumerate() {
        // Texts' masks are drawn apart from each other's.
        let effort = MonteCarlo { seed: effort.seed.wrapping_add((at as u64) << 32), ..effort };
        total.add(score(network, mask, ids, *first, windows, effort, &mut || bar.inc(1))?);
        bytes += of_text;
    }
    bar.finish_and_clear();
    ensure!(total.tokens > 0 && bytes > 0, "the texts hold no token to score");
    Ok(Total { score: total, bytes, windows, exact })
}

pub(in crate::cli) fn read(path: &Path) -> Result<Vec<Text>> {
    let name = path.to_string_lossy();
    if name.ends_with(".jsonl") || name.ends_with(".jsonl.gz") {
        let line = |(number, line): (usize, String)| {
            serde_json::from_str(&line).map_err(|error| anyhow!("{name} line {number}: {error}"))
        };
        return problems::lines(path)?.into_iter().map(line).collect();
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    Ok(vec![Text { prompt: String::new(), text }])
}

/// A text's tokens, how many of them are not scored, and the bytes of those that are. The tokenizer puts before it what it puts before
/// any text.
fn tokens(tokenizer: &Tokenizer, text: &Text, given: usize) -> Result<(Vec<u32>, usize, usize)> {
    let encode = |text: &str, special: bool| tokenizer.encode(text, special).map_err(anyhow::Error::msg);
    let mut ids = encode(&text.prompt, true)?;
    let prompt = ids.len();
    if text.prompt.is_empty() {
        ids = encode(&text.text, true)?;
    } else {
        ids.extend(encode(&text.text, false)?);
    }
    let first = if text.prompt.is_empty() { given } else { prompt.max(given) };
    let unscored = tokenizer.decode(ids.get(..first).unwrap_or(&ids), false).map_err(anyhow::Error::msg)?;
    Ok((ids, first, (text.prompt.len() + text.text.len()).saturating_sub(unscored.len())))
}
