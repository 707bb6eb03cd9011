//! When requests of an open loop are due, and which requests are cancelled: drawn ahead, from a seed.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thiserror::Error;

use super::Until;
use super::window::Window;

/// Arrivals of one run at most; each is kept until the run is over.
pub const ARRIVALS_MAX: usize = 1 << 20;

/// Why a run of an open loop cannot be planned.
#[derive(Debug, Error)]
#[error("these are more than {ARRIVALS_MAX} requests: use a lower --rate, or a shorter --duration")]
pub struct TooMany;

/// Moments of a Poisson process: exponential gaps with a mean of 1 / rate.
struct Poisson {
    rng: ChaCha8Rng,
    rate: f64,
    at: f64,
}

impl Iterator for Poisson {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        // 1 - u is above 0, and its logarithm finite.
        self.at -= (1.0 - self.rng.random::<f64>()).ln() / self.rate;
        Duration::try_from_secs_f64(self.at).ok()
    }
}

/// When requests are due, and the window: it opens as the first request behind the warm-up is due. Each round draws anew.
pub fn open_loop(rate: f64, seed: u64, round: u64, warm_up: u64, until: Until) -> Result<(Vec<Duration>, Window), TooMany> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Streams from 0 up are those of cancellations.
    rng.set_stream(u64::MAX - round);
    let mut arrivals = Poisson { rng, rate, at: 0.0 };
    let warm_up = usize::try_from(warm_up).map_err(|_| TooMany)?;
    let mut due = vec![];
    while due.len() <= ARRIVALS_MAX {
        let next = arrivals.next().ok_or(TooMany)?;
        if let Some(opens) = due.get(warm_up).copied() {
            let (over, closes) = match until {
                Until::Requests(count) => ((due.len() - warm_up) as u64 >= count, next),
                Until::Time(time) => (next > opens + time, opens + time),
            };
            if over {
                return Ok((due, Window { opens, closes }));
            }
        }
        due.push(next);
    }
    Err(TooMany)
}

/// When to cancel a request, as a share of the time that requests usually take; `None` lets it run to its end.
pub fn cancellation(seed: u64, index: u64, share: f64) -> Option<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let (chosen, moment) = (rng.random::<f64>(), rng.random::<f64>());
    (chosen < share).then_some(moment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(rate: f64, seed: u64, count: u64) -> Vec<f64> {
        let (due, _) = open_loop(rate, seed, 0, 0, Until::Requests(count)).unwrap();
        let before = std::iter::once(Duration::ZERO).chain(due.iter().copied());
        due.iter().zip(before).map(|(at, before)| (*at - before).as_secs_f64()).collect()
    }

    #[test]
    fn gaps_are_exponential() {
        let gaps = gaps(50.0, 3, 20_000);
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Of an exponential distribution mean and deviation are the same; the mean of 20,000 strays by 0.7 % at one sigma.
        assert!((mean * 50.0 - 1.0).abs() < 0.04, "{mean}");
        assert!((variance.sqrt() * 50.0 - 1.0).abs() < 0.08, "{variance}");
        let longer = gaps.iter().filter(|gap| **gap > 1.0 / 50.0).count() as f64 / gaps.len() as f64;
        assert!((longer - (-1.0f64).exp()).abs() < 0.02, "{longer}");
    }

    #[test]
    fn a_seed_and_a_round_give_one_schedule() {
        let plan = |seed, round| open_loop(5.0, seed, round, 2, Until::Requests(10)).unwrap();
        assert_eq!(plan(1, 0), plan(1, 0));
        assert_ne!(plan(1, 0), plan(2, 0));
        assert_ne!(plan(1, 0), plan(1, 1));
    }

    #[test]
    fn the_window_opens_behind_the_warm_up() {
        let (due, window) = open_loop(100.0, 1, 0, 5, Until::Requests(20)).unwrap();
        assert_eq!((due.len(), window.opens), (25, due[5]));
        assert!(window.closes > due[24]);
        let time = Duration::from_secs(2);
        let (due, window) = open_loop(100.0, 1, 0, 5, Until::Time(time)).unwrap();
        assert_eq!((window.opens, window.closes), (due[5], due[5] + time));
        assert!(due.last().is_some_and(|last| *last <= window.closes));
        assert!(due.len() > 100, "{}", due.len());
    }

    #[test]
    fn a_schedule_has_bounds() {
        assert!(open_loop(1e6, 1, 0, 0, Until::Time(Duration::from_secs(3600))).is_err());
        assert!(open_loop(1.0, 1, 0, u64::MAX, Until::Requests(1)).is_err());
        assert!(open_loop(1e-300, 1, 0, 0, Until::Requests(1)).is_err());
    }

    #[test]
    fn cancellations_have_their_share() {
        let moments: Vec<f64> = (0..4000).filter_map(|index| cancellation(7, index, 0.25)).collect();
        assert!((moments.len() as f64 / 4000.0 - 0.25).abs() < 0.03, "{}", moments.len());
        let mean = moments.iter().sum::<f64>() / moments.len() as f64;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
        assert_eq!(cancellation(7, 1, 0.0), None);
        assert!((0..100).all(|index| cancellation(7, index, 1.0).is_some()));
    }
}
