//! From a body to the message that gRPC would have brought: OpenAI's names to the wire's, and back for what is wrong with them.
//!
//! Only what JSON adds is checked here; values are judged where gRPC's are. `lacuna`, the extension, has the wire's own names and
//! nesting.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::Error;
use super::fields::Fields;
use crate::engine::request::{AutoregressiveOptions, DiffusionOptions};
use crate::service::convert::{autoregressive_message, diffusion_message};
use crate::service::proto::generate_request::{Method, Prompt};
use crate::service::proto::{Chat, GenerateRequest, Message, Sampling, Stopping, TemplatePiece, TokenIds, template_piece};

/// Choices of one request: each takes a place of its own in the engine.
pub const CHOICES_MAX: u64 = 16;

/// Which of the three a body is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completion,
    /// A completion between two texts.
    Fim,
}

/// What a body asks for.
#[derive(Debug)]
pub struct Ask {
    pub endpoint: Endpoint,
    pub request: GenerateRequest,
    pub choices: u64,
    /// Alternatives to tell beside each token's log-probability, if that is wanted.
    pub logprobs: Option<u32>,
    pub stream: bool,
    pub include_usage: bool,
    /// Chunks are drafts of the whole text.
    pub diffusing: bool,
    /// Whether text stands behind the gap.
    pub suffix: bool,
    /// The field that said how many tokens.
    length_field: &'static str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text, or an array of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text, or an array of token ids")]
enum TextOrTokens {
    Text(String),
    Tokens(Vec<u32>),
}

/// As on the command line: a text, or the length of a hole.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a text, a hole's length, or {\"token_ids\": [...]}")]
enum Piece {
    Text(String),
    Hole(u64),
    Tokens { token_ids: Vec<u32> },
}

/// Seeds are whole numbers of 64 bits, with or without a sign.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a whole number of 64 bits")]
enum Seed {
    Unsigned(u64),
    Signed(i64),
}

impl Ask {
    pub fn read(endpoint: Endpoint, body: &[u8]) -> Result<Self, Error> {
        let mut fields = Fields::read(body)?;
        let model = fields.take("model")?.unwrap_or_default();
        let prompt = match endpoint {
            Endpoint::Chat => chat(&mut fields)?,
            Endpoint::Completion | Endpoint::Fim => fields.take("prompt")?.map(|prompt| match prompt {
                TextOrTokens::Text(text) => Prompt::Text(text),
                TextOrTokens::Tokens(token_ids) => Prompt::TokenIds(TokenIds { token_ids }),
            }),
        };
        let suffix = if endpoint == Endpoint::Chat { None } else { fields.take("suffix")? };
        if endpoint == Endpoint::Fim && suffix.is_none() {
            return Err(Error::field("suffix", "it is not there: give the text behind the gap, or ask for a completion"));
        }
        let choices = fields.take("n")?.unwrap_or(1);
        if choices == 0 || choices > CHOICES_MAX {
            return Err(Error::field("n", format!("{choices} is not from 1 to {CHOICES_MAX}")));
        }
        let (length_field, max_new_tokens) = length(&mut fields)?;
        let logprobs = logprobs(endpoint, &mut fields)?;
        let stop = fields.take("stop")?.map_or(vec![], |stop| match stop {
            OneOrMore::One(stop) => vec![stop],
            OneOrMore::More(stops) => stops,
        });
        let stream = fields.take("stream")?.unwrap_or(false);
        let include_usage = stream_options(&mut fields, stream)?;
        let diffusing = fields.take("diffusing")?.unwrap_or(false);
        if diffusing && !stream {
            return Err(Error::field("diffusing", "drafts come in a stream: set stream too"));
        }
        if diffusing && logprobs.is_some() {
            return Err(Error::field("diffusing", "a draft's tokens have no log-probabilities: leave one of them unset"));
        }
        let sampling = Sampling {
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            presence_penalty: fields.take("presence_penalty")?,
            frequency_penalty: fields.take("frequency_penalty")?,
            logit_bias: fields.take::<BTreeMap<u32, f32>>("logit_bias")?.unwrap_or_default(),
            seed: fields.take("seed")?.map(|seed| match seed {
                Seed::Unsigned(seed) => seed,
                Seed::Signed(seed) => seed as u64,
            }),
            // The engine counts alternatives, and takes 0 for "off".
            logprobs: logprobs.map(|alternatives| alternatives.max(1)),
            ..Sampling::default()
        };
        let mut request = GenerateRequest {
            model,
            prompt,
            suffix,
            sampling: Some(sampling),
            stopping: Some(Stopping { max_new_tokens, stop }),
            step_events: Some(diffusing),
            ..GenerateRequest::default()
        };
        if let Some(extension) = fields.object("lacuna")? {
            extend(&mut request, extension)?;
        }
        fields.finish()?;
        let suffix = request.suffix.is_some();
        if request.prompt.is_none() && !suffix && request.template.is_empty() {
            return Err(Error::field("prompt", "it is not there: give the text to go on from"));
        }
        Ok(Self { endpoint, request, choices, logprobs, stream, include_usage, diffusing, suffix, length_field })
    }

