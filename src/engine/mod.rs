//! The engine: one thread that owns a device and a model, and runs rounds over the sequences that are resident.
//!
//! A round is one step for every resident sequence, all of them in one forward, so that a finished one leaves at once and a waiting
//! one joins at once. Requests come through a bounded queue, events leave through a bounded channel per request; a reader that does
//! not keep up is told less often, and holds back no one. [`scheduler`] decides, `worker` does, [`runner`] computes. The engine
//! knows nothing of gRPC.

pub mod memory;
pub mod outbox;
mod post;
pub mod prefix;
mod reader;
pub mod request;
pub mod runner;
pub mod scheduler;
pub mod scoring;
pub mod sequence;
pub mod text;
pub mod usage;
mod worker;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::mpsc;

use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::canvas::Canvas;
use crate::decode::{FinishReason, Sampling, Step, autoregressive, diffusion};
use crate::draft::Drafters;
use crate::model::{ModelError, Transformer};
use crate::telemetry::Trace;
use crate::telemetry::meter::Meter;
use scheduler::{Bounds, Id, Refusal, Scheduler};
use worker::Worker;

pub use usage::{Drafted, Forwards, Usage};

/// Events that wait in a reader's channel; what comes on top is coalesced.
const EVENTS_MAX: usize = 16;
/// How long the engine waits for a slow reader, or for work, before it looks again.
const IDLE: Duration = Duration::from_millis(2);

/// A step that takes longer than this when the process ends is left behind.
const REST: Duration = Duration::from_secs(5);
/// What a client whom the queue has no room for is told to wait, at least and at most.
const RETRY: std::ops::RangeInclusive<f64> = 0.05..=30.0;

/// A request that has been validated: it fits the model.
#[derive(Clone, Debug)]
pub struct Request {
    /// For the log.
    pub id: String,
    pub canvas: Canvas,
    pub method: Method,
    pub stops: Vec<String>,
    /// Whether the reader wants [`Event::Step`].
    pub steps: bool,
    pub deadline: Option<Instant>,
    /// Higher goes first where requests wait.
    pub priority: i32,
    /// Whether its prompt is computed anew, whatever is known of its beginning, so that its cost is its own.
    pub fresh: bool,
    /// Where its parts are told to, beside its events.
    pub trace: Trace,
}

impl Request {
    /// The same request under another name, with other randomness.
    pub fn again(&self, id: String, seed: u64) -> Self {
        let mut method = self.method.clone();
        match &mut method {
            Method::Diffusion(parameters) => parameters.seed = seed,
            Method::Autoregressive(parameters) => parameters.seed = seed,
            Method::Scoring(_) => {}
        }
        Self { id, method, ..self.clone() }
    }

    /// Tokens that it takes in the engine, canvas and cache.
    pub fn tokens(&self) -> usize {
        let length = self.canvas.sequence().len();
        match &self.method {
            Method::Diffusion(parameters) => {
                length * (1 + usize::from(parameters.cfg_scale != 0.0) + usize::from(parameters.cache.is_some()))
            }
            Method::Autoregressive(parameters) if parameters.deterministic => length + autoregressive::CANONICAL_ROWS,
            Method::Autoregressive(parameters) => length + parameters.drafts.map_or(1, |_| autoregressive::NODES_MAX),
            Method::Scoring(_) => length,
        }
    }
}

/// How a request is decoded.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    Diffusion(diffusion::Parameters),
    Autoregressive(autoregressive::Parameters),
    /// A given text is read, not written.
    Scoring(autoregressive::scoring::Parameters),
}

impl Method {
    pub fn seed(&self) -> u64 {
        match self {
            Self::Diffusion(parameters) => parameters.seed,
            Self::Autoregressive(parameters) => parameters.seed,
            Self::Scoring(_) => 0,
        }
    }

    pub fn sampling(&self) -> &Sampling {
        match self {
            Self::Diffusion(parameters) => &parameters.sampling,
            Self::Autoregressive(parameters) => &parameters.sampling,
            Self::Scoring(parameters) => &parameters.sampling,
        }
    }

    /// Tokens that end the text.
    pub fn ends(&self) -> &[u32] {
        match self {
            Self::Diffusion(parameters) => &parameters.end_of_text.ids,
            Self::Autoregressive(parameters) => &parameters.ends,
            // An end-of-text in the text is a token like any other.
            Self::Scoring(_) => &[],
        }
    }

    /// Who drafts, if anyone.
    pub fn drafts(&self) -> Option<autoregressive::Drafts> {
        match self {
            Self::Autoregressive(parameters) => parameters.drafts,
            Self::Diffusion(_) | Self::Scoring(_) => None,
        }
    }

    /// Whether nothing that runs beside it may show in its text, to the bit.
    pub fn deterministic(&self) -> bool {
        match self {
            Self::Diffusion(parameters) => parameters.deterministic,
            Self::Autoregressive(parameters) => parameters.deterministic,
            Self::Scoring(_) => false,
        }
    }

    /// Whether tokens come with their log-probabilities.
    pub fn logprobs(&self) -> bool {
        matches!(self, Self::Scoring(_)) || self.sampling().alternatives > 0
    }
}

