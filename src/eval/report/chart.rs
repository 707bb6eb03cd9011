//! Plots of points and lines: axes, markers, and labels that stand by what they name rather than in a legend.
//!
//! Every curve has a marker and dashes of its own, so that nothing hangs on colour. A label that would cover another is left
//! out: the table beside a plot has every figure.

use super::svg::{Anchor, Svg, escape, number, width, wrap};

const WIDTH: f64 = 840.0;
const PLOT_HEIGHT: f64 = 330.0;
const LEFT: f64 = 72.0;
/// Where names of curves stand.
const RIGHT: f64 = 236.0;
const TOP: f64 = 52.0;
const UNDER_AXIS: f64 = 50.0;
const TEXT: f64 = 12.5;
const SMALL: f64 = 11.0;
const FOOT: f64 = 10.5;
/// Half a marker.
const MARK: f64 = 4.6;
const DASHES: [&str; 8] = ["", "7 4", "2 3", "10 3 2 3", "14 5", "5 2 1 2 1 2", "1 5", "9 2"];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    Linear,
    Log,
    /// Logarithmic, with a tick at every value that occurs.
    Steps,
    /// Linear, with a tick at every value that occurs.
    Whole,
}

impl Scale {
    fn is_linear(self) -> bool {
        matches!(self, Self::Linear | Self::Whole)
    }
}

#[derive(Clone, Debug)]
pub struct Axis {
    pub label: String,
    pub scale: Scale,
    /// That must not be left, whatever the margins: a percentage ends at 100.
    pub within: (f64, f64),
}

/// One measurement in a plot.
#[derive(Clone, Debug)]
pub struct Dot {
    pub x: f64,
    pub y: f64,
    /// Ends of its spread.
    pub whiskers: Option<(f64, f64)>,
    pub label: String,
}

#[derive(Clone, Debug)]
pub struct Curve {
    pub name: String,
    /// Sorted by x.
    pub dots: Vec<Dot>,
}

/// A plot before it is drawn.
#[derive(Clone, Debug)]
pub struct Chart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub curves: Vec<Curve>,
    /// What was measured with what.
    pub foot: Vec<String>,
}

/// A range of values on a range of pixels.
struct Range {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Range {
    fn new(axis: &Axis, values: &[f64], from: f64, to: f64) -> Self {
        let (mut low, mut high) =
            values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)));
        if axis.scale.is_linear() {
            let pad = if high > low { 0.06 * (high - low) } else { 0.05 * high.abs().max(1.0) };
            (low, high) = ((low - pad).max(axis.within.0), (high + pad).min(axis.within.1));
        } else {
            let pad = if axis.scale == Scale::Steps { 1.12 } else { 1.25 };
            (low, high) = (low.max(1e-9) / pad, high.max(1e-9) * pad);
        }
        let ticks = match axis.scale {
            Scale::Linear => linear_ticks(low, high),
            Scale::Log => log_ticks(low, high),
            Scale::Steps | Scale::Whole => {
                let mut found = values.to_vec();
                found.sort_by(f64::total_cmp);
                found.dedup();
                found
            }
        };
        Self { scale: axis.scale, low, high, from, to, ticks }
    }

    fn at(&self, value: f64) -> f64 {
        let place = |value: f64| if self.scale.is_linear() { value } else { value.max(1e-9).ln() };
        let share = (place(value) - place(self.low)) / (place(self.high) - place(self.low)).max(1e-12);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

/// Multiples of the 1, 2 or 5 by a power of ten of which some six lie within a range.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = ((high - low) / 6.0).max(1e-9);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).ceil(), (high / step + 1e-9).floor());
    (0..=(last - first).clamp(0.0, 40.0) as usize).map(|tick| (first + tick as f64) * step).collect()
}

/// Round numbers, the fewer of each power of ten the more powers there are.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let digits: &[f64] = match high / low {
        ratio if ratio > 3e3 => &[1.0],
        ratio if ratio > 12.0 => &[1.0, 2.0, 5.0],
        ratio if ratio > 3.0 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
        _ => return linear_ticks(low, high),
    };
    let all = powers.flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power)));
    all.filter(|tick| (low..=high).contains(tick)).collect()
}

/// A tick's or a figure's text: thousands apart, and no more digits than tell.
pub fn figure(value: f64) -> String {
    let decimals = if value.abs() >= 100.0 || value.fract() == 0.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        2
    };
    let text = format!("{value:.decimals$}");
    let text = if decimals > 0 { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text };
    let (sign, text) = text.strip_prefix('-').map_or(("", text.as_str()), |text| ("-", text));
    let (whole, rest) = text.find('.').map_or((text, ""), |at| text.split_at(at));
    let digits: Vec<char> = whole.chars().collect();
    let groups: Vec<String> = digits.rchunks(3).rev().map(|group| group.iter().collect()).collect();
    format!("{sign}{}{rest}", groups.join(","))
}

/// Rectangles that are taken; labels keep off them.
#[derive(Default)]
struct Taken(Vec<[f64; 4]>);

