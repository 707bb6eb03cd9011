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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::FinishReason;
    use crate::engine::Usage;

    fn event(tokens: usize) -> Event {
        let usage = Usage { generated_tokens: tokens, ..Usage::default() };
        Event::Finished { reason: FinishReason::Stop, usage }
    }

    /// Two readers' events, given in one round: nothing comes before it is delivered, and then everything, in order.
    fn deliver(mut post: Post) -> [Vec<Event>; 2] {
        let (senders, mut readers): (Vec<_>, Vec<_>) = (0..2).map(|_| mpsc::channel(4)).unzip();
        let mut given: Vec<Given> = vec![];
        for number in 0..4 {
            let place = mpsc::Sender::clone(&senders[number % 2]).try_reserve_owned().unwrap();
            given.push(Given { place, event: Ok(event(number)) });
        }
        post.collect(&mut given);
        assert!(given.is_empty() && readers.iter_mut().all(|reader| reader.try_recv().is_err()));
        post.deliver();
        drop(senders);
        let all = |reader: &mut mpsc::Receiver<_>| std::iter::from_fn(|| reader.blocking_recv()).map(Result::unwrap).collect();
        [all(&mut readers[0]), all(&mut readers[1])]
    }

    #[test]
    fn a_round_is_delivered_in_order_with_a_runtime_without_one_and_after_its_end() {
        let right = [vec![event(0), event(2)], vec![event(1), event(3)]];
        assert_eq!(deliver(Post { given: vec![], carrier: None }), right);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let start = || {
            let _inside = runtime.enter();
            Post::start()
        };
        let (during, after) = (start(), start());
        assert!(during.carrier.is_some() && after.carrier.is_some());
        assert_eq!(deliver(during), right);
        runtime.shutdown_background();
        while after.carrier.as_ref().is_some_and(|carrier| !carrier.is_closed()) {
            std::thread::yield_now();
        }
        assert_eq!(deliver(after), right);
    }
}
