//! A canvas on a terminal, resolving in place.
//!
//! [`Picture`] follows a request's events, [`frame`] lays a picture out as lines, [`Screen`] puts one frame over another. All
//! three are pure: text in, text out. They know nothing of where events come from, and take the text of a token from the caller.

use console::measure_text_width;

use crate::decode::Status;
use crate::engine::Event;

/// A cell without a guess, and, where colour is off, guesses by rising confidence.
const SHADES: [&str; 3] = ["░", "▒", "▓"];
/// Greys of the 256-colour palette that guesses are drawn in, from unsure to sure: readable on black as on white.
const GREYS: (f64, f64) = (238.0, 250.0);
const TAB: &str = "    ";

/// What a cell is at the moment.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Look {
    /// Given by the request.
    Fixed,
    /// Nothing known of it yet.
    Masked,
    /// Still masked; the text is what the model would put there, with its confidence.
    Guess(f64),
    /// Committed in the last step.
    New,
    Committed,
}

#[derive(Clone, Debug, PartialEq)]
struct Cell {
    text: String,
    look: Look,
}

/// Prompt and canvas as far as the events have told.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// The prompt as one cell, then the canvas.
    cells: Vec<Cell>,
    /// Text that is final.
    text: String,
}

impl Picture {
    pub fn new(prompt: &str) -> Self {
        Self { cells: vec![Cell { text: prompt.into(), look: Look::Fixed }], text: String::new() }
    }

    /// Takes one event; `text_of` gives a token's text.
    pub fn apply(&mut self, event: &Event, text_of: &dyn Fn(u32) -> String) {
        match event {
            Event::Started { canvas, masked, .. } => {
                let cell = |(token, masked): (&u32, &bool)| match masked {
                    true => Cell { text: String::new(), look: Look::Masked },
                    false => Cell { text: text_of(*token), look: Look::Fixed },
                };
                self.cells.truncate(1);
                self.cells.extend(canvas.iter().zip(masked).map(cell));
            }
            Event::Step(step) => {
                for cell in self.cells.iter_mut().filter(|cell| cell.look == Look::New) {
                    cell.look = Look::Committed;
                }
                for edit in &step.edits {
                    let Some(cell) = self.cells.get_mut(edit.position + 1) else { continue };
                    let look = match edit.status {
                        Status::Provisional => Look::Guess(edit.confidence),
                        Status::Committed | Status::Edited => Look::New,
                        Status::Remasked => Look::Masked,
                    };
                    *cell = Cell { text: text_of(edit.token), look };
                }
            }
            Event::Committed { text, .. } => self.text.push_str(text),
            // What stands behind the end of the text was never part of it.
            Event::Finished { .. } => {
                self.cells.truncate(1);
                self.cells.push(Cell { text: self.text.clone(), look: Look::Committed });
            }
        }
    }
}

/// What a frame must fit.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub width: usize,
    pub height: usize,
    pub color: bool,
}

/// Lays out a picture. A frame that is too high is cut to the part where there is still something to fill.
pub fn frame(picture: &Picture, page: Page) -> Vec<String> {
    let mut layout = Layout { width: page.width.max(2), ..Layout::default() };
    let mut open = None;
    for cell in &picture.cells {
        if open.is_none() && matches!(cell.look, Look::Masked | Look::Guess(_)) {
            open = Some(layout.lines.len());
        }
        let (text, style) = drawn(cell, page.color);
        layout.put(&text, style);
    }
    let mut lines = layout.finish();
    if lines.len() > page.height {
        let last = lines.len() - page.height;
        let first = open.map_or(last, |line| line.saturating_sub(page.height / 2).min(last));
        lines = lines[first..first + page.height].to_vec();
    }
    lines
}

/// A cell's characters and the SGR code that they are drawn with.
fn drawn(cell: &Cell, color: bool) -> (String, Option<String>) {
    match cell.look {
        Look::Masked => (SHADES[0].into(), color.then(|| "2".into())),
        Look::Guess(confidence) if color => {
            let grey = GREYS.0 + confidence.clamp(0.0, 1.0) * (GREYS.1 - GREYS.0);
            // A guess may be empty text, but a cell must be seen.
            let text = if cell.text.is_empty() { SHADES[0].into() } else { cell.text.replace('\n', "↵\n") };
            (text, Some(format!("38;5;{grey:.0}")))
        }
        Look::Guess(confidence) => {
            let shade = (confidence.clamp(0.0, 1.0) * SHADES.len() as f64) as usize;
            (SHADES[shade.min(SHADES.len() - 1)].into(), None)
        }
        Look::New => (cell.text.clone(), color.then(|| "1".into())),
        Look::Fixed | Look::Committed => (cell.text.clone(), None),
    }
}

/// Breaks styled text into lines of a width.
#[derive(Default)]
struct Layout {
    lines: Vec<String>,
    line: String,
    used: usize,
    width: usize,
    /// The style that the line is in at its end.
    style: Option<String>,
}

impl Layout {
    fn put(&mut self, text: &str, style: Option<String>) {
        for character in text.chars() {
            match character {
                '\n' => self.new_line(),
                '\t' => TAB.chars().for_each(|space| self.put_character(space, &style)),
                // A model's text must not move the cursor or worse.
                _ if character.is_control() => self.put_character(char::REPLACEMENT_CHARACTER, &style),
                _ => self.put_character(character, &style),
            }
        }
    }

    fn put_character(&mut self, character: char, style: &Option<String>) {
        let width = measure_text_width(character.encode_utf8(&mut [0; 4]));
        if self.used + width > self.width {
            self.new_line();
        }
        if self.style != *style {
            self.end_style();
            if let Some(code) = style {
                self.line.push_str(&format!("\x1b[{code}m"));
            }
            self.style.clone_from(style);
        }
        self.line.push(character);
        self.used += width;
    }

    fn end_style(&mut self) {
        if self.style.take().is_some() {
            self.line.push_str("\x1b[0m");
        }
    }

    /// A style ends with its line, so that each line can be drawn without those before it.
    fn new_line(&mut self) {
        self.end_style();
        self.lines.push(std::mem::take(&mut self.line));
        self.used = 0;
    }

    /// Text that ends with a newline has no further line.
    fn finish(mut self) -> Vec<String> {
        if self.used > 0 {
            self.new_line();
        }
        self.lines
    }
}

/// What is on the terminal: so many lines, with the cursor below them.
#[derive(Debug, Default)]
pub struct Screen {
    lines: usize,
}

impl Screen {
    /// Characters that put `frame` over what is there. Each line is cleared before it is written and not after: behind a full
    /// line, terminals differ in what "to the end of the line" means.
    pub fn redraw(&mut self, frame: &[String]) -> String {
        let mut output = if self.lines > 0 { format!("\x1b[{}A\r", self.lines) } else { String::new() };
        for line in frame {
            output.push_str(&format!("\x1b[K{line}\n"));
        }
        output.push_str("\x1b[J");
        self.lines = frame.len();
        output
    }
}

#[cfg(test)]
#[path = "display_tests.rs"]
mod tests;
