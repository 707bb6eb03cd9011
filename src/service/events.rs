//! From the engine's events to the wire's: fills in tokens' texts, the settings in force, and rates.

use std::time::Duration;

use super::proto::{self, generate_event};
use super::{Served, convert};
use crate::decode::diffusion::{Commit, Parameters};
use crate::decode::{Edit, FinishReason, Status, Step};
use crate::engine::{Event, Request, Usage};

/// What the events of one request need to know of it.
pub struct Translator {
    id: String,
    model: Served,
    parameters: Parameters,
    /// Time that the request took to become one.
    preparing: Duration,
}

impl Translator {
    pub fn new(model: Served, request: &Request, preparing: Duration) -> Self {
        Self { id: request.id.clone(), model, parameters: request.parameters.clone(), preparing }
    }

    /// The request's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn translate(&self, event: Event) -> proto::GenerateEvent {
        let event = match event {
            Event::Started { prompt_tokens, canvas, masked } => {
                generate_event::Event::Started(self.started(prompt_tokens, &canvas, &masked))
            }
            Event::Step(step) => generate_event::Event::Step(self.step(step)),
            Event::Committed { token_ids, text } => generate_event::Event::Committed(proto::Committed { text, token_ids }),
            Event::Finished { reason, usage } => {
                let reason = match reason {
                    FinishReason::Stop => proto::FinishReason::Stop,
                    FinishReason::Length => proto::FinishReason::Length,
                };
                let usage = Some(self.usage(&usage));
                generate_event::Event::Finished(proto::Finished { reason: reason.into(), usage })
            }
        };
        proto::GenerateEvent { event: Some(event) }
    }

    fn started(&self, prompt_tokens: usize, canvas: &[u32], masked: &[bool]) -> proto::Started {
        let cell = |(id, masked): (&u32, &bool)| proto::Cell { token_id: *id, text: self.text(*id), masked: *masked };
        proto::Started {
            request_id: self.id.clone(),
            model: self.model.info.name.clone(),
            diffusion: Some(diffusion(&self.parameters)),
            sampling: Some(sampling(&self.parameters)),
            prompt_tokens: prompt_tokens as u64,
            canvas: canvas.iter().zip(masked).map(cell).collect(),
        }
    }

    fn step(&self, step: Step) -> proto::Step {
        let edit = |edit: Edit| {
            let status = match edit.status {
                Status::Provisional => proto::EditStatus::Provisional,
                Status::Committed => proto::EditStatus::Committed,
                Status::Edited => proto::EditStatus::Edited,
                Status::Remasked => proto::EditStatus::Remasked,
            };
            proto::Edit {
                position: edit.position as u64,
                token_id: edit.token,
                text: self.text(edit.token),
                status: status.into(),
                confidence: edit.confidence,
            }
        };
        proto::Step { step: step.step as u64, block: step.block as u64, edits: step.edits.into_iter().map(edit).collect() }
    }

    fn usage(&self, usage: &Usage) -> proto::Usage {
        let decoding = usage.decoding.as_secs_f64();
        let end_to_end = (self.preparing + usage.queued + usage.decoding).as_secs_f64();
        let by = |amount: f64| if amount > 0.0 { usage.generated_tokens as f64 / amount } else { 0.0 };
        proto::Usage {
            prompt_tokens: usage.prompt_tokens as u64,
            generated_tokens: usage.generated_tokens as u64,
            forwards: Some(proto::Forwards { denoise: usage.forwards_denoise as u64, ..proto::Forwards::default() }),
            steps: usage.steps as u64,
            tokens_per_forward: by(usage.forwards_denoise as f64),
            preparing_seconds: self.preparing.as_secs_f64(),
            queue_seconds: usage.queued.as_secs_f64(),
            first_committed_seconds: usage.time_to_first_commit.map(|time| time.as_secs_f64()),
            decoding_seconds: decoding,
            decoding_tokens_per_second: by(decoding),
            end_to_end_tokens_per_second: by(end_to_end),
        }
    }

    fn text(&self, id: u32) -> String {
        self.model.info.tokenizer.token_text(id)
    }
}

/// The diffusion settings in force, in the form in which a client would ask for them.
fn diffusion(parameters: &Parameters) -> proto::Diffusion {
    let mut diffusion = proto::Diffusion {
        block_length: Some(parameters.block_length as u64),
        order: convert::order(parameters.order).into(),
        order_temperature: Some(parameters.order_temperature),
        cfg_scale: Some(parameters.cfg_scale),
        finish_early: Some(parameters.end_of_text.finish_early),
        // The mask token is forbidden in any case, and is never an end.
        suppress_end: Some(parameters.end_of_text.ids.iter().any(|id| parameters.sampling.forbidden.contains(id))),
        late_end: Some(!parameters.sampling.unconfident.is_empty()),
        ..proto::Diffusion::default()
    };
    match parameters.commit {
        Commit::Linear { steps } => {
            diffusion.steps = Some(steps as u64);
            diffusion.schedule = proto::Schedule::Linear.into();
        }
        Commit::Timesteps { steps, eps, independent } => {
            diffusion.steps = Some(steps as u64);
            diffusion.schedule = proto::Schedule::Timesteps.into();
            diffusion.eps = Some(eps);
            diffusion.independent = Some(independent);
        }
        Commit::Threshold(threshold) => diffusion.threshold = Some(threshold),
        Commit::Factor(factor) => diffusion.factor = Some(factor),
        Commit::EntropyBound(bound) => diffusion.entropy_bound = Some(bound),
    }
    diffusion
}

fn sampling(parameters: &Parameters) -> proto::Sampling {
    let sampling = &parameters.sampling;
    proto::Sampling {
        temperature: Some(sampling.temperature),
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: None,
        logit_bias: sampling.logit_bias.iter().copied().collect(),
        seed: Some(parameters.seed),
        logprobs: None,
    }
}
