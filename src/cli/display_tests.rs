use super::*;
use crate::decode::{Edit, FinishReason, Step};
use crate::engine::Usage;

const PAGE: Page = Page { width: 20, height: 10, color: false };

/// Token `n` is a letter, 10 a newline, 27 an escape.
fn text_of(token: u32) -> String {
    match token {
        10 | 27 => char::from(token as u8).into(),
        _ => char::from(b'a' + token as u8).into(),
    }
}

fn step(edits: &[(usize, u32, Status, f64)]) -> Event {
    let edit = |(position, token, status, confidence): &_| Edit {
        position: *position,
        token: *token,
        status: *status,
        confidence: *confidence,
        alternatives: vec![],
    };
    Event::Step(Step { step: 0, block: 0, edits: edits.iter().map(edit).collect() })
}

/// A prompt `> `, three holes and a fixed `z` behind them, after `events`.
fn picture(events: &[Event]) -> Picture {
    let mut picture = Picture::new("> ");
    let started = Event::Started { prompt_tokens: 1, canvas: vec![0, 0, 0, 25], masked: vec![true, true, true, false] };
    for event in std::iter::once(&started).chain(events) {
        picture.apply(event, &text_of);
    }
    picture
}

#[test]
fn a_canvas_resolves() {
    assert_eq!(frame(&picture(&[]), PAGE), ["> ░░░z"]);
    let first = step(&[(0, 1, Status::Committed, 0.9), (1, 2, Status::Provisional, 0.5), (2, 3, Status::Provisional, 0.99)]);
    assert_eq!(frame(&picture(std::slice::from_ref(&first)), PAGE), ["> b▒▓z"]);
    let second = step(&[(0, 1, Status::Remasked, 0.0), (1, 10, Status::Committed, 0.9), (2, 3, Status::Committed, 0.9)]);
    assert_eq!(frame(&picture(&[first, second]), PAGE), ["> ░", "dz"]);
}

#[test]
fn colour_tells_guesses_and_news_apart() {
    let page = Page { color: true, ..PAGE };
    let first = step(&[(0, 1, Status::Committed, 0.9), (1, 10, Status::Provisional, 1.0), (2, 3, Status::Provisional, 0.0)]);
    let lines = frame(&picture(std::slice::from_ref(&first)), page);
    assert_eq!(lines, ["> \x1b[1mb\x1b[0m\x1b[38;5;250m↵\x1b[0m", "\x1b[38;5;238md\x1b[0mz"]);
    // In the next step, what was new no longer is.
    assert_eq!(frame(&picture(&[first, step(&[])]), page)[0], "> b\x1b[38;5;250m↵\x1b[0m");
}

#[test]
fn the_end_shows_the_text_alone() {
    let finished = Event::Finished { reason: FinishReason::Stop, usage: Usage::default() };
    let events = [Event::Committed { token_ids: vec![1], text: "b\n".into(), logprobs: vec![] }, finished];
    assert_eq!(frame(&picture(&events), PAGE), ["> b"]);
}

#[test]
fn long_lines_wrap_by_what_they_take_on_screen() {
    let wide = Picture::new("日本語日本語");
    assert_eq!(frame(&wide, Page { width: 5, ..PAGE }), ["日本", "語日", "本語"]);
    let page = Page { width: 3, color: true, ..PAGE };
    assert_eq!(frame(&picture(&[]), page), ["> \x1b[2m░\x1b[0m", "\x1b[2m░░\x1b[0mz"]);
}

#[test]
fn a_high_frame_is_cut_to_where_the_work_is() {
    let mut long = Picture::new(&"p\n".repeat(8));
    let canvas = Event::Started { prompt_tokens: 8, canvas: vec![0, 10, 1], masked: vec![true, false, false] };
    long.apply(&canvas, &text_of);
    assert_eq!(frame(&long, Page { height: 3, ..PAGE }), ["p", "░", "b"]);
    let top = Picture { cells: long.cells.iter().rev().cloned().collect(), text: String::new() };
    assert_eq!(frame(&top, Page { height: 3, ..PAGE }), ["b", "░p", "p"]);
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    assert_eq!(frame(&picture(&[step(&[(0, 27, Status::Committed, 1.0)])]), PAGE), ["> \u{fffd}░░z"]);
    assert_eq!(frame(&Picture::new("a\tb\r"), PAGE), ["a    b\u{fffd}"]);
}

#[test]
fn a_frame_is_drawn_over_the_last() {
    let mut screen = Screen::default();
    assert_eq!(screen.redraw(&["a".into(), "b".into()]), "\x1b[Ka\n\x1b[Kb\n\x1b[J");
    assert_eq!(screen.redraw(&["c".into()]), "\x1b[2A\r\x1b[Kc\n\x1b[J");
    assert_eq!(screen.redraw(&[]), "\x1b[1A\r\x1b[J");
}
