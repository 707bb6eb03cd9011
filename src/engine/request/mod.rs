//! From what a client asks to what the engine runs: every default filled in, every value checked against the model, once.
//!
//! [`GenerateOptions`] is what any front end (gRPC, command line) can express, unset meaning the model's own default.
//! [`validate`] turns it into a [`Request`] that cannot fail for the client's sake, or into an [`Invalid`] that names the field.
//! What decoding cannot honour is refused, never ignored. [`diffusion`] and [`autoregressive`] hold what is the methods' own.

pub mod autoregressive;
pub mod diffusion;

use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

use super::{Method, Request};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::chat::Message;
use crate::checkpoint::config::{GenerationConfig, ModelConfig};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::canvas::{Canvas, Piece};
use crate::decode::{Penalties, Sampling};
use crate::draft::DrafterInfo;
use crate::model::quantized::Scheme;
use crate::model::{Transformer, precision};
use crate::telemetry::Trace;
use crate::tensor::Placement;

pub use autoregressive::{AutoregressiveOptions, DrafterChoice};
pub use diffusion::{CacheChoice, DiffusionOptions, Schedule, order};

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
pub const LOGPROBS_MAX: u32 = 20;
pub const PRIORITY_MAX: i32 = 10;

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
    /// How the projections' weights are quantised, if they are.
    pub quantization: Option<Scheme>,
    /// Bytes of the weights as they are held, without drafters'.
    pub weight_bytes: usize,
    /// Who can draft for it.
    pub drafters: Vec<DrafterInfo>,
}

impl ModelInfo {
    /// Takes over the checkpoint's tokenizer; `network` is what was loaded of it.
    pub fn new(checkpoint: Checkpoint, network: &Transformer, drafters: Vec<DrafterInfo>) -> Self {
        let name = checkpoint.name();
        let Checkpoint { config, generation, tokenizer, mask_token_id, .. } = checkpoint;
        let (context, placement, tokenizer) = (network.context(), network.placement(), Arc::new(tokenizer));
        let (quantization, weight_bytes) = (network.quantization(), network.weight_bytes());
        Self { name, config, generation, tokenizer, mask_token_id, context, placement, quantization, weight_bytes, drafters }
    }