    /// Where a field of the message stands in the body.
    pub fn path(&self, field: &str) -> String {
        match field.split_once('.') {
            None => match field {
                "text" | "token_ids" | "chat" | "prompt" if self.endpoint == Endpoint::Chat => "messages".into(),
                "text" | "token_ids" | "prompt" => "prompt".into(),
                "suffix" | "model" => field.into(),
                _ => format!("lacuna.{field}"),
            },
            Some(("stopping", "max_new_tokens")) => self.length_field.into(),
            Some(("sampling", "logprobs")) if self.endpoint == Endpoint::Chat => "top_logprobs".into(),
            Some(("sampling", "top_k" | "min_p" | "repetition_penalty")) => format!("lacuna.{field}"),
            Some(("stopping" | "sampling", name)) => name.into(),
            Some(_) => format!("lacuna.{field}"),
        }
    }
}

/// How many tokens, under either of its names.
fn length(fields: &mut Fields) -> Result<(&'static str, Option<u64>), Error> {
    let (old, new): (Option<u64>, _) = (fields.take("max_tokens")?, fields.take("max_completion_tokens")?);
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            Err(Error::field("max_tokens", format!("max_completion_tokens says {new}: leave one of them unset")))
        }
        (_, Some(new)) => Ok(("max_completion_tokens", Some(new))),
        (old, None) => Ok(("max_tokens", old)),
    }
}

/// Chat switches log-probabilities on and counts alternatives in another field; completions do both in one.
fn logprobs(endpoint: Endpoint, fields: &mut Fields) -> Result<Option<u32>, Error> {
    if endpoint != Endpoint::Chat {
        return fields.take("logprobs");
    }
    let (wanted, alternatives) = (fields.take("logprobs")?.unwrap_or(false), fields.take("top_logprobs")?);
    if alternatives.is_some() && !wanted {
        return Err(Error::field("top_logprobs", "it goes with logprobs: true"));
    }
    Ok(wanted.then(|| alternatives.unwrap_or(0)))
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, Error> {
    let options: Option<StreamOptions> = fields.take("stream_options")?;
    if options.is_some() && !stream {
        return Err(Error::field("stream_options", "it goes with stream: true"));
    }
    Ok(options.and_then(|options| options.include_usage).unwrap_or(false))
}

fn chat(fields: &mut Fields) -> Result<Option<Prompt>, Error> {
    let Some(messages) = fields.take::<Vec<serde_json::Map<_, _>>>("messages")? else {
        return Err(Error::field("messages", "it is not there: give the conversation so far"));
    };
    let messages = messages.into_iter().enumerate().map(|(at, map)| message(Fields::at(format!("messages[{at}]"), map)));
    Ok(Some(Prompt::Chat(Chat { messages: messages.collect::<Result<_, _>>()? })))
}

fn message(mut fields: Fields) -> Result<Message, Error> {
    let Some(role) = fields.take::<String>("role")? else {
        return Err(Error::field(&fields.path("role"), "it is not there"));
    };
    let content = match fields.take("content")? {
        None => return Err(Error::field(&fields.path("content"), "it is not there: give a text")),
        Some(serde_json::Value::Array(parts)) => {
            let part = |(at, part)| text_part(&fields.path(&format!("content[{at}]")), part);
            parts.into_iter().enumerate().map(part).collect::<Result<String, _>>()?
        }
        Some(serde_json::Value::String(text)) => text,
        Some(_) => return Err(Error::field(&fields.path("content"), "it is neither a text nor an array of parts")),
    };
    fields.finish()?;
    // What newer clients call the messages that models' templates know as the system's.
    Ok(Message { role: if role == "developer" { "system".into() } else { role }, content })
}

fn text_part(path: &str, part: serde_json::Value) -> Result<String, Error> {
    let serde_json::Value::Object(map) = part else { return Err(Error::field(path, "it is not an object")) };
    let mut fields = Fields::at(path.into(), map);
    let kind = fields.take::<String>("type")?.unwrap_or_default();
    if kind != "text" {
        return Err(Error::field(&fields.path("type"), format!("'{kind}' cannot be read: give parts of type text")));
    }
    let Some(text) = fields.take("text")? else {
        return Err(Error::field(&fields.path("text"), "it is not there"));
    };
    fields.finish()?;
    Ok(text)
}

/// The extension: what OpenAI's API has no name for.
fn extend(request: &mut GenerateRequest, mut fields: Fields) -> Result<(), Error> {
    let diffusion = fields.take::<DiffusionOptions>("diffusion")?.map(|asked| diffusion_message(&asked));
    let autoregressive = fields.take::<AutoregressiveOptions>("autoregressive")?.map(|asked| autoregressive_message(&asked));
    request.method = match (diffusion, autoregressive) {
        (Some(_), Some(_)) => {
            return Err(Error::field("lacuna.autoregressive", "the method is diffusion already: leave one of them out"));
        }
        (Some(diffusion), None) => Some(Method::Diffusion(diffusion)),
        (None, asked) => asked.map(Method::Autoregressive),
    };
    if let Some(mut asked) = fields.object("sampling")? {
        let sampling = request.sampling.get_or_insert_default();
        sampling.top_k = asked.take("top_k")?;
        sampling.min_p = asked.take("min_p")?;
        sampling.repetition_penalty = asked.take("repetition_penalty")?;
        asked.finish()?;
    }
    request.priority = fields.take("priority")?;
    let pieces: Vec<Piece> = fields.take("template")?.unwrap_or_default();
    request.template = pieces.into_iter().map(piece).collect();
    fields.finish()
}

fn piece(piece: Piece) -> TemplatePiece {
    let piece = match piece {
        Piece::Text(text) => template_piece::Piece::Text(text),
        Piece::Hole(length) => template_piece::Piece::Hole(length),
        Piece::Tokens { token_ids } => template_piece::Piece::TokenIds(TokenIds { token_ids }),
    };
    TemplatePiece { piece: Some(piece) }
}
