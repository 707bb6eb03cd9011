//! Running a model over the nano tasks: decode each prompt, run what came out, count.
//!
//! The tasks are drawn from held-out compositions by a seed of their own, so that every model meets the same ones.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::nano::{self, Split};
use super::sandbox::{self, Limits};
use crate::draft::Drafters;
use crate::engine::request::{
    AutoregressiveOptions, DiffusionOptions, GenerateOptions, MethodKind, ModelInfo, Prompt, SamplingOptions, validate,
};
use crate::engine::{Engine, Event, Forwards, Usage};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    pub tasks: usize,
    /// Seeds the choice of tasks.
    pub seed: u64,
    pub max_new_tokens: Option<u64>,
    pub method: Option<MethodKind>,
    pub diffusion: DiffusionOptions,
    pub autoregressive: AutoregressiveOptions,
    pub sampling: SamplingOptions,
}

/// One task's outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub composition: String,
    pub prompt: String,
    pub text: String,
    pub passed: bool,
    pub generated_tokens: usize,
    pub forwards: usize,
}

/// Sums over all tasks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub suite: &'static str,
    pub tasks: usize,
    pub passed: usize,
    pub pass_at_1: f64,
    pub generated_tokens: usize,
    pub forwards: Forwards,
    /// Generated tokens over forwards of any kind but the drafter's own.
    pub tokens_per_forward: f64,
    pub decoding_seconds: f64,
    /// Generated tokens over time spent decoding, one request at a time.
    pub tokens_per_second: f64,
    /// What of the sandbox does not hold on this machine.
    pub sandbox_gaps: Vec<String>,
}

/// Runs the suite; `done` is called after each task.
pub fn run(model: &ModelInfo, engine: &Engine, options: &Options, done: &mut dyn FnMut(&Outcome)) -> Result<Report> {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let limits = Limits::default();
    let mut report = Report {
        suite: "nano",
        tasks: options.tasks,
        passed: 0,
        pass_at_1: 0.0,
        generated_tokens: 0,
        forwards: Forwards::default(),
        tokens_per_forward: 0.0,
        decoding_seconds: 0.0,
        tokens_per_second: 0.0,
        sandbox_gaps: sandbox::capabilities(),
    };
    for _ in 0..options.tasks {
        let task = nano::sample(&mut rng, Split::HeldOut);
        let (text, usage) = generate(model, engine, options, &task.prompt)?;
        let passed = sandbox::passes(&task, &text, &limits).context("generated code could not be run")?;
        report.passed += usize::from(passed);
        report.generated_tokens += usage.generated_tokens;
        report.forwards.add(&usage.forwards);
        report.decoding_seconds += usage.decoding.as_secs_f64();
        done(&Outcome {
            composition: task.composition,
            prompt: task.prompt,
            text,
            passed,
            generated_tokens: usage.generated_tokens,
            forwards: usage.forwards.model(),
        });
    }
    report.pass_at_1 = report.passed as f64 / options.tasks.max(1) as f64;
    report.tokens_per_forward = report.generated_tokens as f64 / report.forwards.model().max(1) as f64;
    report.tokens_per_second = report.generated_tokens as f64 / report.decoding_seconds.max(1e-9);
    Ok(report)
}

fn generate(model: &ModelInfo, engine: &Engine, options: &Options, prompt: &str) -> Result<(String, Usage)> {
    let request = validate(
        model,
        GenerateOptions {
            id: "eval".into(),
            prompt: Prompt::Text(prompt.into()),
            template: vec![],
            max_new_tokens: options.max_new_tokens,
            method: options.method,
            diffusion: options.diffusion.clone(),
            autoregressive: options.autoregressive.clone(),
            sampling: options.sampling.clone(),
            stops: vec![],
            steps: false,
            deadline: None,
            priority: 0,
        },
    )?;
    let mut events = engine.submit(request)?;
    let mut text = String::new();
    while let Some(event) = events.blocking_recv() {
        match event? {
            Event::Committed { text: more, .. } => text.push_str(&more),
            Event::Finished { usage, .. } => return Ok((text, usage)),
            Event::Started { .. } | Event::Step(_) => {}
        }
    }
    bail!("the engine ended a request without finishing it")
}

/// Starts an engine for one request at a time, as evaluation wants it.
pub fn engine(model: &ModelInfo, network: crate::model::Transformer, drafters: Drafters) -> Result<Engine> {
    let limits = crate::engine::Limits::one();
    Engine::start(network, drafters, Arc::clone(&model.tokenizer), limits).context("cannot start the engine's thread")
}
