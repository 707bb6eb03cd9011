//! Training on a network small enough for seconds: it learns, and a run in sittings is the unbroken run; and block diffusion learns
//! from the very numbers that decoding meets.

mod common;

use std::path::Path;

use common::{ids, relative_error};
use lacuna::checkpoint::Checkpoint;
use lacuna::checkpoint::config::ModelConfig;
use lacuna::model::cache::KvCache;
use lacuna::model::family::Attention;
use lacuna::model::{Layout, RandomWeights, Segment, Transformer};
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor, seeded};
use lacuna::train::blocks::Copies;
use lacuna::train::data::Objective;
use lacuna::train::parameters::Parameters;
use lacuna::train::progress::Budget;
use lacuna::train::{Options, run};
use serde_json::{Value, json};

fn options(out: &Path, stop_after: Option<u64>) -> Options {
    Options {
        out: out.into(),
        objective: Objective::Diffusion,
        tokenizer: None,
        from: None,
        block_length: 8,
        seed: 3,
        budget: Budget { steps: Some(60), minutes: None, stop_after },
        batch: 4,
        learning_rate: 3e-3,
        hidden_size: 32,
        layers: 1,
        heads: 2,
        dtype: Dtype::F32,
        device: "cpu".into(),
        threads: 1,
    }
}

fn curve(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("training/curve.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_in_sittings_is_the_unbroken_run_and_it_learns() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&options(whole.path(), None)).unwrap();
    // The second sitting begins amid a pool of batches and ends in a file that a later kill would have to respect.
    for sitting in [Some(7), Some(30), None] {
        run(&options(parts.path(), sitting)).unwrap();
    }
    let read = |folder: &Path, file: &str| std::fs::read(folder.join(file)).unwrap();
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(read(whole.path(), file) == read(parts.path(), file), "{file}");
    }
    let (whole_curve, parts_curve) = (curve(whole.path()), curve(parts.path()));
    assert_eq!(whole_curve.len(), parts_curve.len());
    let last = whole_curve.last().unwrap();
    assert_eq!((&last["step"], &last["held_out_loss"]), (&60.into(), &parts_curve.last().unwrap()["held_out_loss"]));
    // The loss of a network that knows nothing is the logarithm of the vocabulary, about 6.9.
    assert!(last["held_out_loss"].as_f64().unwrap() < 5.5, "{last}");
    // What it wrote is a model folder like any other.
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.problems(), [""; 0]);
    checkpoint.load(Placement::CPU_F32, 256, &mut |_| {}).unwrap();
}

#[test]
fn a_training_state_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    run(&options(folder.path(), Some(1))).unwrap();
    let error = run(&Options { hidden_size: 64, ..options(folder.path(), None) }).unwrap_err();
    assert!(error.to_string().contains("another shape"), "{error}");
}

/// A kill at any moment costs what came after the last checkpoint, and nothing else.
#[test]
fn a_killed_run_goes_on_from_its_checkpoint() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&options(whole.path(), None)).unwrap();
    run(&options(killed.path(), Some(20))).unwrap();
    let flags =
        "--steps 60 --seed 3 --batch 4 --learning-rate 3e-3 --hidden-size 32 --layers 1 --heads 2 --dtype f32 --threads 1";
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .args(["train", "--out"])
        .arg(killed.path())
        .args(flags.split(' '))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(child.try_wait().unwrap().is_none_or(|status| status.success()), "the command did not run");
    child.kill().unwrap();
    child.wait().unwrap();
    run(&options(killed.path(), None)).unwrap();
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(whole.path()) == weights(killed.path()), "the killed run ended with other weights");
}

fn block_options(out: &Path, stop_after: Option<u64>) -> Options {
    Options { objective: Objective::Block, tokenizer: Some("models/nano".into()), ..options(out, stop_after) }
}

#[test]
fn block_diffusion_learns_and_goes_on_to_the_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&block_options(whole.path(), None)).unwrap();
    for sitting in [Some(23), None] {
        run(&block_options(parts.path(), sitting)).unwrap();
    }
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(whole.path()) == weights(parts.path()), "the sittings ended with other weights");
    let last = curve(whole.path()).pop().unwrap();
    assert!(last["held_out_loss"].as_f64().unwrap() < 5.5, "{last}");
    assert!(last["held_out_exact_in_one_forward_a_block"].is_number());
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.problems(), [""; 0]);
    assert_eq!((checkpoint.config.family.name, checkpoint.config.block_length), ("sdar", Some(8)));
}

