//! Which plots a group of results supports, and what is in them.

use serde::Deserialize;

use super::bars::{Bar, Bars};
use super::chart::{Axis, Chart, Curve, Dot, Scale, figure};
use super::input::{DEFAULTS, Point, Source};
use super::provenance::provenance;
use super::score::aup;

/// Percentage points of accuracy that a path's fastest setting may lose against its best.
const LOSS: f64 = 1.0;

/// A plot of a kind; the names are an index's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    AccuracyForward,
    AccuracySpeed,
    SpeedBatch,
    FirstToken,
    Acceptance,
    ForwardCost,
    StepParts,
}

pub const ALL: [Kind; 7] = [
    Kind::AccuracyForward,
    Kind::AccuracySpeed,
    Kind::SpeedBatch,
    Kind::FirstToken,
    Kind::Acceptance,
    Kind::ForwardCost,
    Kind::StepParts,
];

/// What can be drawn.
#[derive(Clone, Debug)]
pub enum Drawing {
    Chart(Chart),
    Bars(Bars),
}

#[derive(Clone, Debug)]
pub struct Plot {
    /// Of its file, without an ending.
    pub name: String,
    pub drawing: Drawing,
    /// What it shows in words, where the figures say it by themselves.
    pub notes: Vec<String>,
}

impl Plot {
    pub fn svg(&self) -> String {
        match &self.drawing {
            Drawing::Chart(chart) => chart.svg(),
            Drawing::Bars(bars) => bars.svg(),
        }
    }

    pub fn title(&self) -> &str {
        match &self.drawing {
            Drawing::Chart(chart) => &chart.title,
            Drawing::Bars(bars) => &bars.title,
        }
    }
}

/// Draws what the results have figures for; `slug` begins the plots' names.
pub fn plots(sources: &[&Source], kinds: &[Kind], slug: &str) -> Vec<Plot> {
    let foot = provenance(sources);
    let group = Group { points: sources.iter().flat_map(|source| &source.points).collect(), foot, slug };
    kinds.iter().flat_map(|kind| group.plots(*kind)).collect()
}

struct Group<'a> {
    points: Vec<&'a Point>,
    foot: Vec<String>,
    slug: &'a str,
}

