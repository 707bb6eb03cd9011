//! The engine's thread: gives requests their places, runs rounds, and hands events out.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use tokio::sync::mpsc;
use tracing::{debug, error};

use super::post::Post;
use super::prefix::Prefixes;
use super::reader::{Reader, ended};
use super::runner::{self, Member, Residence, guarded};
use super::scheduler::{self, Id};
use super::sequence::Sequence;
use super::{Event, Failure, IDLE, Job, Method, Request, State, StepError};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::autoregressive::scoring::Scoring;
use crate::decode::autoregressive::{Autoregressive, DrafterKind};
use crate::decode::{Decoder, Purpose, Window, diffusion};
use crate::draft::Drafters;
use crate::model::{ModelError, Transformer};
use crate::telemetry::Trace;
use crate::telemetry::meter::{Kind, Meter};

/// Weight of the newest stay in the smoothed one.
const SMOOTHING: f64 = 0.1;

struct Resident {
    reader: Reader,
    sequence: Sequence,
    residence: Residence,
    drafter: Option<DrafterKind>,
    /// Whether it neither takes from the store nor adds to it.
    fresh: bool,
    /// Whether what it has of its prompt is in the store.
    stored: bool,
    course: Course,
}

/// What is told of a resident's time when it is over.
struct Course {
    kind: Kind,
    trace: Trace,
    submitted: Instant,
    since: Instant,
    /// Whether its step in this round is over the prompt, and the end of the last one that was.
    prefilling: bool,
    prefilled: Option<Instant>,
    /// When it last had text to give.
    text: Option<Instant>,
    rounds: u64,
}

impl Course {
    /// A step begins. Gives the trace if the round is to have a span for it: a sequence's first round has one, its second, its fourth
    /// and so on, so that a thousand steps have ten.
    fn begin(&mut self, purpose: Purpose) -> Option<Trace> {
        self.prefilling = purpose == Purpose::Prefill;
        self.rounds += 1;
        (self.trace.is_on() && self.rounds.is_power_of_two()).then(|| self.trace.clone())
    }

    /// A step is over.
    fn stepped(&mut self, now: Instant, events: &[Event], meter: Option<&Meter>) {
        if std::mem::take(&mut self.prefilling) {
            self.prefilled = Some(now);
        }
        if let Some(meter) = meter {
            meter.stepped(self.kind, events, self.text.map(|text| now.saturating_duration_since(text)));
            if events.iter().any(|event| matches!(event, Event::Committed { .. })) {
                self.text = Some(now);
            }
        }
    }

    /// The sequence is over.
    fn end(&self, sequence: &Sequence, meter: Option<&Meter>) {
        if let Some(meter) = meter.filter(|_| sequence.finish_reason().is_some()) {
            meter.finished(self.kind, sequence.usage());
        }
        if !self.trace.is_on() {
            return;
        }
        let (usage, now) = (sequence.usage(), Instant::now());
        let decoder = KeyValue::new("lacuna.decoder", self.kind.name());
        self.trace.part("queue", self.submitted, self.since, vec![]);
        if let Some(prefilled) = self.prefilled {
            let reused = KeyValue::new("lacuna.reused_tokens", usage.reused_tokens as i64);
            let tokens = KeyValue::new("gen_ai.usage.input_tokens", usage.prompt_tokens as i64);
            self.trace.part("prefill", self.since, prefilled, vec![tokens, reused]);
        }
        let steps = KeyValue::new("lacuna.steps", usage.steps as i64);
        let forwards = KeyValue::new("lacuna.forwards", usage.forwards.model() as i64);
        let tokens = KeyValue::new("gen_ai.usage.output_tokens", usage.generated_tokens as i64);
        self.trace.part("decode", self.prefilled.unwrap_or(self.since), now, vec![decoder, steps, forwards, tokens]);
    }
}

pub(super) struct Worker {
    model: Transformer,
    drafters: Drafters,
    tokenizer: Arc<Tokenizer>,
    jobs: mpsc::UnboundedReceiver<Job>,
    waiting: HashMap<Id, Job>,
    /// In the order of admission.
    residents: Vec<Resident>,
    /// Those whose sequences are over, while something is left to read.
    lingering: Vec<Reader>,
    prefixes: Prefixes,
    post: Post,
    /// Last, so that whoever sees it go finds all memory free.
    state: Arc<State>,
}

