//! Load on a running server, as plain data: when requests are due, which of them count, and what they came to.
//!
//! [`arrivals`] says when requests of an open loop are due and which are cancelled, [`window`] cuts the steady state out of a run,
//! [`summary`] makes figures of what lies in it, and [`compare`] sets two results side by side. Times are since the start of a run.
//! Nothing here has a clock or a connection: whoever sends the requests hands in what it saw of them.

pub mod arrivals;
pub mod compare;
pub mod summary;
pub mod window;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What decides when the next request is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lane {
    /// So many users, each of whom sends a request as soon as the one before has ended.
    Closed { concurrency: usize },
    /// So many requests a second at random moments, whether those before have ended or not.
    Open { rate: f64 },
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Closed { concurrency } => write!(f, "concurrency {concurrency}"),
            Self::Open { rate } => write!(f, "rate {rate}"),
        }
    }
}

/// How long the steady state is watched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    Requests(u64),
    Time(Duration),
}

/// What was seen of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// When it was to be sent. Latencies count from here, so that a request that had to wait for the sender does not look fast.
    pub intended: Duration,
    pub sent: Duration,
    pub ended: Duration,
    /// The first provisional tokens, where steps are told.
    pub first_step: Option<Duration>,
    pub first_commit: Option<Duration>,
    /// Between one commit and the next.
    pub gaps: Vec<Duration>,
    pub outcome: Outcome,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Finished(Cost),
    /// By the client, on purpose.
    Cancelled,
    /// There was no room.
    Rejected,
    /// Anything else, by the name of its status.
    Failed(String),
}

/// What the server says that a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub queued: Duration,
    pub forwards: Forwards,
}

/// Sequences that the network saw, by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forwards {
    pub prefill: u64,
    pub denoise: u64,
    pub cache_store: u64,
    pub decode: u64,
    pub verify: u64,
    pub draft: u64,
}

impl Forwards {
    pub fn add(&mut self, other: &Self) {
        self.prefill += other.prefill;
        self.denoise += other.denoise;
        self.cache_store += other.cache_store;
        self.decode += other.decode;
        self.verify += other.verify;
        self.draft += other.draft;
    }
}

/// One run of one lane.
#[derive(Clone, Debug)]
pub struct Round {
    pub samples: Vec<Sample>,
    /// When requests were due that could not be sent, because too many were under way.
    pub unsent: Vec<Duration>,
    pub window: window::Window,
}
