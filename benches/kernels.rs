//! The kernels for few rows against libtorch: all products of one decoding step of SmolLM2-135M's shape, and one step of the small
//! model that ships (random weights of its shape), by the number of rows.
//!
//! `cargo bench --bench kernels`; with `LACUNA_KERNELS=off` the steps are libtorch's. Two threads, on the CPU.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lacuna::checkpoint::config::ModelConfig;
use lacuna::model::cache::KvCache;
use lacuna::model::{Layout, RandomWeights, Segment, Transformer};
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor, kernels};

const ROWS: [i64; 6] = [1, 2, 4, 6, 8, 16];

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn products(criterion: &mut Criterion) {
    lacuna::tensor::set_threads(2);
    let shapes = [[960, 576], [576, 576], [3072, 576], [576, 1536]];
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let mut group = criterion.benchmark_group(format!("products of SmolLM2-135M, {name}"));
        group.sample_size(10);
        let layers = (0..30).flat_map(|_| shapes).chain([[49_152, 576]]);
        let weights: Vec<Tensor> = layers.map(|shape| random(&shape, kind)).collect();
        for rows in ROWS {
            let inputs: Vec<Tensor> = weights.iter().map(|weight| random(&[rows, weight.size()[1]], kind)).collect();
            let pairs = || inputs.iter().zip(&weights);
            group.bench_function(BenchmarkId::new("libtorch", rows), |bencher| {
                bencher.iter(|| pairs().for_each(|(x, weight)| drop(x.linear(weight, None::<&Tensor>))));
            });
            group.bench_function(BenchmarkId::new("ours", rows), |bencher| {
                bencher.iter(|| pairs().for_each(|(x, weight)| drop(kernels::linear::linear(x, weight, None).unwrap())));
            });
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
