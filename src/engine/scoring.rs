//! How probable a given text is under a causal model: its tokens' log-probabilities by teacher forcing, as a request that is queued,
//! decoded in rounds and cancelled like any other.
//!
//! [`validate`] makes the request, [`Likelihood`] sums up what its events tell, and [`score`] does all of it for callers that wait.

use std::time::Instant;

use thiserror::Error;

use super::request::{Invalid, ModelInfo, Prompt, autoregressive, invalid, prompt_ids};
use super::{Engine, Event, Failure, Method, Refused, Request, runner};
use crate::decode::Sampling;
use crate::decode::autoregressive::scoring::Parameters;
use crate::decode::canvas::{Canvas, Piece};
use crate::telemetry::Trace;

/// Tokens of one forward, at most; a round has no more of them for prompts.
const CHUNK_MAX: usize = super::scheduler::PREFILL_ROWS;

/// A text to score.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreOptions {
    pub id: String,
    /// What stands before the text, and is not judged. If that is nothing, the tokenizer's begin-of-text token stands there; if there
    /// is none, the text's first token is not judged either.
    pub prompt: Prompt,
    /// Tokenised by itself, as a text that was generated behind the prompt.
    pub text: Prompt,
    pub deadline: Option<Instant>,
}

/// What a text's tokens come to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// Tokens judged, by the model's own tokenizer.
    pub tokens: usize,
    /// The sum of their negative log-probabilities, in nats.
    pub negative_log: f64,
}

impl Likelihood {
    /// Nats per token; `None` without a token.
    pub fn per_token(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.negative_log / self.tokens as f64)
    }

    /// The exponential of that.
    pub fn perplexity(&self) -> Option<f64> {
        self.per_token().map(f64::exp)
    }

    /// Adds what an event of a scoring request tells.
    pub fn take(&mut self, event: &Event) {
        if let Event::Committed { logprobs, .. } = event {
            self.tokens += logprobs.len();
            self.negative_log -= logprobs.iter().flatten().map(|found| found.logprob).sum::<f64>();
        }
    }
}

/// Why a text has no score.
#[derive(Debug, Error)]
pub enum ScoreError {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Failed(#[from] Failure),
    #[error("the engine let go of a request without a word")]
    Gone,
}

/// Checks `options` against `model`. A text without a token to judge is refused.
pub fn validate(model: &ModelInfo, options: ScoreOptions) -> Result<Request, Invalid> {
    if let Some(reason) = autoregressive::unsupported(model) {
        return Err(Invalid::Unsupported(format!("model {} cannot judge a text: {reason}", model.name)));
    }
    let mut prompt = prompt_ids(model, &options.prompt)?;
    let mut text = prompt_ids(model, &options.text)?;
    if prompt.is_empty() {
        prompt = match model.tokenizer.encode("", true) {
            Ok(begin) if begin.len() == 1 => begin,
            _ => text.drain(..text.len().min(1)).collect(),
        };
    }
    if text.is_empty() {
        return invalid("text", "there is no token to judge");
    }
    let length = prompt.len() + text.len();
    if length > model.context {
        return invalid(
            "text",
            format!("prompt and text have {length} tokens, the context of {} {}", model.name, model.context),
        );
    }
    let chunk = (runner::LOGITS_MAX / model.config.vocab_size.max(1)).clamp(1, CHUNK_MAX);
    let canvas = Canvas::new(&prompt, &[Piece::Hole(text.len())], 0);
    let method = Method::Scoring(Parameters { text, chunk, sampling: Sampling::default() });
    let ScoreOptions { id, deadline, .. } = options;
    Ok(Request { id, canvas, method, stops: vec![], steps: false, deadline, priority: 0, fresh: true, trace: Trace::default() })
}

/// Scores a text and waits for it; not for threads that serve a network.
pub fn score(model: &ModelInfo, engine: &Engine, options: ScoreOptions) -> Result<Likelihood, ScoreError> {
    let mut events = engine.submit(validate(model, options)?)?;
    let mut found = Likelihood::default();
    while let Some(event) = events.blocking_recv() {
        let event = event?;
        found.take(&event);
        if let Event::Finished { .. } = event {
            return Ok(found);
        }
    }
    Err(ScoreError::Gone)
}
