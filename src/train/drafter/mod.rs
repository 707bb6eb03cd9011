//! Training draft heads for a model that is there: its states and what it says next are the lesson, and its weights stay.
//!
//! [`texts`] has the teacher write, [`batches`] says which places of those texts the heads learn from, [`heads`] holds their
//! networks. ReDrafter is unrolled along the text as its authors' trainer does (Zhang et al., arXiv 2403.09919), Medusa's heads
//! all start from the one state (Cai et al., arXiv 2401.10774). Both learn the teacher's whole distributions (or just the text's
//! tokens), later steps counting for less. As everywhere in training, what is random follows from the seed and the step's number.

pub mod batches;
pub mod heads;
pub mod texts;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::parameters::{self, AdamW};
use super::progress::{self, Budget, CHECKPOINT_EVERY, Progress, Recent};
use crate::checkpoint::Checkpoint;
use crate::draft::{medusa, redrafter};
use crate::model::Transformer;
use crate::model::family::Attention;
use crate::tensor::{Device, Dtype, Kind, Placement, Tensor};
use batches::{Batch, Order};
use heads::{Heads, Settings};
use texts::{Text, Texts};

const VALIDATE_EVERY: u64 = 500;
/// Held-out texts in one forward.
const VALIDATION_BATCH: usize = 32;
/// What a step counts beside the one before it.
const STEP_WEIGHT: f64 = 0.8;
/// Target of a token that the trimmed vocabulary lacks; libtorch's cross-entropy passes over it.
const IGNORED: i64 = -100;

/// Kind of heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum HeadKind {
    Redrafter,
    Medusa,
}

/// What heads learn to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Loss {
    /// The teacher's distribution (Kullback-Leibler divergence).
    Kl,
    /// The text's token (cross-entropy).
    Hard,
}

/// What to train and for how long. Sizes that are left out take the kind's usual value; those of the other kind are refused.
#[derive(Clone, Debug)]
pub struct Options {
    /// Model folder or GGUF file.
    pub teacher: PathBuf,
    pub kind: HeadKind,
    /// Folder to be named as drafters: the heads go to a folder within that is called as their kind.
    pub out: PathBuf,
    pub texts: texts::Settings,
    pub seed: u64,
    pub budget: Budget,
    pub batch: usize,
    pub learning_rate: f64,
    pub loss: Loss,
    pub layers: usize,
    /// Medusa's.
    pub heads: Option<usize>,
    /// ReDrafter's: width of its blocks, tokens foreseen from one state, and most frequent tokens that it may draft.
    pub exit_dim: Option<usize>,
    pub unroll: Option<usize>,
    pub draft_vocabulary: Option<usize>,
    /// Of the teacher, and of the heads' products.
    pub dtype: Dtype,
    pub threads: usize,
}

impl Options {
    /// Linear warm-up, then a half cosine to zero.
    fn learning_rate(&self, progress: Progress) -> f64 {
        let cosine = 0.5 + 0.5 * (self.budget.share(progress) * std::f64::consts::PI).cos();
        self.learning_rate * cosine * self.budget.warm_up(progress)
    }

    fn check(&self) -> Result<()> {
        self.budget.check()?;
        let within = |flag: &str, value: usize, range: std::ops::RangeInclusive<usize>| {
            ensure!(range.contains(&value), "{flag} must be from {} to {}", range.start(), range.end());
            Ok(())
        };
        within("--batch", self.batch, 1..=4096)?;
        within("--layers", self.layers, 1..=16)?;
        within("--heads", self.heads.unwrap_or(1), 1..=16)?;
        within("--unroll", self.unroll.unwrap_or(1), 1..=16)?;
        within("--exit-dim", self.exit_dim.unwrap_or(1), 1..=1 << 17)?;
        within("--length", self.texts.length, 2..=1 << 16)?;
        within("--texts", self.texts.count.unwrap_or(2), 2..=10_000_000)?;
        let temperature = self.texts.temperature;
        ensure!((0.0..=10.0).contains(&temperature), "--temperature must be from 0 to 10");
        ensure!(self.learning_rate > 0.0 && self.learning_rate.is_finite(), "--learning-rate must be above 0");
        let (medusa, redrafter) = (self.heads.is_some(), [self.exit_dim, self.unroll, self.draft_vocabulary]);
        match self.kind {
            HeadKind::Redrafter => ensure!(!medusa, "--heads is Medusa's: how far ReDrafter looks is --unroll"),
            HeadKind::Medusa => ensure!(
                redrafter.iter().all(Option::is_none),
                "--exit-dim, --unroll and --draft-vocabulary are ReDrafter's: Medusa has --heads and --layers"
            ),
        }
        Ok(())
    }

