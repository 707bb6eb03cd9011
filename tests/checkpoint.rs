//! Broken model folders: each gets one clear error that names what is wrong, before anything is served.

use std::path::{Path, PathBuf};

use lacuna::checkpoint::config::ModelConfig;
use lacuna::checkpoint::weights::{WeightFiles, WeightSource, save};
use lacuna::checkpoint::{Checkpoint, CheckpointError};
use lacuna::model::{Transformer, manifest};
use lacuna::tensor::{Device, Dtype, Kind, Placement, Tensor};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a fixture that a test may break, with the shipped tokenizer if `tokenizer`.
fn copy(name: &str, tokenizer: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    if tokenizer {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(shipped.join(file), folder.path().join(file)).unwrap();
        }
    }
    folder
}

/// Changes `config.json` in place.
fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
}

fn config(folder: &Path) -> ModelConfig {
    ModelConfig::read(&folder.join("config.json")).unwrap()
}

/// Rewrites the weights after `change`.
fn rewrite(folder: &Path, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    change(&mut tensors);
    save(&path, &tensors, Dtype::F32).unwrap();
}

fn problems(folder: &Path) -> Vec<String> {
    WeightFiles::open(folder).unwrap().check(&manifest(&config(folder)))
}

/// The error of loading every tensor.
fn load_error(folder: &Path) -> String {
    let files = WeightFiles::open(folder).unwrap();
    let mut source = WeightSource { files: &files, placement: Placement::CPU_F32, loaded: &mut |_| {} };
    match Transformer::new(&config(folder), Placement::CPU_F32, 64, &mut source) {
        Ok(_) => panic!("the broken checkpoint was loaded"),
        Err(error) => error.to_string(),
    }
}

