//! `lacuna quantize`: a model folder or GGUF file as a folder in fewer bits, and what that changed.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::eval::likelihood::{Text, read, score_all};
use super::eval::{SuiteName, TaskFlags};
use super::load::{Loaded, RunOptions, Switch, open, progress};
use crate::checkpoint::Checkpoint;
use crate::compress::{self, Head, Plan, weights_file};
use crate::eval::likelihood::MonteCarlo;
use crate::eval::suite;
use crate::eval::task::Suite;
use crate::model::manifest;
use crate::model::quantized::Scheme;
use crate::tensor::{self, Dtype};

#[derive(Args, Debug)]
pub struct Options {
    /// Model folder in Hugging Face layout, or GGUF file
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Folder to write
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// int8 (inputs of products as well, 64 at a time), int8-dynamic (each input by itself, as most tools do it), int8-weight-only, int4 (weights only), int4-dynamic (inputs in int8), fp8 (inputs as well) or fp8-block (DeepSeek's)
    #[arg(long, value_name = "SCHEME")]
    to: Scheme,
    /// Weights of int4 that share a scale [default: the largest of 128, 64 and 32 that divides every matrix]
    #[arg(long, value_name = "N")]
    group: Option<usize>,
    /// The vocabulary head; int8 gives one that is the embedding weights of its own [default: int8 beside int8 and int4, else keep]
    #[arg(long, value_enum)]
    head: Option<HeadFlag>,
    /// Type of what is not quantised: f32, f16 or bf16 [default: f16 where all weights are, else bf16]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Text to measure perplexity on, before and after: a text, or .jsonl with {"text": …} a line
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tasks to measure accuracy and speed on, before and after
    #[arg(long, value_enum, value_name = "SUITE")]
    eval: Option<SuiteName>,
    #[command(flatten)]
    tasks: TaskFlags,
    /// Where to measure: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads of one operation; 0 leaves it to libtorch
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Write into a folder that is not empty
    #[arg(long)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HeadFlag {
    Keep,
    Int8,
}

pub fn run(options: Options) -> Result<()> {
    let Options { model, folder, .. } = &options;
    // What is to be measured is read before anything is written.
    let texts = options.text.as_deref().map(read).transpose()?;
    let suite = options.eval.map(|name| options.tasks.suite(name)).transpose()?;
    ensure!(suite.is_some() || !options.tasks.any(), "--data and --tasks go with --eval");
    let checkpoint = open(model)?;
    let inside = || folder.read_dir().with_context(|| format!("cannot read {}", folder.display()));
    let empty = !folder.exists() || inside()?.next().is_none();
    ensure!(options.force || empty, "{} is not empty: name another folder, or write into it with --force", folder.display());
    let same = folder.canonicalize().is_ok_and(|folder| model.canonicalize().is_ok_and(|model| model == folder));
    ensure!(!same, "{} is the model itself: name another folder", folder.display());
    let plan = options.plan(&checkpoint).map_err(anyhow::Error::msg)?;

    tensor::set_threads(options.threads);
    let bar = progress("quantising", manifest(&checkpoint.config).len(), checkpoint.files.bytes());
    let written = compress::write(&checkpoint, folder, &plan, &mut |_| bar.inc(1))?;
    bar.finish_and_clear();
    let size = |path: &Path| path.metadata().map(|file| file.len()).with_context(|| format!("cannot read {}", path.display()));
    let after = open(folder)?;
    let mut facts = json!({
        "model": checkpoint.name(),
        "folder": folder,
        "scheme": plan.scheme.to_string(),
        "head": if plan.head == Head::Int8 { "int8" } else { "kept" },
        "floats": plan.floats.name(),
        "matrices": written.matrices,
        "bytes": { "before": checkpoint.files.bytes(), "after": size(&weights_file(folder))? },
        "bits_per_weight": { "after": 8.0 * after.files.bytes() as f64 / checkpoint.config.parameters() as f64,
                             "before": 8.0 * checkpoint.files.bytes() as f64 / checkpoint.config.parameters() as f64 },
        "weight_error": written.error,
    });
    if texts.is_some() || suite.is_some() {
        let before = measure(options.loaded(checkpoint)?, texts.as_deref(), suite.as_ref())?;
        let after = measure(options.loaded(after)?, texts.as_deref(), suite.as_ref())?;
        for (name, before) in before {
            facts[&name] = json!({ "before": before, "after": after[&name] });
        }
        facts["threads"] = tch::get_num_threads().into();
    }
    facts["command"] = std::env::args().skip(1).collect::<Vec<_>>().join(" ").into();
    let mut stdout = std::io::stdout().lock();
    if options.json {
        writeln!(stdout, "{facts}")?;
    } else {
        write!(stdout, "{}", table(&facts))?;
    }
    Ok(stdout.flush()?)
}

