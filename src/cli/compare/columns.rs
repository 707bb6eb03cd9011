//! Lanes side by side on a terminal: a canvas in each column, under its name and over what it came to.
//!
//! [`Board`] follows a comparison's events and draws; [`frame`] lays columns out as lines and is pure.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use console::{measure_text_width, truncate_str};

use crate::cli::display::{self, Page, Picture, Screen};
use crate::cli::generate::{FRAME, page};
use crate::cli::outcome;
use crate::cli::remote::Wire;
use crate::service::proto::{GenerateEvent, Lane, LaneSummary, Model, generate_event};

/// Columns are no narrower than this: where they do not fit beside one another they stand in rows.
const WIDTH_MIN: usize = 24;
const GAP: &str = " │ ";
/// Lines of a column that are not its canvas.
const RIM: usize = 2;

/// What a column shows.
struct Column {
    name: String,
    picture: Picture,
    /// Below the canvas.
    note: String,
    wire: Option<Wire>,
}

/// All lanes of one comparison.
pub struct Board {
    columns: Vec<Column>,
    /// Tokens that end a text, by model.
    ends: Vec<(String, Vec<u32>)>,
    /// Above the columns, until it has been drawn.
    prompt: Option<String>,
    screen: Screen,
    drawn: Option<Instant>,
}

impl Board {
    pub fn new(prompt: &str, lanes: &[Lane], models: &[Model]) -> Self {
        let column = |lane: &Lane| {
            let name = if lane.name.is_empty() { lane.model.clone() } else { lane.name.clone() };
            Column { name, picture: Picture::new(""), note: "…".into(), wire: None }
        };
        Self {
            columns: lanes.iter().map(column).collect(),
            ends: models.iter().map(|model| (model.name.clone(), model.end_token_ids.clone())).collect(),
            prompt: Some(prompt.into()),
            screen: Screen::default(),
            drawn: None,
        }
    }

    /// Takes in an event of a lane that exists.
    pub fn event(&mut self, lane: usize, event: GenerateEvent) -> Result<()> {
        let Some(column) = self.columns.get_mut(lane) else { return Ok(()) };
        match &event.event {
            Some(generate_event::Event::Started(started)) => {
                let ends = self.ends.iter().find(|(name, _)| *name == started.model).map(|(_, ends)| ends.clone());
                column.wire = Some(Wire::new(ends.unwrap_or_default()));
            }
            Some(generate_event::Event::Step(step)) => column.note = format!("step {}", step.step + 1),
            _ => {}
        }
        if let Some(wire) = &column.wire {
            let event = wire.event(event)?;
            let texts = wire.texts();
            column.picture.apply(&event, &|id| texts.borrow().get(&id).cloned().unwrap_or_default());
        }
        if self.drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME) {
            self.draw(page())?;
        }
        Ok(())
    }

    pub fn summary(&mut self, lane: usize, summary: &LaneSummary) -> Result<()> {
        if let Some(column) = self.columns.get_mut(lane) {
            column.note = note(summary);
        }
        self.draw(page())
    }

    /// Draws the last frame whole: nothing will be drawn over it, so it may scroll.
    pub fn finish(&mut self) -> Result<()> {
        self.draw(Page { height: usize::MAX, ..page() })
    }

    fn draw(&mut self, page: Page) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        if let Some(prompt) = self.prompt.take() {
            let above = display::frame(&Picture::new(&prompt), Page { height: usize::MAX, ..page });
            above.iter().chain([&String::new()]).try_for_each(|line| writeln!(stdout, "{line}"))?;
        }
        stdout.write_all(self.screen.redraw(&frame(&self.columns, page)).as_bytes())?;
        stdout.flush()?;
        self.drawn = Some(Instant::now());
        Ok(())
    }
}

fn note(summary: &LaneSummary) -> String {
    match (&summary.error, &summary.usage) {
        (Some(error), _) => format!("failed: {}", error.message),
        (None, Some(usage)) => {
            let time = outcome::seconds(usage.decoding_seconds);
            format!(
                "{} tokens, {} steps, {time}, {:.0}/s",
                usage.generated_tokens, usage.steps, usage.decoding_tokens_per_second
            )
        }
        (None, None) => "done".into(),
    }
}

