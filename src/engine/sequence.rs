//! One request's life in the engine: a decoder, the text it has given out, and what it has cost. No I/O, no device.

use std::time::{Duration, Instant};

use super::runner::{Aside, Outcome};
use super::text::Detokenizer;
use super::{Event, Logprob, Usage};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::autoregressive::tree::Tree;
use crate::decode::canvas::Cell;
use crate::decode::{Decoder, Drafting, Edit, FinishReason, Purpose, Status, Window};

/// A sequence that is resident in the engine.
pub struct Sequence {
    decoder: Box<dyn Decoder>,
    detokenizer: Detokenizer,
    /// Tokens that end the text.
    ends: Vec<u32>,
    /// Cells handed to the detokeniser.
    given: usize,
    stopped: bool,
    /// Of every cell committed so far, where a request asks for them.
    logprobs: Option<Vec<Option<Logprob>>>,
    usage: Usage,
    started: Instant,
}

impl Sequence {
    /// `queued` is how long the request waited for its place.
    pub fn new(decoder: Box<dyn Decoder>, ends: Vec<u32>, stops: Vec<String>, queued: Duration) -> Self {
        let usage = Usage { prompt_tokens: decoder.canvas().prompt_len(), queued, ..Usage::default() };
        let detokenizer = Detokenizer::new(stops);
        Self { decoder, detokenizer, ends, given: 0, stopped: false, logprobs: None, usage, started: Instant::now() }
    }

    /// Committed text comes with its tokens' log-probabilities.
    pub fn with_logprobs(mut self) -> Self {
        self.logprobs = Some(vec![None; self.decoder.canvas().len()]);
        self
    }

    /// The next forward pass, or `None` when the sequence is finished.
    pub fn window(&self) -> Option<Window> {
        (self.finish_reason().is_none()).then(|| self.decoder.window())
    }

    pub fn finish_reason(&self) -> Option<FinishReason> {
        if self.stopped { Some(FinishReason::Stop) } else { self.decoder.finished() }
    }

    /// Positions that its cache must have room for; 0 where there is none.
    pub fn cache_room(&self) -> usize {
        self.decoder.cache_room()
    }

    /// Begins with so many tokens in the cache.
    pub fn resume(&mut self, cached: usize) {
        self.usage.reused_tokens = cached;
        self.decoder.resume(cached);
    }

    /// Tokens of the last window that the cache keeps.
    pub fn kept(&self) -> &[usize] {
        self.decoder.kept()
    }

    /// What its drafter should be asked next.
    pub fn drafting(&mut self) -> Option<Drafting> {
        if self.finish_reason().is_some() { None } else { self.decoder.drafting() }
    }

    pub fn propose(&mut self, candidates: Tree) {
        self.decoder.propose(candidates);
    }

    /// Tokens from the left that are known: prompt, and the canvas up to its first masked cell.
    pub fn known(&self) -> &[u32] {
        let canvas = self.decoder.canvas();
        &canvas.sequence()[..canvas.prompt_len() + canvas.frontier()]
    }

    /// What it has cost so far.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    pub fn decoder(&self) -> &dyn Decoder {
        &*self.decoder
    }

    /// What can be given out before the first step (fixed text at the start), and the end of a canvas without holes.
    pub fn begin(&mut self, tokenizer: &Tokenizer) -> Result<Vec<Event>, String> {
        let mut events = vec![Event::Started {
            prompt_tokens: self.usage.prompt_tokens,
            canvas: self.decoder.canvas().tokens().to_vec(),
            masked: self.decoder.canvas().cells().iter().map(|cell| *cell == Cell::Masked).collect(),
        }];
        self.give_out(tokenizer, &mut events)?;
        events.extend(self.finish());
        Ok(events)
    }

    /// Applies what came of one window. The end is told by [`Sequence::finish`], when all of the step is accounted for.
    pub fn advance(&mut self, outcome: &Outcome, purpose: Purpose, tokenizer: &Tokenizer) -> Result<Vec<Event>, String> {
        let step = self.decoder.advance(&outcome.rows);
        self.usage.count(purpose, outcome);
        let since = self.started.elapsed();
        if !step.edits.is_empty() {
            self.usage.time_to_first_provisional.get_or_insert(since);
        }
        if step.edits.iter().any(|edit| edit.status != Status::Provisional) {
            self.usage.time_to_first_commit.get_or_insert(since);
        }
        self.note_logprobs(&step.edits);
        let mut events = vec![];
        // A chunk of the prompt changes no cell.
        if !step.edits.is_empty() {
            self.usage.steps += 1;
            events.push(Event::Step(step));
        }
        self.give_out(tokenizer, &mut events)?;
        Ok(events)
    }

    /// Adds what the step cost beside its window.
    pub fn account(&mut self, outcome: &Outcome, aside: Aside) {
        // What a forward costs by itself cannot be told from a part of a shared one.
        let forward = (outcome.beside == 1).then(|| outcome.timing.total().as_secs_f64());
        self.decoder.timed(forward, aside.draft.as_secs_f64());
        self.usage.forwards.draft += aside.draft_forwards;
        self.usage.drafting += aside.draft;
        self.usage.committing += aside.commit;
    }

    fn note_logprobs(&mut self, edits: &[Edit]) {
        let Some(logprobs) = &mut self.logprobs else { return };
        for edit in edits.iter().filter(|edit| edit.status != Status::Provisional) {
            let logprob = Logprob {
                token: edit.token,
                logprob: edit.confidence.ln().max(LOGPROB_MIN),
                alternatives: edit.alternatives.clone(),
            };
            logprobs[edit.position] = (edit.status != Status::Remasked).then_some(logprob);
        }
    }

    /// Releases the text up to the first masked cell or the end of the text.
    fn give_out(&mut self, tokenizer: &Tokenizer, events: &mut Vec<Event>) -> Result<(), String> {
        let canvas = self.decoder.canvas();
        let end = canvas.first_end(&self.ends).unwrap_or(canvas.len());
        let frontier = canvas.frontier().min(end).max(self.given);
        let finished = self.decoder.finished().is_some();
        let before = self.detokenizer.released_tokens().len();
        let released = self.detokenizer.push(tokenizer, &canvas.tokens()[self.given..frontier], finished)?;
        self.given = frontier;
        self.stopped |= released.stopped;
        if !released.text.is_empty() || !released.token_ids.is_empty() {
            let logprobs = self.logprobs.as_ref().and_then(|all| all.get(before..before + released.token_ids.len()));
            let logprobs = logprobs.map(<[_]>::to_vec).unwrap_or_default();
            events.push(Event::Committed { token_ids: released.token_ids, text: released.text, logprobs });
        }
        Ok(())
    }

    /// The last event, once there is nothing more to do.
    pub fn finish(&mut self) -> Option<Event> {
        let reason = self.finish_reason()?;
        let cells = self.decoder.canvas().cells();
        let given = self.detokenizer.released_tokens().len();
        self.usage.generated_tokens = cells[..given].iter().filter(|cell| **cell == Cell::Committed).count();
        self.usage.decoding = self.started.elapsed();
        self.usage.speculation = self.decoder.speculation().cloned();
        self.usage.plain_step = self.decoder.adaptation().map(|known| Duration::from_secs_f64(known.plain_step()));
        Some(Event::Finished { reason, usage: self.usage.clone() })
    }
}

/// Stands for the logarithm of 0, which neither JSON nor arithmetic on sums likes.
const LOGPROB_MIN: f64 = -9999.0;