impl Group<'_> {
    fn plots(&self, kind: Kind) -> Vec<Plot> {
        match kind {
            Kind::AccuracyForward => self.accuracy_forward().into_iter().collect(),
            Kind::AccuracySpeed => self.accuracy_speed(),
            Kind::SpeedBatch => self.speed_batch().into_iter().collect(),
            Kind::FirstToken => self.first_token().into_iter().collect(),
            Kind::Acceptance => self.acceptance().into_iter().collect(),
            Kind::ForwardCost => self.forward_cost().into_iter().collect(),
            Kind::StepParts => self.step_parts().into_iter().collect(),
        }
    }

    fn plot(&self, name: &str, title: &str, axes: (Axis, Axis), curves: Vec<Curve>, notes: Vec<String>) -> Option<Plot> {
        let dots: usize = curves.iter().map(|curve| curve.dots.len()).sum();
        let chart = Chart { title: title.into(), x: axes.0, y: axes.1, curves, foot: self.foot.clone() };
        (dots > 1).then(|| Plot { name: format!("{}-{name}", self.slug), drawing: Drawing::Chart(chart), notes })
    }

    /// Paths in the order in which they come, each with its points that `keep` keeps.
    fn paths(&self, keep: impl Fn(&Point) -> bool) -> Vec<(&str, Vec<&Point>)> {
        let mut paths: Vec<(&str, Vec<&Point>)> = vec![];
        for point in self.points.iter().filter(|point| keep(point)) {
            match paths.iter_mut().find(|(path, _)| *path == point.path) {
                Some((_, points)) => points.push(point),
                None => paths.push((&point.path, vec![point])),
            }
        }
        paths
    }

    fn accuracy_forward(&self) -> Option<Plot> {
        // Neither figure depends on how many requests are in flight, but for a drafter that adapts to what its forwards take.
        let least = |point: &Point| {
            let same = self.points.iter().filter(|other| other.path == point.path && other.setting == point.setting);
            same.map(|other| other.in_flight).min() == Some(point.in_flight)
        };
        let paths = self.paths(|point| point.share().is_some() && point.tokens_per_forward.is_some() && least(point));
        let best = 100.0 * paths.iter().flat_map(|(_, points)| points).filter_map(|point| point.share()).fold(0.0, f64::max);
        let curves = paths.iter().map(|(path, points)| {
            let dots = dots(points, |point| Some((point.tokens_per_forward?, 100.0 * point.share()?, accuracy_ends(point))));
            let score = aup(&dots.iter().map(|dot| (dot.x, dot.y)).collect::<Vec<_>>(), best);
            Curve { name: score.map_or((*path).into(), |score| format!("{path} — AUP {}", figure(score.round()))), dots }
        });
        let axes = (axis("tokens per forward", Scale::Log), percent());
        let notes = vec![format!("AUP is accuracy under parallelism with α = 3, against the best accuracy here, {best:.1} %.")];
        self.plot("accuracy-forward", "Accuracy against tokens per forward", axes, curves.collect(), notes)
    }

    fn accuracy_speed(&self) -> Vec<Plot> {
        let measured = |point: &Point| point.share().is_some() && point.tokens_per_second.is_some();
        let plot = |count: u64| {
            let paths = self.paths(|point| measured(point) && point.in_flight == Some(count));
            let curves = paths.iter().map(|(path, points)| {
                let dot = |point: &Point| Some((point.tokens_per_second?.median, 100.0 * point.share()?, accuracy_ends(point)));
                Curve { name: (*path).into(), dots: dots(points, dot) }
            });
            let title = format!("Accuracy against tokens per second, {count} in flight");
            let axes = (axis("tokens per second", Scale::Log), percent());
            self.plot(&format!("accuracy-speed-{count}"), &title, axes, curves.collect(), vec![])
        };
        self.in_flight(measured).into_iter().filter_map(plot).collect()
    }

    /// Numbers of requests in flight that occur.
    fn in_flight(&self, keep: impl Fn(&Point) -> bool) -> Vec<u64> {
        let mut counts: Vec<u64> = self.points.iter().filter(|point| keep(point)).filter_map(|point| point.in_flight).collect();
        counts.sort_unstable();
        counts.dedup();
        counts
    }

    /// Of each path the points over the requests in flight, at the setting that is fastest with few of them among those that
    /// lose at most [`LOSS`] points of the path's best accuracy.
    fn over_batches(&self, keep: impl Fn(&Point) -> bool) -> Vec<(String, Vec<&Point>)> {
        let paths = self.paths(|point| point.in_flight.is_some() && keep(point));
        let chosen = paths.into_iter().filter_map(|(path, points)| {
            let least = points.iter().filter_map(|point| point.in_flight).min()?;
            let best = points.iter().filter_map(|point| point.share()).fold(0.0, f64::max);
            let good = |point: &&&Point| {
                point.in_flight == Some(least) && point.share().is_none_or(|share| 100.0 * (best - share) <= LOSS + 1e-9)
            };
            let rate = |point: &Point| point.tokens_per_second.map_or(0.0, |rate| rate.median);
            let fastest = points.iter().filter(good).max_by(|a, b| rate(a).total_cmp(&rate(b)))?;
            let setting = fastest.setting.clone();
            // Where there is nothing to choose from, the path's name says it.
            let only = points.iter().all(|point| point.setting == setting);
            let name = if only || setting == DEFAULTS { path.into() } else { format!("{path}, {setting}") };
            let points: Vec<_> = points.into_iter().filter(|point| point.setting == setting).collect();
            (points.len() > 1).then_some((name, points))
        });
        chosen.collect()
    }

    fn speed_batch(&self) -> Option<Plot> {
        let paths = self.over_batches(|point| point.tokens_per_second.is_some());
        let curves = paths.iter().map(|(name, points)| {
            let dot = |point: &Point| {
                let rate = point.tokens_per_second?;
                Some((point.in_flight? as f64, rate.median, Some((rate.min, rate.max))))
            };
            Curve { name: name.clone(), dots: unlabelled(dots(points, dot)) }
        });
        let curves: Vec<Curve> = curves.collect();
        let fastest = self.in_flight(|point| point.tokens_per_second.is_some()).into_iter().filter_map(|count| {
            let at = |curve: &Curve| curve.dots.iter().find(|dot| dot.x == count as f64).map(|dot| (dot.y, curve.name.clone()));
            let (rate, name) = curves.iter().filter_map(at).max_by(|a, b| a.0.total_cmp(&b.0))?;
            Some(format!("{count}: {name} ({})", figure(rate.round())))
        });
        let mut notes =
            vec![format!("Fastest in tokens/s, by requests in flight: {}.", fastest.collect::<Vec<_>>().join("; "))];
        if self.points.iter().any(|point| point.share().is_some()) {
            notes.push(format!(
                "Of each path the setting that is fastest alone among those within {LOSS} point of its best accuracy."
            ));
        }
        let axes = (axis("requests in flight", Scale::Steps), axis("tokens per second", Scale::Log));
        self.plot("speed-batch", "Tokens per second against requests in flight", axes, curves, notes)
    }

    fn first_token(&self) -> Option<Plot> {
        let curves = self.over_batches(|point| point.first_ms.is_some()).into_iter().map(|(name, points)| {
            let dot = |point: &Point| {
                let (p50, p90) = point.first_ms?;
                Some((point.in_flight? as f64, p50, Some((p50, p90))))
            };
            Curve { name, dots: unlabelled(dots(&points, dot)) }
        });
        let axes = (axis("requests in flight", Scale::Steps), axis("ms to the first committed token", Scale::Log));
        let notes = vec!["Medians, with a whisker up to nine in ten requests.".into()];
        self.plot("first-token", "Time to the first committed token", axes, curves.collect(), notes)
    }

    fn acceptance(&self) -> Option<Plot> {
        let curves = self.points.iter().filter(|point| !point.acceptance.is_empty()).map(|point| {
            // Behind the last accepted token drafts were never right, or never that long.
            let reached = point.acceptance.iter().rposition(|share| *share > 0.0).map_or(1, |last| last + 1);
            let dot =
                |(at, share): (usize, &f64)| Dot { x: (at + 1) as f64, y: 100.0 * share, whiskers: None, label: String::new() };
            Curve { name: point.path.clone(), dots: point.acceptance.iter().take(reached).enumerate().map(dot).collect() }
        });
        let position = axis("position in the draft", Scale::Whole);
        let mut share = percent();
        share.label = "accepted, % of all drafts".into();
        let notes = vec!["A draft that is shorter counts as not accepted behind its end.".into()];
        self.plot("acceptance", "Drafted tokens accepted, by position", (position, share), curves.collect(), notes)
    }

    fn forward_cost(&self) -> Option<Plot> {
        let curves = self.points.iter().filter(|point| point.costs.len() > 1).map(|point| {
            let dot = |cost: &crate::eval::speculate::Cost| Dot {
                x: cost.tokens as f64,
                y: cost.ratio,
                whiskers: None,
                label: figure(cost.ratio),
            };
            Curve { name: point.model.clone(), dots: point.costs.iter().map(dot).collect() }
        });
        let axes = (axis("tokens in the forward", Scale::Steps), axis("time, by that of one token", Scale::Log));
        self.plot("forward-cost", "What a forward of several tokens costs", axes, curves.collect(), vec![])
    }

    fn step_parts(&self) -> Option<Plot> {
        let points: Vec<_> = self.points.iter().filter(|point| !point.parts.is_empty()).collect();
        let bar = |point: &&&Point| {
            let batch =
                point.in_flight.filter(|count| *count > 1).map_or(String::new(), |count| format!(", {count} sequences"));
            let name = format!("{}, {}{batch}", point.model, point.setting);
            Bar { name, values: point.parts.iter().map(|(_, spread)| spread.median).collect() }
        };
        let parts = points.first()?.parts.iter().map(|(name, _)| (*name).into()).collect();
        let name = format!("{}-step-parts", self.slug);
        let bars = Bars {
            id: name.clone(),
            title: "Where a denoising step's time goes, medians".into(),
            parts,
            unit: "ms".into(),
            bars: points.iter().map(bar).collect(),
            foot: self.foot.clone(),
        };
        Some(Plot { name, drawing: Drawing::Bars(bars), notes: vec![] })
    }
}

