//! What one engine counts into: handles that are looked up once, so that a round costs it a few atomic operations. Times are taken by
//! the engine, with its clock; nothing here reads one.

use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Histogram};

use crate::decode::{Edit, Purpose, Status};
use crate::engine::{Event, Failure, Method, Refused, Usage};

/// How a request is decoded, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Diffusion,
    Autoregressive,
    Scoring,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Diffusion, Self::Autoregressive, Self::Scoring];

    pub fn of(method: &Method) -> Self {
        match method {
            Method::Diffusion(_) => Self::Diffusion,
            Method::Autoregressive(_) => Self::Autoregressive,
            Method::Scoring(_) => Self::Scoring,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Diffusion => "diffusion",
            Self::Autoregressive => "autoregressive",
            Self::Scoring => "scoring",
        }
    }
}

/// What the sequences of one forward were run for; `Mixed` where they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Denoise,
    Prefill,
    Decode,
    Verify,
    Mixed,
}

impl Phase {
    pub const ALL: [Self; 5] = [Self::Denoise, Self::Prefill, Self::Decode, Self::Verify, Self::Mixed];

    /// Of a forward for these purposes.
    pub fn of(mut purposes: impl Iterator<Item = Purpose>) -> Self {
        let first = purposes.next();
        match first.filter(|first| purposes.all(|other| other == *first)) {
            Some(Purpose::Denoise) => Self::Denoise,
            Some(Purpose::Prefill) => Self::Prefill,
            Some(Purpose::Decode) => Self::Decode,
            Some(Purpose::Verify) => Self::Verify,
            None => Self::Mixed,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Denoise => "denoise",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Verify => "verify",
            Self::Mixed => "mixed",
        }
    }
}

/// Figures of the requests of one kind.
pub struct Requests {
    pub queue: Histogram,
    pub first_provisional: Histogram,
    pub first_commit: Histogram,
    pub inter_chunk: Histogram,
    pub per_output_token: Histogram,
    pub decoding: Histogram,
    pub prompt_tokens: Histogram,
    pub output_tokens: Histogram,
    pub committed_per_step: Histogram,
    pub prompt_tokens_total: Counter,
    pub reused_tokens_total: Counter,
    pub output_tokens_total: Counter,
    pub remasked_total: Counter,
}

/// Figures of the forwards of one phase.
pub struct Forward {
    pub seconds: Histogram,
    pub sequences: Histogram,
    pub passes: Counter,
}

/// Requests that were not taken, and such as ended early, by reason.
pub struct Ends {
    pub queue_full: Counter,
    pub tokens_full: Counter,
    pub too_large: Counter,
    pub refused_stopping: Counter,
    pub client_left: Counter,
    pub deadline: Counter,
    pub stopping: Counter,
    pub unread: Counter,
    pub out_of_memory: Counter,
    pub internal: Counter,
}

/// One model's handles.
pub struct Handles {
    pub requests: [Requests; Kind::ALL.len()],
    pub forwards: [Forward; Phase::ALL.len()],
    pub ends: Ends,
}

/// An engine's way to its model's figures.
#[derive(Clone)]
pub struct Meter(Arc<Handles>);

impl Meter {
    pub fn new(handles: Handles) -> Self {
        Self(Arc::new(handles))
    }

    fn requests(&self, kind: Kind) -> &Requests {
        &self.0.requests[kind as usize]
    }

    /// A request was not taken.
    pub fn refused(&self, why: &Refused) {
        let ends = &self.0.ends;
        match why {
            Refused::QueueFull { .. } => &ends.queue_full,
            Refused::TokensFull { .. } => &ends.tokens_full,
            Refused::TooLarge { .. } => &ends.too_large,
            Refused::Stopping => &ends.refused_stopping,
        }
        .increment(1);
    }

    /// A request that was taken ended before its text was complete.
    pub fn failed(&self, why: &Failure) {
        let ends = &self.0.ends;
        match why {
            Failure::Cancelled => &ends.client_left,
            Failure::DeadlineExceeded => &ends.deadline,
            Failure::Stopping => &ends.stopping,
            Failure::Unread => &ends.unread,
            Failure::OutOfMemory => &ends.out_of_memory,
            Failure::Internal => &ends.internal,
        }
        .increment(1);
    }

    /// One forward over so many sequences.
    pub fn forward(&self, phase: Phase, sequences: usize, took: Duration) {
        let forward = &self.0.forwards[phase as usize];
        forward.seconds.record(took);
        forward.sequences.record(sequences as f64);
        forward.passes.increment(sequences as u64);
    }

    /// What one step told; `since_text` is the time since the last text, where there was some.
    pub fn stepped(&self, kind: Kind, events: &[Event], since_text: Option<Duration>) {
        let requests = self.requests(kind);
        for event in events {
            match event {
                Event::Step(step) => {
                    let count = |status| step.edits.iter().filter(|edit: &&Edit| edit.status == status).count();
                    requests.committed_per_step.record(count(Status::Committed) as f64);
                    requests.remasked_total.increment(count(Status::Remasked) as u64);
                }
                Event::Committed { .. } => {
                    if let Some(gap) = since_text {
                        requests.inter_chunk.record(gap);
                    }
                }
                Event::Started { .. } | Event::Finished { .. } => {}
            }
        }
    }

    /// A request has its place.
    pub fn began(&self, kind: Kind, queued: Duration) {
        self.requests(kind).queue.record(queued);
    }

    /// A request is complete.
    pub fn finished(&self, kind: Kind, usage: &Usage) {
        let requests = self.requests(kind);
        requests.decoding.record(usage.decoding);
        if let Some(time) = usage.time_to_first_provisional {
            requests.first_provisional.record(usage.queued + time);
        }
        if let Some(time) = usage.time_to_first_commit {
            requests.first_commit.record(usage.queued + time);
            let behind = usage.generated_tokens.saturating_sub(1);
            if behind > 0 {
                requests.per_output_token.record(usage.decoding.saturating_sub(time).as_secs_f64() / behind as f64);
            }
        }
        requests.prompt_tokens.record(usage.prompt_tokens as f64);
        requests.output_tokens.record(usage.generated_tokens as f64);
        requests.prompt_tokens_total.increment(usage.prompt_tokens as u64);
        requests.reused_tokens_total.increment(usage.reused_tokens as u64);
        requests.output_tokens_total.increment(usage.generated_tokens as u64);
    }
}
