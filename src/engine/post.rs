//! Delivers a round's events all at once.
//!
//! Every event wakes its reader. Woken one by one from here, sixteen readers would take the processor from a round sixteen times over
//! and write to their connection as often; so where the readers are tasks of a tokio runtime, one task of it is woken, which then hands
//! the events of all of them out.

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::{Event, Failure};

/// An event, and the place in its reader's channel that is kept for it.
pub struct Given {
    pub place: mpsc::OwnedPermit<Result<Event, Failure>>,
    pub event: Result<Event, Failure>,
}

impl Given {
    fn deliver(self) {
        self.place.send(self.event);
    }
}

/// What has been handed out and not yet delivered.
pub struct Post {
    given: Vec<Given>,
    /// Bounded by the places, of which each reader has few.
    carrier: Option<mpsc::UnboundedSender<Vec<Given>>>,
}

impl Post {
    /// With a task of the runtime that is current, if there is one, to deliver.
    pub fn start() -> Self {
        let carrier = Handle::try_current().ok().map(|runtime| {
            let (carrier, mut rounds) = mpsc::unbounded_channel::<Vec<Given>>();
            runtime.spawn(async move {
                while let Some(round) = rounds.recv().await {
                    round.into_iter().for_each(Given::deliver);
                }
            });
            carrier
        });
        Self { given: vec![], carrier }
    }

    /// Takes over what readers were given.
    pub fn collect(&mut self, given: &mut Vec<Given>) {
        self.given.append(given);
    }

    /// To all readers, in the order in which they were given.
    pub fn deliver(&mut self) {
        if self.given.is_empty() {
            return;
        }
        let round = std::mem::take(&mut self.given);
        let undelivered = match &self.carrier {
            // The runtime may be gone already.
            Some(carrier) => carrier.send(round).err().map(|round| round.0).unwrap_or_default(),
            None => round,
        };
        undelivered.into_iter().for_each(Given::deliver);
    }
}
