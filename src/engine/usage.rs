//! What requests have cost: forwards by kind, times, and what drafting came to.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::runner::Outcome;
use crate::decode::Purpose;
use crate::decode::autoregressive::Speculation;

/// What a request has cost. Times count from the moment that the sequence became resident.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Of the prompt (and fixed text behind it), what another request had computed before.
    pub reused_tokens: usize,
    /// Tokens given out that the model chose: neither fixed text nor end-of-text nor what lies behind it.
    pub generated_tokens: usize,
    pub forwards: Forwards,
    pub steps: usize,
    pub queued: Duration,
    /// To the first guess at a token, or to its commitment where nobody guesses.
    pub time_to_first_provisional: Option<Duration>,
    pub time_to_first_commit: Option<Duration>,
    pub decoding: Duration,
    /// What drafting came to, where there was any.
    pub speculation: Option<Speculation>,
    /// Time in drafters, in forwards that verified their drafts, and in bringing the cache in line.
    pub drafting: Duration,
    pub verifying: Duration,
    pub committing: Duration,
    /// What one plain step takes on this device, where drafts adapt and it was measured.
    pub plain_step: Option<Duration>,
}

impl Usage {
    /// Counts one window's forwards.
    pub(super) fn count(&mut self, purpose: Purpose, outcome: &Outcome) {
        let Forwards { prefill, denoise, decode, verify, .. } = &mut self.forwards;
        let kind = match purpose {
            Purpose::Prefill => prefill,
            Purpose::Denoise => denoise,
            Purpose::Decode => decode,
            Purpose::Verify => verify,
        };
        *kind += outcome.forwards;
        if purpose == Purpose::Verify {
            self.verifying += outcome.timing.total();
        }
    }

    /// How much faster than plain decoding the text came, behind its first token: plain steps' time by the time it took.
    pub fn estimated_speedup(&self) -> Option<f64> {
        let taken = self.decoding.checked_sub(self.time_to_first_commit?)?.as_secs_f64();
        let plain = self.plain_step?.as_secs_f64() * self.generated_tokens.saturating_sub(1) as f64;
        (taken > 0.0 && plain > 0.0).then(|| plain / taken)
    }
}

/// What all requests' drafts have come to since the engine started.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drafted {
    pub speculation: Speculation,
    pub drafting: Duration,
    pub verifying: Duration,
    pub committing: Duration,
}

impl Drafted {
    /// Takes in one request's.
    pub(super) fn add(&mut self, found: &Speculation, usage: &Usage) {
        self.speculation.add(found);
        self.drafting += usage.drafting;
        self.verifying += usage.verifying;
        self.committing += usage.committing;
    }
}

/// Sequences that a network saw, by purpose; guidance takes two a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwards {
    pub prefill: usize,
    pub denoise: usize,
    /// One token from one token.
    pub decode: usize,
    pub verify: usize,
    /// The drafter's own network.
    pub draft: usize,
}

impl Forwards {
    /// Sums over requests.
    pub fn add(&mut self, other: &Self) {
        self.prefill += other.prefill;
        self.denoise += other.denoise;
        self.decode += other.decode;
        self.verify += other.verify;
        self.draft += other.draft;
    }

    /// Of the model itself; a drafter's are much cheaper.
    pub fn model(&self) -> usize {
        self.prefill + self.denoise + self.decode + self.verify
    }
}