fn axis(label: &str, scale: Scale) -> Axis {
    Axis { label: label.into(), scale, within: (f64::NEG_INFINITY, f64::INFINITY) }
}

fn percent() -> Axis {
    Axis { label: "pass@1, %".into(), scale: Scale::Linear, within: (0.0, 100.0) }
}

/// The interval of a share, in percent.
fn accuracy_ends(point: &Point) -> Option<(f64, f64)> {
    point.interval.map(|(low, high)| (100.0 * low, 100.0 * high))
}

type Place = (f64, f64, Option<(f64, f64)>);

/// Dots have their settings as labels, where there are several.
fn dots(points: &[&Point], place: impl Fn(&Point) -> Option<Place>) -> Vec<Dot> {
    let only = points.iter().all(|point| point.setting == points[0].setting);
    let dot = |point: &&Point| {
        let (x, y, whiskers) = place(point)?;
        let label = if only || point.setting == DEFAULTS { String::new() } else { point.setting.clone() };
        Some(Dot { x, y, whiskers, label })
    };
    let mut dots: Vec<Dot> = points.iter().filter_map(dot).collect();
    dots.sort_by(|a, b| a.x.total_cmp(&b.x));
    dots
}

/// Where the curve's name has the setting.
fn unlabelled(dots: Vec<Dot>) -> Vec<Dot> {
    dots.into_iter().map(|dot| Dot { label: String::new(), ..dot }).collect()
}
