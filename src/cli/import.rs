//! `lacuna import`: a GGUF file as a model folder in Hugging Face layout.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::load::{open, progress};
use crate::checkpoint::gguf;
use crate::model::manifest;
use crate::tensor::{self, Dtype};

#[derive(Args, Debug)]
pub struct Options {
    /// GGUF file
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// Folder to write
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Type of the written weights: f32 (exactly what the file says), f16 or bf16
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Write into a folder that is not empty
    #[arg(long)]
    force: bool,
}

pub fn run(options: Options) -> Result<()> {
    let Options { model, folder, dtype, force } = options;
    // Conversions wait for memory, not for cores; more threads spend their time waiting for one another.
    tensor::set_threads(1);
    ensure!(!model.is_dir(), "{} is a folder: import takes a GGUF file", model.display());
    let checkpoint = open(&model)?;
    let inside = || folder.read_dir().with_context(|| format!("cannot read {}", folder.display()));
    let empty = !folder.exists() || inside()?.next().is_none();
    ensure!(force || empty, "{} is not empty: name another folder, or write into it with --force", folder.display());
    let (parameters, specs) = (checkpoint.config.parameters(), manifest(&checkpoint.config));
    let bar = progress("importing", specs.len(), parameters * dtype.size());
    gguf::import(&model, &folder, dtype, &mut |_| bar.inc(1))?;
    bar.finish_and_clear();
    let types = checkpoint.files.type_counts();
    let types: Vec<_> = types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let mut stdout = std::io::stdout().lock();
    for (name, value) in [
        ("architecture", checkpoint.config.family.architectures[0].to_owned()),
        ("parameters", parameters.to_string()),
        ("tensors", types.join(", ")),
        ("written as", dtype.name().to_owned()),
        ("folder", folder.display().to_string()),
    ] {
        writeln!(stdout, "{name:<13} {value}")?;
    }
    Ok(stdout.flush()?)
}
