//! A server as the source of events: what `generate --server` sends, and what comes back as the engine's own events.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::runtime::Runtime;

use super::connection::ConnectionFlags;
use crate::checkpoint::chat::Message;
use crate::decode::autoregressive::Speculation;
use crate::decode::{Edit, FinishReason, Status, Step};
use crate::engine::request::{AutoregressiveOptions, DiffusionOptions, GenerateOptions, MethodKind, Prompt, TemplatePiece};
use crate::engine::{Event, Forwards, Logprob, Usage};
use crate::service::proto::generation_client::GenerationClient;
use crate::service::proto::models_client::ModelsClient;
use crate::service::proto::{self, generate_event, generate_request, template_piece};
use crate::service::{autoregressive_message, diffusion_message, sampling_message};

/// Tokens' texts as the server tells them.
pub type Texts = Rc<RefCell<HashMap<u32, String>>>;

/// A running call, as an iterator over its events.
pub struct Remote {
    runtime: Runtime,
    stream: tonic::Streaming<proto::GenerateEvent>,
    wire: Wire,
}

/// What reads one generation's messages as the engine's events.
pub struct Wire {
    /// Tokens that end a text.
    ends: Vec<u32>,
    seed: Rc<Cell<u64>>,
    texts: Texts,
}

impl Remote {
    /// Starts a generation on the server at `address`.
    pub fn start(address: &str, flags: &ConnectionFlags, options: &GenerateOptions) -> Result<Self> {
        let diffuses = options.diffusion != DiffusionOptions::default() || options.method == Some(MethodKind::Diffusion);
        let decodes =
            options.autoregressive != AutoregressiveOptions::default() || options.method == Some(MethodKind::Autoregressive);
        if diffuses && decodes {
            bail!("there are settings of both methods: leave those of one out");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
        let (stream, ends) = runtime.block_on(async {
            let channel = flags.connect(address).await?;
            let model = ModelsClient::new(channel.clone()).get(proto::GetModelRequest::default()).await.map_err(failed)?;
            let ends = model.into_inner().model.unwrap_or_default().end_token_ids;
            let response = GenerationClient::new(channel).generate(request(options)).await.map_err(failed)?;
            anyhow::Ok((response.into_inner(), ends))
        })?;
        Ok(Self { runtime, stream, wire: Wire::new(ends) })
    }

    /// The text of every token that an event has named.
    pub fn texts(&self) -> Texts {
        self.wire.texts()
    }

    /// The seed in force; right once the first event has come.
    pub fn seed(&self) -> Rc<Cell<u64>> {
        self.wire.seed.clone()
    }
}

impl Wire {
    /// `ends` are the tokens that end a text.
    pub fn new(ends: Vec<u32>) -> Self {
        Self { ends, seed: Rc::default(), texts: Rc::default() }
    }

    /// The text of every token that an event has named.
    pub fn texts(&self) -> Texts {
        self.texts.clone()
    }

    fn note(&self, id: u32, text: String) -> u32 {
        let text = if self.ends.contains(&id) { super::generate::END.into() } else { text };
        self.texts.borrow_mut().insert(id, text);
        id
    }

    pub fn event(&self, event: proto::GenerateEvent) -> Result<Event> {
        Ok(match event.event.context("the server sent an event of a kind that this client does not know")? {
            generate_event::Event::Started(started) => {
                self.seed.set(started.sampling.and_then(|sampling| sampling.seed).unwrap_or_default());
                let masked = started.canvas.iter().map(|cell| cell.masked).collect();
                let canvas = started.canvas.into_iter().map(|cell| self.note(cell.token_id, cell.text)).collect();
                Event::Started { prompt_tokens: started.prompt_tokens as usize, canvas, masked }
            }
            generate_event::Event::Step(step) => {
                let edits = step.edits.into_iter().map(|edit| self.edit(edit)).collect::<Result<_>>()?;
                Event::Step(Step { step: step.step as usize, block: step.block as usize, edits })
            }
            generate_event::Event::Committed(committed) => {
                let logprobs = committed.logprobs.into_iter().map(|found| self.logprob(found)).collect();
                Event::Committed { token_ids: committed.token_ids, text: committed.text, logprobs }
            }
            generate_event::Event::Finished(finished) => {
                let reason = reason(finished.reason()).context("the server did not say why it finished")?;
                Event::Finished { reason, usage: usage(finished.usage.unwrap_or_default()) }
            }
        })
    }

    fn logprob(&self, found: proto::TokenLogprob) -> Option<Logprob> {
        let alternative = |one: proto::Alternative| (self.note(one.token_id, one.text), one.logprob);
        let alternatives = found.alternatives.into_iter().map(alternative).collect();
        Some(Logprob { token: found.token_id, logprob: found.logprob?, alternatives })
    }

