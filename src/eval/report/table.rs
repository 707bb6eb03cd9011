//! Tables: the figures that a group of results has, one row a point.

use serde::Deserialize;

use super::chart::figure;
use super::input::{Kind, Point, Source};
use super::score::Spread;

/// What a cell is made from.
struct Row<'a> {
    source: &'a Source,
    point: &'a Point,
    /// The first point of the same setting, which others are compared with.
    first: &'a Point,
}

/// A column that a table may have; the names are an index's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Column {
    Model,
    Path,
    Program,
    Setting,
    InFlight,
    Dtype,
    Device,
    Threads,
    #[serde(rename = "pass_at_1")]
    PassAt1,
    Interval,
    Forwards,
    ForwardsAgainstFirst,
    TokensPerForward,
    TokensPerSecond,
    Spread,
    Runs,
    AgainstFirst,
    RequestsPerSecond,
    First,
    FirstP90,
    Total,
    TotalP90,
    Speedup,
    SpeedupLeast,
    AcceptanceLength,
    SameText,
    Forward,
    Head,
    Selection,
    Events,
    Step,
    Overhead,
    Floor,
    TimesFloor,
    BoundBy,
    Tokens,
    Perplexity,
    BitsPerByte,
    What,
    Measured,
    Ratio,
    File,
}

impl Column {
    /// What a kind of result shows where an index does not say.
    pub fn usual(kind: Kind) -> &'static [Self] {
        use Column::*;
        match kind {
            Kind::Sweep | Kind::Evaluation => &[
                Path,
                Setting,
                InFlight,
                PassAt1,
                Interval,
                Forwards,
                TokensPerForward,
                TokensPerSecond,
                Spread,
                Runs,
                First,
                FirstP90,
                AcceptanceLength,
            ],
            Kind::Load => &[
                Path,
                Setting,
                InFlight,
                TokensPerSecond,
                Spread,
                Runs,
                RequestsPerSecond,
                First,
                FirstP90,
                Total,
                TotalP90,
                TokensPerForward,
            ],
            Kind::Speculation => &[Model, Setting, TokensPerSecond, Speedup, SpeedupLeast, AcceptanceLength, SameText, Runs],
            Kind::Step => &[Model, Setting, InFlight, Dtype, Step, Forward, Head, Selection, Events, Overhead, Runs],
            Kind::Grid => &[Model, Setting, InFlight, Dtype, Step, Floor, TimesFloor, BoundBy, Overhead, Runs],
            Kind::Likelihood => &[Program, Model, Setting, Tokens, Perplexity, BitsPerByte],
            Kind::Peer => &[Program, Model, Dtype, What, Measured, Ratio, Runs],
        }
    }

    fn heading(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Path => "path",
            Self::Program => "program",
            Self::Setting => "setting",
            Self::InFlight => "in flight",
            Self::Dtype => "dtype",
            Self::Device => "device",
            Self::Threads => "threads",
            Self::PassAt1 => "pass@1",
            Self::Interval => "95 % interval",
            Self::Forwards => "forwards",
            Self::ForwardsAgainstFirst => "forwards, by the first path's",
            Self::TokensPerForward => "tokens/forward",
            Self::TokensPerSecond => "tokens/s",
            Self::Spread => "least to most",
            Self::Runs => "runs",
            Self::AgainstFirst => "tokens/s, by the first path's",
            Self::RequestsPerSecond => "requests/s",
            Self::First => "first token, median ms",
            Self::FirstP90 => "p90 ms",
            Self::Total => "whole request, median ms",
            Self::TotalP90 => "p90 ms",
            Self::Speedup => "times plain",
            Self::SpeedupLeast => "worst prompt",
            Self::AcceptanceLength => "acceptance length",
            Self::SameText => "same text",
            Self::Forward => "forward",
            Self::Head => "head",
            Self::Selection => "selection",
            Self::Events => "events",
            Self::Step => "step, ms",
            Self::Overhead => "neither forward nor head",
            Self::Floor => "floor, ms",
            Self::TimesFloor => "times its floor",
            Self::BoundBy => "bound by",
            Self::Tokens => "tokens",
            Self::Perplexity => "perplexity",
            Self::BitsPerByte => "bits/byte",
            Self::What => "what",
            Self::Measured => "median (least to most)",
            Self::Ratio => "lacuna's by the other's",
            Self::File => "raw figures",
        }
    }

    fn is_text(self) -> bool {
        matches!(
            self,
            Self::Model
                | Self::Path
                | Self::Program
                | Self::Setting
                | Self::Dtype
                | Self::Device
                | Self::BoundBy
                | Self::What
                | Self::File
        )
    }

    fn cell(self, row: &Row) -> Option<String> {
        let Row { source, point, first } = row;
        let part = |name: &str| Some(spread(&point.parts.iter().find(|(part, _)| *part == name)?.1));
        let rate = |point: &Point| point.tokens_per_second.map(|rate| rate.median);
        let by = |value: Option<f64>, of: Option<f64>| Some(format!("{:.2}", value? / of.filter(|of| *of > 0.0)?));
        let pair = |pair: Option<(f64, f64)>, second: bool| pair.map(|(p50, p90)| figure(if second { p90 } else { p50 }));
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        match self {
            Self::Model => text(&point.model),
            Self::Path | Self::Program => text(&point.path),
            Self::Setting => text(&point.setting),
            Self::InFlight => point.in_flight.map(|count| count.to_string()),
            Self::Dtype => source.about.dtype.clone(),
            Self::Device => source.about.device.clone(),
            Self::Threads => source.about.threads.map(|count| count.to_string()),
            Self::PassAt1 => Some(format!("{:.1} % ({} of {})", 100.0 * point.share()?, point.passed?, point.tasks?)),
            Self::Interval => {
                let (low, high) = point.interval?;
                Some(format!("{:.1} to {:.1}", 100.0 * low, 100.0 * high))
            }
            Self::Forwards => point.forwards.map(|count| figure(count as f64)),
            Self::ForwardsAgainstFirst => {
                by(point.forwards.map(|count| count as f64), first.forwards.map(|count| count as f64))
            }
            Self::TokensPerForward => point.tokens_per_forward.map(figure),
            Self::TokensPerSecond => rate(point).map(|rate| figure(rate.round())),
            Self::Spread => {
                let spread = point.tokens_per_second.filter(|spread| !spread.is_one())?;
                Some(format!("{} to {}", figure(spread.min.round()), figure(spread.max.round())))
            }
            Self::Runs => point.runs.map(|runs| runs.to_string()),
            Self::AgainstFirst => by(rate(point), rate(first)),
            Self::RequestsPerSecond => point.requests_per_second.map(figure),
            Self::First => pair(point.first_ms, false),
            Self::FirstP90 => pair(point.first_ms, true),
            Self::Total => pair(point.total_ms, false),
            Self::TotalP90 => pair(point.total_ms, true),
            Self::Speedup => point.speedup.map(|ratio| format!("{ratio:.2}")),
            Self::SpeedupLeast => point.speedup_least.map(|ratio| format!("{ratio:.2}")),
            Self::AcceptanceLength => point.acceptance_length.map(|length| format!("{length:.2}")),
            Self::SameText => point.same_text.map(|(same, all)| format!("{same} of {all}")),
            Self::Forward => part("forward"),
            Self::Head => part("head"),
            Self::Selection => part("selection"),
            Self::Events => part("events"),
            Self::Step => point.total.as_ref().map(spread),
            Self::Overhead => {
                let busy: f64 =
                    point.parts.iter().filter(|(part, _)| ["forward", "head"].contains(part)).map(|(_, s)| s.median).sum();
                let share = point.outside.or_else(|| Some(1.0 - busy / point.total?.median))?;
                Some(format!("{:.1} %", 100.0 * share))
            }
            Self::Floor => point.floor.as_ref().map(|(milliseconds, _)| figure(*milliseconds)),
            Self::TimesFloor => by(point.total.map(|total| total.median), point.floor.as_ref().map(|floor| floor.0)),
            Self::BoundBy => point.floor.as_ref().map(|(_, bound)| bound.clone()),
            Self::Tokens => point.tokens.map(|count| figure(count as f64)),
            Self::Perplexity => point.perplexity.map(|(value, error)| match error {
                Some(error) => format!("at most {value:.3} ± {error:.3}"),
                None => format!("{value:.5}"),
            }),
            Self::BitsPerByte => point.bits_per_byte.map(|bits| format!("{bits:.4}")),
            Self::What => point.measured.as_ref().map(|(what, _)| what.clone()),
            Self::Measured => point.measured.as_ref().map(|(_, found)| spread(found)),
            Self::Ratio => point.ratio.as_ref().map(spread),
            Self::File => Some(source.file.clone()),
        }
    }
}

