//! Plots of what a whole is made of: one bar for each, cut into hatched parts.

use super::chart::{figure, foot};
use super::svg::{Anchor, Svg, number, width};

const WIDTH: f64 = 840.0;
const LEFT: f64 = 16.0;
const BAR: f64 = 26.0;
/// A bar with its name above.
const ROW: f64 = 58.0;
const TOP: f64 = 74.0;
const TEXT: f64 = 12.5;
const SMALL: f64 = 11.0;

/// One whole.
#[derive(Clone, Debug)]
pub struct Bar {
    pub name: String,
    /// Of the parts, in the order of their names.
    pub values: Vec<f64>,
}

/// A plot before it is drawn. Bars are equally long: their parts are shares.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Names the plot's hatchings within a page.
    pub id: String,
    pub title: String,
    pub parts: Vec<String>,
    pub unit: String,
    pub bars: Vec<Bar>,
    pub foot: Vec<String>,
}

/// Hatchings that differ in print, on a tile of 8 by 8.
const HATCHES: [&str; 5] = ["", "M0 8L8 0M-2 2L2 -2M6 10L10 6", "M0 0L8 8M-2 6L2 10M6 -2L10 2", "M4 0V8", "M0 4H8"];

impl Bars {
    pub fn svg(&self) -> String {
        let mut svg = Svg::default();
        svg.text("ink", 15.0, (LEFT, 24.0), Anchor::Start, &self.title);
        svg.raw("<defs>");
        for (part, hatch) in HATCHES.iter().enumerate() {
            let tile = "width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\"";
            svg.raw(&format!(
                "<pattern id=\"{}-{part}\" {tile}><rect class=\"bg\" width=\"8\" height=\"8\"/><path class=\"axis c{part}\" d=\"{hatch}\"/></pattern>",
                self.id
            ));
        }
        svg.raw("</defs>");
        let mut x = LEFT;
        for (part, name) in self.parts.iter().enumerate() {
            svg.rectangle(&format!("part c{}", part % 8), [x, 38.0, 18.0, 14.0], &self.hatch(part));
            svg.text("ink", TEXT, (x + 24.0, 49.5), Anchor::Start, name);
            x += 24.0 + width(name, TEXT) + 22.0;
        }
        for (row, bar) in self.bars.iter().enumerate() {
            self.bar(&mut svg, bar, TOP + row as f64 * ROW);
        }
        let end = foot(&mut svg, &self.foot, TOP + self.bars.len() as f64 * ROW - 4.0);
        svg.finish(WIDTH, end, &self.title)
    }

    fn hatch(&self, part: usize) -> String {
        format!("url(#{}-{})", self.id, part % HATCHES.len())
    }

    fn bar(&self, svg: &mut Svg, bar: &Bar, top: f64) {
        let total: f64 = bar.values.iter().sum();
        let whole = WIDTH - 2.0 * LEFT;
        let told = self.parts.iter().zip(&bar.values).map(|(part, value)| format!("{part} {}", figure(*value)));
        let told = format!("{} = {} {}", told.collect::<Vec<_>>().join(" + "), figure(total), self.unit);
        svg.text("ink", TEXT, (LEFT, top + 12.0), Anchor::Start, &bar.name);
        svg.text("soft", SMALL, (WIDTH - LEFT, top + 12.0), Anchor::End, &told);
        let mut x = LEFT;
        for (part, value) in bar.values.iter().enumerate() {
            let length = whole * value / total.max(1e-12);
            svg.rectangle(&format!("part c{}", part % 8), [x, top + 18.0, length, BAR], &self.hatch(part));
            let text = format!("{:.1} %", 100.0 * value / total.max(1e-12));
            let room = width(&text, SMALL) + 8.0;
            if length > room + 4.0 {
                // On ground of its own, so that the hatching does not run through it.
                svg.rectangle("bg", [x + 0.5 * (length - room), top + 23.0, room, 16.0], "");
                svg.text("ink", SMALL, (x + 0.5 * length, top + 35.0), Anchor::Middle, &text);
            }
            x += length;
        }
        svg.path("axis", &format!("M{} {}h{}", number(LEFT), number(top + 18.0 + BAR), number(whole)), "");
    }
}
