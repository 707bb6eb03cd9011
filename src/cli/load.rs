//! Flags that say which model to run and where, and the way from them to a loaded network. Shared by every command that runs one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use tracing::warn;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::draft::Drafters;
use crate::engine::memory::{self, Need};
use crate::engine::request::{ModelInfo, check_defaults};
use crate::engine::{Engine, Limits};
use crate::model::linear::computes;
use crate::model::quantized::{Codes, Scheme};
use crate::model::{Graphs, Transformer, manifest};
use crate::service::{Loader, Served};
use crate::tensor::{self, Device, Dtype, Placement, free_memory};

/// Bytes of weights from which loading takes long enough to show its progress; a disc reads so many in about half a second.
const PROGRESS_FROM: usize = 256 << 20;

#[derive(Args, Clone, Debug)]
pub struct ModelOptions {
    /// Model folder in Hugging Face layout, or GGUF file
    #[arg(long, value_name = "PATH", default_value = "models/nano")]
    pub model: PathBuf,
    #[command(flatten)]
    pub run: RunOptions,
}

/// How a model is run.
#[derive(Args, Clone, Debug)]
pub struct RunOptions {
    /// Folder of draft heads, with redrafter/ or medusa/ in it [default: drafters/ in the model's folder]
    #[arg(long, value_name = "DIR")]
    pub drafters: Option<PathBuf>,
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// On a GPU, replay what lies between attentions as CUDA graphs, for steps of few rows; 'make cuda' builds what that needs
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub cuda_graphs: Switch,
    /// f32, f16 or bf16 [default: f32 on the CPU, as stored on a GPU]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Hold the projections' weights in fewer bits: int8, int8-dynamic (for a GPU), int8-weight-only, int4, int4-dynamic, fp8 or fp8-block. What is stored quantised stays as it is
    #[arg(long, value_name = "SCHEME")]
    pub quantize: Option<Scheme>,
    /// Threads of one operation; 0 leaves it to libtorch
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Longest prompt and canvas together, in tokens; cut to the model's own
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

impl ModelOptions {
    /// Opens the model, loads the network and whatever drafts for it.
    pub fn load(&self) -> Result<Loaded> {
        self.run.device()?;
        self.run.load(open(&self.model)?)
    }
}

/// A model as requests see it, its network, and whatever drafts for it.
pub type Loaded = (ModelInfo, Transformer, Drafters);

impl RunOptions {
    /// A device that is not here is told before anything is read.
    fn device(&self) -> Result<()> {
        tensor::device(&self.device).map(drop).map_err(anyhow::Error::msg)
    }

    /// On a GPU, has the network use CUDA graphs, unless they are not wanted or there is no shim.
    pub fn record(&self, network: &mut Transformer) {
        let device = network.placement().device;
        if device == Device::Cpu || self.cuda_graphs == Switch::Off {
            return;
        }
        match Graphs::open(device) {
            Ok(graphs) => network.use_graphs(graphs),
            Err(reason) => warn!(reason, "running without CUDA graphs"),
        }
    }

    /// What a model takes at least: its weights, its draft heads, and room for one context's tokens. By its headers alone.
    fn need(&self, checkpoint: &Checkpoint, placement: Placement) -> Need {
        let bare = self.bare(&checkpoint.config, placement);
        // What is stored quantised stays so.
        let quantised = self.quantize.is_some() && checkpoint.files.quantization().is_none();
        let weights = if quantised { bare.weights } else { checkpoint.loaded_bytes(placement) as u64 };
        Need { weights, drafters: drafter_bytes(&self.folder(checkpoint)), ..bare }
    }

    /// Likewise of a model without draft heads.
    pub fn bare(&self, config: &ModelConfig, placement: Placement) -> Need {
        let context = config.max_positions.min(self.context as usize);
        Need {
            weights: self.weight_bytes(config, placement),
            drafters: 0,
            token: memory::bytes_per_token(config, placement) as u64,
            tokens_min: context,
            tokens: context,
            free: free_memory(placement.device),
        }
    }

    /// Bytes of all weights; of what is quantised here, without its scales. Where nothing computes with such weights they become floats.
    fn weight_bytes(&self, config: &ModelConfig, placement: Placement) -> u64 {
        let dtype = placement.dtype;
        let (all, embedding) = (config.parameters() as u64, (config.vocab_size * config.hidden_size) as u64);
        let Some(scheme) = self.quantize.filter(|scheme| computes(*scheme, placement)) else {
            return all * dtype.size() as u64;
        };
        // The head has weights of its own then, of eight bits, also where it was the embedding.
        let head = embedding;
        let others = all - embedding - if config.tied { 0 } else { head };
        let others = if scheme.codes == Codes::Int4 { others / 2 } else { others };
        embedding * dtype.size() as u64 + others + head
    }

