//! From what a client asks to what the engine runs: every default filled in, every value checked against the model, once.
//!
//! [`GenerateOptions`] is what any front end (gRPC, command line) can express, unset meaning the model's own default.
//! [`validate`] turns it into a [`Request`] that cannot fail for the client's sake, or into an [`Invalid`] that names the field.
//! What decoding cannot honour is refused, never ignored.

use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;
use thiserror::Error;

use super::Request;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::chat::Message;
use crate::checkpoint::config::{GenerationConfig, ModelConfig};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::Sampling;
use crate::decode::canvas::{Canvas, Piece};
use crate::decode::diffusion::select::Order;
use crate::decode::diffusion::{Commit, EndOfText, Parameters};
use crate::model::family::Attention;
use crate::tensor::Placement;

/// Bounds on one request, whatever the model.
pub const STEPS_MAX: u64 = 4096;
pub const STOPS_MAX: usize = 16;
pub const STOP_BYTES_MAX: usize = 256;
pub const LOGIT_BIAS_MAX: usize = 1024;
pub const PIECES_MAX: usize = 256;
pub const PROMPT_BYTES_MAX: usize = 1 << 20;
/// Below, logits over the temperature leave f32.
pub const TEMPERATURE_MIN: f64 = 1e-4;
pub const TEMPERATURE_MAX: f64 = 10.0;
pub const CFG_SCALE_MAX: f64 = 100.0;

/// A loaded model as requests see it.
#[derive(Clone)]
pub struct ModelInfo {
    pub name: String,
    pub config: ModelConfig,
    pub generation: GenerationConfig,
    pub tokenizer: Arc<Tokenizer>,
    /// The mask token, or why diffusion is not possible.
    pub mask_token_id: Result<u32, String>,
    /// Prompt and canvas together, in tokens.
    pub context: usize,
    pub placement: Placement,
}

impl ModelInfo {
    /// Takes over the checkpoint's tokenizer. `context` is that of the loaded network.
    pub fn new(checkpoint: Checkpoint, context: usize, placement: Placement) -> Self {
        let name = checkpoint.name();
        let Checkpoint { config, generation, tokenizer, mask_token_id, .. } = checkpoint;
        Self { name, config, generation, tokenizer: Arc::new(tokenizer), mask_token_id, context, placement }
    }

    /// Tokens that a canvas gets when the request does not say.
    pub fn default_canvas(&self) -> usize {
        self.generation.max_new_tokens.unwrap_or(128).min(self.context)
    }
}

/// What stands before the canvas.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Taken as it is: no special token is added.
    Text(String),
    /// Rendered by the model's chat template.
    Chat(Vec<Message>),
    Tokens(Vec<u32>),
}

/// One stretch of a canvas template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplatePiece {
    Text(String),
    Tokens(Vec<u32>),
    /// So many cells to fill.
    Hole(u64),
}

/// How counts are spread over steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Linear,
    Timesteps,
}

/// A diffusion method's settings; also the form of `diffusion` in `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiffusionOptions {
    pub steps: Option<u64>,
    pub block_length: Option<u64>,
    pub schedule: Option<Schedule>,
    pub eps: Option<f64>,
    /// Reveal each cell on its own in the timestep schedule (Dream's `origin`).
    pub independent: Option<bool>,
    #[serde(with = "order_name")]
    pub order: Option<Order>,
    pub order_temperature: Option<f64>,
    pub threshold: Option<f64>,
    pub factor: Option<f64>,
    pub entropy_bound: Option<f64>,
    pub cfg_scale: Option<f64>,
    /// End once end-of-text stands with nothing masked before it; on unless said otherwise.
    pub finish_early: Option<bool>,
    /// Never choose end-of-text (LLaDA's `logits_eos_inf`).
    pub suppress_end: Option<bool>,
    /// Choose end-of-text late (LLaDA's `confidence_eos_eot_inf`).
    pub late_end: Option<bool>,
}

