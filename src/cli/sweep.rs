//! `lacuna sweep`: runs a plan's cells in turn, and keeps what they come to in a file that an interrupted sweep goes on from.
//!
//! One model is loaded at a time: a second one's threads would want the same cores.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser};
use indicatif::ProgressBar;

use super::load::{self, ModelOptions, RunOptions, Switch};
use super::method::{AutoregressiveFlags, DiffusionFlags, SamplingFlags, methods};
use crate::checkpoint::write_atomically;
use crate::engine::Engine;
use crate::engine::request::ModelInfo;
use crate::eval::machine::Machine;
use crate::eval::problems::{self, Format};
use crate::eval::report::provenance::Trait;
use crate::eval::score::Report;
use crate::eval::suite;
use crate::eval::sweep::Outcome;
use crate::eval::sweep::plan::{self, CellPlan, Plan};
use crate::eval::task::{Form, Suite};
use crate::tensor::{self, Placement};

#[derive(Args, Debug)]
pub struct Options {
    /// What to run, in TOML; benches/plans/ has examples
    #[arg(value_name = "PLAN.toml")]
    plan: PathBuf,
    /// Folder for the result, NAME.json by the plan's name; a sweep that was cut short goes on from it
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// So many tasks, whatever the plan says
    #[arg(long, value_name = "N")]
    tasks: Option<u32>,
    /// So many rounds, whatever the plan says
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// Let the plan's paths, or a result that is gone on from, differ in this
    #[arg(long, value_enum, value_name = "TRAIT,…", value_delimiter = ',')]
    allow: Vec<Trait>,
    /// Print what each cell is by itself, and run nothing
    #[arg(long)]
    list: bool,
}

/// Flags of 'lacuna eval' that a plan's setting may have.
#[derive(Parser, Debug)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Setting {
    #[arg(long)]
    max_new_tokens: Option<u64>,
    #[command(flatten)]
    diffusion: DiffusionFlags,
    #[command(flatten)]
    autoregressive: AutoregressiveFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
}

pub fn run(options: &Options) -> Result<()> {
    let mut plan = Plan::read(&options.plan)?;
    plan.tasks = options.tasks.unwrap_or(plan.tasks);
    plan.rounds = options.rounds.unwrap_or(plan.rounds);
    plan.validate(&options.allow)?;
    let cells = plan.cells();
    let wanted = cells.iter().map(|cell| setting(&plan, cell)).collect::<Result<Vec<_>>>()?;
    if options.list {
        cells.iter().for_each(|cell| println!("lacuna {}", plan.command(cell)));
        return Ok(());
    }
    let file = options.out.join(format!("{}.json", plan.name));
    let outcome = outcome(&plan, &file, &options.allow)?;
    let bar = load::steps("sweeping", plan.rounds as usize * cells.len());
    bar.inc((plan.rounds as usize * cells.len() - outcome.missing()) as u64);
    let tasks = suite(&plan, plan.tasks, plan.tasks_seed)?;
    let warm_up = suite(&plan, plan.warm_up.max(1), plan.tasks_seed.wrapping_add(1))?;
    let mut sweep = Sweep { plan: &plan, tasks, warm_up, wanted, file: &file, outcome, bar, last: None };
    if sweep.outcome.missing() == plan.rounds as usize * cells.len() {
        sweep.try_out()?;
    }
    for round in 0..plan.rounds {
        for cells in plan.order(round) {
            sweep.path(round, &cells)?;
        }
    }
    sweep.bar.finish_and_clear();
    if let Some(engine) = sweep.last {
        engine.rest();
    }
    println!("{}", file.display());
    Ok(())
}

/// What a cell asks of its model.
fn setting(plan: &Plan, cell: &CellPlan) -> Result<suite::Options> {
    let told = |error: clap::Error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        anyhow!("setting '{}' of path '{}': {line}: use flags of 'lacuna eval'", cell.setting, plan.paths[cell.path].name)
    };
    let flags = Setting::try_parse_from(cell.setting.split_whitespace()).map_err(told)?;
    let (method, diffusion, autoregressive) = methods(&flags.diffusion, &flags.autoregressive);
    Ok(suite::Options {
        max_new_tokens: flags.max_new_tokens,
        method,
        diffusion,
        autoregressive,
        sampling: flags.sampling.options(),
        form: if plan.chat { Form::Chat } else { Form::Raw },
        concurrency: usize::from(cell.concurrency),
        ..suite::Options::default()
    })
}

