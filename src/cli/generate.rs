//! `lacuna generate`: one canvas, filled by an engine in this process or by a server, and its text on stdout.
//!
//! [`follow`] turns any stream of [`Event`]s into the outcome and shows them on the way; where they come from is not its concern.

use std::io::{IsTerminal, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::connection::ConnectionFlags;
use super::display::{Page, Picture, Screen, frame};
use super::load::ModelOptions;
use super::method::{AutoregressiveFlags, DiffusionFlags, SamplingFlags, Template, methods, piece, template};
use super::outcome;
use super::remote::Remote;
use crate::checkpoint::chat::Message;
use crate::decode::FinishReason;
use crate::engine::request::{GenerateOptions, PROMPT_BYTES_MAX, Prompt, TemplatePiece, validate};
use crate::engine::{Engine, Event, Limits, Usage};

/// Frames are drawn no more often than a screen shows them, so that a fast model does not wait for the terminal.
pub(super) const FRAME: Duration = Duration::from_millis(16);

/// How an end-of-text is drawn: it is a token like any other until the text has ended there.
pub(super) const END: &str = "·";

#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)]
pub struct Options {
    /// Text before the canvas; - reads it from stdin
    #[arg(required_unless_present_any = ["template", "piece"])]
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelOptions,
    /// Let the server there do it, with the model that it serves; https://HOST:PORT for TLS
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["model", "device", "dtype", "quantize", "threads", "context"])]
    server: Option<String>,
    #[command(flatten)]
    connection: ConnectionFlags,
    /// Send the prompt as a user's message through the model's chat template
    #[arg(long)]
    chat: bool,
    /// Text behind the canvas: fill what lies between it and the prompt
    #[arg(long, value_name = "TEXT")]
    suffix: Option<String>,
    /// The canvas as a JSON list of texts and hole lengths
    #[arg(long, value_name = "JSON", value_parser = template, conflicts_with_all = ["suffix", "piece", "max_new_tokens"])]
    template: Option<Template>,
    /// One piece of the canvas: text:…, hole:N or tokens:N,N,…; give one flag for each
    #[arg(long, value_parser = piece, conflicts_with_all = ["suffix", "max_new_tokens"])]
    piece: Vec<TemplatePiece>,
    /// Cells to fill
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u64>,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    diffusion: DiffusionFlags,
    #[command(flatten)]
    autoregressive: AutoregressiveFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Print one JSON object: text, token ids, finish reason, usage
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Show the canvas resolving even where stdout is no terminal
    #[arg(long, help_heading = "Output", conflicts_with = "json")]
    show: bool,
    /// Rest after each step, to watch
    #[arg(long, value_name = "MS", default_value_t = 0, help_heading = "Output")]
    delay: u64,
}

pub fn run(options: Options) -> Result<()> {
    let show = options.show || (std::io::stdout().is_terminal() && !options.json);
    let prompt = read_prompt(options.prompt.as_deref())?;
    let (outcome, seed) = match &options.server {
        Some(server) => options.by_server(server, &prompt, show)?,
        None => options.here(&prompt, show)?,
    };
    let Outcome { text, token_ids, reason, usage } = outcome;
    let mut stdout = std::io::stdout().lock();
    if options.json {
        writeln!(stdout, "{}", outcome::outcome(&text, &token_ids, reason, &usage, seed))?;
    } else if show {
        eprintln!("{}", outcome::usage_line(reason, &usage));
    } else {
        stdout.write_all(text.as_bytes())?;
    }
    Ok(stdout.flush()?)
}

impl Options {
    /// Loads the model and runs it in this process; gives the seed too.
    fn here(&self, prompt: &str, show: bool) -> Result<(Outcome, u64)> {
        let (model, network, drafters) = self.model.load()?;
        let request = validate(&model, self.request(model.default_canvas(), prompt, show))?;
        let seed = request.method.seed();
        let engine = Engine::start(network, drafters, model.tokenizer.clone(), Limits::one())?;
        let mut events = engine.submit(request)?;
        let events = std::iter::from_fn(move || events.blocking_recv()).map(|event| event.map_err(anyhow::Error::new));
        let ends = &model.generation.eos_token_ids;
        let text_of = |id: u32| if ends.contains(&id) { END.into() } else { model.tokenizer.token_text(id) };
        let outcome = self.watch(events, prompt, show, &text_of);
        engine.rest();
        Ok((outcome?, seed))
    }

    fn by_server(&self, server: &str, prompt: &str, show: bool) -> Result<(Outcome, u64)> {
        if self.suffix.is_some() && self.max_new_tokens.is_none() {
            bail!("with --server, --suffix needs --max-new-tokens: the model's default length is not known here");
        }
        let remote = Remote::start(server, &self.connection, &self.request(0, prompt, show))?;
        let (texts, seed) = (remote.texts(), remote.seed());
        let text_of = |id: u32| texts.borrow().get(&id).cloned().unwrap_or_default();
        let outcome = self.watch(remote, prompt, show, &text_of)?;
        Ok((outcome, seed.get()))
    }

    /// Reads events to the end, drawing them if `show`.
    fn watch(
        &self,
        events: impl Iterator<Item = Result<Event>>,
        prompt: &str,
        show: bool,
        text_of: &dyn Fn(u32) -> String,
    ) -> Result<Outcome> {
        if !show {
            return follow(events, &mut |_| Ok(()));
        }
        let mut show = Show::new(prompt, Duration::from_millis(self.delay), text_of);
        follow(events, &mut |event| show.event(event))
    }

