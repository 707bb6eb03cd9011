//! The engine: one thread that owns a device and a model, and runs rounds over the sequences that are resident.
//!
//! A round is one step for every resident sequence, so that a finished one leaves at once and a waiting one joins at once.
//! Requests come through a bounded queue, events leave through a bounded channel per request; a reader that does not keep up
//! holds back its own sequence and no other. The engine knows nothing of gRPC.

pub mod request;
pub mod runner;
pub mod sequence;
pub mod text;
pub mod usage;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::mpsc;
use tracing::{debug, error};

use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::autoregressive::{Autoregressive, DrafterKind};
use crate::decode::canvas::Canvas;
use crate::decode::diffusion::Diffusion;
use crate::decode::{Decoder, FinishReason, Sampling, Step, autoregressive, diffusion};
use crate::draft::Drafters;
use crate::model::{ModelError, Transformer};
use runner::{Member, Residence, guarded};
use sequence::Sequence;

pub use usage::{Drafted, Forwards, Usage};

/// Events that wait for a reader; a step makes at most three, so this is some twenty steps of slack.
const EVENTS_MAX: usize = 64;
/// How long the engine waits for a slow reader, or for work, before it looks again.
const IDLE: Duration = Duration::from_millis(2);

/// A step that takes longer than this when the process ends is left behind.
const REST: Duration = Duration::from_secs(5);

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
}

/// How a request is decoded.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    Diffusion(diffusion::Parameters),
    Autoregressive(autoregressive::Parameters),
}

impl Method {
    pub fn seed(&self) -> u64 {
        match self {
            Self::Diffusion(parameters) => parameters.seed,
            Self::Autoregressive(parameters) => parameters.seed,
        }
    }

    pub fn sampling(&self) -> &Sampling {
        match self {
            Self::Diffusion(parameters) => &parameters.sampling,
            Self::Autoregressive(parameters) => &parameters.sampling,
        }
    }

    /// Tokens that end the text.
    pub fn ends(&self) -> &[u32] {
        match self {
            Self::Diffusion(parameters) => &parameters.end_of_text.ids,
            Self::Autoregressive(parameters) => &parameters.ends,
        }
    }

    /// Who drafts, if anyone.
    pub fn drafts(&self) -> Option<autoregressive::Drafts> {
        match self {
            Self::Diffusion(_) => None,
            Self::Autoregressive(parameters) => parameters.drafts,
        }
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
    #[error("the server is stopping")]
    Stopping,
    #[error("the request failed; the server's log has its id")]
    Internal,
}

/// Why a request was not taken.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Refused {
    #[error("the queue is full ({0} requests wait): try again later")]
    QueueFull(usize),
    #[error("the server is stopping and takes no further requests")]
    Stopping,
}

/// Bounds of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that are decoded together.
    pub resident: usize,
    /// Requests that wait.
    pub queued: usize,
}

type Reply = mpsc::Sender<Result<Event, Failure>>;

struct Job {
    request: Request,
    reply: Reply,
    submitted: Instant,
}

/// Shared between the handle and the thread.
#[derive(Default)]
struct State {
    /// Take no new requests; those that are in run on.
    draining: AtomicBool,
    /// End everything now.
    stopping: AtomicBool,
    /// Requests queued or resident.
    active: AtomicUsize,
    /// Requests queued.
    waiting: AtomicUsize,
    drafted: Mutex<Drafted>,
}