impl Options {
    /// As any command would run it.
    fn loaded(&self, checkpoint: Checkpoint) -> Result<Loaded> {
        let run = RunOptions {
            drafters: None,
            device: self.device.clone(),
            dtype: None,
            quantize: None,
            cuda_graphs: Switch::On,
            threads: self.threads,
            context: 4096,
        };
        run.load(checkpoint)
    }

    fn plan(&self, checkpoint: &Checkpoint) -> Result<Plan, String> {
        let types = checkpoint.files.stored_types();
        let stored = if types.len() == 1 && types.contains("f16") { Dtype::F16 } else { Dtype::Bf16 };
        let head = self.head.map(|head| match head {
            HeadFlag::Keep => Head::Kept,
            HeadFlag::Int8 => Head::Int8,
        });
        Plan::new(checkpoint, self.to, self.group, head, self.dtype.unwrap_or(stored))
    }
}

/// Figures by name. The network is gone when they are there.
fn measure(
    (model, network, drafters): Loaded,
    texts: Option<&[Text]>,
    suite: Option<&Suite>,
) -> Result<serde_json::Map<String, Value>> {
    let mut facts = serde_json::Map::new();
    facts.insert("bytes_loaded".into(), network.weight_bytes().into());
    if let Some(texts) = texts {
        let effort = MonteCarlo { samples: 128, batch: 16, seed: 0 };
        let total = score_all(&model, &network, texts, (None, None), effort)?;
        facts.insert("perplexity".into(), (total.score.nats / total.score.tokens as f64).exp().into());
        facts.insert("bits_per_byte".into(), (total.score.nats / std::f64::consts::LN_2 / total.bytes as f64).into());
    }
    if let Some(suite) = suite {
        let decoding = suite::Options::default();
        let engine = suite::engine(&model, network, drafters, decoding.concurrency)?;
        let report = suite::run(&model, &engine, suite, &decoding, &mut |_| {})?;
        engine.rest();
        let passed = report.pass_at.first().ok_or_else(|| anyhow!("the suite has no tasks"))?;
        facts.insert("pass".into(), passed.value.into());
        facts.insert("tokens_per_second".into(), report.tokens_per_second.into());
    }
    Ok(facts)
}

/// Before and after side by side.
fn table(facts: &Value) -> String {
    let text = |name: &str| facts[name].as_str().unwrap_or_default().to_owned();
    let mut table = format!(
        "{} as {} in {}\n{} matrices, the head {}, all else in {}; their weights are off by {:.2} % in norm\n\n{:<18} {:>14} {:>14}\n",
        text("model"),
        text("scheme"),
        text("folder"),
        facts["matrices"],
        text("head"),
        text("floats"),
        100.0 * facts["weight_error"].as_f64().unwrap_or_default(),
        "",
        "before",
        "after",
    );
    let megabytes = |x: f64| format!("{:.1} MB", x / 1e6);
    type Show<'a> = &'a dyn Fn(f64) -> String;
    let rows: [(&str, &str, Show); 7] = [
        ("bytes", "on disc", &megabytes),
        ("bits_per_weight", "bits a weight", &|x| format!("{x:.2}")),
        ("bytes_loaded", "in memory", &megabytes),
        ("perplexity", "perplexity", &|x| format!("{x:.3}")),
        ("bits_per_byte", "bits a byte", &|x| format!("{x:.4}")),
        ("pass", "tasks passed", &|x| format!("{:.1} %", 100.0 * x)),
        ("tokens_per_second", "tokens/s", &|x| format!("{x:.0}")),
    ];
    for (name, title, show) in rows {
        let side = |side: &str| facts[name][side].as_f64().map(show);
        if let (Some(before), Some(after)) = (side("before"), side("after")) {
            table.push_str(&format!("{title:<18} {before:>14} {after:>14}\n"));
        }
    }
    table
}
