//! What the tests of autoregressive decoding share: fixtures, and sequences driven by the engine's own step.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use lacuna::checkpoint::config::ModelConfig;
use lacuna::checkpoint::tokenizer::Tokenizer;
use lacuna::checkpoint::weights::{WeightFiles, WeightSource};
use lacuna::decode::autoregressive::adaptation::Shape;
use lacuna::decode::autoregressive::{Autoregressive, DrafterKind, Drafts, Parameters};
use lacuna::decode::canvas::{Canvas, Piece};
use lacuna::decode::{Edit, FinishReason, Sampling, Step, Window};
use lacuna::draft::chain::Chain;
use lacuna::draft::medusa::Medusa;
use lacuna::draft::redrafter::{Beams, Redrafter};
use lacuna::draft::{Context, Draft, Drafter, Drafters};
use lacuna::engine::runner::{self, Residence};
use lacuna::engine::sequence::Sequence;
use lacuna::engine::{Event, Usage};
use lacuna::model::{ModelError, RandomWeights, Source, TensorSpec, Transformer, manifest};
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub const F32: Placement = Placement { device: Device::Cpu, dtype: Dtype::F32 };
pub const BF16: Placement = Placement { device: Device::Cpu, dtype: Dtype::Bf16 };

/// Of 944 tokens, which is more than any fixture has.
pub static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano")).unwrap());

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn cases(file: &str) -> Vec<Value> {
    let json: Value = serde_json::from_slice(&std::fs::read(fixture(file)).unwrap()).unwrap();
    json["cases"].as_array().unwrap().clone()
}

pub fn parse<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{value}: {e}"))
}

/// The tensors of a safetensors file, by name.
pub fn tensors(path: &Path) -> impl Fn(&str) -> Tensor + use<> {
    let tensors = Tensor::read_safetensors(path).unwrap();
    move |wanted| tensors.iter().find(|(name, _)| name == wanted).unwrap_or_else(|| panic!("no {wanted}")).1.shallow_clone()
}

pub fn load_at(folder: &Path, placement: Placement) -> Transformer {
    // Tests run beside one another; these networks are too small to share out.
    lacuna::tensor::set_threads(1);
    let config = ModelConfig::read(&folder.join("config.json")).unwrap();
    let files = WeightFiles::open(folder).unwrap();
    assert_eq!(files.check(&manifest(&config)), [""; 0], "{folder:?}");
    let mut source = WeightSource { files: &files, placement, loaded: &mut |_| {} };
    Transformer::new(&config, placement, 4096, &mut source).unwrap()
}

pub fn load(name: &str, placement: Placement) -> Transformer {
    load_at(&fixture(name), placement)
}

/// A network of one layer around a given embedding: all that a drafter looks at.
pub fn around(embedding: &Tensor) -> Transformer {
    struct Given<'a>(&'a Tensor, RandomWeights);
    impl Source for Given<'_> {
        type Error = ModelError;
        fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
            if spec.name.contains("embed") { Ok(self.0.shallow_clone()) } else { self.1.tensor(spec) }
        }
    }
    let (vocab, hidden) = embedding.size2().unwrap();
    let source = &mut Given(embedding, RandomWeights { placement: F32 });
    Transformer::new(&llama_config(vocab as usize, hidden as usize, 1), F32, 64, source).unwrap()
}

/// A Llama of two heads that share one key head.
pub fn llama_config(vocab: usize, hidden: usize, layers: usize) -> ModelConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 2 * hidden, "vocab_size": vocab, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    ModelConfig::from_json(&json).unwrap()
}

/// Norm of the difference over the norm of the original.
pub fn relative_error(ours: &Tensor, original: &Tensor) -> f64 {
    assert_eq!(ours.size(), original.size());
    let (ours, original) = (ours.to_kind(Kind::Double), original.to_kind(Kind::Double));
    ((&ours - &original).square().sum(Kind::Double).sqrt() / original.square().sum(Kind::Double).sqrt()).double_value(&[])
}

pub fn ids(tokens: &[u32]) -> Tensor {
    Tensor::from_slice(&tokens.iter().map(|id| i64::from(*id)).collect::<Vec<_>>()).unsqueeze(0)
}

/// The drafter that was trained on the `llama` fixture's texts, for a model of its size.
pub fn trained(model: &Transformer) -> Redrafter {
    Redrafter::load(&fixture("redrafter/trained"), model.config(), model.placement()).unwrap()
}

/// Medusa heads that nobody has trained.
pub fn random_medusa(model: &Transformer, seed: u64) -> Medusa {
    let config = model.config();
    let settings =
        lacuna::draft::medusa::Settings { hidden_size: config.hidden_size, vocab_size: config.vocab_size, heads: 4, layers: 1 };
    let _generator = lacuna::tensor::seeded(seed);
    Medusa::new(settings, &mut RandomWeights { placement: model.placement() }).unwrap()
}

