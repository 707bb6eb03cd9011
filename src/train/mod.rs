//! Training the small models that ship, on libtorch autograd through the very stack that serves them.
//!
//! [`run`] is the loop: batches come from [`data`] and [`blocks`], parameters and optimiser from [`parameters`], the vocabulary
//! from [`vocabulary`]. Everything random follows from the seed and the step's number, so a resumed run sees the batches that an
//! unbroken one would have seen. [`drafter`] trains draft heads for a model that is there. Nothing here knows of serving.

pub mod blocks;
pub mod data;
pub mod drafter;
pub mod parameters;
pub mod progress;
pub mod vocabulary;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::checkpoint::write_atomically;
use crate::eval::nano::Split;
use crate::model::Transformer;
use crate::tensor::{Device, Dtype, Kind, Placement, Tensor};
use data::{Batch, Batches, Objective};
use parameters::{AdamW, Parameters};
use progress::{Budget, CHECKPOINT_EVERY, Progress, Recent};

/// Positions of the small models.
const CONTEXT: usize = 256;
const VALIDATE_EVERY: u64 = 500;
const VALIDATION_BATCHES: u64 = 8;

/// What to train and for how long. Given both bounds, the run ends at the first.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the model: written if absent, resumed if it holds a training state.
    pub out: PathBuf,
    pub objective: Objective,
    /// Folder of the model whose tokenizer to take; without it one is trained on the tasks.
    pub tokenizer: Option<PathBuf>,
    /// Folder of the model whose weights to begin with, as far as it has them.
    pub from: Option<PathBuf>,
    /// Of [`Objective::Block`].
    pub block_length: usize,
    pub seed: u64,
    pub budget: Budget,
    pub batch: usize,
    pub learning_rate: f64,
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub dtype: Dtype,
    /// By its name.
    pub device: String,
    pub threads: usize,
}

impl Options {
    /// Linear warm-up, a plateau, then linearly to zero over the last 40 %.
    fn learning_rate(&self, progress: Progress) -> f64 {
        let decay = ((1.0 - self.budget.share(progress)) / 0.4).min(1.0);
        self.learning_rate * self.budget.warm_up(progress) * decay
    }
}

/// Trains a model on the nano tasks: masked diffusion (LLaDA's objective on the answer; see [`data`] for the masking), or a sibling
/// of about the same size that is autoregressive or fills block after block.
pub fn run(options: &Options) -> Result<()> {
    let budget = options.budget;
    budget.check()?;
    ensure!(options.batch > 0 && options.batch <= 4096, "--batch must be from 1 to 4096");
    ensure!(options.hidden_size.is_multiple_of(options.heads.max(1) * 2), "--hidden-size must be a multiple of 2 × --heads");
    ensure!((1..=data::CANVAS).contains(&options.block_length), "--block-length must be from 1 to {}", data::CANVAS);
    crate::tensor::set_threads(options.threads);
    let device = crate::tensor::device(&options.device).map_err(anyhow::Error::msg)?;
    std::fs::create_dir_all(options.out.join("training")).context("cannot create the model's folder")?;
    let tokenizer = vocabulary::prepare(&options.out, options.tokenizer.as_deref(), options.seed)?;
    let config = model_config(options, &tokenizer)?;
    let mut parameters = Parameters::new(&config, options.dtype, options.seed)?;
    parameters.move_to(device)?;
    let mut optimizer = AdamW::new(&parameters, 0.1)?;
    let state = options.out.join("training/state.safetensors");
    if let Some(from) = options.from.as_ref().filter(|_| !state.exists()) {
        parameters.take_over(&config, &Checkpoint::open(from)?)?;
    }
    let mut progress = parameters::resume(&state, &mut parameters, &mut optimizer)?.unwrap_or_default();
    let mut curve = progress::curve_file(&options.out.join("training/curve.jsonl"), progress)?;
    let batches = Batches {
        tokenizer: &tokenizer,
        seed: options.seed,
        size: options.batch,
        split: Split::Train,
        objective: options.objective,
        block_length: options.block_length,
    };
    let bar = progress::bar(1000);
    bar.println(format!(
        "training {} parameters, vocabulary {}, from step {}",
        config.parameters(),
        config.vocab_size,
        progress.step
    ));
    let mut saved = Instant::now();
    let (mut recent, mut pool) = (Recent::default(), Vec::new());
    let stop = budget.stop(progress);
    while budget.share(progress) < 1.0 && progress.step < stop {
        let started = Instant::now();
        let place = (progress.step % data::POOL) as usize;
        if place == 0 || pool.is_empty() {
            pool = batches.pool(progress.step / data::POOL)?;
        }
        let batch = &pool[place];
        let rate = options.learning_rate(progress);
        let loss = step(&config, &mut parameters, &mut optimizer, batch, rate)?;
        progress.step += 1;
        progress.tokens += batch.tokens.len() as u64;
        progress.seconds += started.elapsed().as_secs_f64();
        recent.add(loss, batch.tokens.len(), started.elapsed());
        if progress.step.is_multiple_of(10) {
            bar.set_position((budget.share(progress) * 1000.0) as u64);
            bar.set_message(format!("step {} loss {:.4} {:.0} tok/s", progress.step, recent.loss, recent.rate()));
        }
        let done = budget.share(progress) >= 1.0;
        if progress.step.is_multiple_of(VALIDATE_EVERY) || done {
            let (validation_loss, exact) = validate(&config, &parameters, &tokenizer, options)?;
            let line = json!({
                "step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds.round(), "learning_rate": rate,
                "loss": recent.loss, "held_out_loss": validation_loss, exact_name(options.objective): exact,
                "tokens_per_second": recent.rate().round(),
            });
            bar.println(line.to_string());
            writeln!(curve, "{line}").context("cannot write the learning curve")?;
        }
        if done || progress.step >= stop || saved.elapsed() > CHECKPOINT_EVERY {
            parameters::save(&state, &parameters, &optimizer, progress)?;
            write_model(options, &config, &parameters)?;
            saved = Instant::now();
        }
    }
    bar.finish();
    Ok(())
}

