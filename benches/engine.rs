//! The engine by itself, without a service: tokens a second of the models that ship with so many requests at a time, each lane in turn,
//! and how much of a round goes into deciding who runs.
//!
//! `cargo bench --bench engine`, with `LACUNA_DTYPE=bf16` in bf16. Two threads, on the CPU; medians of rounds, with their spread.

use std::path::Path;
use std::time::Instant;

use lacuna::checkpoint::Checkpoint;
use lacuna::draft::Drafters;
use lacuna::engine::request::{
    AutoregressiveOptions, DiffusionOptions, GenerateOptions, ModelInfo, Prompt, SamplingOptions, validate,
};
use lacuna::engine::{Engine, Event, Limits, Request};
use lacuna::tensor::{Device, Dtype, Placement};

const CONCURRENCY: [usize; 4] = [1, 4, 16, 32];
/// Requests of a lane's turn.
const REQUESTS: usize = 64;
const ROUNDS: usize = 7;

fn start(name: &str, placement: Placement) -> (ModelInfo, Engine) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name);
    let checkpoint = Checkpoint::open(&folder).expect("the model is there");
    let network = checkpoint.load(placement, 4096, &mut |_| {}).expect("it loads");
    let model = ModelInfo::new(checkpoint, &network, vec![]);
    // Every request computes its prompt: what is shared between prompts is not what is measured.
    let limits = Limits { resident: 32, queued: 256, prefix_tokens: Some(0), ..Limits::default() };
    let engine = Engine::start(network, Drafters::default(), model.tokenizer.clone(), limits).expect("it starts");
    (model, engine)
}

fn request(model: &ModelInfo, number: usize) -> Request {
    let prompt = format!("# Return the sum of the numbers in xs that are greater than {}.\ndef solve(xs):\n", number % 90);
    let options = GenerateOptions {
        id: "bench".into(),
        prompt: Prompt::Text(prompt),
        template: vec![],
        max_new_tokens: Some(48),
        method: None,
        diffusion: DiffusionOptions::default(),
        autoregressive: AutoregressiveOptions::default(),
        sampling: SamplingOptions { seed: Some(1), ..SamplingOptions::default() },
        stops: vec![],
        steps: false,
        deadline: None,
        priority: 0,
    };
    validate(model, options).expect("it is valid")
}

/// Tokens a second with so many requests at a time; each reader is a thread of its own.
fn lane(model: &ModelInfo, engine: &Engine, concurrency: usize) -> f64 {
    let began = Instant::now();
    let tokens: usize = std::thread::scope(|scope| {
        let user = |user: usize| {
            scope.spawn(move || {
                let mut tokens = 0;
                for number in (user..REQUESTS).step_by(concurrency) {
                    let mut events = engine.submit(request(model, number)).expect("there is room");
                    while let Some(event) = events.blocking_recv() {
                        if let Event::Finished { usage, .. } = event.expect("it finishes") {
                            tokens += usage.generated_tokens;
                        }
                    }
                }
                tokens
            })
        };
        (0..concurrency).map(user).collect::<Vec<_>>().into_iter().map(|user| user.join().expect("no panic")).sum()
    });
    tokens as f64 / began.elapsed().as_secs_f64()
}

fn main() {
    lacuna::tensor::set_threads(2);
    let dtype = std::env::var("LACUNA_DTYPE").map_or(Dtype::F32, |name| name.parse().expect("f32 or bf16"));
    for name in ["nano-ar", "nano"] {
        let (model, engine) = start(name, Placement { device: Device::Cpu, dtype });
        let mut rates = vec![vec![]; CONCURRENCY.len()];
        for round in 0..=ROUNDS {
            for (rates, concurrency) in rates.iter_mut().zip(CONCURRENCY) {
                let rate = lane(&model, &engine, concurrency);
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        let mut alone = f64::NAN;
        for (mut rates, concurrency) in rates.into_iter().zip(CONCURRENCY) {
            rates.sort_by(f64::total_cmp);
            let median = rates[rates.len() / 2];
            alone = if concurrency == 1 { median } else { alone };
            let (least, most, times) = (rates[0], rates[rates.len() - 1], median / alone);
            println!(
                "{name}, {}: {concurrency:2} at a time {median:6.0} tokens/s ({least:.0} to {most:.0}), {times:.2} times",
                dtype.name()
            );
        }
        let load = engine.load();
        let share = load.scheduling.as_secs_f64() / load.working.as_secs_f64();
        println!("{name}: {:.2} % of a round goes into deciding who runs", share * 100.0);
        engine.rest();
    }
}