mod order_name {
    use super::Order;
    use serde::{Deserialize, Deserializer, de::Error};

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Order>, D::Error> {
        let Some(name) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        super::order(&name).map(Some).ok_or_else(|| D::Error::custom(format!("order '{name}' is not known")))
    }
}

/// An order by its name.
pub fn order(name: &str) -> Option<Order> {
    Some(match name {
        "confidence" => Order::Confidence,
        "margin" => Order::Margin,
        "entropy" => Order::Entropy,
        "random" => Order::Random,
        "left_to_right" => Order::LeftToRight,
        _ => return None,
    })
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u32>,
    pub min_p: Option<f64>,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
}

/// Everything that a client can ask of one generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    pub id: String,
    pub prompt: Prompt,
    /// Fixed text and holes behind the prompt; empty means one hole of `max_new_tokens`.
    pub template: Vec<TemplatePiece>,
    /// Tokens to generate: the canvas's length. Refused beside a template, whose holes say it.
    pub max_new_tokens: Option<u64>,
    pub diffusion: DiffusionOptions,
    pub sampling: SamplingOptions,
    pub stops: Vec<String>,
    pub steps: bool,
    pub deadline: Option<Instant>,
}

/// What is wrong with a request.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Invalid {
    #[error("{field}: {reason}")]
    Field { field: &'static str, reason: String },
    /// The model cannot do it, whatever the values.
    #[error("{0}")]
    Unsupported(String),
}

fn invalid<T>(field: &'static str, reason: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid::Field { field, reason: reason.into() })
}

/// Whether the model's own defaults make a request: what is wrong with them is the folder's fault, and no client's.
pub fn check_defaults(model: &ModelInfo) -> Result<(), String> {
    let options = GenerateOptions {
        id: String::new(),
        prompt: Prompt::Tokens(vec![]),
        template: vec![],
        max_new_tokens: None,
        diffusion: DiffusionOptions::default(),
        sampling: SamplingOptions::default(),
        stops: vec![],
        steps: false,
        deadline: None,
    };
    match validate(model, options) {
        Err(Invalid::Field { field, reason }) => Err(format!("generation_config.json: {field}: {reason}")),
        // Not a matter of defaults: whoever asks for diffusion is told.
        Err(Invalid::Unsupported(_)) | Ok(_) => Ok(()),
    }
}

/// Checks `options` against `model`.
pub fn validate(model: &ModelInfo, options: GenerateOptions) -> Result<Request, Invalid> {
    let mask = match &model.mask_token_id {
        Ok(mask) => *mask,
        Err(reason) => return Err(Invalid::Unsupported(format!("model {} cannot do diffusion: {reason}", model.name))),
    };
    if model.config.attention == Attention::Causal {
        let reason = "its attention is causal; a masked model on this body says \"is_causal\": false in its config.json";
        return Err(Invalid::Unsupported(format!("model {} cannot do diffusion: {reason}", model.name)));
    }
    let prompt = prompt_ids(model, &options.prompt)?;
    let pieces = pieces(model, &options)?;
    // Counted before it is laid out: a template of many long holes must not take memory first.
    let cells: usize = pieces.iter().map(|piece| if let Piece::Hole(length) = piece { *length } else { 0 }).sum();
    let fixed: usize = pieces.iter().map(|piece| if let Piece::Fixed(ids) = piece { ids.len() } else { 0 }).sum();
    let length = prompt.len() + cells + fixed;
    if length > model.context {
        let field = if options.template.is_empty() { "max_new_tokens" } else { "template" };
        let reason = format!("prompt and canvas have {length} tokens, the model's context {}", model.context);
        return invalid(field, reason);
    }
    let canvas = Canvas::new(&prompt, &pieces, mask);
    for stop in &options.stops {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            return invalid("stop", format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes"));
        }
    }
    if options.stops.len() > STOPS_MAX {
        return invalid("stop", format!("{} stop strings are more than {STOPS_MAX}", options.stops.len()));
    }
    let mut defaults = match &model.generation.diffusion {
        Some(json) => {
            DiffusionOptions::deserialize(json).or_else(|e| invalid("diffusion", format!("the model's own settings: {e}")))?
        }
        None => DiffusionOptions::default(),
    };
    if fixed_behind_hole(&pieces) {
        // An end-of-text inside a hole would cut off the fixed text behind it, so it is not chosen unless a request insists.
        defaults.suppress_end = defaults.suppress_end.or(Some(!model.generation.eos_token_ids.is_empty()));
    }
    let parameters = parameters(model, &options, defaults, mask, canvas.len())?;
    if let Commit::Linear { steps } | Commit::Timesteps { steps, .. } = parameters.commit {
        let blocks = canvas.blocks_to_fill(parameters.block_length);
        if steps < blocks {
            return invalid("steps", format!("{steps} steps cannot fill {blocks} blocks: ask for more, or for longer blocks"));
        }
    }
    Ok(Request { id: options.id, canvas, parameters, stops: options.stops, steps: options.steps, deadline: options.deadline })
}

