//! GGUF files, llama.cpp's form of a model: one file with settings, vocabulary and quantised weights.
//!
//! [`open`] gives what a model folder would hold, so that a file can be run as it is; [`import`] writes that folder. Everything
//! becomes what the model was before its conversion: Hugging Face's names, order of rows and JSON. Weights are unpacked when they are
//! loaded ([`blocks`]): to floats, or to codes and scales of the same numbers. Nothing here knows of decoding.

pub mod blocks;
pub mod reader;
mod settings;
mod vocabulary;

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use serde_json::Value;

use super::weights::{WeightFiles, save_each};
use super::{Checkpoint, CheckpointError, write_atomically};
use crate::model::{TensorSpec, manifest};
use crate::tensor::{Device, Dtype, Placement};
use reader::Gguf;
use settings::Architecture;

/// The JSON of a model folder.
pub struct Folder {
    pub config: Value,
    pub generation: Value,
    pub tokenizer: Value,
    pub tokenizer_config: Value,
}

/// Maps the file and reads everything but the weights' bytes.
pub fn open(path: &Path) -> Result<(Folder, WeightFiles), CheckpointError> {
    let read = |source| CheckpointError::Read { path: path.into(), source };
    let handle = File::open(path).map_err(read)?;
    // SAFETY: as in `WeightFiles::open`: the mapping is only read, and a file cut short meanwhile is the operator's fault.
    let map = unsafe { Mmap::map(&handle) }.map_err(read)?;
    let wrong = |reason| CheckpointError::Config { path: path.into(), reason };
    let gguf = Gguf::parse(map).map_err(wrong)?;
    let architecture = Architecture::of(&gguf).map_err(wrong)?;
    let folder = describe(&gguf, architecture).map_err(wrong)?;
    let (map, tensors) = gguf.into_parts();
    let heads = |field: &str| folder.config[field].as_i64().filter(|_| architecture.interleaved);
    let (queries, keys) = (heads("num_attention_heads"), heads("num_key_value_heads"));
    let entries = tensors.into_iter().filter_map(|(name, info)| {
        let interleaved = if name.contains(".attn_q.") {
            queries
        } else if name.contains(".attn_k.") {
            keys
        } else {
            None
        };
        Some((architecture.rename(&name)?, info, interleaved))
    });
    let files = WeightFiles::from_gguf(path, map, entries).map_err(wrong)?;
    Ok((folder, files))
}

fn describe(gguf: &Gguf<impl AsRef<[u8]>>, architecture: &Architecture) -> Result<Folder, String> {
    if let Some(parts) = gguf.unsigned("split.count")?.filter(|parts| *parts > 1) {
        return Err(format!("it is one of {parts} parts: merge them into one file (llama-gguf-split --merge)"));
    }
    let config = architecture.config(gguf)?;
    let (tokenizer, tokenizer_config) = vocabulary::tokenizer(gguf)?;
    Ok(Folder { config, generation: settings::generation(gguf)?, tokenizer, tokenizer_config })
}

/// Writes the model in `path` as a folder with its weights in `dtype`. `config.json` comes last: a folder that was left half
/// written does not open. `loaded` is called after each tensor.
pub fn import(path: &Path, folder: &Path, dtype: Dtype, loaded: &mut dyn FnMut(&TensorSpec)) -> Result<(), CheckpointError> {
    let (mut json, files) = open(path)?;
    let checkpoint = Checkpoint::from_gguf(path, &json, files)?;
    let problems = checkpoint.problems();
    if !problems.is_empty() {
        return Err(CheckpointError::Problems(problems));
    }
    let write = |source| CheckpointError::Write { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(write)?;
    // What another model may have left here and would be read in place of what comes.
    for stale in ["config.json", "model.safetensors.index.json", "chat_template.jinja"] {
        match std::fs::remove_file(folder.join(stale)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(write(error)),
            _ => {}
        }
    }
    let placement = Placement { device: Device::Cpu, dtype };
    save_each(&folder.join("model.safetensors"), &manifest(&checkpoint.config), dtype, &mut |spec| {
        let tensor = checkpoint.files.load(&spec.name, placement)?;
        loaded(spec);
        Ok(tensor)
    })?;
    json.config["torch_dtype"] = match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
    }
    .into();
    let parts = [
        ("tokenizer.json", &json.tokenizer),
        ("tokenizer_config.json", &json.tokenizer_config),
        ("generation_config.json", &json.generation),
        ("config.json", &json.config),
    ];
    for (name, value) in parts {
        write_atomically(&folder.join(name), format!("{value:#}\n").as_bytes())?;
    }
    Ok(())
}
