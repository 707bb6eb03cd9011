//! `lacuna train`: the flags of [`crate::train`], and of [`crate::train::drafter`] under `lacuna train drafter`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::tensor::Dtype;
use crate::train::data::Objective;
use crate::train::drafter::{self, HeadKind, Loss, texts};
use crate::train::progress::Budget;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Options {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    model: ModelOptions,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Train draft heads for an autoregressive model, which writes the texts that they learn from
    Drafter(DrafterOptions),
}

#[derive(Args, Debug)]
struct ModelOptions {
    /// Folder of the model: written if absent, resumed if it holds a training state
    // Optional for the sake of subcommands: clap counts no group that holds another, as this one does, so that the group cannot be.
    #[arg(long, value_name = "DIR", required = true)]
    out: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Objective::Diffusion)]
    objective: Objective,
    /// Take the tokenizer of this model folder rather than train one
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Begin with this model's weights, as far as it has them: same sizes, whatever its family
    #[arg(long, value_name = "MODEL")]
    from: Option<PathBuf>,
    /// Cells of a block, for --objective block
    #[arg(long, value_name = "N", default_value_t = 8)]
    block_length: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    budget: Budget,
    /// Tasks in one step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    #[arg(long, default_value_t = 256)]
    hidden_size: usize,
    #[arg(long, default_value_t = 6)]
    layers: usize,
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Type of the projections; the residual stream and the optimiser stay in f32
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads of one operation; 0 leaves it to libtorch
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

#[derive(Args, Debug)]
struct DrafterOptions {
    /// Model that the heads draft for: a folder in Hugging Face layout, or a GGUF file
    #[arg(long, value_name = "PATH")]
    teacher: PathBuf,
    #[arg(long, value_enum)]
    kind: HeadKind,
    /// Folder to name with --drafters later; resumed if it holds a training state
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    budget: Budget,
    /// Texts in one step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Learn the teacher's distributions, or the tokens of its texts
    #[arg(long, value_enum, default_value = "kl")]
    loss: Loss,
    /// Residual blocks of a head
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Medusa: heads, each for one token further [default: 4]
    #[arg(long)]
    heads: Option<usize>,
    /// ReDrafter: width of the blocks [default: twice the model's]
    #[arg(long, value_name = "N")]
    exit_dim: Option<usize>,
    /// ReDrafter: tokens foreseen from one state in training [default: 5]
    #[arg(long, value_name = "N")]
    unroll: Option<usize>,
    /// ReDrafter: draft no tokens but so many that the teacher writes most [default: all]
    #[arg(long, value_name = "N")]
    draft_vocabulary: Option<usize>,
    /// Prompts, one a line: a JSON string, an object with "prompt", or plain text [default: nano tasks]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Of half of the teacher's texts; the others are greedy
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// Tokens that the teacher writes behind a prompt, at most
    #[arg(long, value_name = "N", default_value_t = 64)]
    length: usize,
    /// Texts to learn from [default: 16384 of nano tasks, or one for each prompt]
    #[arg(long, value_name = "N")]
    texts: Option<usize>,
    /// Type of the teacher and of the heads' products; the heads' weights and the optimiser stay in f32
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Threads of one operation; 0 leaves it to libtorch
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

pub fn run(options: Options) -> Result<()> {
    match options.what {
        Some(What::Drafter(options)) => drafter(options),
        None => model(options.model),
    }
}

fn model(options: ModelOptions) -> Result<()> {
    crate::train::run(&crate::train::Options {
        // clap asks for --out before it comes to this.
        out: options.out.context("say what to train: --out DIR for a model, or drafter for draft heads")?,
        objective: options.objective,
        tokenizer: options.tokenizer,
        from: options.from,
        block_length: options.block_length,
        seed: options.seed,
        budget: options.budget,
        batch: options.batch,
        learning_rate: options.learning_rate,
        hidden_size: options.hidden_size,
        layers: options.layers,
        heads: options.heads,
        dtype: options.dtype,
        device: options.device,
        threads: options.threads,
    })
}

fn drafter(options: DrafterOptions) -> Result<()> {
    drafter::run(&drafter::Options {
        teacher: options.teacher,
        kind: options.kind,
        out: options.out,
        texts: texts::Settings {
            prompts: options.prompts,
            temperature: options.temperature,
            length: options.length,
            count: options.texts,
            seed: options.seed,
        },
        seed: options.seed,
        budget: options.budget,
        batch: options.batch,
        learning_rate: options.learning_rate,
        loss: options.loss,
        layers: options.layers,
        heads: options.heads,
        exit_dim: options.exit_dim,
        unroll: options.unroll,
        draft_vocabulary: options.draft_vocabulary,
        dtype: options.dtype,
        threads: options.threads,
    })
}