fn prompt_ids(model: &ModelInfo, prompt: &Prompt) -> Result<Vec<u32>, Invalid> {
    let encode = |field: &'static str, text: &str| {
        if text.len() > PROMPT_BYTES_MAX {
            return invalid(field, format!("{} bytes are more than {PROMPT_BYTES_MAX}", text.len()));
        }
        model.tokenizer.encode(text, false).or_else(|reason| invalid(field, reason))
    };
    match prompt {
        Prompt::Text(text) => encode("text", text),
        Prompt::Tokens(ids) => check_ids(model, "token_ids", ids).map(|()| ids.clone()),
        Prompt::Chat(messages) => {
            if messages.is_empty() {
                return invalid("chat", "there is no message");
            }
            let Some(template) = model.tokenizer.chat() else {
                return Err(Invalid::Unsupported(format!("model {} has no chat template: send text instead", model.name)));
            };
            let text = template.render(messages).or_else(|reason| invalid("chat", reason))?;
            encode("chat", &text)
        }
    }
}

fn check_ids(model: &ModelInfo, field: &'static str, ids: &[u32]) -> Result<(), Invalid> {
    match ids.iter().find(|id| **id as usize >= model.config.vocab_size) {
        Some(id) => invalid(field, format!("token id {id} is outside the vocabulary of {}", model.config.vocab_size)),
        None => Ok(()),
    }
}

fn pieces(model: &ModelInfo, options: &GenerateOptions) -> Result<Vec<Piece>, Invalid> {
    let bounded = |field: &'static str, length: u64| {
        if length == 0 || length > model.context as u64 {
            return invalid(field, format!("{length} is not from 1 to the model's context of {}", model.context));
        }
        Ok(length as usize)
    };
    if options.template.is_empty() {
        let asked = options.max_new_tokens.unwrap_or(model.default_canvas() as u64);
        return Ok(vec![Piece::Hole(bounded("max_new_tokens", asked)?)]);
    }
    if options.max_new_tokens.is_some() {
        return invalid("max_new_tokens", "a template's holes say how many tokens to generate: leave it unset");
    }
    if options.template.len() > PIECES_MAX {
        return invalid("template", format!("{} pieces are more than {PIECES_MAX}", options.template.len()));
    }
    let piece = |piece: &TemplatePiece| match piece {
        TemplatePiece::Hole(length) => Ok(Piece::Hole(bounded("template", *length)?)),
        TemplatePiece::Tokens(ids) => check_ids(model, "template", ids).map(|()| Piece::Fixed(ids.clone())),
        TemplatePiece::Text(text) if text.len() > PROMPT_BYTES_MAX => {
            invalid("template", format!("{} bytes are more than {PROMPT_BYTES_MAX}", text.len()))
        }
        TemplatePiece::Text(text) => {
            let ids = model.tokenizer.encode(text, false).or_else(|reason| invalid("template", reason))?;
            Ok(Piece::Fixed(ids))
        }
    };
    let pieces = options.template.iter().map(piece).collect::<Result<Vec<_>, _>>()?;
    if !pieces.iter().any(|piece| matches!(piece, Piece::Hole(_))) {
        return invalid("template", "there is no hole to fill");
    }
    Ok(pieces)
}

