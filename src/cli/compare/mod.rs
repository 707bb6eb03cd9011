//! `lacuna compare`: a prompt, or a file of them, in several lanes; by engines in this process or by a server. Both are asked through
//! the service's own Compare, so that what is shown and told here is what any client gets.
//!
//! [`lanes`] reads and makes up lanes, [`prompts`] reads prompts, [`columns`] draws lanes side by side, [`table`] says what they came
//! to.

mod columns;
mod lanes;
mod prompts;
mod table;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use futures::StreamExt;
use futures::stream::LocalBoxStream;
use tokio::runtime::Runtime;

use super::connection::{Connection, ConnectionFlags};
use super::load::{self, RunOptions};
use super::method::SamplingFlags;
use super::remote::failed;
use crate::engine::Limits;
use crate::service::proto::compare_request::Prompt;
use crate::service::proto::generation_client::GenerationClient;
use crate::service::proto::models_client::ModelsClient;
use crate::service::proto::{
    self, Chat, CompareEvent, CompareRequest, LaneOrder, LaneSummary, ModelState, Stopping, compare_event, generate_event,
};
use crate::service::{Local, sampling_message};
use columns::Board;
use lanes::LaneSpec;
use prompts::Task;

/// Nobody waits for longer on one prompt.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

#[derive(Args, Debug)]
#[command(allow_negative_numbers = true)]
pub struct Options {
    /// Text before the canvas; - reads it from stdin
    #[arg(required_unless_present = "prompts", conflicts_with = "prompts")]
    prompt: Option<String>,
    /// Prompts, one a line: plain, or JSON objects of "prompt" and, where there is one, "reference"
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// The right answer, to compare the texts with
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts")]
    reference: Option<String>,
    /// A lane: settings by the names of generate's flags, and diffusion or ar, as in 'diffusion steps=8 block-length=16',
    /// 'ar drafter=redrafter' or 'model=models/nano threshold=0.9 name=fast'; give one flag for each lane [default: each model
    /// as it is, causal ones with their drafter too]
    #[arg(long, value_name = "SPEC", value_parser = lanes::parse)]
    lane: Vec<LaneSpec>,
    /// Model folder in Hugging Face layout, or GGUF file; give one flag for each model
    #[arg(long, value_name = "PATH", default_values = ["models/nano", "models/nano-ar"])]
    model: Vec<PathBuf>,
    #[command(flatten)]
    run: RunOptions,
    /// Let the server there do it, with the models that it serves; https://HOST:PORT for TLS
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["model", "drafters", "device", "dtype", "quantize", "threads", "context"])]
    server: Option<String>,
    #[command(flatten)]
    connection: ConnectionFlags,
    /// The model that judges how probable the texts are, or none [default: the first causal one]
    #[arg(long, value_name = "NAME")]
    judge: Option<String>,
    /// Run all lanes at once: good to watch, not to measure
    #[arg(long)]
    racing: bool,
    /// Comparisons of the first prompt that are made before and not told: the first lane of all is slower than it need be
    #[arg(long, value_name = "N", default_value_t = 0)]
    warm_up: u32,
    /// Send the prompt as a user's message through the models' chat templates
    #[arg(long)]
    chat: bool,
    /// Tokens to generate
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u64>,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Print one JSON object for each prompt
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Show the lanes side by side even where stdout is no terminal
    #[arg(long, help_heading = "Output", conflicts_with_all = ["json", "prompts"])]
    show: bool,
}

/// The comparison that was asked for cannot be made, as a wrong flag cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(String);

