//! What a lane's runs came to: rates, counts and latencies of the requests that count.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::{Forwards, Lane, Outcome, Round, Sample};

/// Share of requests that straddle an edge from which on the window says little.
const STRADDLING_MAX: f64 = 0.1;
/// Milliseconds by which a sender may be late; more is told.
const LATE_MAX: f64 = 5.0;
/// Microseconds that a histogram can hold: a day.
const LONGEST: u64 = 86_400_000_000;

/// What a request must keep to count for the goodput.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Time to the first committed token.
    pub first_committed_ms: Option<f64>,
    /// Time to the end.
    pub total_ms: Option<f64>,
}

impl Limits {
    fn any(&self) -> bool {
        self.first_committed_ms.is_some() || self.total_ms.is_some()
    }

    /// A text without tokens has its first one, so to speak, as it ends.
    fn kept(&self, sample: &Sample) -> bool {
        let first = sample.first_commit.unwrap_or(sample.ended);
        let within = |limit: Option<f64>, time: Duration| limit.is_none_or(|limit| time.as_secs_f64() * 1e3 <= limit);
        within(self.first_committed_ms, first.saturating_sub(sample.intended))
            && within(self.total_ms, sample.ended.saturating_sub(sample.intended))
    }
}

/// A distribution, in milliseconds; all but `mean` to three digits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Times of finished requests from the moment at which they were to be sent. `None` where there was nothing to time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// To the first event with provisional tokens, where steps are told.
    pub first_provisional: Option<Spread>,
    pub first_committed: Option<Spread>,
    pub between_commits: Option<Spread>,
    pub total: Option<Spread>,
}

/// How requests ended. `finished`, `cancelled`, `rejected` and `failed` make up `sent`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    pub sent: u64,
    pub finished: u64,
    pub cancelled: u64,
    pub rejected: u64,
    pub failed: u64,
    /// By the name of the status.
    pub failed_by_code: BTreeMap<String, u64>,
    /// Due in an open loop, and not sent: too many were under way.
    pub unsent: u64,
}

impl Counts {
    fn add(&mut self, outcome: &Outcome) {
        self.sent += 1;
        match outcome {
            Outcome::Finished(_) => self.finished += 1,
            Outcome::Cancelled => self.cancelled += 1,
            Outcome::Rejected => self.rejected += 1,
            Outcome::Failed(code) => {
                self.failed += 1;
                *self.failed_by_code.entry(code.clone()).or_default() += 1;
            }
        }
    }
}

/// One lane's figures over all its rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub lane: String,
    /// Of all rounds together.
    pub window_seconds: f64,
    /// Generated tokens of finished requests, each by its share of time within the window.
    pub tokens_per_second: f64,
    /// Likewise, round by round.
    pub tokens_per_second_by_round: Vec<f64>,
    pub requests_per_second: f64,
    /// Finished requests that kept the limits; unset without a limit.
    pub goodput_per_second: Option<f64>,
    /// Requests that began and ended within the window.
    pub counted: Counts,
    /// All that were sent, in warm-up and drain too.
    pub all: Counts,
    /// Requests that lie within the window in part.
    pub straddling: u64,
    pub latency_ms: Latencies,
    /// What the server says that finished requests waited for their place.
    pub queue_ms: Option<Spread>,
    /// How long after their intended moment requests were sent: the generator's own delay.
    pub send_delay_ms: Option<Spread>,
    /// Of finished requests that count.
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub forwards: Forwards,
    /// What a reader should know before trusting the figures.
    pub notes: Vec<String>,
}

/// Times on their way to a [`Spread`].
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Result<Self, hdrhistogram::CreationError> {
        Histogram::new_with_bounds(1, LONGEST, 3).map(Self)
    }

    fn add(&mut self, time: Duration) {
        self.0.saturating_record(time.as_micros().min(u128::from(LONGEST)) as u64);
    }

    fn spread(&self) -> Option<Spread> {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        (!self.0.is_empty()).then(|| Spread {
            count: self.0.len(),
            mean: self.0.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: self.0.max() as f64 / 1e3,
        })
    }
}

/// Sums of finished requests, each by its share of time within its window.
#[derive(Default)]
struct Rates {
    tokens: f64,
    requests: f64,
    good: f64,
}