fn open_error(folder: &Path) -> String {
    match WeightFiles::open(folder) {
        Ok(_) => panic!("the broken file was opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_missing_an_unexpected_and_a_misshapen_tensor_are_named() {
    let folder = copy("llada", false);
    rewrite(folder.path(), |tensors| {
        tensors.retain(|(name, _)| name != "model.transformer.ln_f.weight");
        tensors.push(("model.transformer.surprise.weight".into(), Tensor::zeros([2], (Kind::Float, Device::Cpu))));
        let wrong = tensors.iter_mut().find(|(name, _)| name.ends_with("blocks.1.q_proj.weight")).unwrap();
        wrong.1 = wrong.1.narrow(0, 0, 3);
    });
    assert_eq!(
        problems(folder.path()),
        [
            "tensor model.transformer.blocks.1.q_proj.weight has shape [3, 64], not [64, 64]",
            "tensor model.transformer.ln_f.weight is missing",
            "tensor model.transformer.surprise.weight is unexpected",
        ]
    );
}

#[test]
fn a_tensor_with_nan_is_named() {
    let folder = copy("dream", false);
    rewrite(folder.path(), |tensors| {
        let (_, tensor) = tensors.iter_mut().find(|(name, _)| name == "model.norm.weight").unwrap();
        let _ = tensor.fill_(f64::NAN);
    });
    assert_eq!(
        load_error(folder.path()),
        "the checkpoint does not fit its config: tensor model.norm.weight holds NaN or infinity"
    );
}

#[test]
fn a_truncated_file_a_broken_header_and_an_absent_file_are_errors() {
    let folder = copy("llama", false);
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 5, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = open_error(folder.path());
        assert!(error.contains("model.safetensors"), "{length} bytes: {error}");
    }
    let mut broken = whole.clone();
    broken[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, &broken).unwrap();
    assert!(open_error(folder.path()).contains("model.safetensors"));
    std::fs::remove_file(&path).unwrap();
    assert!(open_error(folder.path()).starts_with("cannot read"));
}

#[test]
fn an_index_that_names_an_absent_shard_or_tensor_is_an_error() {
    let folder = copy("llama-sharded", false);
    assert_eq!(problems(folder.path()), [""; 0]);
    let index = "model.safetensors.index.json";
    edit(folder.path(), index, |json| json["weight_map"]["model.ghost.weight"] = "model-00001-of-00003.safetensors".into());
    assert!(open_error(folder.path()).contains("no shard holds tensor model.ghost.weight"));
    edit(folder.path(), index, |json| json["weight_map"]["model.ghost.weight"] = "../outside.safetensors".into());
    assert!(open_error(folder.path()).contains("not a plain file name"));
    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    edit(folder.path(), index, |json| {
        json["weight_map"].as_object_mut().unwrap().remove("model.ghost.weight");
    });
    assert!(open_error(folder.path()).contains("shard model-00002-of-00003.safetensors is absent"));
}

#[test]
fn f16_and_bf16_files_are_converted_on_load() {
    let exact = WeightFiles::open(&fixture("qwen2")).unwrap();
    for (dtype, tolerance) in [(Dtype::F16, 1e-3), (Dtype::Bf16, 1e-2)] {
        let folder = copy("qwen2", false);
        let tensors = Tensor::read_safetensors(folder.path().join("model.safetensors")).unwrap();
        save(&folder.path().join("model.safetensors"), &tensors, dtype).unwrap();
        let files = WeightFiles::open(folder.path()).unwrap();
        assert_eq!(files.stored_types().into_iter().collect::<Vec<_>>(), [dtype.name()]);
        for spec in manifest(&config(folder.path())) {
            let (ours, exact) = (files.load(&spec.name, Placement::CPU_F32), exact.load(&spec.name, Placement::CPU_F32));
            let (ours, exact) = (ours.unwrap(), exact.unwrap());
            assert_eq!(ours.kind(), Kind::Float);
            let error = (&ours - &exact).abs().max().double_value(&[]);
            assert!(error <= tolerance * exact.abs().max().double_value(&[]), "{} {error}", spec.name);
        }
    }
}

#[test]
fn config_errors_name_the_field() {
    let base: Value = serde_json::from_slice(&std::fs::read(fixture("llada").join("config.json")).unwrap()).unwrap();
    let with = |field: &str, value: Value| {
        let mut json = base.clone();
        json[field] = value;
        ModelConfig::from_json(&json).unwrap_err()
    };
    assert_eq!(with("d_model", json!(null)), "d_model is missing");
    assert_eq!(with("n_heads", json!(7)), "d_model = 64 is not a multiple of n_heads = 7");
    assert_eq!(with("n_layers", json!(-3)), "n_layers = -3 is not a whole number from 1 to 16777216");
    assert_eq!(with("mask_token_id", json!(100_000)), "mask_token_id = 100000 is outside the vocabulary of 160");
    assert!(with("architectures", json!(["GPT9"])).starts_with("architecture GPT9 is not known; known are LLaDAModelLM, "));
    assert_eq!(with("alibi", json!(true)), "alibi = true is not supported for llada: only false is");
    assert!(with("rope_scaling", json!({"rope_type": "yarn"})).contains("'yarn' is not supported"));
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_a_problem() {
    let folder = copy("llada", true);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let problems = checkpoint.problems();
    assert!(problems.iter().any(|p| p.ends_with("tokens, the embedding only 160 rows")), "{problems:?}");
    assert!(matches!(checkpoint.load(Placement::CPU_F32, 64, &mut |_| {}).map(|_| ()), Err(CheckpointError::Problems(_))));
}

/// A folder whose embedding is large enough for the shipped tokenizer.
fn with_large_vocabulary(family: &str) -> tempfile::TempDir {
    let folder = copy(family, true);
    edit(folder.path(), "config.json", |json| {
        json["vocab_size"] = 2048.into();
        json["embedding_size"] = 2048.into();
        json.as_object_mut().unwrap().remove("mask_token_id");
    });
    folder
}

#[test]
fn the_mask_token_comes_from_config_then_tokenizer_then_family() {
    let folder = with_large_vocabulary("llada");
    let mask = |folder: &Path| Checkpoint::open(folder).unwrap().mask_token_id;
    let tokenizer = Checkpoint::open(folder.path()).unwrap().tokenizer;
    assert_eq!(mask(folder.path()), Ok(tokenizer.mask_token_id().unwrap()));
    edit(folder.path(), "config.json", |json| json["mask_token_id"] = 99.into());
    assert_eq!(mask(folder.path()), Ok(99));
    edit(folder.path(), "config.json", |json| {
        json.as_object_mut().unwrap().remove("mask_token_id");
    });
    edit(folder.path(), "tokenizer_config.json", |json| {
        json.as_object_mut().unwrap().remove("mask_token");
    });
    // The family's own id is 126336, which this small vocabulary does not hold.
    assert_eq!(mask(folder.path()), Err("its mask token 126336 is outside the vocabulary of 2048".into()));
}

#[test]
fn a_model_without_a_mask_token_says_so() {
    let folder = with_large_vocabulary("llama");
    edit(folder.path(), "tokenizer_config.json", |json| {
        json.as_object_mut().unwrap().remove("mask_token");
    });
    let reason = Checkpoint::open(folder.path()).unwrap().mask_token_id.unwrap_err();
    assert_eq!(reason, "neither config.json nor the tokenizer nor the family (llama) names a mask token");
}

#[test]
fn a_broken_tokenizer_or_template_names_its_file() {
    let folder = with_large_vocabulary("llada");
    edit(folder.path(), "tokenizer_config.json", |json| json["chat_template"] = "{% for %}".into());
    let error = Checkpoint::open(folder.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("chat template"), "{error}");
    std::fs::write(folder.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    let error = Checkpoint::open(folder.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn a_template_that_never_ends_is_stopped() {
    let folder = with_large_vocabulary("llada");
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
    edit(folder.path(), "tokenizer_config.json", |json| json["chat_template"] = endless.into());
    let tokenizer = Checkpoint::open(folder.path()).unwrap().tokenizer;
    let error = tokenizer.chat().unwrap().render(&[]).unwrap_err();
    assert!(error.contains("fuel"), "{error}");
}