    /// Where its draft heads are, if it has any.
    fn folder(&self, checkpoint: &Checkpoint) -> PathBuf {
        self.drafters.clone().unwrap_or_else(|| checkpoint.path.join("drafters"))
    }

    /// Where a model runs, and in which type.
    pub fn placement(&self, checkpoint: &Checkpoint) -> Result<Placement, String> {
        let device = tensor::device(&self.device)?;
        // A CPU computes in f32 wherever it lacks bf16 units, and small models lose nothing by it; a GPU has those units.
        let stored = checkpoint.config.dtype.unwrap_or(Dtype::Bf16);
        Ok(Placement { device, dtype: self.dtype.unwrap_or(if device == Device::Cpu { Dtype::F32 } else { stored }) })
    }

    pub fn load(&self, checkpoint: Checkpoint) -> Result<Loaded> {
        tensor::set_threads(self.threads);
        let placement = self.placement(&checkpoint).map_err(anyhow::Error::msg)?;
        self.need(&checkpoint, placement).within(&checkpoint.name(), None, &[]).map_err(anyhow::Error::msg)?;
        let bar = progress("loading", manifest(&checkpoint.config).len(), checkpoint.files.bytes());
        let mut network = checkpoint.load_as(self.quantize, placement, self.context as usize, &mut |_| bar.inc(1))?;
        bar.finish_and_clear();
        self.record(&mut network);
        let folder = self.folder(&checkpoint);
        ensure!(self.drafters.is_none() || folder.is_dir(), "there is no folder {} of draft heads", folder.display());
        let drafters = Drafters::load(&folder, &checkpoint.config, placement).map_err(|error| anyhow!(error))?;
        let info = ModelInfo::new(checkpoint, &network, drafters.infos());
        check_defaults(&info).map_err(anyhow::Error::msg)?;
        Ok((info, network, drafters))
    }
}

/// Loads all `models`, none before every one of them is known to be there under a name of its own, and to have room beside the others.
pub fn load_all(models: &[PathBuf], run: &RunOptions) -> Result<Vec<Loaded>> {
    ensure!(
        models.len() == 1 || run.drafters.is_none(),
        "--drafters goes with one --model: with several, each has its own in drafters/ in its folder"
    );
    run.device()?;
    let mut checkpoints: Vec<Checkpoint> = vec![];
    for path in models {
        let checkpoint = open(path)?;
        if let Some(other) = checkpoints.iter().find(|other| other.name() == checkpoint.name()) {
            let (name, one) = (checkpoint.name(), other.path.display());
            bail!("{one} and {} would both be called {name}: give them different names", path.display());
        }
        checkpoints.push(checkpoint);
    }
    let mut taken: Vec<(String, u64)> = vec![];
    for checkpoint in &checkpoints {
        let need = run.need(checkpoint, run.placement(checkpoint).map_err(anyhow::Error::msg)?);
        let others: Vec<_> = taken.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        need.within(&checkpoint.name(), None, &others).map_err(anyhow::Error::msg)?;
        taken.push((checkpoint.name(), need.bytes()));
    }
    let each = checkpoints.into_iter().map(|checkpoint| {
        let name = checkpoint.name();
        run.load(checkpoint).with_context(|| format!("model {name}"))
    });
    each.collect()
}

/// Starts an engine for each. The memory that is free now, with all weights in it, is shared out in equal parts; where more models
/// may come, none takes more than [`most`].
pub fn start_all(models: Vec<Loaded>, limits: Limits, more: bool) -> Result<Vec<Served>> {
    let sharers = models.len();
    let room = |network: &Transformer| {
        let room = memory::room(network.config(), network.placement(), network.context(), sharers);
        if more { room.min(most(&limits, network.context())) } else { room }
    };
    let rooms: Vec<usize> = models.iter().map(|(_, network, _)| room(network)).collect();
    let start = |(loaded, room): (Loaded, usize)| start(loaded, Limits { tokens: limits.tokens.or(Some(room)), ..limits });
    models.into_iter().zip(rooms).map(start).collect()
}

fn start((info, network, drafters): Loaded, limits: Limits) -> Result<Served> {
    let engine = Engine::start(network, drafters, info.tokenizer.clone(), limits);
    Ok(Served { engine: engine.context("cannot start an engine's thread")?, info: Arc::new(info) })
}

/// Tokens that requests of the usual kind could have in an engine at most.
fn most(limits: &Limits, context: usize) -> usize {
    limits.resident.saturating_mul(context)
}

/// How models are loaded while a server runs.
pub struct ByRequest {
    pub run: RunOptions,
    pub limits: Limits,
}

impl Loader for ByRequest {
    fn measure(&self, path: &Path) -> Result<Need, String> {
        let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
        let placement = self.run.placement(&checkpoint)?;
        let need = self.run.need(&checkpoint, placement);
        let context = need.tokens_min;
        Ok(Need {
            tokens_min: context.min(self.limits.tokens.unwrap_or(context)),
            tokens: self.limits.tokens.unwrap_or_else(|| most(&self.limits, context)),
            ..need
        })
    }

