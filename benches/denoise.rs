//! Statistics and selection at the vocabularies of LLaDA (126,464) and SmolLM2 (49,152), and one denoising step of a small model.
//!
//! `make bench`. Everything runs on the CPU in this process; criterion warms up and reports spread.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lacuna::checkpoint::config::ModelConfig;
use lacuna::decode::diffusion::select::{Candidate, Rule, select};
use lacuna::decode::{Noise, Pattern, Purpose, Sampling, Wanted, Window};
use lacuna::engine::runner::{self, Residence};
use lacuna::model::statistics::{Conditions, statistics};
use lacuna::model::{RandomWeights, Transformer};
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor};

/// Rows and vocabulary of a batch of LLaDA's canvas cells, and of one of SmolLM2's.
const SHAPES: [(i64, i64); 2] = [(32, 126_464), (64, 49_152)];

fn row_statistics(criterion: &mut Criterion) {
    lacuna::tensor::set_threads(2);
    let plain = Sampling { forbidden: vec![7], ..Sampling::default() };
    let warm = Sampling { temperature: 0.8, ..plain.clone() };
    let variants = [
        ("greedy", plain.clone()),
        ("margin", Sampling { margin: true, ..plain.clone() }),
        ("entropy", Sampling { entropy: true, ..plain.clone() }),
        ("temperature", warm.clone()),
        ("top_p 0.95", Sampling { top_p: Some(0.95), ..warm.clone() }),
        ("top_k 50", Sampling { top_k: Some(50), ..warm.clone() }),
        ("min_p 0.05", Sampling { min_p: Some(0.05), ..warm }),
        ("5 alternatives", Sampling { alternatives: 5, ..plain }),
    ];
    for (rows, vocabulary) in SHAPES {
        let mut group = criterion.benchmark_group(format!("statistics of {rows} x {vocabulary}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        let logits = Tensor::randn([rows, vocabulary], (Kind::Float, Device::Cpu)) * 4.0;
        for (kind, logits) in [("f32", logits.shallow_clone()), ("bf16", logits.to_kind(Kind::BFloat16))] {
            for (name, sampling) in &variants {
                let conditions = Conditions { sampling, noise: &Noise::Seed(1), histories: &[], proposal: None };
                group.bench_function(BenchmarkId::new(*name, kind), |bencher| {
                    bencher.iter(|| statistics(&logits, &conditions).unwrap());
                });
            }
        }
    }
}

fn selection(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("selection among 256 cells");
    let candidates: Vec<Candidate> = (0..256u32)
        .map(|cell| {
            let score = f64::from(cell.wrapping_mul(2_654_435_761) >> 8) / f64::from(1 << 24);
            Candidate { score, entropy: 1.0 - score }
        })
        .collect();
    let uniforms: Vec<f64> = candidates.iter().map(|c| c.score).collect();
    let rules = [
        ("count", Rule::Count(8)),
        ("threshold", Rule::Threshold { threshold: 0.9, least: 1 }),
        ("factor", Rule::Factor(1.0)),
        ("entropy bound", Rule::EntropyBound(1.0)),
    ];
    for (name, rule) in rules {
        group.bench_function(name, |bencher| bencher.iter(|| select(&candidates, rule, &uniforms)));
    }
}

/// The network of the shipped model's shape with random weights: 20 tokens of prompt, 48 of canvas, f32.
fn step(criterion: &mut Criterion) {
    let json = serde_json::json!({
        "architectures": ["LLaDAModelLM"], "d_model": 256, "n_layers": 6, "n_heads": 8, "mlp_hidden_size": 704,
        "vocab_size": 944, "embedding_size": 944, "max_sequence_length": 256, "weight_tying": true, "mask_token_id": 1,
    });
    let config = ModelConfig::from_json(&json).unwrap();
    let placement = Placement { device: Device::Cpu, dtype: Dtype::F32 };
    let model = Transformer::new(&config, placement, 256, &mut RandomWeights { placement }).unwrap();
    let window = Window {
        tokens: (0..68).map(|n| if n < 20 { n + 10 } else { 1 }).collect(),
        pattern: Pattern::Whole(config.attention),
        purpose: Purpose::Denoise,
        wanted: Wanted::Positions((20..68).collect()),
        guidance: None,
        sampling: Sampling { forbidden: vec![1], ..Sampling::default() },
        noise: Noise::Seed(0),
        alone: false,
        histories: vec![],
    };
    let none = Residence::default();
    criterion.bench_function("one denoising step", |bencher| bencher.iter(|| runner::run(&model, &window, &none).unwrap()));
}

criterion_group!(benches, row_statistics, selection, step);
criterion_main!(benches);
