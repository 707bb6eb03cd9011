//! Deltas as JSON in OpenAI's shapes: chunks of a stream, or whole answers.
//!
//! `lacuna` in a choice, and in `usage`, is what OpenAI's API has no name for; its names are the wire's.

use serde_json::{Map, Value, json};

use super::ask::Endpoint;
use super::choice::{Delta, End, Token};
use crate::service::proto::{FinishReason, Forwards, Usage};

/// What all parts of one answer say.
pub struct Answer {
    pub endpoint: Endpoint,
    pub request_id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
}

/// A choice as far as it has come.
#[derive(Default)]
pub struct Whole {
    text: String,
    tokens: Vec<Token>,
    seed: u64,
    end: Option<End>,
}

impl Whole {
    pub fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.tokens);
        (self.seed, self.end) = (delta.seed, delta.end);
    }
}

impl Answer {
    /// The answer of a stream that is over. `logprobs` says whether they were asked for.
    pub fn whole(&self, choices: &[Whole], logprobs: bool) -> Value {
        let usages: Vec<&Usage> = choices.iter().filter_map(|choice| Some(&choice.end.as_ref()?.usage)).collect();
        let usage = usage(&usages);
        let choice = |(index, choice): (usize, &Whole)| {
            let mut shown = Map::new();
            shown.insert("index".into(), index.into());
            match self.endpoint {
                Endpoint::Chat => {
                    let message = json!({"role": "assistant", "content": choice.text, "refusal": null});
                    shown.insert("message".into(), message);
                }
                Endpoint::Completion | Endpoint::Fim => drop(shown.insert("text".into(), choice.text.clone().into())),
            }
            shown.insert("logprobs".into(), if logprobs { self.logprobs(&choice.tokens) } else { Value::Null });
            end(&mut shown, choice.seed, choice.end.as_ref());
            Value::Object(shown)
        };
        let object = if self.endpoint == Endpoint::Chat { "chat.completion" } else { "text_completion" };
        let mut answer = self.head(object, choices.iter().enumerate().map(choice).collect());
        answer.insert("usage".into(), usage);
        Value::Object(answer)
    }

    /// A chunk of a stream. Where usage will follow, every chunk says that this is not yet it.
    pub fn chunk(&self, delta: &Delta, include_usage: bool) -> Value {
        let mut choice = Map::new();
        choice.insert("index".into(), delta.index.into());
        // The end of a text adds none, but a draft is replaced to the last.
        let has_text = delta.end.is_none() || !delta.text.is_empty();
        match self.endpoint {
            Endpoint::Chat => {
                let mut shown = Map::new();
                if delta.first {
                    shown.insert("role".into(), "assistant".into());
                }
                if has_text {
                    shown.insert("content".into(), delta.text.clone().into());
                }
                choice.insert("delta".into(), shown.into());
            }
            Endpoint::Completion | Endpoint::Fim => drop(choice.insert("text".into(), delta.text.clone().into())),
        }
        let logprobs = if delta.tokens.is_empty() { Value::Null } else { self.logprobs(&delta.tokens) };
        choice.insert("logprobs".into(), logprobs);
        end(&mut choice, delta.seed, delta.end.as_ref());
        let mut chunk = self.head(self.chunk_object(), vec![choice.into()]);
        if include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        chunk.into()
    }

    /// The chunk that tells what all choices have cost.
    pub fn usage_chunk(&self, usages: &[Usage]) -> Value {
        let mut chunk = self.head(self.chunk_object(), vec![]);
        chunk.insert("usage".into(), usage(&usages.iter().collect::<Vec<_>>()));
        chunk.into()
    }

