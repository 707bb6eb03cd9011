//! Our kernels against libtorch, by the number of rows: all products of a forward of SmolLM2-135M's and nano's shapes, and one step
//! of nano's (random weights).
//!
//! `cargo bench --bench kernels`; with `LACUNA_KERNELS=off` the steps are libtorch's. Two threads, on the CPU.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lacuna::checkpoint::config::ModelConfig;
use lacuna::model::cache::KvCache;
use lacuna::model::{Layout, RandomWeights, Segment, Transformer};
use lacuna::tensor::kernels::attention::{Seen, Shared, Slots, Span, attention as attend};
use lacuna::tensor::kernels::fixed::Fixed;
use lacuna::tensor::kernels::packed::Packed;
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor, kernels};

const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 80];

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
                // As a model's are, rearranged once.
                let packed: Vec<Packed> = weights.iter().filter_map(|weight| Packed::of(weight).unwrap()).collect();
                group.bench_function(BenchmarkId::new("ours", rows), |bencher| {
                    bencher.iter(|| inputs.iter().zip(&packed).for_each(|(x, weight)| drop(weight.product(x).unwrap())));
                });
            }
        }
    }
}

/// Attention of some rows over themselves and what came before, where everybody sees everything. Ours turns queries and keys and
/// fills the cache as well; libtorch's is the bare operation.
fn attention(criterion: &mut Criterion) {
    lacuna::tensor::set_threads(2);
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        for (model, heads, kv_heads, dim) in [("nano", 8, 8, 32), ("SmolLM2-135M", 9, 3, 64)] {
            let mut group = criterion.benchmark_group(format!("attention of {model}, {name}"));
            group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
            for (rows, slots) in [(1, 64), (1, 512), (8, 64), (80, 80), (128, 128), (256, 256), (32, 512)] {
                let qkv = random(&[rows, (heads + 2 * kv_heads) * dim], kind);
                let angles = [(); 2].map(|()| Fixed::of(random(&[slots, dim], Kind::Float)));
                let positions: Vec<usize> = (0..rows as usize).collect();
                let (keys, values) = (random(&[kv_heads, slots, dim], kind), random(&[kv_heads, slots, dim], kind));
                let shared = Shared {
                    heads: heads as usize,
                    kv_heads: kv_heads as usize,
                    dim: dim as usize,
                    angles: (&angles[0], &angles[1]),
                    positions: &positions,
                    norms: None,
                    eps: 0.0,
                };
                let sees = vec![slots as usize; rows as usize];
                let (start, rows) = ((slots - rows) as usize, rows as usize);
                let shape = format!("{rows} over {slots}");
                group.bench_function(BenchmarkId::new("ours", &shape), |bencher| {
                    let (slots, seen) = (&Slots::of(&keys, &values).unwrap(), Seen::First(&sees));
                    bencher.iter(|| attend(&shared, &qkv, &[Span { rows: 0..rows, slots, start, seen }]).unwrap().unwrap());
                });
                let query = random(&[1, kv_heads, heads / kv_heads * rows as i64, dim], kind);
                let (keys, values) = (keys.unsqueeze(0), values.unsqueeze(0));
                group.bench_function(BenchmarkId::new("libtorch", &shape), |bencher| {
                    let none = None::<&Tensor>;
                    let run =
                        || Tensor::scaled_dot_product_attention(&query, &keys, &values, none, 0.0, false, None::<f64>, false);
                    bencher.iter(run);
                });
            }
        }
    }
}

/// The small operations between products, on nano's widths.
fn small(criterion: &mut Criterion) {
    lacuna::tensor::set_threads(2);
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let mut group = criterion.benchmark_group(format!("small operations of nano, {name}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(300));
        for rows in [1, 8, 80, 640] {
            let (x, weight) = (random(&[rows, 256], kind), random(&[256], kind));
            let gates = random(&[rows, 1408], kind);
            group.bench_function(BenchmarkId::new("rms_norm", rows), |bencher| {
                bencher.iter(|| kernels::pointwise::rms_norm(&x, &weight, 1e-5).unwrap().unwrap());
            });
            group.bench_function(BenchmarkId::new("rms_norm, libtorch", rows), |bencher| {
                bencher.iter(|| x.rms_norm([256], Some(&weight), 1e-5));
            });
            group.bench_function(BenchmarkId::new("swiglu", rows), |bencher| {
                bencher.iter(|| kernels::pointwise::swiglu(&gates).unwrap().unwrap());
            });
            group.bench_function(BenchmarkId::new("swiglu, libtorch", rows), |bencher| {
                bencher.iter(|| gates.narrow(1, 0, 704).silu() * gates.narrow(1, 704, 704));
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
            let tokens = vec![1; rows];
            group.bench_function(BenchmarkId::new("rows", rows), |bencher| bencher.iter(|| run(&tokens, &cache)));
        }
    }
}

criterion_group!(benches, products, attention, small, steps);
criterion_main!(benches);