fn fixed_behind_hole(pieces: &[Piece]) -> bool {
    let first = pieces.iter().position(|piece| matches!(piece, Piece::Hole(_)));
    first.is_some_and(|first| pieces[first..].iter().any(|piece| matches!(piece, Piece::Fixed(ids) if !ids.is_empty())))
}

/// A number within bounds; NaN and infinity are in none.
fn number(field: &'static str, value: Option<f64>, range: std::ops::RangeInclusive<f64>) -> Result<Option<f64>, Invalid> {
    match value {
        Some(value) if !range.contains(&value) => {
            invalid(field, format!("{value} is not a number from {} to {}", range.start(), range.end()))
        }
        _ => Ok(value),
    }
}

fn whole(field: &'static str, value: Option<u64>, max: u64) -> Result<Option<usize>, Invalid> {
    match value {
        Some(value) if value == 0 || value > max => invalid(field, format!("{value} is not a whole number from 1 to {max}")),
        _ => Ok(value.map(|value| value as usize)),
    }
}

fn parameters(
    model: &ModelInfo,
    options: &GenerateOptions,
    defaults: DiffusionOptions,
    mask: u32,
    canvas: usize,
) -> Result<Parameters, Invalid> {
    let asked = &options.diffusion;
    // A request that says how to commit replaces the model's default rule as a whole; order and the rest fall back one by one.
    let rules = [asked.steps.is_some(), asked.threshold.is_some(), asked.factor.is_some(), asked.entropy_bound.is_some()];
    let rules = rules.iter().filter(|set| **set).count();
    if rules > 1 {
        return invalid("diffusion", "steps, threshold, factor and entropy_bound exclude one another");
    }
    let rule = if rules == 1 { asked } else { &defaults };
    let order = asked.order.or(defaults.order).unwrap_or(Order::Confidence);
    let commit = commit(asked, rule, &defaults, order, canvas)?;
    let ends = model.generation.eos_token_ids.clone();
    let need_ends = |field: &'static str, set: Option<bool>| match set.unwrap_or(false) && ends.is_empty() {
        true => invalid(field, "the model names no end-of-text token"),
        false => Ok(set.unwrap_or(false)),
    };
    let mut sampling = sampling(model, &options.sampling)?;
    sampling.forbidden.push(mask);
    if need_ends("suppress_end", asked.suppress_end.or(defaults.suppress_end))? {
        sampling.forbidden.extend(&ends);
    }
    if need_ends("late_end", asked.late_end.or(defaults.late_end))? {
        sampling.unconfident.clone_from(&ends);
    }
    // Dream draws and judges under the same filtered distribution; LLaDA judges under the plain one.
    sampling.filtered_confidence = model.config.shift;
    sampling.margin = order == Order::Margin;
    sampling.entropy = order == Order::Entropy || matches!(commit, Commit::EntropyBound(_));
    let block_length = whole("block_length", asked.block_length.or(defaults.block_length), u64::from(u32::MAX))?;
    Ok(Parameters {
        block_length: block_length.unwrap_or(canvas).min(canvas),
        order,
        order_temperature: number(
            "order_temperature",
            asked.order_temperature.or(defaults.order_temperature),
            0.0..=TEMPERATURE_MAX,
        )?
        .unwrap_or(0.0),
        commit,
        cfg_scale: number("cfg_scale", asked.cfg_scale.or(defaults.cfg_scale), 0.0..=CFG_SCALE_MAX)?.unwrap_or(0.0),
        sampling,
        end_of_text: EndOfText { ids: ends, finish_early: asked.finish_early.or(defaults.finish_early).unwrap_or(true) },
        seed: options.sampling.seed.unwrap_or_else(rand::random),
    })
}

