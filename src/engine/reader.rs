//! Whoever a request's events go to: hands out what there is room for, keeps the rest, and knows when the request must end.
//!
//! The channel has one place more than events may wait in it, so that a reader whose channel is full can still be told of its end.

use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::mpsc::OwnedPermit;

use super::outbox::Outbox;
use super::post::Given;
use super::scheduler::Id;
use super::{Event, Failure, Reply, State};

/// Whoever a request's events go to.
pub struct Reader {
    pub id: Id,
    /// For the log.
    pub name: String,
    pub reply: Reply,
    pub outbox: Outbox,
    /// Handed out in this round, with the places in the channel that it takes.
    pub given: Vec<Given>,
    steps: bool,
    deadline: Option<Instant>,
    /// Kept for being cut off, of which nobody can be told whose channel is full.
    last: Option<OwnedPermit<Result<Event, Failure>>>,
}

impl Reader {
    pub fn new(id: Id, name: String, reply: Reply, steps: bool, deadline: Option<Instant>) -> Self {
        let last = reply.clone().try_reserve_owned().ok();
        Self { id, name, reply, outbox: Outbox::default(), given: vec![], steps, deadline, last }
    }

    pub fn take(&mut self, events: Vec<Event>) {
        let steps = self.steps;
        for event in events.into_iter().filter(|event| steps || !matches!(event, Event::Step(_))) {
            self.outbox.push(event);
            self.give();
        }
    }

    /// Hands out what there is room for.
    pub fn give(&mut self) {
        // Without a place there is no room, or no reader; the next round sees which.
        while !self.outbox.is_empty()
            && let Ok(place) = self.reply.clone().try_reserve_owned()
            && let Some(event) = self.outbox.pop()
        {
            self.given.push(Given { place, event });
        }
    }

    pub fn fail(&mut self, failure: Failure) {
        self.outbox.fail(failure);
        self.give();
    }

    /// Ends without what waits, so that a reader that never looks costs nothing any more.
    pub fn cut_off(self) {
        if let Some(place) = self.last {
            place.send(Err(Failure::Unread));
        }
    }

    /// Why the request must end before it is complete, if it must.
    pub fn ended(&self, state: &State) -> Option<Failure> {
        ended(state, &self.reply, self.deadline)
    }
}

/// Why a request must end, whether or not it has its place already.
pub fn ended(state: &State, reply: &Reply, deadline: Option<Instant>) -> Option<Failure> {
    // Whoever reads knows the deadline too, and lets go when it has passed: that is no leaving.
    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
        Some(Failure::DeadlineExceeded)
    } else if reply.is_closed() {
        Some(Failure::Cancelled)
    } else {
        state.stopping.load(Ordering::Acquire).then_some(Failure::Stopping)
    }
}