/// One optimiser step; returns the loss. A loss that is not finite ends the run before it spoils the weights.
fn step(config: &ModelConfig, parameters: &mut Parameters, optimizer: &mut AdamW, batch: &Batch, rate: f64) -> Result<f64> {
    let model = network(config, parameters)?;
    let (loss, _) = losses(&model, batch)?;
    let value = loss.f_double_value(&[])?;
    if !value.is_finite() {
        bail!("the loss is {value}: lower --learning-rate");
    }
    loss.f_backward()?;
    optimizer.step(parameters, rate)?;
    Ok(value)
}

fn network(config: &ModelConfig, parameters: &mut Parameters) -> Result<Transformer> {
    let placement = Placement { device: parameters.device(), dtype: parameters.dtype() };
    Ok(Transformer::new(config, placement, CONTEXT, parameters)?)
}

/// Mean cross-entropy over the batch's loss rows, and whether each row's best token is right (`[rows]`, bool).
fn losses(model: &Transformer, batch: &Batch) -> Result<(Tensor, Tensor)> {
    let shape = [batch.size as i64, (batch.tokens.len() / batch.size) as i64];
    let device = model.placement().device;
    let tokens = Tensor::f_from_slice(&batch.tokens)?.f_view(shape)?.f_to_device(device)?;
    let hidden = match batch.copies {
        None => model.hidden(&tokens, model.config().attention)?,
        Some(copies) => {
            let sees = Tensor::f_from_slice(&copies.sees())?.f_view([shape[1], shape[1]])?.f_to_device(device)?;
            model.hidden_where(&tokens, &copies.positions(), &sees)?
        }
    };
    let hidden = hidden.f_reshape([-1, model.config().hidden_size as i64])?;
    let rows = Tensor::f_from_slice(&batch.rows)?.f_to_device(device)?;
    let targets = Tensor::f_from_slice(&batch.targets)?.f_to_device(device)?;
    let logits = model.logits(&hidden.f_index_select(0, &rows)?)?.f_to_kind(Kind::Float)?;
    let loss = logits.f_cross_entropy_loss(&targets, None::<&Tensor>, tch::Reduction::Mean, -100, 0.0)?;
    let right = logits.f_argmax(-1, false)?.f_eq_tensor(&targets)?;
    Ok((loss, right))
}

/// What [`validate`]'s second figure is called in the curve.
fn exact_name(objective: Objective) -> &'static str {
    match objective {
        Objective::Diffusion => "held_out_exact_in_one_forward",
        Objective::Autoregressive => "held_out_exact_when_greedy",
        Objective::Block => "held_out_exact_in_one_forward_a_block",
    }
}

