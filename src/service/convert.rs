//! From the wire to what the engine validates: [`GenerateRequest`] to [`GenerateOptions`], and the models' settings back.
//!
//! Only what the wire adds is checked here (a missing choice, an unknown enum number); values are the engine's to judge, and
//! [`path`] says where in the request a field that it names stands.

use std::time::Instant;

use tonic::Status;

use super::proto::{self, GenerateRequest, generate_request, template_piece};
use super::status::{self, bad_field};
use crate::checkpoint::chat::Message;
use crate::decode::autoregressive::DrafterKind;
use crate::decode::diffusion::select::Order;
use crate::engine::Request;
use crate::engine::request::{
    AutoregressiveOptions, CacheChoice, DiffusionOptions, DrafterChoice, GenerateOptions, MethodKind, ModelInfo, PRIORITY_MAX,
    Prompt, SamplingOptions, Schedule, TemplatePiece, validate,
};
use crate::telemetry::account;

/// The client's name for the request, or one made up.
pub fn request_id(asked: Option<&str>) -> Result<String, Status> {
    let Some(id) = asked else { return Ok(account::new_id()) };
    if !account::is_id(id) {
        return Err(bad_field("request_id", format!("it is not 1 to {} of A-Z a-z 0-9 . _ : -", account::ID_BYTES_MAX)));
    }
    Ok(id.into())
}

/// The request that `model` is asked to run, or what is wrong with it.
pub fn check(model: &ModelInfo, request: GenerateRequest, id: String, deadline: Instant) -> Result<Request, Status> {
    let (suffix, autoregressive) =
        (request.suffix.is_some(), matches!(request.method, Some(generate_request::Method::Autoregressive(_))));
    let options = options(model, request, id, deadline)?;
    validate(model, options).map_err(|invalid| status::invalid(invalid, |field| path(field, suffix, autoregressive)))
}

/// What the request asks of `model`.
pub fn options(model: &ModelInfo, request: GenerateRequest, id: String, deadline: Instant) -> Result<GenerateOptions, Status> {
    let stopping = request.stopping.unwrap_or_default();
    let mut template = request.template.into_iter().enumerate().map(piece).collect::<Result<Vec<_>, _>>()?;
    let mut max_new_tokens = stopping.max_new_tokens;
    let infill = !template.is_empty() || request.suffix.is_some();
    let prompt = match request.prompt {
        Some(prompt) => self::prompt(prompt),
        None if infill => Prompt::Tokens(vec![]),
        None => return Err(bad_field("prompt", "set one of text, chat and token_ids, or a template or suffix")),
    };
    if let Some(suffix) = request.suffix {
        if !template.is_empty() {
            return Err(bad_field("suffix", "a template says what follows: leave the suffix unset, or the template"));
        }
        let hole = max_new_tokens.take().unwrap_or(model.default_canvas() as u64);
        if hole == 0 || hole > model.context as u64 {
            let reason = format!("{hole} is not from 1 to the model's context of {}", model.context);
            return Err(bad_field("stopping.max_new_tokens", reason));
        }
        template = vec![TemplatePiece::Hole(hole), TemplatePiece::Text(suffix)];
    }
    let (mut diffusion, mut autoregressive) = (DiffusionOptions::default(), AutoregressiveOptions::default());
    let method = match request.method {
        Some(generate_request::Method::Diffusion(asked)) => {
            diffusion = self::diffusion(asked)?;
            Some(MethodKind::Diffusion)
        }
        Some(generate_request::Method::Autoregressive(asked)) => {
            autoregressive = self::autoregressive(asked)?;
            Some(MethodKind::Autoregressive)
        }
        None => None,
    };
    Ok(GenerateOptions {
        id,
        prompt,
        template,
        max_new_tokens,
        method,
        diffusion,
        autoregressive,
        sampling: sampling(request.sampling.unwrap_or_default()),
        stops: stopping.stop,
        steps: request.step_events.unwrap_or(true),
        deadline: Some(deadline),
        priority: request.priority.unwrap_or(0),
    })
}

/// The smallest request there is: one token in one step, by the model's usual method or with a drafter at hand.
pub fn warm_up(drafter: Option<DrafterKind>, deadline: Instant) -> GenerateOptions {
    GenerateOptions {
        id: "warm-up".into(),
        prompt: Prompt::Tokens(vec![0]),
        template: vec![],
        max_new_tokens: Some(1),
        method: drafter.map(|_| MethodKind::Autoregressive),
        diffusion: DiffusionOptions::default(),
        autoregressive: AutoregressiveOptions {
            drafter: drafter.map(DrafterChoice::Use),
            adapt: drafter.map(|_| true),
            ..AutoregressiveOptions::default()
        },
        sampling: SamplingOptions { seed: Some(0), temperature: drafter.map(|_| 0.0), ..SamplingOptions::default() },
        stops: vec![],
        steps: false,
        deadline: Some(deadline),
        priority: PRIORITY_MAX,
    }
}