impl Taken {
    /// Takes what a line covers, in short pieces.
    fn line(&mut self, (x, y): (f64, f64), (to_x, to_y): (f64, f64)) {
        const PIECE: f64 = 5.0;
        let pieces = ((to_x - x).hypot(to_y - y) / PIECE).ceil().min(1e4) as usize;
        let at = |piece: usize| piece as f64 / pieces.max(1) as f64;
        self.0.extend((0..pieces).map(|piece| [x + at(piece) * (to_x - x) - 1.5, y + at(piece) * (to_y - y) - 1.5, 3.0, 3.0]));
    }

    fn free(&self, [x, y, w, h]: [f64; 4]) -> bool {
        self.0.iter().all(|[a, b, c, d]| x + w <= *a || a + c <= x || y + h <= *b || b + d <= y)
    }
}

impl Chart {
    pub fn svg(&self) -> String {
        let mut svg = Svg::default();
        let (right, bottom) = (WIDTH - RIGHT, TOP + PLOT_HEIGHT);
        let dots = || self.curves.iter().flat_map(|curve| &curve.dots);
        let xs: Vec<f64> = dots().map(|dot| dot.x).collect();
        let ys: Vec<f64> =
            dots().flat_map(|dot| [dot.y, dot.whiskers.map_or(dot.y, |w| w.0), dot.whiskers.map_or(dot.y, |w| w.1)]).collect();
        let x = Range::new(&self.x, &xs, LEFT, right);
        let y = Range::new(&self.y, &ys, bottom, TOP);
        svg.text("ink", 15.0, (LEFT - 56.0, 24.0), Anchor::Start, &self.title);
        self.axes(&mut svg, &x, &y);
        // Whiskers and lines first, so that no marker lies under the next curve's.
        let mut taken = Taken::default();
        for (index, curve) in self.curves.iter().enumerate() {
            let at: Vec<(f64, f64)> = curve.dots.iter().map(|dot| (x.at(dot.x), y.at(dot.y))).collect();
            for (dot, (px, _)) in curve.dots.iter().zip(&at) {
                if let Some((low, high)) = dot.whiskers.filter(|(low, high)| low < high) {
                    svg.path(&format!("axis whisker c{}", index % 8), &whisker(*px, y.at(low), y.at(high)), "");
                    taken.0.push([px - 1.5, y.at(high), 3.0, y.at(low) - y.at(high)]);
                }
            }
            if at.len() > 1 {
                let d: Vec<_> = at.iter().map(|(x, y)| format!("{} {}", number(*x), number(*y))).collect();
                svg.path(&format!("line c{}", index % 8), &format!("M{}", d.join("L")), DASHES[index % 8]);
            }
            taken.0.extend(at.iter().map(|(x, y)| [x - MARK, y - MARK, 2.0 * MARK, 2.0 * MARK]));
            at.windows(2).for_each(|pair| taken.line(pair[0], pair[1]));
        }
        for (index, curve) in self.curves.iter().enumerate() {
            for dot in &curve.dots {
                marker(&mut svg, index, x.at(dot.x), y.at(dot.y), &format!("{}: {}", curve.name, dot.label));
            }
        }
        for dot in dots().filter(|dot| !dot.label.is_empty()) {
            label(&mut svg, &mut taken, (x.at(dot.x), y.at(dot.y)), &dot.label, (LEFT, right));
        }
        self.names(&mut svg, &x, &y, right);
        let end = foot(&mut svg, &self.foot, bottom + UNDER_AXIS);
        svg.finish(WIDTH, end, &self.title)
    }

    fn axes(&self, svg: &mut Svg, x: &Range, y: &Range) {
        for tick in &y.ticks {
            let at = y.at(*tick);
            svg.path("grid", &format!("M{} {}H{}", number(x.from), number(at), number(x.to)), "");
            svg.text("soft", SMALL, (x.from - 7.0, at + 4.0), Anchor::End, &figure(*tick));
        }
        for tick in &x.ticks {
            let at = x.at(*tick);
            svg.path("axis", &format!("M{} {}v5", number(at), number(y.from)), "");
            svg.text("soft", SMALL, (at, y.from + 18.0), Anchor::Middle, &figure(*tick));
        }
        svg.path("axis", &format!("M{} {}V{}H{}", number(x.from), number(y.to), number(y.from), number(x.to)), "");
        svg.text("ink", TEXT, (0.5 * (x.from + x.to), y.from + 37.0), Anchor::Middle, &self.x.label);
        svg.upright("ink", TEXT, (18.0, 0.5 * (y.from + y.to)), &self.y.label);
    }

