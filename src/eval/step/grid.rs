//! The cost of steps over a grid: windows of so many tokens, over so many cached ones, for so many sequences at once; and beside each
//! what it costs at least on a device that moves and multiplies as fast as was measured.
//!
//! A step here is what the engine's runner does with such windows, every row of them wanted, and what a decoder makes of the outcome;
//! beside it the network and its head alone are timed, in turn with it, and what the step takes longer is outside of them. The device
//! is waited for at both ends of every time taken.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::ceilings::Ceilings;
use super::{Spread, sequence, spread};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::{Noise, Pattern, Purpose, Sampling, Wanted, Window};
use crate::engine::runner::{self, Ask, Residence};
use crate::engine::sequence::Sequence;
use crate::model::cache::KvCache;
use crate::model::family::Attention;
use crate::model::{Layout, ModelError, Segment, Transformer};
use crate::tensor::{self, Copies, Device, Dtype, Tensor, free_memory, give_back_memory, mebibytes, synchronize};

/// Tokens that a step may commit, for which rates are told.
const COMMITTED: [usize; 4] = [1, 3, 5, 10];

#[derive(Clone, Debug)]
pub struct Grid {
    pub windows: Vec<usize>,
    pub prefixes: Vec<usize>,
    pub sequences: Vec<usize>,
    pub warm_up: usize,
    pub runs: usize,
    pub seed: u64,
}

/// One point of it.
#[derive(Clone, Copy, Debug)]
struct Point {
    window: usize,
    prefix: usize,
    sequences: usize,
}

/// Times in milliseconds, rates in tokens per second.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    pub window: usize,
    pub prefix: usize,
    pub sequences: usize,
    /// A whole step.
    pub total: Spread,
    /// The network and its head alone.
    pub network: Spread,
    /// Share of the step that is neither: 0 to 1, or a little less than 0 where noise is more than that.
    pub outside_share: f64,
    pub floor: Floor,
    /// The step by its floor.
    pub times_floor: f64,
    /// The floor by the step, 0 to 1.
    pub share_of_floor: f64,
    /// Copies that a step makes to the device and from it; on a CPU none, or those that a GPU would take where libtorch does the work.
    pub copies: Copies,
    /// All sequences' together, by how many tokens each commits in a step.
    pub tokens_per_second: BTreeMap<usize, f64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Skip {
    pub window: usize,
    pub prefix: usize,
    pub sequences: usize,
    pub why: String,
}

pub enum Outcome {
    Measured(Box<Cell>),
    /// There is no memory for it.
    Skipped(Skip),
}

/// What a step costs at least.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// That must move: all weights once, less an embedding that is no head, of which a few rows are read; the prefix's keys and values,
    /// read; the window's, written and read.
    pub bytes: f64,
    /// Multiplications and additions of products and attention.
    pub operations: f64,
    pub milliseconds: f64,
    pub bound: Bound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    Memory,
    Arithmetic,
}

impl Bound {
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Arithmetic => "arithmetic",
        }
    }
}

impl Floor {
    /// `read` are the bytes of weights that a forward and its head read.
    fn new(c: &ModelConfig, read: usize, dtype: Dtype, point: Point, ceilings: &Ceilings) -> Self {
        let Point { window, prefix, sequences } = point;
        let (rows, size) = ((window * sequences) as f64, dtype.size() as f64);
        let embedding = if c.tied { 0 } else { c.vocab_size * c.hidden_size };
        let weights = (c.parameters() - embedding) as f64;
        let token = (c.layers * 2 * c.kv_heads * c.head_dim) as f64 * size;
        // Causal rows see half of the window on average.
        let seen = if c.attention == Attention::Causal { (window + 1) as f64 / 2.0 } else { window as f64 } + prefix as f64;
        let bytes = read as f64 + token * sequences as f64 * (prefix + 2 * window) as f64;
        let products = 2.0 * rows * weights;
        let attention = 4.0 * rows * seen * (c.layers * c.heads * c.head_dim) as f64;
        let plain = ceilings.operations_per_second;
        // All of them by the faster way, although a head may be stored in floats: the floor is what nothing goes below.
        let coded = ceilings.coded_per_second.map_or(plain, |coded| coded.max(plain));
        let (moving, multiplying) = (bytes / ceilings.bytes_per_second, products / coded + attention / plain);
        let bound = if moving >= multiplying { Bound::Memory } else { Bound::Arithmetic };
        Self { bytes, operations: products + attention, milliseconds: moving.max(multiplying) * 1e3, bound }
    }
}