impl Worker {
    pub fn new(
        model: Transformer,
        drafters: Drafters,
        tokenizer: Arc<Tokenizer>,
        jobs: mpsc::UnboundedReceiver<Job>,
        state: Arc<State>,
        prefix_tokens: usize,
    ) -> Self {
        let prefixes = Prefixes::new(prefix_tokens, model.config().block_length.unwrap_or(1));
        let (waiting, residents, lingering) = (HashMap::new(), vec![], vec![]);
        Self { model, drafters, tokenizer, jobs, state, waiting, residents, lingering, prefixes, post: Post::start() }
    }

    /// Rounds until every handle is gone.
    pub fn run(mut self) {
        while self.receive() {
            let started = Instant::now();
            self.let_go();
            self.admit();
            // Whoever begins or has ended need not wait for the others' step.
            self.post.deliver();
            let (residents, windows) = self.choose();
            let deciding = started.elapsed();
            let stepped = self.round(residents, windows);
            self.account(started, deciding, stepped);
            self.post.deliver();
            if stepped == 0 && self.state.book().scheduler.active() > 0 {
                std::thread::sleep(IDLE);
            }
        }
    }

    /// Takes in what has been submitted; sleeps when there is nothing to do. False when no request can come any more.
    fn receive(&mut self) -> bool {
        if self.residents.is_empty() && self.waiting.is_empty() && self.lingering.is_empty() {
            match self.jobs.blocking_recv() {
                Some(job) => drop(self.waiting.insert(job.id, job)),
                None => return false,
            }
        }
        while let Ok(job) = self.jobs.try_recv() {
            self.waiting.insert(job.id, job);
        }
        true
    }

    /// Whoever's client has left, or whose time is over, gives up what it has, wherever it is.
    fn let_go(&mut self) {
        let (state, post) = (&self.state, &mut self.post);
        self.waiting.retain(|id, job| match ended(state, &job.reply, job.request.deadline) {
            None => true,
            Some(failure) => {
                state.book().scheduler.leave(*id);
                state.count(&failure);
                let _ = job.reply.try_send(Err(failure));
                false
            }
        });
        self.lingering.retain_mut(|reader| {
            // Under the lock, so that whoever has the last event finds the place in the queue free.
            let mut book = state.book();
            reader.give();
            post.collect(&mut reader.given);
            let over = reader.outbox.is_empty() || reader.ended(state).is_some();
            if over {
                book.scheduler.leave(reader.id);
            }
            !over
        });
        let residents = std::mem::take(&mut self.residents);
        for resident in residents {
            match resident.reader.ended(&self.state) {
                None => self.residents.push(resident),
                Some(failure) => {
                    debug!(request = resident.reader.name, %failure, "ended early");
                    self.state.count(&failure);
                    self.leave(resident, |reader| reader.fail(failure));
                }
            }
        }
    }

    /// Fills free places.
    fn admit(&mut self) {
        loop {
            let Some(id) = self.state.book().scheduler.admit() else { return };
            // Submitted, but still on its way here: it is taken in next.
            while !self.waiting.contains_key(&id) {
                match self.jobs.try_recv() {
                    Ok(job) => drop(self.waiting.insert(job.id, job)),
                    Err(_) => break,
                }
            }
            match self.waiting.remove(&id) {
                Some(job) => self.take(job),
                None => drop(self.state.book().scheduler.leave(id)),
            }
        }
    }