/// So many of the plan's tasks, drawn by this seed where they are drawn.
fn suite(plan: &Plan, count: u32, seed: u64) -> Result<Suite> {
    let data = plan.data.as_deref().unwrap_or(Path::new(""));
    match plan.suite {
        plan::Suite::Nano => Ok(Suite::nano(count as usize, seed)),
        plan::Suite::Humaneval => Ok(problems::read(data, Format::HumanEval, count as usize)?),
        plan::Suite::Jsonl => Ok(problems::read(data, Format::Plain, count as usize)?),
    }
}

/// Nothing yet, or what is there of the same sweep.
fn outcome(plan: &Plan, file: &Path, allow: &[Trait]) -> Result<Outcome> {
    tensor::set_threads(plan.threads);
    let device = tensor::device(&plan.device).map_err(anyhow::Error::msg)?;
    let dtype = plan.dtype.parse().map_err(anyhow::Error::msg)?;
    let device = Placement { device, dtype }.device_name();
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let new = Outcome::new(plan, Machine::here(), device, command);
    match std::fs::read(file) {
        Ok(bytes) => {
            let before = serde_json::from_slice(&bytes);
            let before = before.with_context(|| format!("{} is no result of a sweep: name another folder", file.display()))?;
            new.go_on(before, allow).with_context(|| format!("cannot go on from {}", file.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(new),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

struct Sweep<'a> {
    plan: &'a Plan,
    tasks: Suite,
    warm_up: Suite,
    /// Of each cell.
    wanted: Vec<suite::Options>,
    file: &'a Path,
    outcome: Outcome,
    bar: ProgressBar,
    /// The engine that runs, or ran last: at the end of the process it must not be dropped.
    last: Option<Engine>,
}

impl Sweep<'_> {
    /// Every setting on the warm-up's tasks, so that a model or setting that cannot be fails now and not in an hour.
    fn try_out(&mut self) -> Result<()> {
        for cells in self.plan.order(0) {
            let Some(first) = cells.first() else { continue };
            let (model, engine) = self.load(*first)?;
            for cell in cells {
                self.decode(cell, &model, &engine, &self.warm_up)?;
            }
        }
        Ok(())
    }

    /// One round of one path.
    fn path(&mut self, round: u32, cells: &[usize]) -> Result<()> {
        let missing: Vec<usize> = cells.iter().copied().filter(|cell| self.outcome.wants(*cell, round)).collect();
        let Some(first) = missing.first() else { return Ok(()) };
        let (model, engine) = self.load(*first)?;
        for cell in missing {
            if self.plan.warm_up > 0 {
                self.decode(cell, &model, &engine, &self.warm_up)?;
            }
            let report = self.decode(cell, &model, &engine, &self.tasks)?;
            self.outcome.add(cell, &model.name, &report);
            let folder = self.file.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            write_atomically(self.file, &serde_json::to_vec_pretty(&self.outcome)?)?;
            self.bar.inc(1);
        }
        Ok(())
    }

    fn decode(&self, cell: usize, model: &ModelInfo, engine: &Engine, tasks: &Suite) -> Result<Report> {
        let path = &self.outcome.cells[cell].path;
        suite::run(model, engine, tasks, &self.wanted[cell], &mut |_| ()).with_context(|| format!("path '{path}'"))
    }

    /// Loads a cell's model in place of the one before.
    fn load(&mut self, cell: usize) -> Result<(ModelInfo, Engine)> {
        if let Some(before) = self.last.take() {
            before.stop();
        }
        let path = &self.plan.paths[self.plan.cells()[cell].path];
        let dtype = self.plan.dtype(path);
        let (dtype, scheme) = dtype.split_once('/').map_or((dtype, None), |(dtype, scheme)| (dtype, Some(scheme)));
        let run = RunOptions {
            drafters: None,
            cuda_graphs: Switch::On,
            device: self.plan.device.clone(),
            dtype: Some(dtype.parse().map_err(anyhow::Error::msg)?),
            quantize: scheme.map(str::parse).transpose().map_err(anyhow::Error::msg)?,
            threads: self.plan.threads,
            context: 4096,
        };
        let options = ModelOptions { model: path.model.clone(), run };
        let (model, network, drafters) = options.load().with_context(|| format!("path '{}'", path.name))?;
        let most = self.plan.in_flight.iter().copied().max().unwrap_or(1);
        let engine = suite::engine(&model, network, drafters, usize::from(most))?;
        self.last = Some(engine.clone());
        Ok((model, engine))
    }
}