    /// Tokens foreseen from one state.
    fn depth(&self) -> usize {
        match self.kind {
            HeadKind::Redrafter => self.unroll.unwrap_or(5),
            HeadKind::Medusa => self.heads.unwrap_or(4),
        }
    }

    fn settings(&self, teacher: &Transformer) -> Settings {
        let (hidden_size, vocab_size) = (teacher.config().hidden_size, teacher.config().vocab_size);
        match self.kind {
            HeadKind::Redrafter => Settings::Redrafter(redrafter::Settings {
                hidden_size,
                exit_dim: self.exit_dim.unwrap_or(2 * hidden_size),
                layers: self.layers,
                rows: self.draft_vocabulary.unwrap_or(vocab_size),
                trimmed: self.draft_vocabulary.is_some(),
                recurrent: true,
            }),
            HeadKind::Medusa => {
                Settings::Medusa(medusa::Settings { hidden_size, vocab_size, heads: self.depth(), layers: self.layers })
            }
        }
    }
}

/// Trains heads of one kind, and writes them as folders that a model takes as its drafters.
pub fn run(options: &Options) -> Result<()> {
    options.check()?;
    crate::tensor::set_threads(options.threads);
    let (checkpoint, teacher) = teacher(options)?;
    let settings = options.settings(&teacher);
    let folder = options.out.join(settings.name());
    for folder in [options.out.join("training"), folder.join("training")] {
        std::fs::create_dir_all(folder).context("cannot create the heads' folder")?;
    }
    let file = options.out.join("training/texts.jsonl");
    let Texts { held_out, mut training } = texts::prepare(&file, &checkpoint, &teacher, &options.texts)?;
    let tokens = options.draft_vocabulary.map(|size| frequent(&training, size, teacher.config().vocab_size)).transpose()?;
    // One token is chosen by the network itself: what is foreseen begins with the second.
    training.retain(|text| text.tokens.len() >= text.prompt + 2);
    ensure!(!training.is_empty(), "each of the teacher's texts ends at once: there is nothing to foresee");
    let filling = checkpoint.generation.eos_token_ids.first().copied().unwrap_or(0);
    let lesson = Lesson { teacher: &teacher, filling, depth: options.depth(), loss: options.loss };
    let mut heads = Heads::new(settings, &teacher, tokens.as_deref(), options.seed)?;
    let mut optimizer = AdamW::new(&heads.parameters, 0.0)?;
    let state = folder.join("training/state.safetensors");
    let mut progress = parameters::resume(&state, &mut heads.parameters, &mut optimizer)?.unwrap_or_default();
    let mut curve = progress::curve_file(&folder.join("training/curve.jsonl"), progress)?;
    let order =
        Order { lengths: training.iter().map(|text| text.tokens.len()).collect(), size: options.batch, seed: options.seed };
    let (budget, bar) = (options.budget, progress::bar(1000));
    bar.println(format!("training {} on {} texts, from step {}", settings.name(), training.len(), progress.step));
    let (mut recent, mut saved, mut pass) = (Recent::default(), Instant::now(), Vec::new());
    let stop = budget.stop(progress);
    while budget.share(progress) < 1.0 && progress.step < stop {
        let started = Instant::now();
        let place = (progress.step % order.batches()) as usize;
        if place == 0 || pass.is_empty() {
            pass = order.pass(progress.step / order.batches());
        }
        let batch: Vec<_> = pass[place].iter().map(|text| &training[*text]).collect();
        let rate = options.learning_rate(progress);
        let (loss, tokens) = lesson.step(&mut heads, &mut optimizer, &batch, rate)?;
        progress.step += 1;
        progress.tokens += tokens as u64;
        progress.seconds += started.elapsed().as_secs_f64();
        recent.add(loss, tokens, started.elapsed());
        if progress.step.is_multiple_of(10) {
            bar.set_position((budget.share(progress) * 1000.0) as u64);
            bar.set_message(format!("step {} loss {:.4} {:.0} tok/s", progress.step, recent.loss, recent.rate()));
        }
        let done = budget.share(progress) >= 1.0;
        if progress.step.is_multiple_of(VALIDATE_EVERY) || done {
            let found = lesson.validate(&heads, &held_out)?;
            let line = json!({
                "step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds.round(), "learning_rate": rate,
                "loss": recent.loss, "held_out_loss": found.loss, "held_out_acceptance": found.acceptance,
                "held_out_acceptance_length": found.length(), "tokens_per_second": recent.rate().round(),
            });
            bar.println(line.to_string());
            writeln!(curve, "{line}").context("cannot write the learning curve")?;
        }
        if done || progress.step >= stop || saved.elapsed() > CHECKPOINT_EVERY {
            parameters::save(&state, &heads.parameters, &optimizer, progress)?;
            heads.save(&folder, teacher.config().vocab_size)?;
            saved = Instant::now();
        }
    }
    bar.finish();
    Ok(())
}

