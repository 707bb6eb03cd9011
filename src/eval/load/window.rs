//! The steady state of a run: the stretch between the ramp-up, which fills the server, and the drain, which empties it.
//!
//! A closed loop's window opens when as many requests as the warm-up asks for have ended, and closes when so many requests have
//! begun and ended within it, or so much time has passed, as was asked for. An open loop's opens as the first request behind the
//! warm-up is due, and closes after that time, or as the request behind the last is due. The load is kept up until it closes.
//!
//! A request counts if its intended start and its end both lie within. What straddles an edge has no place in latencies and counts,
//! but to leave it out of the throughput as well would take about one latency off every window, and so make long requests look slow.
//! There each request counts by the share of its time that lies within.

use std::time::Duration;

use super::{Sample, Until};

/// A stretch of time, both ends included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    pub opens: Duration,
    pub closes: Duration,
}

impl Window {
    pub fn holds(&self, moment: Duration) -> bool {
        self.opens <= moment && moment <= self.closes
    }

    /// Whether a request counts.
    pub fn counts(&self, sample: &Sample) -> bool {
        self.holds(sample.intended) && self.holds(sample.ended)
    }

    /// How much of a request's time lies within, from 0 to 1.
    pub fn share(&self, sample: &Sample) -> f64 {
        let within = sample.ended.min(self.closes).saturating_sub(sample.intended.max(self.opens));
        let whole = sample.ended.saturating_sub(sample.intended);
        if whole.is_zero() { f64::from(u8::from(self.counts(sample))) } else { within.as_secs_f64() / whole.as_secs_f64() }
    }

    pub fn seconds(&self) -> f64 {
        self.closes.saturating_sub(self.opens).as_secs_f64()
    }
}

/// Finds the window of a closed loop while it runs.
#[derive(Clone, Debug)]
pub struct Gate {
    warm_up: u64,
    until: Until,
    opens: Option<Duration>,
    closes: Option<Duration>,
    /// Requests that have ended: of the warm-up until the window opens, within it from then on.
    ended: u64,
}

impl Gate {
    pub fn new(warm_up: u64, until: Until) -> Self {
        let mut gate = Self { warm_up, until, opens: None, closes: None, ended: 0 };
        if warm_up == 0 {
            gate.open(Duration::ZERO);
        }
        gate
    }

    fn open(&mut self, now: Duration) {
        self.ended = 0;
        self.opens = Some(now);
        if let Until::Time(time) = self.until {
            self.closes = Some(now + time);
        }
    }

    /// Notes a request's end. Ends must come in order.
    pub fn ended(&mut self, intended: Duration, ended: Duration) {
        match self.opens {
            None => {
                self.ended += 1;
                if self.ended >= self.warm_up {
                    self.open(ended);
                }
            }
            Some(opens) if intended >= opens && self.closes.is_none() => {
                self.ended += 1;
                if self.until == Until::Requests(self.ended) {
                    self.closes = Some(ended);
                }
            }
            Some(_) => {}
        }
    }

    /// Whether the load may end.
    pub fn closed(&self, now: Duration) -> bool {
        self.closes.is_some_and(|closes| now >= closes)
    }

    /// The window, once it is known.
    pub fn window(&self) -> Option<Window> {
        Some(Window { opens: self.opens?, closes: self.closes? })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn sample(intended: u64, ended: u64) -> Sample {
        Sample {
            intended: at(intended),
            sent: at(intended),
            ended: at(ended),
            first_step: None,
            first_commit: None,
            gaps: vec![],
            outcome: Outcome::Cancelled,
        }
    }

    #[test]
    fn what_straddles_an_edge_does_not_count() {
        let window = Window { opens: at(100), closes: at(200) };
        for (intended, ended, counts, share) in [
            (100, 200, true, 1.0),
            (120, 130, true, 1.0),
            (150, 150, true, 1.0),
            (80, 120, false, 0.5),
            (190, 230, false, 0.25),
            (50, 250, false, 0.5),
            (10, 90, false, 0.0),
            (210, 220, false, 0.0),
            (220, 220, false, 0.0),
        ] {
            let sample = sample(intended, ended);
            assert_eq!((window.counts(&sample), window.share(&sample)), (counts, share), "{intended} to {ended}");
        }
    }

    /// Back-to-back requests of one user fill the window exactly, wherever its edges fall.
    #[test]
    fn shares_add_up_to_the_window() {
        let window = Window { opens: at(133), closes: at(467) };
        let total: f64 = (0..10).map(|index| window.share(&sample(index * 70, (index + 1) * 70))).sum();
        assert!((total - window.seconds() / 0.070).abs() < 1e-9, "{total}");
    }

    #[test]
    fn a_gate_counts_requests_that_begin_within() {
        let mut gate = Gate::new(2, Until::Requests(2));
        gate.ended(at(0), at(10));
        assert!(gate.window().is_none());
        gate.ended(at(0), at(12));
        // Begun before the window opened at 12.
        gate.ended(at(10), at(20));
        gate.ended(at(12), at(22));
        assert!(!gate.closed(at(22)));
        gate.ended(at(20), at(30));
        assert!(gate.closed(at(30)));
        gate.ended(at(22), at(32));
        assert_eq!(gate.window(), Some(Window { opens: at(12), closes: at(30) }));
    }

    #[test]
    fn a_gate_counts_time_from_the_end_of_the_warm_up() {
        let mut gate = Gate::new(1, Until::Time(at(100)));
        assert!(!gate.closed(at(1000)));
        gate.ended(at(0), at(40));
        assert!(!gate.closed(at(139)) && gate.closed(at(140)));
        assert_eq!(gate.window(), Some(Window { opens: at(40), closes: at(140) }));
        let cold = Gate::new(0, Until::Time(at(100)));
        assert_eq!(cold.window(), Some(Window { opens: at(0), closes: at(100) }));
    }
}