pub fn run(options: Options) -> Result<()> {
    let tasks = match &options.prompts {
        Some(path) => prompts::read(path)?,
        None => {
            let prompt = super::generate::read_prompt(options.prompt.as_deref())?;
            vec![Task { prompt, reference: options.reference.clone() }]
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let mut specs = options.lane.clone();
    let source = match &options.server {
        Some(address) => Source::Server(runtime.block_on(options.connection.connect(address))?),
        None => {
            let paths = lanes::models(&options.model, &mut specs);
            let models = load::start_all(load::load_all(&paths, &options.run)?, Limits::default(), false)?;
            Source::Local(Local::new(models)?)
        }
    };
    let done = options.compare(&runtime, &source, &specs, &tasks);
    source.rest();
    done
}

/// What came of one lane.
pub struct Outcome {
    pub summary: LaneSummary,
    pub seed: u64,
}

impl Options {
    fn compare(&self, runtime: &Runtime, source: &Source, specs: &[LaneSpec], tasks: &[Task]) -> Result<()> {
        if let Source::Local(local) = source {
            runtime.block_on(local.warm()).map_err(anyhow::Error::msg)?;
        }
        let models = runtime.block_on(source.models())?;
        let lanes: Vec<proto::Lane> = match specs {
            [] => lanes::defaults(&models),
            specs => specs.iter().map(|spec| spec.0.clone()).collect(),
        };
        for _ in 0..self.warm_up {
            runtime.block_on(follow(source, self.request(&tasks[0], &lanes, false), None))?;
        }
        let show = self.show || (tasks.len() == 1 && !self.json && std::io::stdout().is_terminal());
        let bar = if tasks.len() > 1 { load::steps("comparing", tasks.len()) } else { indicatif::ProgressBar::hidden() };
        let mut all = vec![];
        for task in tasks {
            let request = self.request(task, &lanes, show);
            let mut board = show.then(|| Board::new(&task.prompt, &lanes, &models));
            let told = runtime.block_on(follow(source, request, board.as_mut()));
            let outcomes = told.with_context(|| match tasks.len() {
                1 => "the comparison failed".to_owned(),
                _ => format!("the comparison of prompt {} failed", all.len() + 1),
            })?;
            bar.inc(1);
            if self.json {
                writeln!(std::io::stdout(), "{}", table::object(task, &outcomes, &models, self.racing))?;
            }
            all.push(outcomes);
        }
        bar.finish_and_clear();
        if !self.json {
            let mut stdout = std::io::stdout().lock();
            table::lines(&all).iter().try_for_each(|line| writeln!(stdout, "{line}"))?;
        }
        Ok(())
    }

    fn request(&self, task: &Task, lanes: &[proto::Lane], steps: bool) -> CompareRequest {
        let prompt = task.prompt.clone();
        CompareRequest {
            request_id: None,
            prompt: Some(match self.chat {
                true => Prompt::Chat(Chat { messages: vec![proto::Message { role: "user".into(), content: prompt }] }),
                false => Prompt::Text(prompt),
            }),
            lanes: lanes.to_vec(),
            sampling: Some(sampling_message(&self.sampling.options())),
            stopping: Some(Stopping { max_new_tokens: self.max_new_tokens, stop: self.stop.clone() }),
            order: if self.racing { LaneOrder::Racing } else { LaneOrder::InTurn }.into(),
            reference: task.reference.clone(),
            judge: self.judge.as_ref().map(|judge| if judge == "none" { String::new() } else { judge.clone() }),
            step_events: Some(steps),
        }
    }
}

/// Whoever runs the lanes.
enum Source {
    Local(Local),
    Server(Connection),
}

impl Source {
    async fn models(&self) -> Result<Vec<proto::Model>> {
        match self {
            Self::Local(local) => Ok(local.models()),
            Self::Server(channel) => {
                let list = ModelsClient::new(channel.clone()).list(proto::ListModelsRequest {}).await.map_err(failed)?;
                let ready = |model: &proto::Model| !matches!(model.state(), ModelState::Loading | ModelState::Unloading);
                Ok(list.into_inner().models.into_iter().filter(ready).collect())
            }
        }
    }

    async fn compare(&self, request: CompareRequest) -> Result<LocalBoxStream<'static, Result<CompareEvent>>> {
        match self {
            Self::Local(local) => {
                let events = local.compare(request, Instant::now() + PATIENCE).await;
                let events = events.map_err(|status| Unusable(status.message().into()))?;
                Ok(events.map(|event| event.map_err(|status| anyhow!("{}", status.message()))).boxed_local())
            }
            Self::Server(channel) => {
                let events = GenerationClient::new(channel.clone()).compare(request).await.map_err(failed)?;
                Ok(events.into_inner().map(|event| event.map_err(failed)).boxed_local())
            }
        }
    }

    fn rest(self) {
        if let Self::Local(local) = self {
            local.rest();
        }
    }
}

/// Reads a comparison to its end, drawing it on the board if there is one.
async fn follow(source: &Source, request: CompareRequest, mut board: Option<&mut Board>) -> Result<Vec<Outcome>> {
    let mut seeds = vec![0; request.lanes.len()];
    let mut summaries: Vec<Option<LaneSummary>> = vec![None; request.lanes.len()];
    let mut events = source.compare(request).await?;
    while let Some(event) = events.next().await {
        let CompareEvent { lane, event } = event?;
        let lane = lane as usize;
        let (Some(seed), Some(summary)) = (seeds.get_mut(lane), summaries.get_mut(lane)) else {
            bail!("an event is of lane {lane}, which nobody asked for");
        };
        match event.context("an event is of a kind that this client does not know")? {
            compare_event::Event::Generation(event) => {
                if let Some(generate_event::Event::Started(started)) = &event.event {
                    *seed = started.sampling.as_ref().and_then(|sampling| sampling.seed).unwrap_or_default();
                }
                if let Some(board) = &mut board {
                    board.event(lane, event)?;
                }
            }
            compare_event::Event::Summary(told) => {
                if let Some(board) = &mut board {
                    board.summary(lane, &told)?;
                }
                *summary = Some(told);
            }
        }
    }
    if let Some(board) = board {
        board.finish()?;
    }
    let outcomes = summaries.into_iter().zip(seeds).map(|(summary, seed)| Some(Outcome { summary: summary?, seed }));
    outcomes.collect::<Option<_>>().context("the events ended before every lane was summed up")
}