impl Grid {
    /// Refuses what the network cannot run, before anything is measured.
    pub fn check(&self, model: &Transformer) -> Result<()> {
        let longest = |of: &[usize]| of.iter().copied().max().unwrap_or(0);
        let positive = [&self.windows, &self.sequences].iter().all(|of| !of.is_empty() && !of.contains(&0));
        ensure!(positive && !self.prefixes.is_empty() && self.runs > 0, "windows, sequences and runs must be above 0");
        let (length, context) = (longest(&self.windows) + longest(&self.prefixes), model.context());
        ensure!(length <= context, "the longest prefix and window have {length} tokens, the context {context}: see --context");
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.windows.len() * self.prefixes.len() * self.sequences.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn points(&self) -> impl Iterator<Item = Point> {
        self.sequences.iter().flat_map(move |sequences| {
            self.prefixes.iter().flat_map(move |prefix| {
                self.windows.iter().map(move |window| Point { window: *window, prefix: *prefix, sequences: *sequences })
            })
        })
    }
}

/// Measures point by point. What one has taken of the memory is free again before the next.
pub fn run(
    model: &Transformer,
    tokenizer: &Tokenizer,
    grid: &Grid,
    ceilings: &Ceilings,
) -> impl Iterator<Item = Result<Outcome>> {
    grid.points().map(move |point| {
        let measured = match room(model, point) {
            Ok(()) => measure(model, tokenizer, grid, point, ceilings),
            Err(why) => Ok(Err(why)),
        };
        give_back_memory();
        let Point { window, prefix, sequences } = point;
        Ok(match measured? {
            Ok(cell) => Outcome::Measured(Box::new(cell)),
            Err(why) => Outcome::Skipped(Skip { window, prefix, sequences, why }),
        })
    })
}

/// A CPU's memory is promised before it is there, and whoever then takes it may be killed. A GPU's allocator says no by itself, and
/// keeps what was freed, so that the count of what is free would be too low.
fn room(model: &Transformer, point: Point) -> Result<(), String> {
    let (config, placement) = (model.config(), model.placement());
    let tokens = point.sequences * (point.prefix + point.window);
    let needed = (tokens * config.layers * 2 * config.kv_heads * config.head_dim * placement.dtype.size()) as u64;
    match free_memory(placement.device).filter(|_| placement.device == Device::Cpu) {
        Some(free) if needed > free / 2 => {
            Err(format!("keys and values need {}, of {} that are free", mebibytes(needed), mebibytes(free)))
        }
        _ => Ok(()),
    }
}

/// The inner error says why the point is left out.
fn measure(
    model: &Transformer,
    tokenizer: &Tokenizer,
    grid: &Grid,
    point: Point,
    ceilings: &Ceilings,
) -> Result<Result<Cell, String>> {
    let scene = match Scene::new(model, grid, point) {
        Err(ModelError::OutOfMemory(why)) => return Ok(Err(why)),
        scene => scene?,
    };
    let (mut totals, mut networks, mut copies) = (vec![], vec![], Copies::default());
    for run in 0..grid.warm_up + grid.runs {
        let times = scene.network(model).and_then(|network| {
            let before = tensor::copies();
            let total = scene.step(model, tokenizer)?;
            copies = tensor::copies().since(before);
            Ok((network, total))
        });
        let (network, total) = match times {
            Err(error) if matches!(error.downcast_ref(), Some(ModelError::OutOfMemory(_))) => {
                return Ok(Err(error.to_string()));
            }
            times => times?,
        };
        if run >= grid.warm_up {
            networks.push(network);
            totals.push(total);
        }
    }
    let (total, network) = (spread(totals), spread(networks));
    let floor = Floor::new(model.config(), model.bytes_read(), model.placement().dtype, point, ceilings);
    let Point { window, prefix, sequences } = point;
    let rate = |committed: usize| (committed, (committed * sequences) as f64 / (total.median / 1e3));
    Ok(Ok(Cell {
        window,
        prefix,
        sequences,
        total,
        network,
        outside_share: 1.0 - network.median / total.median,
        floor,
        times_floor: total.median / floor.milliseconds,
        share_of_floor: floor.milliseconds / total.median,
        copies,
        tokens_per_second: COMMITTED.into_iter().filter(|committed| *committed <= window).map(rate).collect(),
    }))
}

/// Sequences in the middle of decoding: each with keys and values of its prefix, about to run its window.
struct Scene {
    windows: Vec<Window>,
    residences: Vec<Residence>,
    options: super::Options,
}

impl Scene {
    fn new(model: &Transformer, grid: &Grid, point: Point) -> Result<Self, ModelError> {
        let Point { window, prefix, sequences } = point;
        let (c, placement) = (model.config(), model.placement());
        let mut rng = ChaCha8Rng::seed_from_u64(grid.seed);
        let windows = (0..sequences).map(|_| asked(c, point, &mut rng)).collect();
        let residence = || -> Result<Residence, ModelError> {
            let mut cache = KvCache::new(c, placement, prefix + window)?;
            if prefix > 0 {
                cache.fill(prefix)?;
            }
            Ok(Residence { cache: Some(cache), proposal: None })
        };
        let residences = (0..sequences).map(|_| tch::no_grad(residence)).collect::<Result<_, _>>()?;
        let options = super::Options { prompt: 0, canvas: window, batch: sequences, warm_up: 0, runs: 0, seed: grid.seed };
        Ok(Self { windows, residences, options })
    }

