//! Our kernels against libtorch, by the number of rows: all products of a forward of SmolLM2-135M's and nano's shapes, and one step
//! of nano's (random weights).
//!
//! `cargo bench --bench kernels`; with `LACUNA_KERNELS=off` the steps are libtorch's. Two threads, on the CPU.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lacuna::checkpoint::config::ModelConfig;
use lacuna::model::cache::KvCache;
use lacuna::model::{Layout, RandomWeights, Segment, Transformer};
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor, kernels};

const ROWS: [i64; 6] = [1, 2, 4, 6, 8, 16];

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// All products of a forward, in multiply-adds a second. Few rows meet a whole model's weights, which no cache holds for long; for
/// many, where the weights hardly matter, three layers stand for all.
fn products(criterion: &mut Criterion) {
    lacuna::tensor::set_threads(2);
    let nano = ("nano", 6, vec![[768, 256], [256, 256], [1408, 256], [256, 704]], [944, 256]);
    let smollm2 = ("SmolLM2-135M", 30, vec![[960, 576], [576, 576], [3072, 576], [576, 1536]], [49_152, 576]);
    for (model, layers, shapes, head) in [nano, smollm2] {
        for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            let mut group = criterion.benchmark_group(format!("products of {model}, {name}"));
            group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(700));
            for rows in [1, 2, 4, 8, 16, 32, 80, 160, 640, 1280] {
                let (layers, heads) = if rows <= 32 { (layers, 1) } else { (3, 0) };
                let shapes = (0..layers).flat_map(|_| &shapes).chain((0..heads).map(|_| &head));
                let weights: Vec<Tensor> = shapes.map(|shape| random(shape, kind)).collect();
                let inputs: Vec<Tensor> = weights.iter().map(|weight| random(&[rows, weight.size()[1]], kind)).collect();
                let pairs = || inputs.iter().zip(&weights);
                group.throughput(Throughput::Elements(weights.iter().map(|weight| weight.numel() as u64 * rows as u64).sum()));
                group.bench_function(BenchmarkId::new("libtorch", rows), |bencher| {
                    bencher.iter(|| pairs().for_each(|(x, weight)| drop(x.linear(weight, None::<&Tensor>))));
                });
                group.bench_function(BenchmarkId::new("ours", rows), |bencher| {
                    bencher.iter(|| pairs().for_each(|(x, weight)| drop(kernels::linear::linear(x, weight, None).unwrap())));
                });
            }
        }
    }
}

fn steps(criterion: &mut Criterion) {
    lacuna::tensor::set_threads(2);
    let _no_gradients = tch::no_grad_guard();
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 704, "vocab_size": 944, "max_position_embeddings": 256,
        "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(&json).unwrap();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let placement = Placement { device: Device::Cpu, dtype };
        let model = Transformer::new(&config, placement, 256, &mut RandomWeights { placement }).unwrap();
        let mut group = criterion.benchmark_group(format!("a step of nano-ar's shape over 48 tokens, {}", dtype.name()));
        for rows in ROWS {
            let mut cache = KvCache::new(&config, placement, 128).unwrap();
            let run = |tokens: &[u32], cache: &KvCache| {
                let hidden = model.forward(&[Segment { tokens, layout: Layout::Causal, cache: Some(cache) }]).unwrap();
                model.logits(&hidden).unwrap()
            };
            let _logits = run(&[1; 48], &cache);
            cache.keep(&(0..48).collect::<Vec<_>>()).unwrap();
            let tokens = vec![1; rows as usize];
            group.bench_function(BenchmarkId::new("rows", rows), |bencher| bencher.iter(|| run(&tokens, &cache)));
        }
    }
}

criterion_group!(benches, products, steps);
criterion_main!(benches);