/// Columns as lines: as many beside one another as the page is wide enough for, the others in rows below.
fn frame(columns: &[Column], page: Page) -> Vec<String> {
    let gap = measure_text_width(GAP);
    let abreast = ((page.width + gap) / (WIDTH_MIN + gap)).clamp(1, columns.len().max(1));
    // Rows of equal length, as far as that goes.
    let rows = columns.len().div_ceil(abreast).max(1);
    let abreast = columns.len().div_ceil(rows).max(1);
    let width = ((page.width + gap) / abreast).saturating_sub(gap).max(2);
    let height = (page.height / rows).saturating_sub(RIM).max(1);
    let mut lines = vec![];
    for row in columns.chunks(abreast) {
        let canvases: Vec<Vec<String>> =
            row.iter().map(|column| display::frame(&column.picture, Page { width, height, ..page })).collect();
        let highest = canvases.iter().map(Vec::len).max().unwrap_or(0);
        let names = row.iter().map(|column| match page.color {
            true => format!("\x1b[7m{}\x1b[0m", padded(&cut(&column.name, width), width)),
            false => cut(&column.name, width),
        });
        lines.push(beside(names, width));
        for line in 0..highest {
            lines.push(beside(canvases.iter().map(|canvas| canvas.get(line).cloned().unwrap_or_default()), width));
        }
        lines.push(beside(row.iter().map(|column| cut(&column.note, width)), width));
    }
    lines
}

/// A text of a client or a server as one line that fits.
fn cut(text: &str, width: usize) -> String {
    let line: String = text.chars().map(|one| if one.is_control() { ' ' } else { one }).collect();
    truncate_str(&line, width, "…").into_owned()
}

fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(measure_text_width(text))))
}

fn beside(cells: impl Iterator<Item = String>, width: usize) -> String {
    let cells: Vec<String> = cells.map(|cell| padded(&cell, width)).collect();
    cells.join(GAP).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Edit, Status, Step};
    use crate::engine::Event;

    fn column(name: &str, note: &str, cells: usize) -> Column {
        let mut picture = Picture::new("");
        let text_of = |id: u32| char::from(b'a' + id as u8).into();
        picture.apply(&Event::Started { prompt_tokens: 0, canvas: vec![0; cells], masked: vec![true; cells] }, &text_of);
        let edit = Edit { position: 0, token: 1, status: Status::Committed, confidence: 1.0, alternatives: vec![] };
        picture.apply(&Event::Step(Step { step: 0, block: 0, edits: vec![edit] }), &text_of);
        Column { name: name.into(), picture, note: note.into(), wire: None }
    }

    #[test]
    fn lanes_stand_side_by_side() {
        let columns = [column("one", "step 1", 30), column("two", "…", 3)];
        let page = Page { width: 51, height: 20, color: false };
        let lines = frame(&columns, page);
        let wide = |text: &str| format!("{text:24}");
        assert_eq!(lines[0], format!("{} │ two", wide("one")));
        assert_eq!(lines[1], format!("b{} │ b░░", "░".repeat(23)));
        assert_eq!(lines[2], format!("{} │", wide("░░░░░░")));
        assert_eq!(lines[3], format!("{} │ …", wide("step 1")));
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn what_does_not_fit_beside_stands_below() {
        let columns = [column("one", "", 3), column("two", "", 3), column("three\nlines", "x".repeat(60).as_str(), 3)];
        let page = Page { width: 60, height: 6, color: false };
        let lines = frame(&columns, page);
        assert_eq!(lines.len(), 6);
        assert!(lines[0].starts_with("one ") && lines[0].ends_with("│ two"));
        assert_eq!((lines[3].as_str(), lines[4].as_str()), ("three lines", "b░░"));
        assert!(lines[5].ends_with('…') && lines.iter().all(|line| measure_text_width(line) <= 60), "{lines:?}");
        // However narrow, something is shown.
        assert_eq!(frame(&columns, Page { width: 1, height: 1, color: true }).len(), 9);
        assert!(frame(&[], page).is_empty());
    }

    #[test]
    fn colour_takes_no_room() {
        let columns = [column("one", "", 3), column("two", "", 3)];
        let lines = frame(&columns, Page { width: 51, height: 20, color: true });
        assert!(lines[0].contains('\x1b') && lines.iter().all(|line| measure_text_width(line) <= 51), "{lines:?}");
    }
}