/// On held-out compositions: the loss, and the share of tasks whose every token up to the end of the text is right after one
/// forward. For diffusion that is from a fully masked canvas, and the decoder usually does better, since it may look again; by
/// blocks, from fully masked ones behind right ones. An autoregressive network whose every token is right after the right ones
/// before it writes just that text when greedy.
fn validate(config: &ModelConfig, parameters: &Parameters, tokenizer: &Tokenizer, options: &Options) -> Result<(f64, f64)> {
    let held_out = Batches {
        tokenizer,
        seed: options.seed ^ 0x5eed,
        size: 32,
        split: Split::HeldOut,
        objective: options.objective,
        block_length: options.block_length,
    };
    tch::no_grad(|| {
        let mut weights = parameters.shallow_clone();
        let model = network(config, &mut weights)?;
        let (mut loss, mut exact, mut tasks) = (0.0, 0, 0);
        for index in 0..VALIDATION_BATCHES {
            let batch = held_out.validation(index)?;
            let (batch_loss, right) = losses(&model, &batch)?;
            loss += batch_loss.f_double_value(&[])? / VALIDATION_BATCHES as f64;
            let right: Vec<bool> = Vec::try_from(&right.f_to_device(Device::Cpu)?)?;
            let mut wrong = vec![false; batch.size];
            for (row, right) in batch.rows.iter().zip(right) {
                wrong[*row as usize / (batch.tokens.len() / batch.size)] |= !right;
            }
            exact += wrong.iter().filter(|wrong| !**wrong).count();
            tasks += batch.size;
        }
        Ok((loss, exact as f64 / tasks as f64))
    })
}

/// The shipped models are a LLaDA, a Llama and an SDAR by their configs: the authors' own code can load them.
fn model_config(options: &Options, tokenizer: &Tokenizer) -> Result<ModelConfig> {
    let token = |name: &str| tokenizer.token_id(name).with_context(|| format!("the tokenizer lacks {name}"));
    let (end, mask) = (token(vocabulary::END)?, token(vocabulary::MASK)?);
    let rows = tokenizer.size().next_multiple_of(16);
    // 8/3 of the width in multiples of 64: the usual size where the MLP has three matrices.
    let mlp = (options.hidden_size * 8 / 3).next_multiple_of(64);
    let json = match options.objective {
        Objective::Diffusion => json!({
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "d_model": options.hidden_size,
            "n_layers": options.layers,
            "n_heads": options.heads,
            "n_kv_heads": options.heads,
            "mlp_hidden_size": mlp,
            "vocab_size": tokenizer.size(),
            "embedding_size": rows,
            "max_sequence_length": CONTEXT,
            "rope": true,
            "rope_theta": 10000.0,
            "rope_full_precision": true,
            "rms_norm_eps": 1e-5,
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "block_type": "llama",
            "block_group_size": 1,
            "alibi": false,
            "attention_layer_norm": false,
            "include_bias": false,
            "include_qkv_bias": false,
            "bias_for_layer_norm": false,
            "input_emb_norm": false,
            "scale_logits": false,
            "weight_tying": true,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "mask_token_id": mask,
            "eos_token_id": end,
            "pad_token_id": end,
            "torch_dtype": "float16",
        }),
        Objective::Autoregressive => json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": options.hidden_size,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.heads,
            "intermediate_size": mlp,
            "vocab_size": rows,
            "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "tie_word_embeddings": true,
            "eos_token_id": end,
            "pad_token_id": end,
            "torch_dtype": "float16",
        }),
        Objective::Block => json!({
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "block_size": options.block_length,
            "hidden_size": options.hidden_size,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.heads,
            "head_dim": options.hidden_size / options.heads,
            "intermediate_size": mlp,
            "vocab_size": rows,
            "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0,
            "rope_scaling": null,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "use_sliding_window": false,
            "tie_word_embeddings": true,
            "mask_token_id": mask,
            "eos_token_id": end,
            "pad_token_id": end,
            "torch_dtype": "float16",
        }),
    };
    write_atomically(&options.out.join("config.json"), &serde_json::to_vec_pretty(&json)?)?;
    let mut generation = json!({ "eos_token_id": end, "max_new_tokens": data::CANVAS });
    // The decoder's defaults for this model; its README has the measurements behind them.
    match options.objective {
        Objective::Diffusion => generation["diffusion"] = json!({ "block_length": data::CANVAS, "threshold": 0.9 }),
        Objective::Autoregressive => {}
        Objective::Block => generation["diffusion"] = json!({ "threshold": 0.9 }),
    }
    write_atomically(&options.out.join("generation_config.json"), &serde_json::to_vec_pretty(&generation)?)?;
    ModelConfig::from_json(&json).map_err(anyhow::Error::msg)
}

fn write_model(options: &Options, config: &ModelConfig, parameters: &Parameters) -> Result<()> {
    let tensors: Vec<_> = crate::model::manifest(config)
        .into_iter()
        .map(|spec| Ok((spec.name.clone(), parameters.get(&spec.name)?.shallow_clone())))
        .collect::<Result<_>>()?;
    // 11 bits of mantissa are plenty for weights of this size, at half the bytes.
    Ok(crate::checkpoint::weights::save(&options.out.join("model.safetensors"), &tensors, Dtype::F16)?)
}