    fn request(&self, default_canvas: usize, prompt: &str, steps: bool) -> GenerateOptions {
        let template = match (&self.template, &self.suffix) {
            (Some(template), _) => template.0.clone(),
            (None, Some(suffix)) => {
                let hole = self.max_new_tokens.unwrap_or(default_canvas as u64);
                vec![TemplatePiece::Hole(hole), TemplatePiece::Text(suffix.clone())]
            }
            (None, None) => self.piece.clone(),
        };
        let prompt = prompt.to_owned();
        let (method, diffusion, autoregressive) = methods(&self.diffusion, &self.autoregressive);
        GenerateOptions {
            id: "generate".into(),
            prompt: match self.chat {
                true => Prompt::Chat(vec![Message { role: "user".into(), content: prompt }]),
                false => Prompt::Text(prompt),
            },
            max_new_tokens: self.max_new_tokens.filter(|_| template.is_empty()),
            template,
            method,
            diffusion,
            autoregressive,
            sampling: self.sampling.options(),
            stops: self.stop.clone(),
            steps,
            deadline: None,
            priority: 0,
        }
    }
}

/// The prompt as given, or from stdin, no more of it than a request may have.
pub(super) fn read_prompt(given: Option<&str>) -> Result<String> {
    match given {
        Some("-") => {
            let mut prompt = String::new();
            let stdin = std::io::stdin().lock().take(PROMPT_BYTES_MAX as u64 + 1);
            std::io::BufReader::new(stdin).read_to_string(&mut prompt).context("cannot read the prompt from stdin")?;
            Ok(prompt)
        }
        given => Ok(given.unwrap_or_default().to_owned()),
    }
}

/// What came of a generation.
#[derive(Debug, PartialEq)]
struct Outcome {
    text: String,
    token_ids: Vec<u32>,
    reason: FinishReason,
    usage: Usage,
}

/// Reads events to the end, each shown as it comes.
fn follow(events: impl IntoIterator<Item = Result<Event>>, show: &mut dyn FnMut(&Event) -> Result<()>) -> Result<Outcome> {
    let (mut text, mut token_ids) = (String::new(), vec![]);
    for event in events {
        let event = event?;
        show(&event)?;
        match event {
            Event::Started { .. } | Event::Step(_) => {}
            Event::Committed { token_ids: ids, text: more, .. } => {
                token_ids.extend(ids);
                text.push_str(&more);
            }
            Event::Finished { reason, usage } => return Ok(Outcome { text, token_ids, reason, usage }),
        }
    }
    bail!("the events ended before the text was complete")
}

/// Draws events on stdout.
struct Show<'a> {
    picture: Picture,
    screen: Screen,
    delay: Duration,
    drawn: Option<Instant>,
    text_of: &'a dyn Fn(u32) -> String,
}

impl<'a> Show<'a> {
    fn new(prompt: &str, delay: Duration, text_of: &'a dyn Fn(u32) -> String) -> Self {
        Self { picture: Picture::new(prompt), screen: Screen::default(), delay, drawn: None, text_of }
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        self.picture.apply(event, self.text_of);
        let due = match event {
            Event::Committed { .. } => false,
            Event::Started { .. } | Event::Finished { .. } => true,
            Event::Step(_) => !self.delay.is_zero() || self.drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME),
        };
        if due {
            let mut page = page();
            if matches!(event, Event::Finished { .. }) {
                // Nothing will be drawn over the last frame, so it may scroll: the text stays whole, however long.
                page.height = usize::MAX;
            }
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(self.screen.redraw(&frame(&self.picture, page)).as_bytes())?;
            stdout.flush()?;
            self.drawn = Some(Instant::now());
        }
        if !matches!(event, Event::Committed { .. } | Event::Finished { .. }) {
            std::thread::sleep(self.delay);
        }
        Ok(())
    }
}

/// Asked anew for each frame: a window may change its size. One line is left for the cursor.
pub(super) fn page() -> Page {
    let (rows, columns) = console::Term::stdout().size_checked().unwrap_or((40, 80));
    let color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    Page { width: columns.into(), height: usize::from(rows).saturating_sub(1).max(1), color }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_was_committed() {
        let committed =
            |ids: &[u32], text: &str| Ok(Event::Committed { token_ids: ids.into(), text: text.into(), logprobs: vec![] });
        let finished = Event::Finished { reason: FinishReason::Length, usage: Usage::default() };
        let events = vec![committed(&[1, 2], "ab"), committed(&[3], "c"), Ok(finished)];
        let mut shown = 0;
        let mut show = |_: &Event| {
            shown += 1;
            Ok(())
        };
        let outcome = follow(events, &mut show).unwrap();
        assert_eq!((outcome.text.as_str(), outcome.token_ids), ("abc", vec![1, 2, 3]));
        assert_eq!(shown, 3);
    }

    #[test]
    fn a_failure_is_passed_on() {
        assert!(follow(vec![Err(anyhow::anyhow!("gone"))], &mut |_| Ok(())).is_err());
        assert!(follow(vec![], &mut |_| Ok(())).is_err());
    }
}
