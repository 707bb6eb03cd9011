//! What a reader has still to be given. Where it does not keep up, steps become one with the newest state of every cell, and texts
//! become one text: committed text is never dropped, and what waits is bounded by the canvas. No channel, no clock.

use std::collections::BTreeMap;

use super::{Event, Failure};
use crate::decode::{Edit, Status, Step};

/// What one cell's reader has to know: what became of it, and the guess since, if it is masked.
#[derive(Debug, Default)]
struct Cell {
    settled: Option<Edit>,
    guess: Option<Edit>,
}

impl Cell {
    fn take(&mut self, edit: Edit) {
        match edit.status {
            Status::Provisional => self.guess = Some(edit),
            _ => *self = Self { settled: Some(edit), guess: None },
        }
    }
}

/// Events on their way to one reader, in their order: the start, steps, text, the end.
#[derive(Debug, Default)]
pub struct Outbox {
    started: Option<Event>,
    step: Option<(Step, BTreeMap<usize, Cell>)>,
    /// Steps that became part of a later one.
    coalesced: usize,
    text: Option<Event>,
    end: Option<Result<Event, Failure>>,
}

impl Outbox {
    /// Takes an event in. Replaying what comes out leaves the canvas that replaying what went in would.
    pub fn push(&mut self, event: Event) {
        match event {
            Event::Started { .. } => self.started = Some(event),
            Event::Step(step) => {
                let (newest, edits) = self.step.get_or_insert_with(|| (Step { edits: vec![], ..step }, BTreeMap::new()));
                self.coalesced += usize::from(newest.step != step.step);
                (newest.step, newest.block) = (step.step, step.block);
                step.edits.into_iter().for_each(|edit| edits.entry(edit.position).or_default().take(edit));
            }
            Event::Committed { token_ids, text, logprobs } => match &mut self.text {
                Some(Event::Committed { token_ids: ids, text: all, logprobs: known }) => {
                    ids.extend(token_ids);
                    all.push_str(&text);
                    known.extend(logprobs);
                }
                _ => self.text = Some(Event::Committed { token_ids, text, logprobs }),
            },
            Event::Finished { .. } => self.end = Some(Ok(event)),
        }
    }

    /// Ends without a finish: whatever waits is told first.
    pub fn fail(&mut self, failure: Failure) {
        self.end = Some(Err(failure));
    }

    /// The next event to give.
    pub fn pop(&mut self) -> Option<Result<Event, Failure>> {
        if let Some(started) = self.started.take() {
            return Some(Ok(started));
        }
        if let Some((step, edits)) = self.step.take() {
            let edits = edits.into_values().flat_map(|cell| [cell.settled, cell.guess]).flatten().collect();
            return Some(Ok(Event::Step(Step { edits, ..step })));
        }
        if let Some(text) = self.text.take() {
            return Some(Ok(text));
        }
        self.end.take()
    }

    pub fn is_empty(&self) -> bool {
        self.started.is_none() && self.step.is_none() && self.text.is_none() && self.end.is_none()
    }

    /// Steps that were never told by themselves.
    pub fn coalesced(&self) -> usize {
        self.coalesced
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::decode::FinishReason;
    use crate::decode::canvas::{Canvas, Piece};
    use crate::engine::Usage;

    fn edit(position: usize, token: u32, status: Status) -> Edit {
        Edit { position, token, status, confidence: 0.5, alternatives: vec![] }
    }

    fn text(ids: &[u32], text: &str) -> Event {
        Event::Committed { token_ids: ids.to_vec(), text: text.into(), logprobs: vec![] }
    }

    #[test]
    fn a_reader_that_keeps_up_gets_every_event_as_it_was() {
        let step = Event::Step(Step {
            step: 3,
            block: 1,
            edits: vec![edit(0, 7, Status::Committed), edit(2, 9, Status::Provisional)],
        });
        let mut outbox = Outbox::default();
        for event in [step, text(&[7], "a")] {
            outbox.push(event.clone());
            assert_eq!(outbox.pop().unwrap().unwrap(), event);
            assert!(outbox.is_empty());
        }
        assert_eq!(outbox.coalesced(), 0);
    }

    #[test]
    fn the_end_comes_last_and_failures_after_the_text() {
        let mut outbox = Outbox::default();
        outbox.push(Event::Finished { reason: FinishReason::Length, usage: Usage::default() });
        outbox.push(text(&[1], "x"));
        assert!(matches!(outbox.pop(), Some(Ok(Event::Committed { .. }))));
        assert!(matches!(outbox.pop(), Some(Ok(Event::Finished { .. }))));
        outbox.push(text(&[2], "y"));
        outbox.fail(Failure::Internal);
        assert!(matches!(outbox.pop(), Some(Ok(Event::Committed { .. }))));
        assert!(matches!(outbox.pop(), Some(Err(Failure::Internal))));
        assert!(outbox.pop().is_none() && outbox.is_empty());
    }

    /// Readers of every speed end with the same canvas and the same text, and little waits for the slowest.
    #[test]
    fn slow_readers_miss_steps_but_no_state_and_no_text() {
        for seed in 0..200 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut canvas = Canvas::new(&[], &[Piece::Hole(12)], 0);
            let (mut seen, mut outbox) = (canvas.clone(), Outbox::default());
            let (mut given, mut read, mut told) = (String::new(), String::new(), 0);
            let mut take = |outbox: &mut Outbox, read: &mut String| match outbox.pop() {
                Some(Ok(Event::Step(step))) => {
                    assert!(step.edits.len() <= 24, "two for a cell at most: what became of it, and a guess");
                    step.edits.iter().for_each(|edit| seen.replay(edit));
                    told += 1;
                }
                Some(Ok(Event::Committed { text, .. })) => read.push_str(&text),
                _ => {}
            };
            for step in 0..40 {
                let statuses = [Status::Provisional, Status::Committed, Status::Edited, Status::Remasked];
                let edits: Vec<Edit> = (0..rng.random_range(1..5))
                    .map(|_| edit(rng.random_range(0..12), rng.random_range(1..90), statuses[rng.random_range(0..4)]))
                    .collect();
                edits.iter().for_each(|edit| canvas.replay(edit));
                outbox.push(Event::Step(Step { step, block: 0, edits }));
                let more = step.to_string();
                given.push_str(&more);
                outbox.push(text(&[step as u32], &more));
                if rng.random_bool(0.3) {
                    take(&mut outbox, &mut read);
                }
            }
            while !outbox.is_empty() {
                take(&mut outbox, &mut read);
            }
            assert_eq!((seen.tokens(), seen.cells()), (canvas.tokens(), canvas.cells()), "seed {seed}");
            assert_eq!(read, given);
            assert_eq!(told + outbox.coalesced(), 40);
        }
    }
}