impl Rates {
    fn of(round: &Round, limits: &Limits) -> Self {
        let mut rates = Self::default();
        for sample in &round.samples {
            if let Outcome::Finished(cost) = &sample.outcome {
                let share = round.window.share(sample);
                rates.tokens += share * cost.generated_tokens as f64;
                rates.requests += share;
                rates.good += share * f64::from(u8::from(limits.kept(sample)));
            }
        }
        rates
    }
}

/// Figures of one lane's rounds.
pub fn summary(lane: Lane, rounds: &[Round], limits: &Limits) -> Result<Summary, hdrhistogram::CreationError> {
    let (mut first_step, mut first_commit, mut gaps) = (Times::new()?, Times::new()?, Times::new()?);
    let (mut total, mut queued, mut delay) = (Times::new()?, Times::new()?, Times::new()?);
    let (mut counted, mut all) = (Counts::default(), Counts::default());
    let (mut prompt_tokens, mut generated_tokens, mut forwards) = (0, 0, Forwards::default());
    let mut straddling = 0;
    for round in rounds {
        counted.unsent += round.unsent.iter().filter(|due| round.window.holds(**due)).count() as u64;
        all.unsent += round.unsent.len() as u64;
        for sample in &round.samples {
            all.add(&sample.outcome);
            if !round.window.counts(sample) {
                straddling += u64::from(round.window.share(sample) > 0.0);
                continue;
            }
            counted.add(&sample.outcome);
            delay.add(sample.sent.saturating_sub(sample.intended));
            let Outcome::Finished(cost) = &sample.outcome else { continue };
            let since = |moment: Duration| moment.saturating_sub(sample.intended);
            sample.first_step.into_iter().for_each(|moment| first_step.add(since(moment)));
            sample.first_commit.into_iter().for_each(|moment| first_commit.add(since(moment)));
            sample.gaps.iter().for_each(|gap| gaps.add(*gap));
            total.add(since(sample.ended));
            queued.add(cost.queued);
            prompt_tokens += cost.prompt_tokens;
            generated_tokens += cost.generated_tokens;
            forwards.add(&cost.forwards);
        }
    }
    let rates: Vec<Rates> = rounds.iter().map(|round| Rates::of(round, limits)).collect();
    let seconds: f64 = rounds.iter().map(|round| round.window.seconds()).sum();
    let rate = |part: fn(&Rates) -> f64| by(rates.iter().map(part).sum(), seconds);
    let mut summary = Summary {
        lane: lane.to_string(),
        window_seconds: seconds,
        tokens_per_second: rate(|rates| rates.tokens),
        tokens_per_second_by_round: rounds.iter().zip(&rates).map(|(r, rates)| by(rates.tokens, r.window.seconds())).collect(),
        requests_per_second: rate(|rates| rates.requests),
        goodput_per_second: limits.any().then(|| rate(|rates| rates.good)),
        counted,
        all,
        straddling,
        latency_ms: Latencies {
            first_provisional: first_step.spread(),
            first_committed: first_commit.spread(),
            between_commits: gaps.spread(),
            total: total.spread(),
        },
        queue_ms: queued.spread(),
        send_delay_ms: delay.spread(),
        prompt_tokens,
        generated_tokens,
        forwards,
        notes: vec![],
    };
    summary.notes = notes(&summary);
    Ok(summary)
}

fn notes(summary: &Summary) -> Vec<String> {
    let mut notes = vec![];
    let Summary { counted, straddling, .. } = summary;
    if *straddling as f64 > STRADDLING_MAX * counted.sent as f64 {
        notes.push(format!(
            "{straddling} requests straddle the window's edges, {} lie within it: use more --requests, or a longer --duration",
            counted.sent
        ));
    }
    if counted.unsent > 0 {
        notes.push(format!("{} requests were due and not sent: --max-in-flight were under way already", counted.unsent));
    }
    if let Some(delay) = summary.send_delay_ms.filter(|delay| delay.p99 > LATE_MAX) {
        notes.push(format!("requests were sent up to {:.0} ms late: the generator lacks time, not only the server", delay.max));
    }
    notes
}