    fn edit(&self, edit: proto::Edit) -> Result<Edit> {
        let status = match edit.status() {
            proto::EditStatus::Provisional => Status::Provisional,
            proto::EditStatus::Committed => Status::Committed,
            proto::EditStatus::Edited => Status::Edited,
            proto::EditStatus::Remasked => Status::Remasked,
            proto::EditStatus::Unspecified => bail!("the server sent an edit without a status"),
        };
        let token = self.note(edit.token_id, edit.text);
        Ok(Edit { position: edit.position as usize, token, status, confidence: edit.confidence, alternatives: vec![] })
    }
}

impl Iterator for Remote {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        match self.runtime.block_on(self.stream.message()) {
            Ok(Some(event)) => Some(self.wire.event(event)),
            Ok(None) => None,
            Err(status) => Some(Err(failed(status))),
        }
    }
}

pub fn failed(status: tonic::Status) -> anyhow::Error {
    // Of a connection that broke, only the last cause says how.
    let causes = std::iter::successors(std::error::Error::source(&status), |cause| cause.source());
    let cause = causes.last().map(|cause| format!(": {cause}")).unwrap_or_default();
    anyhow!("the server refused or failed: {}{cause} ({:?})", status.message(), status.code())
}

/// Why a text ended, if the message says so.
pub fn reason(told: proto::FinishReason) -> Option<FinishReason> {
    match told {
        proto::FinishReason::Stop => Some(FinishReason::Stop),
        proto::FinishReason::Length => Some(FinishReason::Length),
        proto::FinishReason::Unspecified => None,
    }
}

pub fn usage(usage: proto::Usage) -> Usage {
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let forwards = usage.forwards.unwrap_or_default();
    let forwards = Forwards {
        prefill: forwards.prefill as usize,
        denoise: forwards.denoise as usize,
        decode: forwards.decode as usize,
        verify: forwards.verify as usize,
        draft: forwards.draft as usize,
    };
    let found = usage.speculation.clone().unwrap_or_default();
    Usage {
        prompt_tokens: usage.prompt_tokens as usize,
        reused_tokens: usage.reused_tokens as usize,
        generated_tokens: usage.generated_tokens as usize,
        forwards,
        steps: usage.steps as usize,
        queued: seconds(usage.queue_seconds),
        time_to_first_provisional: usage.first_provisional_seconds.map(seconds),
        time_to_first_commit: usage.first_committed_seconds.map(seconds),
        decoding: seconds(usage.decoding_seconds),
        drafting: seconds(found.draft_seconds),
        verifying: seconds(found.verify_seconds),
        committing: seconds(found.commit_seconds),
        // The server tells the ratio, not the step.
        plain_step: None,
        speculation: usage.speculation.is_some().then(|| Speculation {
            drafts: found.drafts as usize,
            candidates: found.candidate_tokens as usize,
            drafted: found.drafted_tokens as usize,
            accepted: found.accepted_tokens as usize,
            accepted_exactly: found.accepted_exactly.iter().map(|count| *count as usize).collect(),
        }),
    }
}

/// The options as a message.
pub fn request(options: &GenerateOptions) -> proto::GenerateRequest {
    // A message has settings of a method by naming it: where nobody has, it is the one that has some.
    let method = match options.method {
        None if options.diffusion != DiffusionOptions::default() => Some(MethodKind::Diffusion),
        None if options.autoregressive != AutoregressiveOptions::default() => Some(MethodKind::Autoregressive),
        method => method,
    };
    let tokens = |ids: &[u32]| proto::TokenIds { token_ids: ids.to_vec() };
    let piece = |piece: &TemplatePiece| proto::TemplatePiece {
        piece: Some(match piece {
            TemplatePiece::Text(text) => template_piece::Piece::Text(text.clone()),
            TemplatePiece::Tokens(ids) => template_piece::Piece::TokenIds(tokens(ids)),
            TemplatePiece::Hole(length) => template_piece::Piece::Hole(*length),
        }),
    };
    let prompt = match &options.prompt {
        Prompt::Text(text) => generate_request::Prompt::Text(text.clone()),
        Prompt::Tokens(ids) => generate_request::Prompt::TokenIds(tokens(ids)),
        Prompt::Chat(messages) => {
            let message = |m: &Message| proto::Message { role: m.role.clone(), content: m.content.clone() };
            generate_request::Prompt::Chat(proto::Chat { messages: messages.iter().map(message).collect() })
        }
    };
    proto::GenerateRequest {
        prompt: Some(prompt),
        template: options.template.iter().map(piece).collect(),
        sampling: Some(sampling_message(&options.sampling)),
        method: method.map(|method| match method {
            MethodKind::Diffusion => generate_request::Method::Diffusion(diffusion_message(&options.diffusion)),
            MethodKind::Autoregressive => {
                generate_request::Method::Autoregressive(autoregressive_message(&options.autoregressive))
            }
        }),
        stopping: Some(proto::Stopping { max_new_tokens: options.max_new_tokens, stop: options.stops.clone() }),
        step_events: Some(options.steps),
        priority: Some(options.priority),
        ..proto::GenerateRequest::default()
    }
}