    fn load(&self, path: &Path, tokens: usize) -> Result<Served, String> {
        let loaded = open(path).and_then(|checkpoint| self.run.load(checkpoint));
        let limits = Limits { tokens: Some(tokens), ..self.limits };
        loaded.and_then(|loaded| start(loaded, limits)).map_err(|error| format!("{error:#}"))
    }
}

/// Bytes that the draft heads in a folder take at most: what is stored has 16 bits at least, what runs 32 at most, and ReDrafter's searches
/// have a copy in up to 16 bits besides.
fn drafter_bytes(folder: &Path) -> u64 {
    let size = |kind: &str| folder.join(kind).join("model.safetensors").metadata().map_or(0, |file| file.len());
    3 * size("redrafter") + 2 * size("medusa")
}

/// Opens a model folder or GGUF file. One that is not there at all gets a word on where it might come from.
pub fn open(path: &Path) -> Result<Checkpoint> {
    ensure!(path.exists(), "there is no model folder {}: name one that holds config.json, or a GGUF file", path.display());
    Checkpoint::open(path).map_err(|error| anyhow!(error))
}

/// A bar of `tensors` on stderr, hidden where the weights are small or stderr is no terminal.
pub fn progress(verb: &'static str, tensors: usize, bytes: usize) -> ProgressBar {
    if bytes < PROGRESS_FROM {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {pos}/{len} tensors, eta {eta}");
    let bar = ProgressBar::new(tensors as u64).with_prefix(verb);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// A bar of `count` steps on stderr.
pub fn steps(verb: &'static str, count: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {pos}/{len}, eta {eta}");
    let bar = ProgressBar::new(count as u64).with_prefix(verb);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum by headers alone is what the loaded network then holds, but for scales and padding.
    #[test]
    fn what_is_said_to_be_needed_is_what_is_held() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let nano = || open(&root.join("models/nano")).unwrap();
        let schemes = [None, Some(Scheme::INT8), Some(Scheme::INT8_WEIGHT_ONLY), Some(Scheme::INT4), Some(Scheme::FP8)];
        let mut cases: Vec<(Checkpoint, _)> = schemes.map(|scheme| (nano(), scheme)).into();
        // Weights that stay in 16 bits, and such as stay in blocks.
        let mut halves = nano();
        halves.files = halves.files.halves(true);
        cases.push((halves, None));
        cases.push((open(&root.join("tests/fixtures/gguf/llama.gguf")).unwrap(), None));
        let cases = cases.into_iter().map(|(checkpoint, scheme)| (checkpoint, scheme, None));
        // Nothing computes with such weights in f16 here.
        let floats = (nano(), Some(Scheme::INT8), Some(Dtype::F16));
        for (checkpoint, scheme, dtype) in cases.chain([floats]) {
            let run = RunOptions {
                drafters: None,
                device: "cpu".into(),
                dtype,
                quantize: scheme,
                cuda_graphs: Switch::On,
                threads: 1,
                context: 64,
            };
            let placement = run.placement(&checkpoint).unwrap();
            let said = run.need(&checkpoint, placement).weights as f64;
            let held = checkpoint.load_as(scheme, placement, 64, &mut |_| {}).unwrap().weight_bytes() as f64;
            // What is joined of several forms takes as much as the longest of them.
            let least = if checkpoint.name() == "llama" { 0.75 } else { 0.85 };
            assert!((least..1.02).contains(&(said / held)), "{} {scheme:?}: {said} and {held}", checkpoint.name());
        }
    }
}