fn by(amount: f64, seconds: f64) -> f64 {
    if seconds > 0.0 { amount / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::Cost;
    use super::super::window::Window;
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn finished(intended: u64, sent: u64, first: u64, ended: u64) -> Sample {
        let forwards = Forwards { decode: 3, ..Forwards::default() };
        let cost = Cost { prompt_tokens: 5, generated_tokens: 10, queued: at(2), forwards };
        Sample {
            intended: at(intended),
            sent: at(sent),
            ended: at(ended),
            first_step: None,
            first_commit: Some(at(first)),
            gaps: vec![at(1), at(3)],
            outcome: Outcome::Finished(cost),
        }
    }

    fn ended(outcome: Outcome) -> Sample {
        Sample { outcome, ..finished(100, 100, 100, 101) }
    }

    fn round(samples: Vec<Sample>) -> Round {
        Round { samples, unsent: vec![at(50), at(150)], window: Window { opens: at(100), closes: at(1100) } }
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-3 * b.abs()
    }

    #[test]
    fn latencies_count_from_the_intended_moment() {
        // Due at 200, but sent only at 500: the 300 ms in a queue of the sender's are latency too.
        let summary =
            summary(Lane::Open { rate: 1.0 }, &[round(vec![finished(200, 500, 520, 600)])], &Limits::default()).unwrap();
        let latency = &summary.latency_ms;
        assert!(near(latency.first_committed.unwrap().p50, 320.0), "{latency:?}");
        assert!(near(latency.total.unwrap().max, 400.0), "{latency:?}");
        assert!(near(summary.send_delay_ms.unwrap().max, 300.0), "{summary:?}");
        assert_eq!(latency.first_provisional, None);
        assert!(summary.notes.iter().any(|note| note.contains("300 ms late")), "{:?}", summary.notes);
    }

    #[test]
    fn only_what_lies_within_counts() {
        let samples = vec![
            finished(100, 100, 110, 120),
            finished(90, 90, 110, 110),
            finished(1090, 1090, 1100, 1110),
            finished(0, 0, 10, 20),
            ended(Outcome::Rejected),
            ended(Outcome::Cancelled),
            ended(Outcome::Failed("INTERNAL".into())),
        ];
        let limits = Limits { first_committed_ms: Some(15.0), total_ms: None };
        let summary = summary(Lane::Closed { concurrency: 4 }, &[round(samples)], &limits).unwrap();
        let Counts { sent, finished, cancelled, rejected, failed, .. } = summary.counted;
        assert_eq!((sent, finished, cancelled, rejected, failed), (4, 1, 1, 1, 1));
        assert_eq!((summary.all.sent, summary.all.finished, summary.straddling), (7, 4, 2));
        assert_eq!((summary.counted.unsent, summary.all.unsent), (1, 2));
        assert_eq!(summary.counted.failed_by_code, BTreeMap::from([("INTERNAL".into(), 1)]));
        assert_eq!((summary.generated_tokens, summary.forwards.decode, summary.prompt_tokens), (10, 3, 5));
        assert_eq!(summary.latency_ms.total.unwrap().count, 1);
        assert_eq!(summary.latency_ms.between_commits.unwrap().count, 2);
        // One whole request and two halves in one second; the one that came in before the window was late.
        assert!(near(summary.tokens_per_second, 20.0) && near(summary.requests_per_second, 2.0), "{summary:?}");
        assert!(near(summary.goodput_per_second.unwrap(), 1.5), "{summary:?}");
    }

    #[test]
    fn rounds_are_pooled() {
        let fast = round(vec![finished(100, 100, 110, 120), finished(120, 120, 130, 140)]);
        let slow = round(vec![finished(100, 100, 150, 200)]);
        let summary = summary(Lane::Closed { concurrency: 1 }, &[fast, slow], &Limits::default()).unwrap();
        assert_eq!(summary.tokens_per_second_by_round, [20.0, 10.0]);
        assert!(near(summary.tokens_per_second, 15.0) && near(summary.window_seconds, 2.0), "{summary:?}");
        assert_eq!((summary.counted.finished, summary.goodput_per_second), (3, None));
    }

    #[test]
    fn nothing_counted_is_no_figure() {
        let summary =
            summary(Lane::Closed { concurrency: 1 }, &[round(vec![ended(Outcome::Rejected)])], &Limits::default()).unwrap();
        assert_eq!((summary.tokens_per_second, summary.latency_ms.total, summary.queue_ms), (0.0, None, None));
    }

    #[test]
    fn quantiles_are_those_of_the_times() {
        let mut times = Times::new().unwrap();
        (1..=1000).for_each(|millisecond| times.add(at(millisecond)));
        let spread = times.spread().unwrap();
        for (found, wanted) in [(spread.p50, 500.0), (spread.p90, 900.0), (spread.p99, 990.0), (spread.max, 1000.0)] {
            assert!(near(found, wanted), "{spread:?}");
        }
        assert!(near(spread.mean, 500.5), "{spread:?}");
    }
}