    fn asks(&self) -> Vec<Ask<'_>> {
        self.windows.iter().zip(&self.residences).map(|(window, residence)| Ask { window, residence }).collect()
    }

    /// A whole step of all sequences. Keys are written behind what is kept and not kept, so that every step is the same.
    fn step(&self, model: &Transformer, tokenizer: &Tokenizer) -> Result<Duration> {
        let mut sequences: Vec<Sequence> = self.windows.iter().map(|_| sequence(model, &self.options, &[])).collect();
        let asks = self.asks();
        synchronize(model.placement().device);
        let started = Instant::now();
        let mut members = sequences.iter_mut();
        for forward in runner::forwards(model, &asks) {
            for outcome in runner::run_all(model, &asks[forward])? {
                let (outcome, member) = (outcome?, members.next());
                let events = member.map(|member| member.advance(&outcome, Purpose::Denoise, tokenizer));
                std::hint::black_box(events.transpose().map_err(anyhow::Error::msg)?);
            }
        }
        synchronize(model.placement().device);
        Ok(started.elapsed())
    }

    /// The network and its head, over as many rows at once as the runner takes.
    fn network(&self, model: &Transformer) -> Result<Duration> {
        let asks = self.asks();
        let device = model.placement().device;
        let chunk = (runner::LOGITS_MAX / model.config().vocab_size.max(1)).max(self.options.canvas) as i64;
        tch::no_grad(|| {
            synchronize(device);
            let started = Instant::now();
            for forward in runner::forwards(model, &asks) {
                let segments: Vec<Segment> = asks[forward].iter().map(segment).collect();
                let hidden = model.forward(&segments)?;
                let rows = hidden.size()[0];
                for first in (0..rows).step_by(chunk as usize) {
                    let logits: Tensor = model.logits(&hidden.f_narrow(0, first, chunk.min(rows - first))?)?;
                    drop(std::hint::black_box(logits));
                }
            }
            synchronize(device);
            Ok(started.elapsed())
        })
    }
}

