//! From the engine's events to the wire's: fills in tokens' texts, the settings in force, and rates.

use std::time::Duration;

use super::proto::{self, generate_event};
use super::{Served, convert};
use crate::decode::autoregressive::{self, Speculation};
use crate::decode::diffusion::cache::CacheKind;
use crate::decode::diffusion::{self, Commit};
use crate::decode::{Edit, FinishReason, Status, Step};
use crate::engine::request::CacheChoice;
use crate::engine::request::DrafterChoice;
use crate::engine::{Event, Logprob, Method, Request, Usage};

/// What the events of one request need to know of it.
pub struct Translator {
    id: String,
    model: Served,
    method: Method,
    /// Time that the request took to become one.
    preparing: Duration,
}

impl Translator {
    pub fn new(model: Served, request: &Request, preparing: Duration) -> Self {
        Self { id: request.id.clone(), model, method: request.method.clone(), preparing }
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
            Event::Committed { token_ids, text, logprobs } => {
                let logprobs = token_ids.iter().zip(logprobs).map(|(id, logprob)| self.logprob(*id, logprob)).collect();
                generate_event::Event::Committed(proto::Committed { text, token_ids, logprobs })
            }
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
        let (diffusion, autoregressive) = match &self.method {
            Method::Diffusion(parameters) => (Some(diffusion(parameters)), None),
            Method::Autoregressive(parameters) => (None, Some(autoregressive(parameters))),
            Method::Scoring(_) => (None, None),
        };
        proto::Started {
            request_id: self.id.clone(),
            model: self.model.info.name.clone(),
            diffusion,
            autoregressive,
            sampling: Some(sampling(&self.method)),
            prompt_tokens: prompt_tokens as u64,
            canvas: canvas.iter().zip(masked).map(cell).collect(),
        }
    }

    fn logprob(&self, token_id: u32, logprob: Option<Logprob>) -> proto::TokenLogprob {
        let alternative = |(id, logprob): (u32, f64)| proto::Alternative { token_id: id, text: self.text(id), logprob };
        let (logprob, alternatives) = logprob.map_or((None, vec![]), |found| (Some(found.logprob), found.alternatives));
        proto::TokenLogprob { token_id, logprob, alternatives: alternatives.into_iter().map(alternative).collect() }
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
        let forwards = proto::Forwards {
            prefill: usage.forwards.prefill as u64,
            denoise: usage.forwards.denoise as u64,
            cache_store: 0,
            verify: usage.forwards.verify as u64,
            draft: usage.forwards.draft as u64,
            decode: usage.forwards.decode as u64,
        };
        proto::Usage {
            prompt_tokens: usage.prompt_tokens as u64,
            reused_tokens: usage.reused_tokens as u64,
            generated_tokens: usage.generated_tokens as u64,
            forwards: Some(forwards),
            steps: usage.steps as u64,
            tokens_per_forward: by(usage.forwards.model() as f64),
            preparing_seconds: self.preparing.as_secs_f64(),
            queue_seconds: usage.queued.as_secs_f64(),
            first_provisional_seconds: usage.time_to_first_provisional.map(|time| time.as_secs_f64()),
            first_committed_seconds: usage.time_to_first_commit.map(|time| time.as_secs_f64()),
            decoding_seconds: decoding,
            decoding_tokens_per_second: by(decoding),
            end_to_end_tokens_per_second: by(end_to_end),
            speculation: usage.speculation.as_ref().map(|found| proto::Speculation {
                estimated_speedup: usage.estimated_speedup(),
                ..speculation(found, usage.drafting, usage.verifying, usage.committing)
            }),
        }
    }

    fn text(&self, id: u32) -> String {
        self.model.info.tokenizer.token_text(id)
    }
}

/// The diffusion settings in force, in the form in which a client would ask for them.
fn diffusion(parameters: &diffusion::Parameters) -> proto::Diffusion {
    let mut diffusion = proto::Diffusion {
        block_length: Some(parameters.block_length as u64),
        order: convert::order(parameters.order).into(),
        order_temperature: Some(parameters.order_temperature),
        cfg_scale: Some(parameters.cfg_scale),
        cache: convert::cache(match parameters.cache.map(|cache| cache.kind) {
            None if parameters.sub_blocks.is_some_and(|sub| sub.cached) => CacheChoice::Dual,
            None => CacheChoice::Off,
            Some(CacheKind::Prefix) => CacheChoice::Prefix,
            Some(CacheKind::Dual) => CacheChoice::Dual,
        })
        .into(),
        deterministic: Some(parameters.deterministic),
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
        Commit::Dynamic { threshold, steps } => {
            diffusion.threshold = Some(threshold);
            diffusion.steps = Some(steps as u64);
        }
        Commit::Factor(factor) => diffusion.factor = Some(factor),
        Commit::EntropyBound(bound) => diffusion.entropy_bound = Some(bound),
    }
    diffusion
}

/// Likewise the autoregressive settings.
fn autoregressive(parameters: &autoregressive::Parameters) -> proto::Autoregressive {
    let drafts = parameters.drafts;
    proto::Autoregressive {
        drafter: convert::drafter(drafts.map_or(DrafterChoice::Off, |drafts| DrafterChoice::Use(drafts.drafter))).into(),
        draft_length: drafts.map(|drafts| drafts.shape.length as u64),
        beam_width: drafts.map(|drafts| drafts.shape.width as u64),
        adapt: drafts.map(|drafts| drafts.adapt),
        deterministic: Some(parameters.deterministic),
        suppress_end: Some(parameters.ends.iter().any(|id| parameters.sampling.forbidden.contains(id))),
        prefill_chunk: Some(parameters.chunk as u64),
    }
}

/// Counts and times of drafts, one request's or all.
pub fn speculation(found: &Speculation, draft: Duration, verify: Duration, commit: Duration) -> proto::Speculation {
    let removed = found.candidates.saturating_sub(found.drafted) as f64;
    proto::Speculation {
        drafts: found.drafts as u64,
        candidate_tokens: found.candidates as u64,
        drafted_tokens: found.drafted as u64,
        accepted_tokens: found.accepted as u64,
        acceptance_length: found.acceptance_length(),
        acceptance_by_position: found.acceptance_by_position(),
        accepted_exactly: found.accepted_exactly.iter().map(|count| *count as u64).collect(),
        deduplicated_share: if found.candidates > 0 { removed / found.candidates as f64 } else { 0.0 },
        draft_seconds: draft.as_secs_f64(),
        verify_seconds: verify.as_secs_f64(),
        commit_seconds: commit.as_secs_f64(),
        estimated_speedup: None,
    }
}

fn sampling(method: &Method) -> proto::Sampling {
    let sampling = method.sampling();
    // Diffusion has no penalties to be in force.
    let penalties = matches!(method, Method::Autoregressive(_)).then_some(sampling.penalties);
    proto::Sampling {
        temperature: Some(sampling.temperature),
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: penalties.map(|penalties| penalties.repetition),
        presence_penalty: penalties.map(|penalties| penalties.presence),
        frequency_penalty: penalties.map(|penalties| penalties.frequency),
        logit_bias: sampling.logit_bias.iter().copied().collect(),
        seed: Some(method.seed()),
        logprobs: Some(sampling.alternatives),
    }
}