    /// As [`Transformer::precision`].
    pub fn precision(&self) -> String {
        precision(self.placement.dtype, self.quantization)
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

#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u32>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
    /// Committed tokens come with their log-probabilities, and with those of so many alternatives; 0 is off.
    pub logprobs: Option<u32>,
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
    /// Unset: [`default_method`].
    pub method: Option<MethodKind>,
    pub diffusion: DiffusionOptions,
    pub autoregressive: AutoregressiveOptions,
    pub sampling: SamplingOptions,
    pub stops: Vec<String>,
    pub steps: bool,
    pub deadline: Option<Instant>,
    /// Higher goes first where requests wait, from -[`PRIORITY_MAX`] to [`PRIORITY_MAX`].
    pub priority: i32,
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

pub(super) fn invalid<T>(field: &'static str, reason: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid::Field { field, reason: reason.into() })
}

/// Whether the model's own defaults make a request: what is wrong with them is the folder's fault, and no client's.
pub fn check_defaults(model: &ModelInfo) -> Result<(), String> {
    let options = GenerateOptions {
        id: String::new(),
        // Some token, for methods that need one to go on from.
        prompt: Prompt::Tokens(vec![0]),
        template: vec![],
        // The model's own length might not leave room for the prompt's one token.
        max_new_tokens: model.generation.max_new_tokens.map(|length| length.min(model.context.saturating_sub(1)) as u64),
        method: None,
        diffusion: DiffusionOptions::default(),
        autoregressive: AutoregressiveOptions::default(),
        sampling: SamplingOptions::default(),
        stops: vec![],
        steps: false,
        deadline: None,
        priority: 0,
    };
    match validate(model, options) {
        Err(Invalid::Field { field, reason }) => Err(format!("generation_config.json: {field}: {reason}")),
        // Not a matter of defaults: whoever asks for diffusion is told.
        Err(Invalid::Unsupported(_)) | Ok(_) => Ok(()),
    }
}

/// Which decoder a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodKind {
    Diffusion,
    Autoregressive,
}

/// What `model` does when a request does not say: diffusion if it can.
pub fn default_method(model: &ModelInfo) -> MethodKind {
    let causal = diffusion::unsupported(model).is_some() && autoregressive::unsupported(model).is_none();
    if causal { MethodKind::Autoregressive } else { MethodKind::Diffusion }
}

/// Why `model` cannot decode by `method`, if it cannot.
pub fn unsupported(model: &ModelInfo, method: MethodKind) -> Option<String> {
    match method {
        MethodKind::Diffusion => diffusion::unsupported(model),
        MethodKind::Autoregressive => autoregressive::unsupported(model),
    }
}

/// Checks `options` against `model`.
pub fn validate(model: &ModelInfo, options: GenerateOptions) -> Result<Request, Invalid> {
    let kind = options.method.unwrap_or(default_method(model));
    check_method(model, &options, kind)?;
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
    // A model without a mask token shows its holes as ends of text; which cells are masked is told beside the tokens.
    let blank = model.mask_token_id.as_ref().ok().or(model.generation.eos_token_ids.first()).copied().unwrap_or(0);
    let canvas = Canvas::new(&prompt, &pieces, blank);
    for stop in &options.stops {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            return invalid("stop", format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes"));
        }
    }
    if options.stops.len() > STOPS_MAX {
        return invalid("stop", format!("{} stop strings are more than {STOPS_MAX}", options.stops.len()));
    }
    let method = match kind {
        MethodKind::Diffusion => Method::Diffusion(diffusion::parameters(model, &options, &canvas, &pieces)?),
        MethodKind::Autoregressive => {
            Method::Autoregressive(autoregressive::parameters(model, &options, prompt.len() + fixed, &pieces)?)
        }
    };
    if !(-PRIORITY_MAX..=PRIORITY_MAX).contains(&options.priority) {
        return invalid("priority", format!("{} is not from -{PRIORITY_MAX} to {PRIORITY_MAX}", options.priority));
    }
    let GenerateOptions { id, stops, steps, deadline, priority, .. } = options;
    Ok(Request { id, canvas, method, stops, steps, deadline, priority, fresh: false, trace: Trace::default() })
}

/// Whether `model` can do it, and whether only its own settings are given.
fn check_method(model: &ModelInfo, options: &GenerateOptions, kind: MethodKind) -> Result<(), Invalid> {
    let what = match kind {
        MethodKind::Diffusion => "do diffusion",
        MethodKind::Autoregressive => "decode autoregressively",
    };
    let unsupported = unsupported(model, kind);
    if let (Some(reason), Some(_)) = (&unsupported, &options.autoregressive.drafter) {
        return invalid("drafter", format!("model {} cannot {what}, so there is nothing to draft for: {reason}", model.name));
    }
    if let Some(reason) = unsupported {
        return Err(Invalid::Unsupported(format!("model {} cannot {what}: {reason}", model.name)));
    }
    match kind {
        MethodKind::Diffusion if options.autoregressive != AutoregressiveOptions::default() => {
            invalid("autoregressive", "the method is diffusion: leave these settings unset, or choose the other method")
        }
        MethodKind::Autoregressive if options.diffusion != DiffusionOptions::default() => {
            invalid("diffusion", "the method is autoregressive: leave these settings unset, or choose the other method")
        }
        _ => Ok(()),
    }
}

pub(super) fn prompt_ids(model: &ModelInfo, prompt: &Prompt) -> Result<Vec<u32>, Invalid> {
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
    let penalties = Penalties {
        repetition: number("repetition_penalty", asked.repetition_penalty, 0.1..=10.0)?.unwrap_or(1.0),
        presence: number("presence_penalty", asked.presence_penalty, -10.0..=10.0)?.unwrap_or(0.0),
        frequency: number("frequency_penalty", asked.frequency_penalty, -10.0..=10.0)?.unwrap_or(0.0),
    };
    if let Some(count) = asked.logprobs.filter(|count| *count > LOGPROBS_MAX) {
        return invalid("logprobs", format!("{count} alternatives are more than {LOGPROBS_MAX}"));
    }
    Ok(Sampling {
        temperature: temperature.unwrap_or(0.0),
        penalties,
        alternatives: asked.logprobs.unwrap_or(0),
        // The mask token stands for what is not known: it is never a prediction.
        forbidden: model.mask_token_id.iter().copied().collect(),
        top_k: asked.top_k.or(model.generation.top_k),
        top_p: positive("top_p", asked.top_p.or(model.generation.top_p))?,
        min_p: positive("min_p", asked.min_p)?,
        logit_bias: asked.logit_bias.clone(),
        ..Sampling::default()
    })
}