    fn chunk_object(&self) -> &'static str {
        if self.endpoint == Endpoint::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn head(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let prefix = if self.endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let fields = [
            ("id", format!("{prefix}-{}", self.request_id).into()),
            ("object", object.into()),
            ("created", self.created.into()),
            ("model", self.model.clone().into()),
            ("system_fingerprint", concat!("lacuna-", env!("CARGO_PKG_VERSION")).into()),
            ("choices", choices.into()),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn logprobs(&self, tokens: &[Token]) -> Value {
        if self.endpoint == Endpoint::Chat {
            let content: Vec<Value> = tokens
                .iter()
                .map(|token| {
                    let others = token.alternatives.iter().map(|(text, logprob)| Value::Object(entry(text, *logprob)));
                    let mut shown = entry(&token.text, token.logprob);
                    shown.insert("top_logprobs".into(), others.collect());
                    Value::Object(shown)
                })
                .collect();
            return json!({"content": content, "refusal": null});
        }
        let others = |token: &Token| {
            let others = token.alternatives.iter().map(|(text, logprob)| (text.clone(), (*logprob).into()));
            Value::Object(others.collect())
        };
        json!({
            "tokens": tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(others).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|token| token.offset).collect::<Vec<_>>(),
        })
    }
}

/// A token with its log-probability. Of part of a character only the display is known, not the bytes.
fn entry(text: &str, logprob: f64) -> Map<String, Value> {
    let bytes = (!text.contains(char::REPLACEMENT_CHARACTER)).then_some(text.as_bytes());
    let fields = [("token", text.into()), ("logprob", logprob.into()), ("bytes", json!(bytes))];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// How a choice ended, if it has, and what it alone has cost.
fn end(choice: &mut Map<String, Value>, seed: u64, end: Option<&End>) {
    let reason = end.map(|end| if end.reason == FinishReason::Length { "length" } else { "stop" });
    choice.insert("finish_reason".into(), reason.into());
    if let Some(End { usage, .. }) = end {
        let mut told = cost(&[usage]);
        told.insert("seed".into(), seed.into());
        for (name, value) in [
            ("preparing_seconds", Some(usage.preparing_seconds)),
            ("queue_seconds", Some(usage.queue_seconds)),
            ("first_provisional_seconds", usage.first_provisional_seconds),
            ("first_committed_seconds", usage.first_committed_seconds),
            ("decoding_seconds", Some(usage.decoding_seconds)),
            ("decoding_tokens_per_second", Some(usage.decoding_tokens_per_second)),
        ] {
            told.insert(name.into(), value.into());
        }
        choice.insert("lacuna".into(), told.into());
    }
}

/// What choices on one prompt have cost together.
fn usage(usages: &[&Usage]) -> Value {
    let prompt = usages.first().map_or(0, |usage| usage.prompt_tokens);
    let cached = usages.iter().map(|usage| usage.reused_tokens).max().unwrap_or(0).min(prompt);
    let completion: u64 = usages.iter().map(|usage| usage.generated_tokens).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "lacuna": cost(usages),
    })
}

fn cost(usages: &[&Usage]) -> Map<String, Value> {
    let sum = |count: fn(&Forwards) -> u64| usages.iter().filter_map(|usage| usage.forwards.as_ref()).map(count).sum::<u64>();
    let forwards = [
        ("prefill", sum(|forwards| forwards.prefill)),
        ("denoise", sum(|forwards| forwards.denoise)),
        ("decode", sum(|forwards| forwards.decode)),
        ("verify", sum(|forwards| forwards.verify)),
        ("draft", sum(|forwards| forwards.draft)),
    ];
    // A drafter's own forwards are far cheaper than the model's.
    let model: u64 = forwards.iter().filter(|(kind, _)| *kind != "draft").map(|(_, count)| count).sum();
    let tokens: u64 = usages.iter().map(|usage| usage.generated_tokens).sum();
    let rate = if model > 0 { tokens as f64 / model as f64 } else { 0.0 };
    let forwards: Map<String, Value> = forwards.into_iter().map(|(kind, count)| (kind.to_owned(), count.into())).collect();
    let fields: [(&str, Value); 3] = [
        ("steps", usages.iter().map(|usage| usage.steps).sum::<u64>().into()),
        ("forwards", forwards.into()),
        ("tokens_per_forward", rate.into()),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