/// Where a field that the engine names stands in the request.
pub fn path(field: &'static str, suffix: bool, autoregressive: bool) -> String {
    match field {
        "template" if suffix => "suffix".into(),
        "prompt" | "text" | "chat" | "token_ids" | "template" | "diffusion" | "autoregressive" | "priority" => field.into(),
        "max_new_tokens" | "stop" => format!("stopping.{field}"),
        "temperature" | "top_p" | "top_k" | "min_p" | "logit_bias" | "seed" | "logprobs" | "repetition_penalty"
        | "presence_penalty" | "frequency_penalty" => format!("sampling.{field}"),
        "drafter" | "draft_length" | "beam_width" | "adapt" | "deterministic" | "prefill_chunk" => {
            format!("autoregressive.{field}")
        }
        "suppress_end" if autoregressive => format!("autoregressive.{field}"),
        _ => format!("diffusion.{field}"),
    }
}

pub fn prompt(prompt: generate_request::Prompt) -> Prompt {
    match prompt {
        generate_request::Prompt::Text(text) => Prompt::Text(text),
        generate_request::Prompt::TokenIds(tokens) => Prompt::Tokens(tokens.token_ids),
        generate_request::Prompt::Chat(chat) => {
            let message = |message: proto::Message| Message { role: message.role, content: message.content };
            Prompt::Chat(chat.messages.into_iter().map(message).collect())
        }
    }
}

fn piece((at, piece): (usize, proto::TemplatePiece)) -> Result<TemplatePiece, Status> {
    match piece.piece {
        Some(template_piece::Piece::Text(text)) => Ok(TemplatePiece::Text(text)),
        Some(template_piece::Piece::TokenIds(tokens)) => Ok(TemplatePiece::Tokens(tokens.token_ids)),
        Some(template_piece::Piece::Hole(length)) => Ok(TemplatePiece::Hole(length)),
        None => Err(bad_field(&format!("template[{at}]"), "set one of text, token_ids and hole")),
    }
}

fn sampling(asked: proto::Sampling) -> SamplingOptions {
    SamplingOptions {
        temperature: asked.temperature,
        top_p: asked.top_p,
        top_k: asked.top_k,
        min_p: asked.min_p,
        repetition_penalty: asked.repetition_penalty,
        presence_penalty: asked.presence_penalty,
        frequency_penalty: asked.frequency_penalty,
        logit_bias: asked.logit_bias.into_iter().collect(),
        seed: asked.seed,
        logprobs: asked.logprobs,
    }
}

/// Sampling settings as a message.
pub fn sampling_message(options: &SamplingOptions) -> proto::Sampling {
    proto::Sampling {
        temperature: options.temperature,
        top_p: options.top_p,
        top_k: options.top_k,
        min_p: options.min_p,
        repetition_penalty: options.repetition_penalty,
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        logit_bias: options.logit_bias.iter().copied().collect(),
        seed: options.seed,
        logprobs: options.logprobs,
    }
}

fn autoregressive(asked: proto::Autoregressive) -> Result<AutoregressiveOptions, Status> {
    let choice = |kind| Some(DrafterChoice::Use(kind));
    let drafter = match proto::Drafter::try_from(asked.drafter) {
        Ok(proto::Drafter::Unspecified) => None,
        Ok(proto::Drafter::None) => Some(DrafterChoice::Off),
        Ok(proto::Drafter::Redrafter) => choice(DrafterKind::Redrafter),
        Ok(proto::Drafter::Medusa) => choice(DrafterKind::Medusa),
        Ok(proto::Drafter::Chain) => choice(DrafterKind::Chain),
        Ok(proto::Drafter::Lookup) => choice(DrafterKind::Lookup),
        Err(_) => {
            let reason = format!("{} is not a value of this enum", asked.drafter);
            return Err(bad_field("autoregressive.drafter", reason));
        }
    };
    Ok(AutoregressiveOptions {
        drafter,
        draft_length: asked.draft_length,
        beam_width: asked.beam_width,
        adapt: asked.adapt,
        deterministic: asked.deterministic,
        suppress_end: asked.suppress_end,
        prefill_chunk: asked.prefill_chunk,
    })
}

/// The settings as a message: a model's own for its description, or a client's for its request.
pub fn autoregressive_message(options: &AutoregressiveOptions) -> proto::Autoregressive {
    proto::Autoregressive {
        drafter: options.drafter.map_or(proto::Drafter::Unspecified, drafter).into(),
        draft_length: options.draft_length,
        beam_width: options.beam_width,
        adapt: options.adapt,
        deterministic: options.deterministic,
        suppress_end: options.suppress_end,
        prefill_chunk: options.prefill_chunk,
    }
}

