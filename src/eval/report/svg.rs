//! The little of SVG that plots need: shapes and text with classes, and one style sheet for light, dark and print.
//!
//! A plotting library was not taken: those at hand write colours into every element, so that a picture cannot follow the
//! reader's light or dark, and draw dashes as many short lines.

use std::fmt::Write;

/// Width of a character by the font's size, on average. Too wide rather than too narrow, so that labels keep apart.
const CHARACTER: f64 = 0.56;

/// Series differ by marker and dashes, parts by hatching; colour only helps.
const STYLE: &str = "\
.bg{fill:#fff}.ink{fill:#1b1b1b}.soft{fill:#555}\
text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;stroke:none}\
.mono{font-family:ui-monospace,Menlo,Consolas,monospace}\
.grid{stroke:#ddd;stroke-width:1;fill:none}.axis{stroke:#666;stroke-width:1;fill:none}.whisker{opacity:.6}.lead{stroke:#999;stroke-width:.8;fill:none}\
.line{fill:none;stroke-width:2;stroke-linejoin:round}.mark{stroke-width:1.2}.open{stroke-width:2;fill:none}\
.c0{stroke:#0a5c9e;color:#0a5c9e}.c1{stroke:#b3400a;color:#b3400a}.c2{stroke:#157347;color:#157347}.c3{stroke:#7a3c96;color:#7a3c96}\
.c4{stroke:#8a6100;color:#8a6100}.c5{stroke:#a3195b;color:#a3195b}.c6{stroke:#3d5a64;color:#3d5a64}.c7{stroke:#1b1b1b;color:#1b1b1b}\
.mark{fill:currentColor}.part{stroke:#1b1b1b;stroke-width:1}\
@media (prefers-color-scheme:dark){\
.bg{fill:#15181c}.ink{fill:#e8e8e8}.soft{fill:#a8adb3}.grid{stroke:#343a40}.axis{stroke:#8a9097}.lead{stroke:#6a7077}\
.c0{stroke:#6cb6f5;color:#6cb6f5}.c1{stroke:#f59b6c;color:#f59b6c}.c2{stroke:#6fd3a0;color:#6fd3a0}.c3{stroke:#cfa0e8;color:#cfa0e8}\
.c4{stroke:#e5c15f;color:#e5c15f}.c5{stroke:#f28cbb;color:#f28cbb}.c6{stroke:#a5c3cd;color:#a5c3cd}.c7{stroke:#e8e8e8;color:#e8e8e8}}\
@media print{.bg{fill:#fff}.ink,.soft{fill:#000}.grid{stroke:#ccc}.axis{stroke:#000}}";

/// Where a text's position lies on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture in the making; lengths are in pixels.
#[derive(Clone, Debug, Default)]
pub struct Svg {
    body: String,
}

impl Svg {
    /// `d` is a path's.
    pub fn path(&mut self, class: &str, d: &str, dashes: &str) {
        let dashes = if dashes.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dashes}\"") };
        self.add(format_args!("<path class=\"{class}\" d=\"{d}\"{dashes}/>"));
    }

    pub fn rectangle(&mut self, class: &str, [x, y, width, height]: [f64; 4], fill: &str) {
        let fill = if fill.is_empty() { String::new() } else { format!(" fill=\"{fill}\"") };
        let [x, y, width, height] = [x, y, width, height].map(number);
        self.add(format_args!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"{fill}/>"));
    }

    pub fn text(&mut self, class: &str, size: f64, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let (x, y, size, text) = (number(x), number(y), number(size), escape(text));
        self.add(format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\" font-size=\"{size}\"{anchor}>{text}</text>"));
    }

    /// Turned by a quarter to the left, its middle at a position.
    pub fn upright(&mut self, class: &str, size: f64, (x, y): (f64, f64), text: &str) {
        let (x, y, size, text) = (number(x), number(y), number(size), escape(text));
        let turn = format!("transform=\"rotate(-90 {x} {y})\"");
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" font-size=\"{size}\" text-anchor=\"middle\" {turn}>{text}</text>"
        ));
    }

    /// Markup as it is.
    pub fn raw(&mut self, markup: &str) {
        self.add(format_args!("{markup}"));
    }

    fn add(&mut self, element: std::fmt::Arguments) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }

    /// The whole picture: a file of its own, or part of a page.
    pub fn finish(self, width: f64, height: f64, title: &str) -> String {
        let (width, height, title) = (number(width), number(height), escape(title));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" role=\"img\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n<rect class=\"bg\" width=\"100%\" height=\"100%\"/>\n{}</svg>\n",
            self.body
        )
    }
}

/// Text for between tags and within quotes; what XML cannot hold at all is left out.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            letter if letter.is_control() && !"\n\t".contains(letter) || "\u{fffe}\u{ffff}".contains(letter) => {}
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// To a tenth of a pixel, without a zero behind the point.
pub fn number(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

/// About how wide a text is.
pub fn width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * CHARACTER
}

/// Lines of at most `columns` characters, broken at spaces where there are any.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    let words: Vec<Vec<char>> = text.split(' ').map(|word| word.chars().collect()).collect();
    for piece in words.iter().flat_map(|word| word.chunks(columns.max(1))) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + piece.len() <= columns => {
                line.push(' ');
                line.extend(piece);
            }
            _ => lines.push(piece.iter().collect()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_gives_xml() {
        let mut svg = Svg::default();
        let text = "a<b> & \"c\" 'd' \u{1}\u{ffff} ä 日";
        svg.text("ink", 12.0, (1.0, 2.25), Anchor::End, text);
        svg.upright("ink", 12.0, (1.0, 2.0), text);
        let picture = svg.finish(100.0, 50.5, text);
        let tree = roxmltree::Document::parse(&picture).unwrap();
        let texts: Vec<_> =
            tree.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text"))).collect();
        assert_eq!(texts.len(), 2);
        assert!(texts.iter().all(|node| node.text() == Some("a<b> & \"c\" 'd'  ä 日")), "{picture}");
        assert!(picture.contains("y=\"2.2\"") && picture.contains("height=\"50.5\""), "{picture}");
    }

    #[test]
    fn long_lines_are_broken() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("a unbreakable b", 5), ["a", "unbre", "akabl", "e b"]);
        assert!(wrap("", 5).is_empty());
    }
}