    /// Each curve's name right of the plot, as near to its last point as the others let it, with a line between.
    fn names(&self, svg: &mut Svg, x: &Range, y: &Range, right: f64) {
        const LINE: f64 = 14.0;
        let columns = ((RIGHT - 40.0) / (TEXT * 0.52)) as usize;
        let mut names: Vec<(usize, (f64, f64), Vec<String>)> = vec![];
        for (index, curve) in self.curves.iter().enumerate() {
            if let Some(last) = curve.dots.last() {
                names.push((index, (x.at(last.x), y.at(last.y)), wrap(&curve.name, columns)));
            }
        }
        names.sort_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let heights: Vec<f64> = names.iter().map(|(_, _, lines)| lines.len() as f64 * LINE + 5.0).collect();
        // Down from the top, then up from the bottom where they ran over it.
        let mut tops: Vec<f64> = vec![];
        for (((_, (_, at), _), height), above) in names.iter().zip(&heights).zip(std::iter::once(&0.0).chain(&heights)) {
            let least = tops.last().map_or(TOP - 8.0, |top| top + above);
            tops.push((at - 0.5 * height).max(least));
        }
        let mut floor = TOP + PLOT_HEIGHT + 8.0;
        for (top, height) in tops.iter_mut().zip(&heights).rev() {
            *top = top.min(floor - height);
            floor = *top;
        }
        for ((index, (px, py), lines), top) in names.iter().zip(&tops) {
            let middle = top + 0.5 * LINE + 1.0;
            let start = right + 18.0;
            if px + MARK < right {
                svg.path(
                    "lead",
                    &format!("M{} {}L{} {}", number(px + MARK + 1.0), number(*py), number(start - MARK - 2.0), number(middle)),
                    "1 3",
                );
            }
            marker(svg, *index, start, middle, &self.curves[*index].name);
            for (line, text) in lines.iter().enumerate() {
                svg.text("ink", TEXT, (start + 10.0, middle + 4.5 + line as f64 * LINE), Anchor::Start, text);
            }
        }
    }
}

fn whisker(x: f64, low: f64, high: f64) -> String {
    let (x, left, low, high) = (number(x), number(x - 3.0), number(low), number(high));
    format!("M{x} {low}V{high}M{left} {low}h6M{left} {high}h6")
}

/// The shape of a curve's markers; `told` appears where the reader points at it.
fn marker(svg: &mut Svg, index: usize, x: f64, y: f64, told: &str) {
    let m = MARK;
    let corners = |points: &[(f64, f64)]| {
        let points: Vec<_> = points.iter().map(|(dx, dy)| format!("{} {}", number(x + dx * m), number(y + dy * m))).collect();
        format!("M{}Z", points.join("L"))
    };
    let (class, d) = match index % 8 {
        0 => ("mark", format!("M{} {}a{m} {m} 0 1 0 {} 0a{m} {m} 0 1 0 -{} 0Z", number(x - m), number(y), 2.0 * m, 2.0 * m)),
        1 => ("mark", corners(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])),
        2 => ("mark", corners(&[(0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)])),
        3 => ("open", corners(&[(0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)])),
        4 => ("mark", corners(&[(0.0, 1.15), (1.1, -0.85), (-1.1, -0.85)])),
        5 => ("open", format!("M{} {}v{}M{} {}h{}", number(x), number(y - m), 2.0 * m, number(x - m), number(y), 2.0 * m)),
        6 => ("open", corners(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])),
        _ => {
            let (left, right, top, low) = (number(x - m), number(x + m), number(y - m), number(y + m));
            ("open", format!("M{left} {top}L{right} {low}M{left} {low}L{right} {top}"))
        }
    };
    svg.raw(&format!("<path class=\"{class} c{}\" d=\"{d}\"><title>{}</title></path>", index % 8, escape(told)));
}

/// A point's label at the first place around it that is free; nowhere, if none is.
fn label(svg: &mut Svg, taken: &mut Taken, (x, y): (f64, f64), text: &str, (left, right): (f64, f64)) {
    let (w, h) = (width(text, SMALL), SMALL);
    let (gap, side) = (MARK + 3.0, MARK + 5.0);
    let places = [
        (x - 0.5 * w, y - gap - h),
        (x - 0.5 * w, y + gap),
        (x + side, y - gap - h),
        (x - side - w, y - gap - h),
        (x + side, y + gap),
        (x - side - w, y + gap),
        (x + side, y - 0.5 * h),
        (x - side - w, y - 0.5 * h),
    ];
    let inside = |(x, y): &(f64, f64)| *x >= left + 1.0 && x + w <= right && *y >= TOP - 12.0 && y + h <= TOP + PLOT_HEIGHT;
    let place = places.into_iter().filter(inside).find(|(x, y)| taken.free([*x, *y, w, h]));
    if let Some((x, y)) = place {
        taken.0.push([x, y, w, h]);
        svg.text("soft", SMALL, (x, y + h - 2.0), Anchor::Start, text);
    }
}

/// Lines of what was measured; returns where they end.
pub fn foot(svg: &mut Svg, lines: &[String], top: f64) -> f64 {
    let columns = ((WIDTH - 32.0) / (FOOT * 0.605)) as usize;
    let mut y = top + 8.0;
    for line in lines.iter().flat_map(|line| wrap(line, columns)) {
        y += 14.0;
        svg.text("soft mono", FOOT, (16.0, y), Anchor::Start, &line);
    }
    y + 14.0
}

#[cfg(test)]
#[path = "chart_tests.rs"]
mod tests;