pub fn drafter(choice: DrafterChoice) -> proto::Drafter {
    match choice {
        DrafterChoice::Off => proto::Drafter::None,
        DrafterChoice::Use(DrafterKind::Redrafter) => proto::Drafter::Redrafter,
        DrafterChoice::Use(DrafterKind::Medusa) => proto::Drafter::Medusa,
        DrafterChoice::Use(DrafterKind::Chain) => proto::Drafter::Chain,
        DrafterChoice::Use(DrafterKind::Lookup) => proto::Drafter::Lookup,
    }
}

fn diffusion(asked: proto::Diffusion) -> Result<DiffusionOptions, Status> {
    let unknown = |field: &str, number: i32| bad_field(field, format!("{number} is not a value of this enum"));
    let schedule = match proto::Schedule::try_from(asked.schedule) {
        Ok(proto::Schedule::Unspecified) => None,
        Ok(proto::Schedule::Linear) => Some(Schedule::Linear),
        Ok(proto::Schedule::Timesteps) => Some(Schedule::Timesteps),
        Err(_) => return Err(unknown("diffusion.schedule", asked.schedule)),
    };
    let order = match proto::Order::try_from(asked.order) {
        Ok(proto::Order::Unspecified) => None,
        Ok(proto::Order::Confidence) => Some(Order::Confidence),
        Ok(proto::Order::Margin) => Some(Order::Margin),
        Ok(proto::Order::Entropy) => Some(Order::Entropy),
        Ok(proto::Order::Random) => Some(Order::Random),
        Ok(proto::Order::LeftToRight) => Some(Order::LeftToRight),
        Err(_) => return Err(unknown("diffusion.order", asked.order)),
    };
    let cache = match proto::DiffusionCache::try_from(asked.cache) {
        Ok(proto::DiffusionCache::Unspecified) => None,
        Ok(proto::DiffusionCache::Off) => Some(CacheChoice::Off),
        Ok(proto::DiffusionCache::Prefix) => Some(CacheChoice::Prefix),
        Ok(proto::DiffusionCache::Dual) => Some(CacheChoice::Dual),
        Err(_) => return Err(unknown("diffusion.cache", asked.cache)),
    };
    Ok(DiffusionOptions {
        steps: asked.steps,
        block_length: asked.block_length,
        schedule,
        eps: asked.eps,
        independent: asked.independent,
        order,
        order_temperature: asked.order_temperature,
        threshold: asked.threshold,
        factor: asked.factor,
        entropy_bound: asked.entropy_bound,
        cfg_scale: asked.cfg_scale,
        finish_early: asked.finish_early,
        suppress_end: asked.suppress_end,
        late_end: asked.late_end,
        cache,
        deterministic: asked.deterministic,
    })
}

/// The settings as a message: a model's own for its description, or a client's for its request.
pub fn diffusion_message(options: &DiffusionOptions) -> proto::Diffusion {
    proto::Diffusion {
        steps: options.steps,
        block_length: options.block_length,
        schedule: options.schedule.map_or(proto::Schedule::Unspecified, schedule).into(),
        eps: options.eps,
        independent: options.independent,
        order: options.order.map_or(proto::Order::Unspecified, order).into(),
        order_temperature: options.order_temperature,
        threshold: options.threshold,
        factor: options.factor,
        entropy_bound: options.entropy_bound,
        cfg_scale: options.cfg_scale,
        finish_early: options.finish_early,
        suppress_end: options.suppress_end,
        late_end: options.late_end,
        cache: options.cache.map_or(proto::DiffusionCache::Unspecified, cache).into(),
        deterministic: options.deterministic,
    }
}

pub fn cache(choice: CacheChoice) -> proto::DiffusionCache {
    match choice {
        CacheChoice::Off => proto::DiffusionCache::Off,
        CacheChoice::Prefix => proto::DiffusionCache::Prefix,
        CacheChoice::Dual => proto::DiffusionCache::Dual,
    }
}

fn schedule(schedule: Schedule) -> proto::Schedule {
    match schedule {
        Schedule::Linear => proto::Schedule::Linear,
        Schedule::Timesteps => proto::Schedule::Timesteps,
    }
}

pub fn order(order: Order) -> proto::Order {
    match order {
        Order::Confidence => proto::Order::Confidence,
        Order::Margin => proto::Order::Margin,
        Order::Entropy => proto::Order::Entropy,
        Order::Random => proto::Order::Random,
        Order::LeftToRight => proto::Order::LeftToRight,
    }
}