fn segment<'a>(ask: &Ask<'a>) -> Segment<'a> {
    let layout = match &ask.window.pattern {
        Pattern::Span { start, sees } => Layout::Span { start: *start, sees },
        _ => Layout::Causal,
    };
    Segment { tokens: &ask.window.tokens, layout, cache: ask.residence.cache.as_ref() }
}

/// The next tokens of a causal model, or a block whose cells all see one another and the prefix.
fn asked(c: &ModelConfig, Point { window, prefix, .. }: Point, rng: &mut ChaCha8Rng) -> Window {
    let pattern = match c.attention {
        Attention::Causal => Pattern::Next,
        Attention::Full | Attention::BlockCausal => Pattern::Span { start: prefix, sees: vec![prefix + window; window] },
    };
    Window {
        tokens: (0..window).map(|_| rng.random_range(0..c.vocab_size as u32)).collect(),
        pattern,
        purpose: Purpose::Denoise,
        wanted: Wanted::Following((0..window).collect()),
        guidance: None,
        sampling: Sampling { forbidden: c.mask_token_id.into_iter().collect(), ..Sampling::default() },
        noise: Noise::Seed(0),
        alone: false,
        histories: vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(shape: &str) -> ModelConfig {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/shapes").join(format!("{shape}.json"));
        ModelConfig::read(&path).unwrap()
    }

    /// By hand: LLaDA-8B has 8.0 billion parameters, 0.5 of them its embedding, and 512 KiB of keys and values for each token in bf16.
    #[test]
    fn floors_are_those_of_the_shape() {
        let c = config("llada-8b");
        let ceilings = Ceilings {
            bytes_per_second: 3e12,
            bytes_by: "",
            operations_per_second: 800e12,
            operations_by: String::new(),
            coded_per_second: None,
        };
        let read = 2 * (c.parameters() - 126_464 * 4096);
        let floor =
            |window, prefix, sequences| Floor::new(&c, read, Dtype::Bf16, Point { window, prefix, sequences }, &ceilings);
        let one = floor(32, 512, 1);
        assert_eq!(one.bound, Bound::Memory);
        assert_eq!(one.bytes, read as f64 + (512.0 + 64.0) * 524_288.0);
        assert!((4.9..5.3).contains(&one.milliseconds), "{one:?}");
        let many = floor(256, 512, 32);
        assert_eq!(many.bound, Bound::Arithmetic);
        let attention = 4.0 * 8192.0 * 768.0 * (32 * 4096) as f64;
        assert_eq!(many.operations, 8192.0 * read as f64 + attention);
        let milliseconds = many.operations / 800e12 * 1e3;
        assert!((many.milliseconds / milliseconds - 1.0).abs() < 1e-12);
        // Products in eight bits at twice the rate, and attention as before.
        let fast = Ceilings { coded_per_second: Some(1600e12), ..ceilings.clone() };
        let coded = Floor::new(&c, read / 2, Dtype::Bf16, Point { window: 256, prefix: 512, sequences: 32 }, &fast);
        let expected = (8192.0 * read as f64 / 1600e12 + attention / 800e12) * 1e3;
        assert!((coded.milliseconds / expected - 1.0).abs() < 1e-12, "{coded:?}");
        // In half the bytes the same arithmetic takes no less.
        let half = Floor::new(&c, read / 2, Dtype::Bf16, Point { window: 256, prefix: 512, sequences: 32 }, &ceilings);
        assert!(half.milliseconds == many.milliseconds && half.bytes < many.bytes);
    }

    #[test]
    fn the_published_shapes_have_their_published_sizes() {
        for (shape, billions) in
            [("llada-8b", 8.02), ("dream-7b", 7.62), ("qwen2.5-7b", 7.62), ("sdar-4b", 4.41), ("sdar-8b", 8.19)]
        {
            let found = config(shape).parameters() as f64 / 1e9;
            assert!((found - billions).abs() < 0.01, "{shape}: {found}");
        }
    }
}