impl State {
    /// A request is over, finished or not.
    fn end(&self) {
        self.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A handle to the engine thread.
#[derive(Clone)]
pub struct Engine {
    queue: mpsc::Sender<Job>,
    state: Arc<State>,
    limits: Limits,
}

impl Engine {
    /// Starts the thread that owns `model` and `drafters`.
    pub fn start(model: Transformer, drafters: Drafters, tokenizer: Arc<Tokenizer>, limits: Limits) -> std::io::Result<Self> {
        // This thread has probably loaded the model; from here on another one computes.
        crate::tensor::kernels::release_threads();
        let (queue, jobs) = mpsc::channel(limits.queued.max(1));
        let state = Arc::new(State::default());
        let worker = Worker {
            model,
            drafters,
            tokenizer,
            jobs,
            state: state.clone(),
            waiting: VecDeque::new(),
            residents: Vec::new(),
            limits,
        };
        std::thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
        Ok(Self { queue, state, limits })
    }

    /// Hands a request over; its events come through the receiver. Dropping the receiver cancels the request.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Result<Event, Failure>>, Refused> {
        if self.state.draining.load(Ordering::Acquire) {
            return Err(Refused::Stopping);
        }
        let room = |waiting| (waiting < self.limits.queued.max(1)).then_some(waiting + 1);
        if self.state.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_err() {
            return Err(Refused::QueueFull(self.limits.queued));
        }
        let (reply, events) = mpsc::channel(EVENTS_MAX);
        self.state.active.fetch_add(1, Ordering::AcqRel);
        // The count above keeps the channel from ever being full, so a failure means that the thread is gone.
        self.queue.try_send(Job { request, reply, submitted: Instant::now() }).map_err(|_| {
            self.state.waiting.fetch_sub(1, Ordering::AcqRel);
            self.state.end();
            Refused::Stopping
        })?;
        Ok(events)
    }

    /// What drafts have come to so far.
    pub fn drafted(&self) -> Drafted {
        self.state.drafted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Requests queued or resident.
    pub fn active(&self) -> usize {
        self.state.active.load(Ordering::Acquire)
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

struct Resident {
    id: String,
    sequence: Sequence,
    residence: Residence,
    drafter: Option<DrafterKind>,
    reply: Reply,
    steps: bool,
    deadline: Option<Instant>,
}

/// What a resident does in a round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Step,
    /// Its reader has no room; it sits this round out.
    Wait,
    Leave,
}

/// Gives a resident's reader what its step came to; true when that was the last.
fn deliver(resident: &mut Resident, result: Result<Vec<Event>, StepError>) -> bool {
    match result {
        Ok(events) => {
            let steps = resident.steps;
            send(resident, events.into_iter().filter(|event| steps || !matches!(event, Event::Step(_))).map(Ok));
            resident.sequence.finish_reason().is_some()
        }
        Err(reason) => {
            error!(request = resident.id, %reason, "a step failed");
            send(resident, [Err(Failure::Internal)]);
            true
        }
    }
}

struct Worker {
    model: Transformer,
    drafters: Drafters,
    tokenizer: Arc<Tokenizer>,
    jobs: mpsc::Receiver<Job>,
    state: Arc<State>,
    /// In the order of arrival; [`State::waiting`] bounds it.
    waiting: VecDeque<Job>,
    residents: Vec<Resident>,
    limits: Limits,
}

impl Worker {
    /// Rounds until every handle is gone.
    fn run(mut self) {
        while self.admit() {
            let mut residents = std::mem::take(&mut self.residents);
            let turns: Vec<Turn> = residents.iter().map(|resident| self.turn(resident)).collect();
            let mut members: Vec<_> = residents.iter_mut().zip(&turns).filter(|(_, turn)| **turn == Turn::Step).collect();
            let mut asked: Vec<Member> = members
                .iter_mut()
                .map(|(resident, _)| Member { sequence: &mut resident.sequence, residence: &mut resident.residence })
                .collect();
            let results = runner::round(&self.model, &self.drafters, &mut asked, &self.tokenizer);
            let stepped = !results.is_empty();
            let mut results = results.into_iter();
            for (mut resident, turn) in residents.into_iter().zip(turns) {
                let done = match turn {
                    Turn::Step => results.next().is_none_or(|result| deliver(&mut resident, result)),
                    Turn::Wait => false,
                    Turn::Leave => true,
                };
                if done {
                    self.learn(&resident);
                    self.state.end();
                } else {
                    self.residents.push(resident);
                }
            }
            if !stepped && !self.residents.is_empty() {
                std::thread::sleep(IDLE);
            }
        }
    }

    /// Fills free places from the queue; sleeps when there is nothing to do. False when no request can come any more.
    fn admit(&mut self) -> bool {
        if self.residents.is_empty() && self.waiting.is_empty() {
            match self.jobs.blocking_recv() {
                Some(job) => self.waiting.push_back(job),
                None => return false,
            }
        }
        while let Ok(job) = self.jobs.try_recv() {
            self.waiting.push_back(job);
        }
        self.forget_the_departed();
        while self.residents.len() < self.limits.resident.max(1)
            && let Some(job) = self.waiting.pop_front()
        {
            self.state.waiting.fetch_sub(1, Ordering::AcqRel);
            self.take(job);
        }
        true
    }

    /// Requests whose client has left or whose time is over give up their places in the queue.
    fn forget_the_departed(&mut self) {
        let state = &self.state;
        self.waiting.retain(|job| match ended(state, &job.reply, job.request.deadline) {
            None => true,
            Some(failure) => {
                let _ = job.reply.try_send(Err(failure));
                state.waiting.fetch_sub(1, Ordering::AcqRel);
                state.end();
                false
            }
        });
    }

    /// Gives a request its place, and its reader what there is before the first step.
    fn take(&mut self, job: Job) {
        let Job { request, reply, submitted } = job;
        let Request { id, canvas, method, stops, steps, deadline } = request;
        let begun = guarded(|| {
            let (ends, drafts, logprobs) = (method.ends().to_vec(), method.drafts(), method.sampling().alternatives > 0);
            let decoder: Box<dyn Decoder> = match method {
                Method::Diffusion(parameters) => Box::new(Diffusion::new(parameters, canvas, self.model.config().attention)),
                Method::Autoregressive(parameters) => {
                    let adaptation = match drafts.filter(|drafts| drafts.adapt) {
                        Some(drafts) => self.drafters.adaptation(drafts.drafter, &self.model)?,
                        None => None,
                    };
                    Box::new(Autoregressive::new(parameters, canvas, adaptation))
                }
            };
            let mut sequence = Sequence::new(decoder, ends, stops, submitted.elapsed());
            if logprobs {
                sequence = sequence.with_logprobs();
            }
            let residence = Residence::new(&self.model, &sequence)?;
            let events = sequence.begin(&self.tokenizer).map_err(StepError::Text)?;
            Ok((sequence, residence, drafts.map(|drafts| drafts.drafter), events))
        });
        match begun {
            Ok((sequence, residence, drafter, events)) => {
                let resident = Resident { id, sequence, residence, drafter, reply, steps, deadline };
                send(&resident, events.into_iter().map(Ok));
                if resident.sequence.finish_reason().is_none() {
                    self.residents.push(resident);
                    return;
                }
            }
            Err(reason) => {
                error!(request = id, %reason, "a request could not begin");
                let _ = reply.try_send(Err(Failure::Internal));
            }
        }
        self.state.end();
    }

    /// Whether a resident takes part in this round.
    fn turn(&self, resident: &Resident) -> Turn {
        if let Some(failure) = ended(&self.state, &resident.reply, resident.deadline) {
            debug!(request = resident.id, %failure, "ended early");
            send(resident, [Err(failure)]);
            return Turn::Leave;
        }
        // A step makes at most three events. Only this thread sends, so room that is there now stays.
        if resident.reply.capacity() < 4 { Turn::Wait } else { Turn::Step }
    }

    /// What a sequence saw of its drafter is where the next one begins.
    fn learn(&mut self, resident: &Resident) {
        if let Some(found) = resident.sequence.decoder().speculation() {
            let mut drafted = self.state.drafted.lock().unwrap_or_else(PoisonError::into_inner);
            drafted.add(found, resident.sequence.usage());
        }
        if let (Some(kind), Some(seen)) = (resident.drafter, resident.sequence.decoder().adaptation()) {
            self.drafters.learn(kind, seen);
        }
    }
}

/// Why a request must end before it is complete, if it must.
fn ended(state: &State, reply: &Reply, deadline: Option<Instant>) -> Option<Failure> {
    if reply.is_closed() {
        Some(Failure::Cancelled)
    } else if state.stopping.load(Ordering::Acquire) {
        Some(Failure::Stopping)
    } else {
        deadline.is_some_and(|deadline| Instant::now() >= deadline).then_some(Failure::DeadlineExceeded)
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

/// Room was checked before the step, so a failed send means that the reader has gone; the next turn sees that.
fn send(resident: &Resident, events: impl IntoIterator<Item = Result<Event, Failure>>) {
    for event in events {
        if resident.reply.try_send(event).is_err() {
            return;
        }
    }
}