/// Opens and loads the model whose words are to be foreseen.
fn teacher(options: &Options) -> Result<(Checkpoint, Transformer)> {
    let path = options.teacher.display();
    ensure!(options.teacher.exists(), "there is no model {path}: name a folder that holds config.json, or a GGUF file");
    let checkpoint = Checkpoint::open(&options.teacher)?;
    if checkpoint.config.attention != Attention::Causal {
        bail!(
            "{path} is a diffusion model ({}, bidirectional attention): draft heads foresee what an autoregressive one says next",
            checkpoint.config.family.name
        );
    }
    let vocabulary = checkpoint.config.vocab_size;
    ensure!(
        options.draft_vocabulary.is_none_or(|size| (2..=vocabulary).contains(&size)),
        "--draft-vocabulary must be from 2 to the model's {vocabulary}"
    );
    let placement = Placement { device: Device::Cpu, dtype: options.dtype };
    let model = checkpoint.load(placement, checkpoint.config.max_positions, &mut |_| {})?;
    Ok((checkpoint, model))
}

/// The tokens that the teacher writes most, ascending; of equally frequent ones the first.
fn frequent(texts: &[Text], size: usize, vocab_size: usize) -> Result<Vec<i64>> {
    let mut counts: Vec<(usize, i64)> = (0..vocab_size as i64).map(|token| (0, token)).collect();
    for token in texts.iter().flat_map(|text| &text.tokens[text.prompt..]) {
        counts.get_mut(*token as usize).context("the teacher wrote a token that it does not have")?.0 += 1;
    }
    counts.sort_by_key(|(count, token)| (std::cmp::Reverse(*count), *token));
    let mut tokens: Vec<i64> = counts.into_iter().take(size).map(|(_, token)| token).collect();
    tokens.sort_unstable();
    Ok(tokens)
}

/// The teacher and how heads are held to it.
struct Lesson<'a> {
    teacher: &'a Transformer,
    filling: u32,
    depth: usize,
    loss: Loss,
}

/// What heads come to on texts that they have not seen.
struct Validation {
    loss: f64,
    /// Of the places where every step before was right, the share where this one is.
    acceptance: Vec<f64>,
}

impl Validation {
    /// Tokens that one forward yields if it verifies a chain of all steps, its own choice included.
    fn length(&self) -> f64 {
        let reached = self.acceptance.iter().scan(1.0, |reached, share| {
            *reached *= share;
            Some(*reached)
        });
        1.0 + reached.sum::<f64>()
    }
}

