//! One lane as a stream of events: those of its generation, then its summary. Its failure is the summary's; only the call's deadline
//! ends the stream with a status, for it is every lane's.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream};
use tonic::{Code, Status};

use super::judge::Judge;
use crate::engine::Request;
use crate::service::events::Translator;
use crate::service::generation::Reader;
use crate::service::proto::{CompareEvent, Finished, LaneError, LaneSummary, compare_event, generate_event};
use crate::service::{Served, status};

/// A lane that has been checked.
pub struct Lane {
    pub index: u32,
    pub name: String,
    pub model: Served,
    pub request: Request,
    /// Time that checking it took.
    pub preparing: Duration,
    pub judge: Arc<Judge>,
}

impl Lane {
    /// Nothing is submitted before the first event is asked for.
    pub fn events(self) -> impl Stream<Item = Result<CompareEvent, Status>> + Send {
        stream::unfold(Stage::Checked(Box::new(self)), Stage::next)
    }
}

enum Stage {
    Checked(Box<Lane>),
    Running(Box<Run>, Reader),
    Finished(Box<Run>, Finished),
    Over,
}

/// What a lane's summary is made of.
struct Run {
    index: u32,
    name: String,
    model: String,
    text: String,
    judge: Arc<Judge>,
}

impl Stage {
    /// The next event, and what is left.
    async fn next(self) -> Option<(Result<CompareEvent, Status>, Self)> {
        match self {
            Self::Checked(lane) => {
                let Lane { index, name, model, request, preparing, judge } = *lane;
                let run = Box::new(Run { index, name, model: model.info.name.clone(), text: String::new(), judge });
                let translator = Translator::new(model.clone(), &request, preparing);
                let deadline = run.judge.deadline();
                match model.engine.submit(request) {
                    Ok(events) => run.follow(Reader::new(events, translator, deadline)).await,
                    Err(refused) => (*run).failed(status::refused(&refused)),
                }
            }
            Self::Running(run, reader) => run.follow(reader).await,
            Self::Finished(run, finished) => Some(run.finished(finished).await),
            Self::Over => None,
        }
    }
}

impl Run {
    async fn follow(mut self: Box<Self>, mut reader: Reader) -> Option<(Result<CompareEvent, Status>, Stage)> {
        match reader.next().await {
            Ok((event, _)) => {
                if let Some(generate_event::Event::Committed(committed)) = &event.event {
                    self.text.push_str(&committed.text);
                }
                let finished = match &event.event {
                    Some(generate_event::Event::Finished(finished)) => Some(finished.clone()),
                    _ => None,
                };
                let told = self.told(compare_event::Event::Generation(event));
                let stage = match finished {
                    Some(finished) => Stage::Finished(self, finished),
                    None => Stage::Running(self, reader),
                };
                Some((Ok(told), stage))
            }
            Err(failed) => (*self).failed(failed),
        }
    }

    async fn finished(mut self: Box<Self>, finished: Finished) -> (Result<CompareEvent, Status>, Stage) {
        let text = std::mem::take(&mut self.text);
        let mut summary = LaneSummary { reason: finished.reason, usage: finished.usage, ..self.summary() };
        match self.judge.likelihood(&text, self.index).await {
            Ok(likelihood) => summary.likelihood = likelihood,
            Err(failed) if failed.code() == Code::DeadlineExceeded => return (Err(failed), Stage::Over),
            Err(failed) => summary.judge_error = Some(error(&failed)),
        }
        match self.judge.reference_match(&text).await {
            Ok(found) => summary.reference_match = found,
            Err(failed) => return (Err(failed), Stage::Over),
        }
        summary.text = text;
        (Ok(self.told(compare_event::Event::Summary(summary))), Stage::Over)
    }

    /// The lane did not get to its end.
    fn failed(mut self, failed: Status) -> Option<(Result<CompareEvent, Status>, Stage)> {
        if failed.code() == Code::DeadlineExceeded {
            return Some((Err(failed), Stage::Over));
        }
        let text = std::mem::take(&mut self.text);
        let summary = LaneSummary { error: Some(error(&failed)), text, ..self.summary() };
        Some((Ok(self.told(compare_event::Event::Summary(summary))), Stage::Over))
    }

    fn summary(&self) -> LaneSummary {
        LaneSummary { name: self.name.clone(), model: self.model.clone(), ..LaneSummary::default() }
    }

    fn told(&self, event: compare_event::Event) -> CompareEvent {
        CompareEvent { lane: self.index, event: Some(event) }
    }
}

fn error(failed: &Status) -> LaneError {
    LaneError { code: failed.code() as i32, message: failed.message().into() }
}