    /// Gives a request its place, and its reader what there is before the first step.
    fn take(&mut self, job: Job) {
        let Job { id, request, reply, submitted } = job;
        let Request { id: name, canvas, method, stops, steps, deadline, fresh, trace, .. } = request;
        let reader = Reader::new(id, name, reply, steps, deadline);
        let room = self.state.book().scheduler.room();
        self.prefixes.shrink(room);
        let kind = Kind::of(&method);
        // Where rows depend on those they are run with, others' chunks of a beginning would show in what follows it.
        let fresh = fresh || method.deterministic() && !self.model.rows_are_independent();
        let begun = guarded(|| {
            let (ends, drafts, logprobs) = (method.ends().to_vec(), method.drafts(), method.logprobs());
            let decoder: Box<dyn Decoder> = match method {
                Method::Diffusion(parameters) => {
                    let config = self.model.config();
                    diffusion::decoder(parameters, canvas, config.attention, config.shift)
                }
                Method::Scoring(parameters) => Box::new(Scoring::new(parameters, &canvas.sequence()[..canvas.prompt_len()])),
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
            let mut residence = Residence::new(&self.model, &sequence)?;
            if let (true, Some(cache)) = (sequence.decoder().resumable() && !fresh, &mut residence.cache) {
                let known = self.prefixes.load(sequence.known(), cache)?;
                sequence.resume(known);
            }
            let events = sequence.begin(&self.tokenizer).map_err(StepError::Text)?;
            Ok((sequence, residence, drafts.map(|drafts| drafts.drafter), events))
        });
        match begun {
            Ok((sequence, residence, drafter, events)) => {
                let course = Course {
                    kind,
                    trace,
                    submitted,
                    since: Instant::now(),
                    prefilling: false,
                    prefilled: None,
                    text: None,
                    rounds: 0,
                };
                let mut resident = Resident { reader, sequence, residence, drafter, fresh, stored: false, course };
                if let Some(meter) = self.state.meter.get() {
                    meter.began(kind, resident.sequence.usage().queued);
                }
                match resident.sequence.finish_reason() {
                    None => {
                        resident.reader.take(events);
                        self.post.collect(&mut resident.reader.given);
                        self.residents.push(resident);
                    }
                    Some(_) => self.leave(resident, |reader| reader.take(events)),
                }
            }
            Err(reason) => {
                error!(request = reader.name, %reason, "a request could not begin");
                self.state.count(&reason.failure());
                self.part(reader, |reader| reader.fail(reason.failure()));
            }
        }
    }

    /// The residents, and the windows of those who run in this round.
    fn choose(&mut self) -> (Vec<Resident>, Vec<Option<Result<Window, StepError>>>) {
        let residents = std::mem::take(&mut self.residents);
        let window = |resident: &Resident| guarded(|| Ok(resident.sequence.window())).transpose();
        let mut windows: Vec<_> = residents.iter().map(window).collect();
        let prefill = |window: &Option<Result<Window, StepError>>| match window {
            Some(Ok(window)) if window.purpose == Purpose::Prefill => window.tokens.len(),
            _ => 0,
        };
        let runs = scheduler::round(&windows.iter().map(prefill).collect::<Vec<_>>());
        windows.iter_mut().zip(runs).filter(|(_, runs)| !runs).for_each(|(window, _)| *window = None);
        (residents, windows)
    }

    /// One step of everybody who has a window; gives how many there were.
    fn round(&mut self, mut residents: Vec<Resident>, windows: Vec<Option<Result<Window, StepError>>>) -> usize {
        let (mut members, mut traced) = (vec![], vec![]);
        let mut results: Vec<Option<Result<Vec<Event>, StepError>>> = vec![];
        for (resident, window) in residents.iter_mut().zip(windows) {
            results.push(match window {
                Some(Ok(window)) => {
                    let Resident { sequence, residence, course, .. } = resident;
                    traced.extend(course.begin(window.purpose));
                    members.push((results.len(), Member { sequence, residence, window }));
                    None
                }
                Some(Err(reason)) => Some(Err(reason)),
                None => Some(Ok(vec![])),
            });
        }
        let (places, members): (Vec<usize>, Vec<Member>) = members.into_iter().unzip();
        let stepped = places.len();
        let (meter, began) = (self.state.meter.get(), Instant::now());
        let stepping = runner::round(&self.model, &self.drafters, members, &self.tokenizer, meter);
        let ended = Instant::now();
        let sequences = KeyValue::new("lacuna.sequences", stepped as i64);
        Trace::round(&traced, began, ended, vec![sequences]);
        places.into_iter().zip(stepping).for_each(|(place, result)| results[place] = Some(result));
        for (mut resident, result) in residents.into_iter().zip(results) {
            match result.unwrap_or(Ok(vec![])) {
                Ok(events) => {
                    resident.course.stepped(ended, &events, self.state.meter.get());
                    self.remember(&mut resident);
                    match resident.sequence.finish_reason() {
                        None => {
                            resident.reader.take(events);
                            self.post.collect(&mut resident.reader.given);
                            self.residents.push(resident);
                        }
                        Some(_) => self.leave(resident, |reader| reader.take(events)),
                    }
                }
                Err(reason) => {
                    error!(request = resident.reader.name, %reason, "a step failed");
                    self.state.count(&reason.failure());
                    self.leave(resident, |reader| reader.fail(reason.failure()));
                }
            }
        }
        stepped
    }

    /// Keeps the keys of a prompt for others, once they are all there, and those of the text behind it at its end.
    fn remember(&mut self, resident: &mut Resident) {
        let Some(cache) =
            resident.residence.cache.as_ref().filter(|_| resident.sequence.decoder().resumable() && !resident.fresh)
        else {
            return;
        };
        let prompt = !resident.stored && cache.len() + 1 >= resident.sequence.decoder().canvas().prompt_len();
        if prompt || resident.sequence.finish_reason().is_some() {
            resident.stored = true;
            let room = self.state.book().scheduler.room();
            if let Err(reason) = self.prefixes.store(resident.sequence.known(), cache, room) {
                // Nothing but time is lost.
                debug!(request = resident.reader.name, %reason, "its keys could not be kept for others");
            }
        }
    }

    /// A sequence is over: its memory is free at once, and what it saw of its drafter is where the next one begins. All of that is so
    /// before its reader is told by `last`.
    fn leave(&mut self, resident: Resident, last: impl FnOnce(&mut Reader)) {
        let Resident { reader, sequence, residence, drafter, course, .. } = resident;
        drop(residence);
        course.end(&sequence, self.state.meter.get());
        let mut book = self.state.book();
        let stay = course.since.elapsed().as_secs_f64();
        book.stay = if book.stay == 0.0 { stay } else { book.stay + SMOOTHING * (stay - book.stay) };
        if let Some(found) = sequence.decoder().speculation() {
            book.drafted.add(found, sequence.usage());
        }
        drop(book);
        if let (Some(kind), Some(seen)) = (drafter, sequence.decoder().adaptation()) {
            self.drafters.learn(kind, seen);
        }
        self.part(reader, last);
    }

    /// Tells a reader the `last` of it, and keeps it until it has everything. Whoever has read to the end finds its place free: the lock
    /// is held until it is.
    fn part(&mut self, mut reader: Reader, last: impl FnOnce(&mut Reader)) {
        let mut book = self.state.book();
        last(&mut reader);
        self.post.collect(&mut reader.given);
        book.load.coalesced += reader.outbox.coalesced() as u64;
        if reader.outbox.is_empty() || reader.reply.is_closed() {
            book.scheduler.leave(reader.id);
        } else {
            let behind = book.scheduler.linger(reader.id);
            drop(book);
            self.lingering.push(reader);
            if let Some(at) = self.lingering.iter().position(|reader| Some(reader.id) == behind) {
                let reader = self.lingering.remove(at);
                debug!(request = reader.name, "cut off: it was complete and was not read");
                self.state.count(&Failure::Unread);
                reader.cut_off();
            }
        }
    }

    fn account(&mut self, started: Instant, deciding: Duration, stepped: usize) {
        let mut book = self.state.book();
        let load = &mut book.load;
        load.prefix_tokens = self.prefixes.tokens();
        if stepped > 0 {
            load.rounds += 1;
            load.steps += stepped as u64;
            load.scheduling += deciding;
            load.working += started.elapsed();
        }
    }
}

impl StepError {
    /// What the client is told.
    fn failure(&self) -> Failure {
        match self {
            Self::Model(ModelError::OutOfMemory(_)) => Failure::OutOfMemory,
            _ => Failure::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_memory_that_ran_out_is_told_apart() {
        let failure = |error: ModelError| StepError::Model(error).failure();
        assert!(matches!(failure(ModelError::OutOfMemory("1 TiB".into())), Failure::OutOfMemory));
        assert!(matches!(failure(ModelError::NotFinite), Failure::Internal));
        assert!(matches!(StepError::Panic.failure(), Failure::Internal));
    }
}
