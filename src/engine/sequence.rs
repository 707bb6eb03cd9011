//! One request's life in the engine: a decoder, the text it has given out, and what it has cost. No I/O, no device.

use std::time::{Duration, Instant};

use super::text::Detokenizer;
use super::{Event, Usage};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::canvas::Cell;
use crate::decode::{Decoder, FinishReason, RowStatistics, Status, Window};

/// A sequence that is resident in the engine.
pub struct Sequence {
    decoder: Box<dyn Decoder>,
    detokenizer: Detokenizer,
    /// Tokens that end the text.
    ends: Vec<u32>,
    /// Cells handed to the detokeniser.
    given: usize,
    stopped: bool,
    usage: Usage,
    started: Instant,
}

impl Sequence {
    /// `queued` is how long the request waited for its place.
    pub fn new(decoder: Box<dyn Decoder>, ends: Vec<u32>, stops: Vec<String>, queued: Duration) -> Self {
        let usage = Usage { prompt_tokens: decoder.canvas().prompt_len(), queued, ..Usage::default() };
        let detokenizer = Detokenizer::new(stops);
        Self { decoder, detokenizer, ends, given: 0, stopped: false, usage, started: Instant::now() }
    }

    /// The next forward pass, or `None` when the sequence is finished.
    pub fn window(&self) -> Option<Window> {
        (self.finish_reason().is_none()).then(|| self.decoder.window())
    }

    pub fn finish_reason(&self) -> Option<FinishReason> {
        if self.stopped { Some(FinishReason::Stop) } else { self.decoder.finished() }
    }

    /// What can be given out before the first step (fixed text at the start), and the end of a canvas without holes.
    pub fn begin(&mut self, tokenizer: &Tokenizer) -> Result<Vec<Event>, String> {
        let mut events = vec![Event::Started {
            prompt_tokens: self.usage.prompt_tokens,
            canvas: self.decoder.canvas().tokens().to_vec(),
            masked: self.decoder.canvas().cells().iter().map(|cell| *cell == Cell::Masked).collect(),
        }];
        self.give_out(tokenizer, &mut events)?;
        Ok(events)
    }

    /// Applies one forward's statistics.
    pub fn advance(&mut self, rows: &[RowStatistics], forwards: usize, tokenizer: &Tokenizer) -> Result<Vec<Event>, String> {
        let step = self.decoder.advance(rows);
        self.usage.forwards_denoise += forwards;
        self.usage.steps += 1;
        let since = self.started.elapsed();
        if step.edits.iter().any(|edit| edit.status != Status::Provisional) {
            self.usage.time_to_first_commit.get_or_insert(since);
        }
        let mut events = vec![Event::Step(step)];
        self.give_out(tokenizer, &mut events)?;
        Ok(events)
    }

    /// Releases the text up to the first masked cell or the end of the text, and the end itself.
    fn give_out(&mut self, tokenizer: &Tokenizer, events: &mut Vec<Event>) -> Result<(), String> {
        let canvas = self.decoder.canvas();
        let end = canvas.first_end(&self.ends).unwrap_or(canvas.len());
        let frontier = canvas.frontier().min(end).max(self.given);
        let finished = self.decoder.finished().is_some();
        let released = self.detokenizer.push(tokenizer, &canvas.tokens()[self.given..frontier], finished)?;
        self.given = frontier;
        self.stopped |= released.stopped;
        if !released.text.is_empty() || !released.token_ids.is_empty() {
            events.push(Event::Committed { token_ids: released.token_ids, text: released.text });
        }
        if let Some(reason) = self.finish_reason() {
            events.push(Event::Finished { reason, usage: self.finish() });
        }
        Ok(())
    }

    fn finish(&mut self) -> Usage {
        let cells = self.decoder.canvas().cells();
        let given = self.detokenizer.released_tokens().len();
        self.usage.generated_tokens = cells[..given].iter().filter(|cell| **cell == Cell::Committed).count();
        self.usage.decoding = self.started.elapsed();
        self.usage.clone()
    }
}
