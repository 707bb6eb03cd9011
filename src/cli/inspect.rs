//! `lacuna inspect`: what a model folder holds, how it would be run, and everything that keeps it from being run.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::load::{open, progress};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::model::manifest;
use crate::tensor::{Dtype, Placement};

#[derive(Args, Debug)]
pub struct Options {
    /// Model folder in Hugging Face layout, or GGUF file
    #[arg(default_value = "models/nano")]
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Look at names, shapes and types only, not at the values of the weights
    #[arg(long)]
    quick: bool,
}

pub fn run(options: Options) -> Result<()> {
    let checkpoint = open(&options.model)?;
    let mut problems = checkpoint.problems();
    if !options.quick {
        problems.extend(wrong_values(&checkpoint, &problems));
    }
    let facts = facts(&checkpoint);
    let mut stdout = std::io::stdout().lock();
    if options.json {
        let mut object: serde_json::Map<_, _> = facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        object.insert("problems".into(), json!(problems));
        writeln!(stdout, "{}", Value::Object(object))?;
    } else {
        for (name, value) in facts {
            writeln!(stdout, "{:<22} {}", name.replace('_', " "), shown(name, &value))?;
        }
        for problem in &problems {
            writeln!(stdout, "problem: {problem}")?;
        }
    }
    stdout.flush()?;
    match problems.len() {
        0 => Ok(()),
        1 => bail!("{} cannot be run: it has a problem", options.model.display()),
        count => bail!("{} cannot be run: it has {count} problems", options.model.display()),
    }
}

/// Loads every tensor that is in order so far. One after the other: the whole network need not fit into memory.
fn wrong_values(checkpoint: &Checkpoint, known: &[String]) -> Vec<String> {
    let specs = manifest(&checkpoint.config);
    let bar = progress("checking", specs.len(), checkpoint.files.bytes());
    let mut problems = vec![];
    for spec in specs {
        bar.inc(1);
        let name = format!("tensor {}", spec.name);
        if known.iter().any(|problem| problem.starts_with(&name)) {
            continue;
        }
        match checkpoint.files.matrix(&spec, Placement::CPU_F32) {
            Ok(_) => {}
            Err(CheckpointError::Problems(found)) => problems.extend(found),
            Err(other) => problems.push(other.to_string()),
        }
    }
    bar.finish_and_clear();
    problems
}

/// Everything worth knowing, in the order in which it is shown. Sizes of memory are in bytes.
fn facts(checkpoint: &Checkpoint) -> Vec<(&'static str, Value)> {
    let Checkpoint { config, generation, tokenizer, files, mask_token_id, .. } = checkpoint;
    let (mask, origin) = match mask_token_id {
        Ok(id) => (json!(id), mask_origin(checkpoint).to_owned()),
        Err(reason) => (Value::Null, reason.clone()),
    };
    vec![
        ("name", json!(checkpoint.name())),
        ("family", json!(config.family.name)),
        ("architecture", json!(config.family.architectures[0])),
        ("layers", json!(config.layers)),
        ("hidden_size", json!(config.hidden_size)),
        ("heads", json!(config.heads)),
        ("kv_heads", json!(config.kv_heads)),
        ("head_dim", json!(config.head_dim)),
        ("mlp_size", json!(config.intermediate_size)),
        ("vocabulary", json!(config.vocab_size)),
        ("tokenizer_size", json!(tokenizer.size())),
        ("context", json!(config.max_positions)),
        ("parameters", json!(config.parameters())),
        ("attention", json!(config.attention.name())),
        ("shifted_logits", json!(config.shift)),
        ("tied_head", json!(config.tied)),
        ("dtype_stored", json!(files.stored_types())),
        ("files", json!(files.file_count())),
        ("bytes_stored", json!(files.bytes())),
        ("quantization", json!(files.quantization().map(|quantization| quantization.counts()))),
        ("bytes_loaded_f32", json!(checkpoint.loaded_bytes(Placement::CPU_F32))),
        ("bytes_loaded_bf16", json!(checkpoint.loaded_bytes(Placement { dtype: Dtype::Bf16, ..Placement::CPU_F32 }))),
        ("mask_token_id", mask),
        ("mask_token_origin", json!(origin)),
        ("eos_token_ids", json!(generation.eos_token_ids)),
        ("chat_template", json!(tokenizer.chat().is_some())),
        ("max_new_tokens", json!(generation.max_new_tokens)),
        ("diffusion_defaults", generation.diffusion.clone().unwrap_or(Value::Null)),
    ]
}

/// Which of the places that [`Checkpoint::open`] asks has named the mask token.
fn mask_origin(checkpoint: &Checkpoint) -> &'static str {
    if checkpoint.config.mask_token_id.is_some() {
        "config.json"
    } else if checkpoint.tokenizer.mask_token_id().is_some() {
        "tokenizer_config.json"
    } else {
        "the family's own"
    }
}

/// A fact for people.
fn shown(name: &str, value: &Value) -> String {
    match value {
        Value::Number(bytes) if name.starts_with("bytes") => megabytes(bytes.as_f64().unwrap_or_default()),
        Value::Null => "none".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Array(list) => list.iter().map(|item| shown("", item)).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| format!("{name} {}", shown("", value));
            fields.iter().map(field).collect::<Vec<_>>().join(", ")
        }
    }
}

fn megabytes(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}
