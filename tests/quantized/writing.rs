//! What `lacuna quantize` writes: other tools compute the same from it, it decodes as well as before, and nothing is overwritten.

use std::path::Path;
use std::process::{Command, Output};

use lacuna::checkpoint::Checkpoint;
use lacuna::compress::{Head, Plan, write};
use lacuna::model::quantized::Scheme;
use lacuna::tensor::{Dtype, Placement};
use serde_json::Value;

use super::common::{fixture, relative_error, tensors};
use super::{dequantised, json_of, logits, network, open, weights_only};

const MODEL: &str = "models/nano-ar";

fn shipped() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL)).unwrap()
}

fn plan(scheme: Scheme, group: Option<usize>, head: Option<Head>) -> Result<Plan, String> {
    Plan::new(&shipped(), scheme, group, head, Dtype::F16)
}

fn lacuna(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().unwrap()
}

fn failure(arguments: &[&str]) -> String {
    let output = lacuna(arguments);
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// transformers with compressed-tensors has read what was written here from the model that ships, and what it computed was recorded
/// (`--written`). Weights mean the same to both; where activations are of eight bits, see `products_of_other_tools_are_ours`.
#[test]
fn what_is_written_means_the_same_to_transformers() {
    let recorded = tensors(&fixture("quantized/written.safetensors"));
    for (name, scheme) in Scheme::NAMED.iter().filter(|(name, _)| *name != "fp8-block") {
        let folder = tempfile::tempdir().unwrap();
        write(&shipped(), folder.path(), &plan(*scheme, None, None).unwrap(), &mut |_| {}).unwrap();
        let last = |logits: lacuna::tensor::Tensor| logits.narrow(1, 7, 1);
        let theirs = |part: &str| recorded(&format!("{name}.{part}"));
        let ids = recorded("input_ids");
        let (config, files) = open(folder.path(), weights_only).unwrap();
        let error = relative_error(&last(logits(&dequantised(&config, &files), &ids)), &theirs("logits_weights"));
        let (config, files) = open(folder.path(), |_| {}).unwrap();
        let running = relative_error(&last(logits(&network(&config, &files).unwrap(), &ids)), &theirs("logits"));
        let effect = relative_error(&theirs("logits"), &theirs("logits_weights"));
        println!("{name}: weights {error:.1e}, running {running:.1e}, activations {effect:.1e}");
        // The largest number is 127 codes here and 127.5 there: either is as far from the other as from no rounding at all.
        let tolerance = if matches!(*name, "int8" | "int8-dynamic" | "int4-dynamic") { 2e-2 } else { 1e-4 };
        assert!(error < 1e-5 && running < tolerance, "{name}: {error}, {running}");
    }
}

#[test]
fn every_scheme_writes_a_model_that_opens_and_is_smaller() {
    let before = shipped();
    // Bytes of codes and scales for a weight of 16 bits; errors of normal weights, about.
    for (name, share, error) in [
        ("int8", 0.57, 0.01),
        ("int8-dynamic", 0.57, 0.01),
        ("int8-weight-only", 0.57, 0.01),
        ("int4", 0.36, 0.1),
        ("fp8", 0.55, 0.03),
        ("fp8-block", 0.55, 0.03),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(name.parse().unwrap(), None, None).unwrap();
        let written = write(&before, folder.path(), &plan, &mut |_| {}).unwrap();
        let after = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(after.problems(), [""; 0], "{name}");
        let size = after.files.bytes() as f64 / before.files.bytes() as f64;
        assert!(size < share && written.error < error && written.error > 0.1 * error, "{name}: {size}, {}", written.error);
        assert_eq!(after.config.tied, plan.head == Head::Kept, "{name}");
        assert_eq!(after.generation.eos_token_ids, before.generation.eos_token_ids);
        assert_eq!(after.tokenizer.chat().is_some(), before.tokenizer.chat().is_some());
        let drafters = ["redrafter", "medusa"].map(|kind| folder.path().join("drafters").join(kind).join("model.safetensors"));
        assert!(drafters.iter().all(|path| path.is_file()), "{name}");
        let counts = after.files.quantization().unwrap().counts();
        assert_eq!(counts.values().sum::<usize>(), written.matrices, "{name}: {counts:?}");
        // Where nothing computes with such weights, in f16, they become floats, and are said to.
        for dtype in [Dtype::F32, Dtype::F16] {
            let placement = Placement { dtype, ..Placement::CPU_F32 };
            let held = after.load(placement, 64, &mut |_| {}).unwrap().weight_bytes() as f64;
            let said = after.loaded_bytes(placement) as f64;
            assert!((0.85..1.05).contains(&(said / held)), "{name} in {dtype:?}: {said} and {held}");
        }
    }
}

/// The groups of int4 are those that fit; what cannot be is refused before anything is written.
#[test]
fn plans_are_checked() {
    // 256 and 704 inputs: 64 divides both.
    assert_eq!(plan(Scheme::INT4, None, None).unwrap().scheme, Scheme::INT4);
    assert!(plan(Scheme::INT4, Some(128), None).unwrap_err().contains("704 inputs, which are no whole groups of 128"));
    assert!(plan(Scheme::INT4, Some(0), None).unwrap_err().contains("use 8 or more"));
    assert!(plan(Scheme::INT8, Some(64), None).unwrap_err().contains("--group goes with int4"));
    assert!(plan(Scheme::FP8_BLOCK, None, Some(Head::Int8)).unwrap_err().contains("--head keep"));
    assert_eq!(plan(Scheme::FP8, None, None).unwrap().head, Head::Kept);
    assert_eq!(plan(Scheme::INT4, None, None).unwrap().head, Head::Int8);
}

/// The whole command: a model that still writes what it wrote, with its figures beside those from before.
#[test]
fn quantize_writes_a_model_and_measures_it() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("new");
    let target = target.to_str().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "# Return the sum of the numbers in xs.\ndef solve(xs):\n    return sum(xs)\n").unwrap();
    let arguments = [
        "quantize",
        MODEL,
        target,
        "--to",
        "int4",
        "--text",
        text.to_str().unwrap(),
        "--eval",
        "nano",
        "--tasks",
        "8",
        "--threads",
        "1",
    ];
    let facts = json(&lacuna(&[&arguments[..], &["--json"]].concat()));
    assert_eq!((&facts["scheme"], &facts["head"], &facts["matrices"]), (&"int4".into(), &"int8".into(), &43.into()));
    let side = |name: &str, side: &str| facts[name][side].as_f64().unwrap_or_else(|| panic!("{facts}"));
    for name in ["bytes", "bits_per_weight", "bytes_loaded"] {
        assert!(side(name, "after") < 0.5 * side(name, "before"), "{facts}");
    }
    assert!((side("bits_per_byte", "after") - side("bits_per_byte", "before")).abs() < 0.1, "{facts}");
    assert!(side("pass", "after") >= side("pass", "before") - 0.13 && side("tokens_per_second", "after") > 0.0, "{facts}");

    let inspected = json(&lacuna(&["inspect", target, "--json"]));
    assert_eq!(inspected["quantization"], serde_json::json!({"int4": 42, "int8-weight-only": 1}));
    let prompt = "# Return the sum of the numbers in xs.\ndef solve(xs):\n";
    let written = lacuna(&["generate", "--model", target, "--threads", "1", prompt]);
    assert!(String::from_utf8_lossy(&written.stdout).contains("return sum("), "{written:?}");

    let error = failure(&["quantize", MODEL, target, "--to", "int8"]);
    assert!(error.contains("is not empty: name another folder, or write into it with --force"), "{error}");
    let error = failure(&["quantize", target, target, "--to", "int8", "--force"]);
    assert!(error.contains("is the model itself"), "{error}");
    let other = folder.path().join("other");
    let error = failure(&["quantize", target, other.to_str().unwrap(), "--to", "int8"]);
    assert!(error.contains("is quantised already"), "{error}");
    let error = failure(&["quantize", MODEL, other.to_str().unwrap(), "--to", "int2"]);
    assert!(error.contains("unknown quantisation 'int2'"), "{error}");
    assert!(!other.exists());

    let table = lacuna(&["quantize", MODEL, target, "--to", "int8", "--head", "keep", "--force"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("42 matrices, the head kept") && table.contains("on disc"), "{table}");
    assert_eq!(json_of(Path::new(target))["quantization_config"]["ignore"], serde_json::json!(["lm_head"]));
}

#[test]
fn a_gguf_file_is_quantised_too() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("gguf/qwen2.gguf")).unwrap();
    let plan = Plan::new(&source, Scheme::INT8, None, None, Dtype::Bf16).unwrap();
    write(&source, folder.path(), &plan, &mut |_| {}).unwrap();
    let written = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(written.problems(), [""; 0]);
    assert_eq!(written.tokenizer.size(), source.tokenizer.size());
    let ids = super::common::ids(&[5, 9, 30, 12]);
    let (before, after) =
        (source.load(Placement::CPU_F32, 64, &mut |_| {}).unwrap(), written.load(Placement::CPU_F32, 64, &mut |_| {}).unwrap());
    let error = relative_error(&logits(&after, &ids), &logits(&before, &ids));
    assert!(error < 0.05, "{error}");
}
