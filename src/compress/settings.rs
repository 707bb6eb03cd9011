//! All of a quantised model's folder but its weights: what was there before is copied, and `config.json` says what is quantised.

use std::path::Path;

use serde_json::{Value, json};

use super::{Head, Plan, head_scheme};
use crate::checkpoint::quantization::Layout;
use crate::checkpoint::{Checkpoint, CheckpointError, config, gguf, write_atomically};
use crate::model::quantized::{Activations, Codes, Scheme, Sharing};
use crate::tensor::Dtype;

/// Endings of what belongs to a model beside its weights: settings, vocabulary, templates, and code of its own for other tools.
const COPIED: [&str; 5] = ["json", "jinja", "txt", "model", "py"];
/// Files of draft heads.
const DRAFTERS: [&str; 4] =
    ["redrafter/config.json", "redrafter/model.safetensors", "medusa/config.json", "medusa/model.safetensors"];

/// Makes the folder, and takes away what another model may have left that would be read in place of what comes.
pub fn begin(folder: &Path) -> Result<(), CheckpointError> {
    let write = |source| CheckpointError::Write { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(write)?;
    for stale in ["config.json", "model.safetensors.index.json", "chat_template.jinja"] {
        match std::fs::remove_file(folder.join(stale)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(write(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Copies or writes everything else, `config.json` last.
pub fn finish(checkpoint: &Checkpoint, folder: &Path, plan: &Plan) -> Result<(), CheckpointError> {
    let mut settings = if checkpoint.path.is_file() {
        let (json, _) = gguf::open(&checkpoint.path)?;
        let parts = [
            ("tokenizer.json", &json.tokenizer),
            ("tokenizer_config.json", &json.tokenizer_config),
            ("generation_config.json", &json.generation),
        ];
        for (name, value) in parts {
            write_atomically(&folder.join(name), format!("{value:#}\n").as_bytes())?;
        }
        json.config
    } else {
        copy(&checkpoint.path, folder)?;
        config::read_json(&checkpoint.path.join("config.json"))?
    };
    let dtype = match plan.floats {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
    };
    let field = if settings.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    settings[field] = dtype.into();
    if plan.untied.is_some() {
        settings[checkpoint.config.family.keys.tied] = false.into();
    }
    settings["quantization_config"] = quantization(plan, checkpoint.config.family.names.head);
    write_atomically(&folder.join("config.json"), format!("{settings:#}\n").as_bytes())
}

fn copy(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    let read = |source| CheckpointError::Read { path: from.into(), source };
    let one = |from: &Path, to: &Path| {
        std::fs::copy(from, to).map(drop).map_err(|source| CheckpointError::Write { path: to.into(), source })
    };
    for entry in from.read_dir().map_err(read)? {
        let path = entry.map_err(read)?.path();
        let (Some(name), Some(ending)) = (path.file_name().and_then(|n| n.to_str()), path.extension().and_then(|e| e.to_str()))
        else {
            continue;
        };
        let weights = name == "config.json" || name.ends_with(".index.json") || name.starts_with('.');
        if path.is_file() && COPIED.contains(&ending) && !weights {
            one(&path, &to.join(name))?;
        }
    }
    for name in DRAFTERS {
        let (from, to) = (from.join("drafters").join(name), to.join("drafters").join(name));
        if from.is_file() {
            let folder = to.parent().unwrap_or(&to);
            std::fs::create_dir_all(folder).map_err(|source| CheckpointError::Write { path: folder.into(), source })?;
            one(&from, &to)?;
        }
    }
    Ok(())
}

/// What `config.json` says of it.
fn quantization(plan: &Plan, head: &str) -> Value {
    if let Sharing::Block(side) = plan.scheme.sharing {
        return json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [side, side],
        });
    }
    let group = |scheme: Scheme, targets: &[&str]| {
        let form = super::form(scheme);
        let format = match (form.layout, scheme.codes) {
            (Layout::Packed(_), _) => "pack-quantized",
            (_, Codes::E4m3) => "float-quantized",
            _ => "int-quantized",
        };
        let (bits, kind) = match scheme.codes {
            Codes::Int8 => (8, "int"),
            Codes::Int4 => (4, "int"),
            Codes::E4m3 => (8, "float"),
        };
        let (strategy, length) = match scheme.sharing {
            Sharing::Group(length) => ("group", json!(length)),
            _ => ("channel", Value::Null),
        };
        let weights = json!({
            "num_bits": bits, "type": kind, "symmetric": true, "strategy": strategy, "group_size": length, "dynamic": false,
        });
        let inputs = match scheme.activations {
            Activations::Kept => Value::Null,
            dynamic => {
                let (strategy, length) = match dynamic {
                    Activations::Groups(length) => ("group", json!(length)),
                    _ => ("token", Value::Null),
                };
                json!({
                    "num_bits": 8, "type": kind, "symmetric": true, "strategy": strategy, "group_size": length, "dynamic": true,
                })
            }
        };
        json!({
            "format": format, "targets": targets, "weights": weights, "input_activations": inputs, "output_activations": null,
        })
    };
    // The head goes by its name, since vLLM's is no "Linear", and first, since compressed-tensors warns of targets that others foreclose.
    let (groups, ignore) = match plan.head {
        Head::Kept => (vec![group(plan.scheme, &["Linear"])], vec![head]),
        Head::Int8 if head_scheme(plan.scheme) == plan.scheme => (vec![group(plan.scheme, &[head, "Linear"])], vec![]),
        Head::Int8 => (vec![group(head_scheme(plan.scheme), &[head]), group(plan.scheme, &["Linear"])], vec![]),
    };
    let same = groups.iter().all(|group| group["format"] == groups[0]["format"]);
    let format = if same { groups[0]["format"].clone() } else { "mixed-precision".into() };
    let groups: serde_json::Map<_, _> =
        groups.into_iter().enumerate().map(|(at, group)| (format!("group_{at}"), group)).collect();
    json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignore, "kv_cache_scheme": null,
    })
}