/// Every drafter there is, for the `llama` fixture.
pub fn all_drafters(model: &Transformer) -> Drafters {
    let mut drafters = Drafters::default();
    drafters.add(DrafterKind::Redrafter, Box::new(Beams::exact(trained(model))));
    drafters.add(DrafterKind::Chain, Box::new(Chain::exact(trained(model))));
    drafters.add(DrafterKind::Medusa, Box::new(random_medusa(model, 3)));
    drafters
}

/// Something made up that proposes: what follows the tokens so far.
pub struct Made<F>(pub F);

impl<F: Fn(&[u32], Shape) -> Vec<Vec<u32>> + Send> Drafter for Made<F> {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        let beams = (self.0)(context.tokens, context.asked.shape);
        let tree = lacuna::decode::autoregressive::tree::Tree::from_beams(context.root(), beams.iter().map(Vec::as_slice));
        Ok(Draft { tree, proposal: None, forwards: 0 })
    }

    fn limit(&self) -> Shape {
        Shape { width: 4, length: 8 }
    }

    fn usual(&self) -> Shape {
        self.limit()
    }
}

/// Greedy decoding to the end of the canvas, nobody drafting.
pub fn plain() -> Parameters {
    Parameters { sampling: Sampling::default(), ends: vec![], chunk: 512, seed: 0, deterministic: false, drafts: None }
}

/// The same with drafts of one shape.
pub fn drafted(drafter: DrafterKind, width: usize, length: usize) -> Parameters {
    Parameters { drafts: Some(Drafts { drafter, shape: Shape { width, length }, adapt: false }), ..plain() }
}

/// All that one sequence told.
pub struct Told {
    pub windows: Vec<Window>,
    pub steps: Vec<Step>,
    pub text: String,
    pub reason: FinishReason,
    pub usage: Usage,
}

impl Told {
    pub fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.steps.iter().flat_map(|step| &step.edits)
    }

    pub fn tokens(&self) -> Vec<u32> {
        self.edits().map(|edit| edit.token).collect()
    }

    pub fn confidences(&self) -> Vec<u64> {
        self.edits().map(|edit| edit.confidence.to_bits()).collect()
    }
}

/// Decodes `length` tokens behind `prompt`, step by step as the engine does.
pub fn drive(model: &Transformer, drafters: &Drafters, parameters: Parameters, prompt: &[u32], length: usize) -> Told {
    drive_until(model, drafters, parameters, prompt, length, &[])
}

pub fn drive_until(
    model: &Transformer,
    drafters: &Drafters,
    parameters: Parameters,
    prompt: &[u32],
    length: usize,
    stops: &[&str],
) -> Told {
    let ends = parameters.ends.clone();
    let decoder = Autoregressive::new(parameters, Canvas::new(prompt, &[Piece::Hole(length)], 0), None);
    let stops = stops.iter().map(|stop| stop.to_string()).collect();
    let mut sequence = Sequence::new(Box::new(decoder), ends, stops, Duration::ZERO);
    let mut residence = Residence::new(model, &sequence).unwrap();
    let (mut windows, mut events) = (vec![], vec![]);
    while let Some(window) = sequence.window() {
        windows.push(window);
        events.extend(runner::step(model, drafters, &mut sequence, &mut residence, &TOKENIZER).unwrap());
        assert!(windows.len() <= prompt.len() + length, "decoding does not end");
    }
    let (mut steps, mut text, mut last) = (vec![], String::new(), None);
    for event in events {
        match event {
            Event::Step(step) => steps.push(step),
            Event::Committed { text: more, .. } => text.push_str(&more),
            Event::Finished { reason, usage } => last = Some((reason, usage)),
            Event::Started { .. } => panic!("a sequence starts before its first step"),
        }
    }
    let (reason, usage) = last.expect("a sequence that has no window has finished");
    Told { windows, steps, text, reason, usage }
}

/// Runs this test binary once more with everything left to libtorch: the way that GPUs, other types and many rows take must keep the
/// same promises. `except` is the calling test.
pub fn again_without_kernels(except: &str) {
    again(except, &[], None);
}

/// Likewise with the kernels that GPUs have, which are slow here: only tests whose names hold one of `some`.
pub fn again_with_fused_kernels(except: &str, some: &[&str]) {
    again(except, some, Some(kernels_on_cpu()));
}

fn again(except: &str, some: &[&str], fused: Option<PathBuf>) {
    if std::env::var_os("LACUNA_KERNELS").is_some() {
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(some).args(["--skip", except]).env("LACUNA_KERNELS", "off");
    command.envs(fused.map(|library| ("LACUNA_FUSED_LIBRARY", library)));
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !told.contains("running 0 tests"), "{told}{}", String::from_utf8_lossy(&output.stderr));
}

/// The kernels of `cuda/kernels`, built for the CPU.
pub fn kernels_on_cpu() -> PathBuf {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("liblacuna_kernels_on_cpu.so");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-cuda.sh");
        let built = std::process::Command::new(script).arg("kernels-on-cpu").arg(&library).output().expect("the script starts");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        library
    });
    LIBRARY.clone()
}