/// What a reader is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The canvas as it begins: its tokens, and which cells are masked.
    Started {
        prompt_tokens: usize,
        canvas: Vec<u32>,
        masked: Vec<bool>,
    },
    Step(Step),
    /// Text that is final; joined, these are the whole text.
    Committed {
        token_ids: Vec<u32>,
        text: String,
        /// Of each token, where the request asks; fixed text has none.
        logprobs: Vec<Option<Logprob>>,
    },
    Finished {
        reason: FinishReason,
        usage: Usage,
    },
}

/// How probable a committed token was, under the distribution before temperature, filters and penalties.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    pub token: u32,
    /// Natural logarithm.
    pub logprob: f64,
    /// The most probable tokens, best first.
    pub alternatives: Vec<(u32, f64)>,
}

/// Why a sequence ended without finishing.
#[derive(Debug, Error)]
pub enum Failure {
    /// Nobody is there to be told.
    #[error("the client left")]
    Cancelled,
    #[error("the deadline passed before the text was complete")]
    DeadlineExceeded,
    #[error("the model is stopping")]
    Stopping,
    /// Its reader did not take its text, nor did too many others take theirs.
    #[error("the text was complete and was not read: read faster, or keep fewer calls open")]
    Unread,
    #[error("the device's memory did not suffice: ask for fewer tokens, or try again later")]
    OutOfMemory,
    #[error("the request failed; the server's log has its id")]
    Internal,
}

/// Why a request was not taken.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum Refused {
    #[error("the queue is full ({waiting} requests wait): try again later")]
    QueueFull {
        waiting: usize,
        /// When a place may be free.
        retry: Duration,
    },
    #[error("the queue is full ({tokens} tokens wait): try again later")]
    TokensFull { tokens: usize, retry: Duration },
    #[error("the request needs room for {needed} tokens, and the server has room for {budget} in all: ask for fewer")]
    TooLarge { needed: usize, budget: usize },
    #[error("the model is stopping and takes no further requests")]
    Stopping,
}

/// Bounds of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that are decoded together.
    pub resident: usize,
    /// Requests that wait.
    pub queued: usize,
    /// Tokens of the residents, canvas and cache; unset, what fits the memory that is free when the engine starts.
    pub tokens: Option<usize>,
    /// Tokens of the requests that wait; unset, four times those of the residents.
    pub queued_tokens: Option<usize>,
    /// Tokens whose keys are kept for later requests that begin alike, out of the residents' room; unset, a quarter of it.
    pub prefix_tokens: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { resident: 16, queued: 64, tokens: None, queued_tokens: None, prefix_tokens: None }
    }
}

impl Limits {
    /// For one request at a time.
    pub fn one() -> Self {
        Self { resident: 1, queued: 1, prefix_tokens: Some(0), ..Self::default() }
    }
}

type Reply = mpsc::Sender<Result<Event, Failure>>;

struct Job {
    id: Id,
    request: Request,
    reply: Reply,
    submitted: Instant,
}

/// What the engine is doing, and what it has done since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub waiting: usize,
    pub waiting_tokens: usize,
    pub residents: usize,
    /// Tokens of the residents, and the most there may be.
    pub tokens: usize,
    pub tokens_max: usize,
    /// Tokens kept for requests that begin alike.
    pub prefix_tokens: usize,
    /// Rounds, and the steps taken in them.
    pub rounds: u64,
    pub steps: u64,
    /// Time in rounds, and the share of it that went into deciding who runs rather than running.
    pub working: Duration,
    pub scheduling: Duration,
    /// Steps that were never told by themselves, because their readers did not keep up.
    pub coalesced: u64,
}

/// Shared between the handle and the thread.
struct State {
    /// Take no new requests; those that are in run on.
    draining: AtomicBool,
    /// End everything now.
    stopping: AtomicBool,
    book: Mutex<Book>,
    /// Where it counts, once somebody wants to know.
    meter: OnceLock<Meter>,
}

struct Book {
    scheduler: Scheduler,
    load: Load,
    drafted: Drafted,
    /// How long a resident stays, smoothed; seconds.
    stay: f64,
}

impl State {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request that was taken ended early.
    fn count(&self, failure: &Failure) {
        if let Some(meter) = self.meter.get() {
            meter.failed(failure);
        }
    }

    fn load(&self) -> Load {
        let book = self.book();
        let scheduler = &book.scheduler;
        Load {
            waiting: scheduler.waiting(),
            waiting_tokens: scheduler.waiting_tokens(),
            residents: scheduler.residents(),
            tokens: scheduler.tokens(),
            ..book.load
        }
    }
}

/// What an engine says of itself, for somebody who does not keep it alive.
pub struct Readings(Weak<State>);

impl Readings {
    /// `None` once the engine is gone: all handles are, and its thread has ended and freed the model.
    pub fn take(&self) -> Option<(Load, Drafted)> {
        let state = self.0.upgrade()?;
        let drafted = state.book().drafted.clone();
        Some((state.load(), drafted))
    }
}