impl Lesson<'_> {
    /// One optimiser step; gives the loss and the number of tokens. A loss that is not finite ends the run.
    fn step(&self, heads: &mut Heads, optimizer: &mut AdamW, texts: &[&Text], rate: f64) -> Result<(f64, usize)> {
        let batch = Batch::new(texts, self.depth, self.filling)?;
        let (contexts, judges) = self.judge(&batch)?;
        let logits = heads.logits(self.teacher, &contexts, &batch.steps)?;
        let (sum, weight) = self.sum(heads, &logits, &batch, &judges)?;
        let loss = sum.f_div_scalar(weight)?;
        let value = loss.f_double_value(&[])?;
        ensure!(value.is_finite(), "the loss is {value}: lower --learning-rate");
        loss.f_backward()?;
        optimizer.step(&mut heads.parameters, rate)?;
        Ok((value, batch.tokens.numel()))
    }

    /// The teacher's states at the contexts, `[contexts, hidden]`, and its logits one place behind each, `[contexts, vocab]`.
    fn judge(&self, batch: &Batch) -> Result<(Tensor, Tensor)> {
        tch::no_grad(|| {
            let hidden = self.teacher.hidden(&batch.tokens, Attention::Causal)?;
            let hidden = hidden.f_reshape([-1, self.teacher.config().hidden_size as i64])?;
            let judges = self.teacher.logits(&hidden.f_index_select(0, &batch.judges)?)?.f_to_kind(Kind::Float)?;
            Ok((hidden.f_index_select(0, &batch.contexts)?, judges))
        })
    }

    /// The loss of all steps' rows together, and what they weigh together.
    fn sum(&self, heads: &Heads, logits: &[Tensor], batch: &Batch, judges: &Tensor) -> Result<(Tensor, f64)> {
        let judges = match &heads.tokens {
            Some(tokens) => judges.f_index_select(1, tokens)?,
            None => judges.shallow_clone(),
        };
        let judges = judges.f_log_softmax(-1, Kind::Float)?;
        let mut total = Tensor::f_zeros([], (Kind::Float, Device::Cpu))?;
        let (mut factor, mut weight) = (1.0, 0.0);
        for (logits, step) in logits.iter().zip(&batch.steps) {
            let loss = match self.loss {
                Loss::Kl => {
                    let said = judges.f_index_select(0, &step.judge)?;
                    logits.f_log_softmax(-1, Kind::Float)?.f_kl_div(&said, tch::Reduction::Sum, true)?
                }
                Loss::Hard => {
                    let said = self.rows(heads, &step.said)?;
                    logits.f_cross_entropy_loss(&said, None::<&Tensor>, tch::Reduction::Sum, IGNORED, 0.0)?
                }
            };
            total = total.f_add(&loss.f_mul_scalar(factor)?)?;
            weight += factor * step.live as f64;
            factor *= STEP_WEIGHT;
        }
        Ok((total, weight))
    }

    /// The head's rows of `tokens`.
    fn rows(&self, heads: &Heads, tokens: &Tensor) -> Result<Tensor> {
        let Some(kept) = &heads.tokens else { return Ok(tokens.shallow_clone()) };
        let options = (Kind::Int64, Device::Cpu);
        let rows = Tensor::f_full([self.teacher.config().vocab_size as i64], IGNORED, options)?;
        let rows = rows.f_index_copy(0, kept, &Tensor::f_arange(kept.size()[0], options)?)?;
        Ok(rows.f_index_select(0, tokens)?)
    }

    /// On the teacher's greedy texts of held-out prompts.
    fn validate(&self, heads: &Heads, texts: &[Text]) -> Result<Validation> {
        let (mut sum, mut weight) = (0.0, 0.0);
        let (mut reached, mut right) = (vec![0.0; self.depth], vec![0.0; self.depth]);
        for texts in texts.chunks(VALIDATION_BATCH) {
            let batch = Batch::new(&texts.iter().collect::<Vec<_>>(), self.depth, self.filling)?;
            if batch.steps.is_empty() {
                continue;
            }
            tch::no_grad(|| -> Result<()> {
                let (contexts, judges) = self.judge(&batch)?;
                let logits = heads.logits(self.teacher, &contexts, &batch.steps)?;
                let (loss, rows) = self.sum(heads, &logits, &batch, &judges)?;
                sum += loss.f_double_value(&[])?;
                weight += rows;
                let best = judges.f_argmax(-1, false)?;
                let mut going = Tensor::f_ones([contexts.size()[0]], (Kind::Bool, Device::Cpu))?;
                for (at, (logits, step)) in logits.iter().zip(&batch.steps).enumerate() {
                    going = going.f_narrow(0, 0, step.live)?;
                    reached[at] += going.f_sum(Kind::Double)?.f_double_value(&[])?;
                    let said = self.rows(heads, &best.f_index_select(0, &step.judge)?)?;
                    going = going.f_logical_and(&logits.f_argmax(-1, false)?.f_eq_tensor(&said)?)?;
                    right[at] += going.f_sum(Kind::Double)?.f_double_value(&[])?;
                }
                Ok(())
            })?;
        }
        let acceptance = right.iter().zip(&reached).map(|(right, reached)| right / f64::max(*reached, 1.0)).collect();
        Ok(Validation { loss: sum / f64::max(weight, 1.0), acceptance })
    }
}