/// By what they are for: a LLaDA's weights in a Llama, looked at from both sides, are the LLaDA.
#[test]
fn weights_of_another_family_are_taken_over() {
    let nano = Checkpoint::open(Path::new("models/nano")).unwrap();
    let llama = ModelConfig::read(Path::new("models/nano-ar/config.json")).unwrap();
    let mut parameters = Parameters::new(&llama, Dtype::F32, 1).unwrap();
    parameters.take_over(&llama, &nano).unwrap();
    let original = nano.load(Placement::CPU_F32, 256, &mut |_| {}).unwrap();
    tch::no_grad(|| {
        let model = Transformer::new(&llama, Placement::CPU_F32, 256, &mut parameters).unwrap();
        let tokens = ids(&[7, 300, 41, 1, 1, 1]);
        let error = relative_error(
            &model.hidden(&tokens, Attention::Full).unwrap(),
            &original.hidden(&tokens, Attention::Full).unwrap(),
        );
        assert!(error < 1e-6, "relative error {error}");
    });
    let folder = tempfile::tempdir().unwrap();
    let error = run(&Options { from: Some("models/nano".into()), ..block_options(folder.path(), None) }).unwrap_err();
    assert!(error.to_string().contains("another shape"), "{error}");
}

/// Norms that the other network lacks begin with the length that its queries have on average.
#[test]
fn norms_of_queries_begin_with_their_length() {
    let nano = Checkpoint::open(Path::new("models/nano")).unwrap();
    let json = json!({
        "architectures": ["SDARForCausalLM"], "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 32, "intermediate_size": 704, "vocab_size": 944,
        "max_position_embeddings": 256, "tie_word_embeddings": true,
    });
    let sdar = ModelConfig::from_json(&json).unwrap();
    let mut parameters = Parameters::new(&sdar, Dtype::F32, 1).unwrap();
    parameters.take_over(&sdar, &nano).unwrap();
    let get = |name: &str| parameters.get(&format!("model.layers.2.{name}.weight")).unwrap().detach();
    let inputs = {
        let _generator = seeded(1);
        Tensor::randn([2000, 256], (Kind::Float, Device::Cpu)) * get("input_layernorm")
    };
    for (projection, norm) in [("self_attn.q_proj", "self_attn.q_norm"), ("self_attn.k_proj", "self_attn.k_norm")] {
        let length = inputs.matmul(&get(projection).transpose(0, 1)).square().mean(Kind::Float).sqrt().double_value(&[]);
        let norm = get(norm);
        assert_eq!(norm.size(), [32]);
        let off = (&norm / length - 1.0).abs().max().double_value(&[]);
        assert!(off < 0.02, "{projection}: {off}");
    }
}

/// What a noisy block gets in training is what the decoder's forward gives for it over the stored keys of the blocks before.
#[test]
fn both_copies_in_one_forward_are_the_blocks_over_a_cache() {
    let config = ModelConfig::read(Path::new("tests/fixtures/sdar/config.json")).unwrap();
    let copies = Copies { block: config.block_length.unwrap(), from: 4, length: 16 };
    let model =
        Transformer::new(&config, Placement::CPU_F32, 64, &mut RandomWeights { placement: Placement::CPU_F32 }).unwrap();
    let clean: Vec<u32> = (0..16).map(|n| 3 + 7 * n % 90).collect();
    let noisy: Vec<u32> = clean[4..].iter().enumerate().map(|(at, id)| if at % 3 == 0 { 156 } else { *id }).collect();
    let tokens: Vec<i64> = noisy.iter().chain(&clean[..12]).map(|id| i64::from(*id)).collect();
    let width = tokens.len() as i64;
    let trained = tch::no_grad(|| {
        let sees = Tensor::from_slice(&copies.sees()).view([width, width]);
        model.hidden_where(&Tensor::from_slice(&tokens).view([1, width]), &copies.positions(), &sees).unwrap().get(0)
    });
    let mut cache = KvCache::new(&config, Placement::CPU_F32, 16).unwrap();
    for start in (0..16).step_by(4) {
        let block = |tokens: &[u32]| {
            let sees = [start + 4; 4];
            let segment = Segment { tokens, layout: Layout::Span { start, sees: &sees }, cache: Some(&cache) };
            tch::no_grad(|| model.forward(&[segment]).unwrap())
        };
        if start >= 4 {
            let served = block(&noisy[start - 4..start]);
            let error = relative_error(&trained.narrow(0, start as i64 - 4, 4), &served);
            assert!(error < 1e-5, "block at {start}: {error}");
        }
        let _ = block(&clean[start..start + 4]);
        cache.keep(&[0, 1, 2, 3]).unwrap();
    }
}