fn commit(
    asked: &DiffusionOptions,
    rule: &DiffusionOptions,
    defaults: &DiffusionOptions,
    order: Order,
    canvas: usize,
) -> Result<Commit, Invalid> {
    let counted = rule.threshold.is_none() && rule.factor.is_none() && rule.entropy_bound.is_none();
    for (field, set) in
        [("schedule", asked.schedule.is_some()), ("eps", asked.eps.is_some()), ("independent", asked.independent.is_some())]
    {
        if set && !counted {
            return invalid(field, "it goes with steps only");
        }
    }
    let compares = rule.threshold.is_some() || rule.factor.is_some();
    if compares && asked.order_temperature.or(defaults.order_temperature).is_some_and(|temperature| temperature != 0.0) {
        return invalid("order_temperature", "threshold and factor compare probabilities, not drawn scores: leave it unset");
    }
    if compares && !matches!(order, Order::Confidence | Order::Margin) {
        return invalid("order", "threshold and factor compare probabilities: use order confidence or margin with them");
    }
    if let Some(threshold) = number("threshold", rule.threshold, 0.0..=1.0)? {
        return Ok(Commit::Threshold(threshold));
    }
    if let Some(factor) = number("factor", rule.factor, 0.0..=1000.0)? {
        return Ok(Commit::Factor(factor));
    }
    if let Some(bound) = number("entropy_bound", rule.entropy_bound, 0.0..=1000.0)? {
        return Ok(Commit::EntropyBound(bound));
    }
    let steps = whole("steps", rule.steps, STEPS_MAX)?.unwrap_or(canvas);
    let eps = number("eps", asked.eps.or(defaults.eps), 0.0..=0.5)?;
    let independent = asked.independent.or(defaults.independent);
    match asked.schedule.or(defaults.schedule).unwrap_or(Schedule::Linear) {
        Schedule::Timesteps => {
            Ok(Commit::Timesteps { steps, eps: eps.unwrap_or(1e-3), independent: independent.unwrap_or(false) })
        }
        Schedule::Linear if asked.eps.is_some() => invalid("eps", "it goes with the timestep schedule only"),
        Schedule::Linear if asked.independent == Some(true) => {
            invalid("independent", "it goes with the timestep schedule only")
        }
        Schedule::Linear => Ok(Commit::Linear { steps }),
    }
}

fn sampling(model: &ModelInfo, asked: &SamplingOptions) -> Result<Sampling, Invalid> {
    if asked.logit_bias.len() > LOGIT_BIAS_MAX {
        return invalid("logit_bias", format!("{} entries are more than {LOGIT_BIAS_MAX}", asked.logit_bias.len()));
    }
    for (id, bias) in &asked.logit_bias {
        check_ids(model, "logit_bias", &[*id])?;
        number("logit_bias", Some(f64::from(*bias)), -1000.0..=1000.0)?;
    }
    if asked.top_k == Some(0) {
        return invalid("top_k", "0 is not a whole number above 0: leave it unset to take all tokens");
    }
    let positive = |field, value| match number(field, value, 0.0..=1.0)? {
        Some(0.0) => invalid(field, "0 would leave no token: use a number above 0 and at most 1"),
        value => Ok(value),
    };
    let temperature = number("temperature", asked.temperature.or(model.generation.temperature), 0.0..=TEMPERATURE_MAX)?;
    if let Some(temperature) = temperature.filter(|temperature| *temperature > 0.0 && *temperature < TEMPERATURE_MIN) {
        return invalid(
            "temperature",
            format!("{temperature} is neither 0 nor at least {TEMPERATURE_MIN}: use 0 for the best token"),
        );
    }
    Ok(Sampling {
        temperature: temperature.unwrap_or(0.0),
        top_k: asked.top_k.or(model.generation.top_k),
        top_p: positive("top_p", asked.top_p.or(model.generation.top_p))?,
        min_p: positive("min_p", asked.min_p)?,
        logit_bias: asked.logit_bias.clone(),
        ..Sampling::default()
    })
}