/// A handle to the engine thread.
#[derive(Clone)]
pub struct Engine {
    queue: mpsc::UnboundedSender<Job>,
    state: Arc<State>,
}

impl Engine {
    /// Starts the thread that owns `model` and `drafters`. Called within a tokio runtime, events are handed out by a task of that runtime,
    /// which must then go on running while they are read.
    pub fn start(model: Transformer, drafters: Drafters, tokenizer: Arc<Tokenizer>, limits: Limits) -> std::io::Result<Self> {
        // This thread has probably loaded the model; from here on another one computes.
        crate::tensor::kernels::release_threads();
        let tokens = limits.tokens.unwrap_or_else(|| memory::room(model.config(), model.placement(), model.context(), 1));
        let bounds = Bounds {
            resident: limits.resident,
            tokens,
            queued: limits.queued,
            queued_tokens: limits.queued_tokens.unwrap_or(tokens.saturating_mul(4)),
        };
        let book = Book {
            scheduler: Scheduler::new(bounds),
            load: Load { tokens_max: tokens, ..Load::default() },
            drafted: Drafted::default(),
            stay: 0.0,
        };
        let state = Arc::new(State {
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            book: Mutex::new(book),
            meter: OnceLock::new(),
        });
        // The scheduler bounds what is in it.
        let (queue, jobs) = mpsc::unbounded_channel();
        let worker = Worker::new(model, drafters, tokenizer, jobs, state.clone(), limits.prefix_tokens.unwrap_or(tokens / 4));
        std::thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
        Ok(Self { queue, state })
    }

    /// Hands a request over; its events come through the receiver. Dropping the receiver cancels the request.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Result<Event, Failure>>, Refused> {
        let taken = self.take(request);
        if let (Err(refused), Some(meter)) = (&taken, self.state.meter.get()) {
            meter.refused(refused);
        }
        taken
    }

    fn take(&self, request: Request) -> Result<mpsc::Receiver<Result<Event, Failure>>, Refused> {
        let mut book = self.state.book();
        if self.state.draining.load(Ordering::Acquire) {
            return Err(Refused::Stopping);
        }
        let id = book.scheduler.submit(request.tokens(), request.priority).map_err(|refusal| book.refused(refusal))?;
        // One place more, for whoever has to be told that it is cut off.
        let (reply, events) = mpsc::channel(EVENTS_MAX + 1);
        self.queue.send(Job { id, request, reply, submitted: Instant::now() }).map_err(|_| {
            book.scheduler.leave(id);
            Refused::Stopping
        })?;
        Ok(events)
    }

    /// What drafts have come to so far.
    pub fn drafted(&self) -> Drafted {
        self.state.book().drafted.clone()
    }

    pub fn load(&self) -> Load {
        self.state.load()
    }

    /// The same and the drafts', for as long as the engine lives.
    pub fn readings(&self) -> Readings {
        Readings(Arc::downgrade(&self.state))
    }

    /// Has it count into `meter` from here on; the first one stays.
    pub fn count_into(&self, meter: Meter) {
        let _ = self.state.meter.set(meter);
    }

    /// What may be in the engine at one time.
    pub fn bounds(&self) -> Bounds {
        self.state.book().scheduler.bounds()
    }

    /// Requests that wait, are decoded, or have not been read to the end.
    pub fn active(&self) -> usize {
        self.state.book().scheduler.active()
    }

    /// Whether further requests are refused.
    pub fn draining(&self) -> bool {
        self.state.draining.load(Ordering::Acquire)
    }

    /// Takes no further requests; those that are in run to their end.
    pub fn drain(&self) {
        self.state.draining.store(true, Ordering::Release);
    }

    /// Ends every request now.
    pub fn stop(&self) {
        self.drain();
        self.state.stopping.store(true, Ordering::Release);
    }

    /// For the end of a process: stops, waits for the step that runs (a few seconds at most), and leaves the thread asleep with the
    /// model. Freeing tensors while the process ends would race with libtorch's own clean-up.
    pub fn rest(self) {
        self.stop();
        let waited = Instant::now();
        while self.active() > 0 && waited.elapsed() < REST {
            std::thread::sleep(IDLE);
        }
        std::mem::forget(self);
    }
}

impl Book {
    fn refused(&self, refusal: Refusal) -> Refused {
        // A place is free when one of the residents leaves, and those before in the queue have theirs.
        let residents = self.scheduler.residents().max(1) as f64;
        let seconds = self.stay / residents * (self.scheduler.waiting() + 1) as f64;
        let retry = Duration::from_secs_f64(seconds.clamp(*RETRY.start(), *RETRY.end()));
        match refusal {
            Refusal::Requests(waiting) => Refused::QueueFull { waiting, retry },
            Refusal::Tokens(tokens) => Refused::TokensFull { tokens, retry },
            Refusal::TooLarge { needed, budget } => Refused::TooLarge { needed, budget },
        }
    }
}

/// What can go wrong in a sequence; the log has it, the client only the request's id.
#[derive(Debug, Error)]
pub enum StepError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("tokens could not be turned into text: {0}")]
    Text(String),
    #[error("it panicked")]
    Panic,
}