/// "2.05 (1.9 to 2.4)".
fn spread(found: &Spread) -> String {
    match found.is_one() {
        true => figure(found.median),
        false => format!("{} ({} to {})", figure(found.median), figure(found.min), figure(found.max)),
    }
}

/// A table's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    pub head: Vec<String>,
    /// Whether a column is of text, not of figures.
    pub is_text: Vec<bool>,
    pub rows: Vec<Vec<String>>,
}

/// A table of all points of `sources`. Columns that would be empty are left out.
pub fn table(sources: &[&Source], columns: &[Column]) -> Table {
    let points: Vec<_> = sources.iter().flat_map(|source| source.points.iter().map(move |point| (*source, point))).collect();
    let cell = |column: &Column, (source, point): &(&Source, &Point)| {
        let alike = |other: &&(&Source, &Point)| other.1.setting == point.setting && other.1.in_flight == point.in_flight;
        let first = points.iter().find(alike).map_or(*point, |(_, first)| first);
        column.cell(&Row { source, point, first })
    };
    let mut table = Table { head: vec![], is_text: vec![], rows: points.iter().map(|_| vec![]).collect() };
    for column in columns {
        let cells: Vec<_> = points.iter().map(|row| cell(column, row)).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        table.head.push(column.heading().into());
        table.is_text.push(column.is_text());
        table.rows.iter_mut().zip(cells).for_each(|(row, cell)| row.push(cell.unwrap_or_else(|| "–".into())));
    }
    table
}
