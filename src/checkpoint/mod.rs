//! Model folders in the Hugging Face layout, and GGUF files: settings, tokenizer, chat template and weights, checked before
//! anything is served.
//!
//! [`Checkpoint::open`] reads everything but the weights' bytes; [`Checkpoint::load`] builds the network. It knows the families
//! only through their data ([`crate::model::family`]) and nothing of decoding.

pub mod chat;
pub mod config;
pub mod gguf;
pub mod quantization;
pub mod tokenizer;
pub mod weights;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::model::quantized::{Quantizing, Scheme};
use crate::model::{ModelError, TensorSpec, Transformer, manifest};
use crate::tensor::{Placement, TchError};
use chat::ChatTemplate;
use config::{GenerationConfig, ModelConfig};
use quantization::Quantization;
use tokenizer::Tokenizer;
use weights::{WeightFiles, WeightSource};

/// A model folder or file cannot be used, and why.
#[derive(Debug, Error)]
pub enum CheckpointError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path}: {reason}")]
    Config { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Weights { path: PathBuf, reason: String },
    #[error("the checkpoint does not fit its config: {}", summary(.0))]
    Problems(Vec<String>),
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<TchError> for CheckpointError {
    fn from(error: TchError) -> Self {
        Self::Model(error.into())
    }
}

fn summary(problems: &[String]) -> String {
    let shown = problems.iter().take(5).cloned().collect::<Vec<_>>().join("; ");
    if problems.len() > 5 { format!("{shown}; and {} more", problems.len() - 5) } else { shown }
}

/// What a model at `path` is called: its folder's or file's name.
pub fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

/// An opened model folder or GGUF file.
pub struct Checkpoint {
    pub path: PathBuf,
    pub config: ModelConfig,
    pub generation: GenerationConfig,
    pub tokenizer: Tokenizer,
    pub files: WeightFiles,
    /// The mask token, or why this model has none.
    pub mask_token_id: Result<u32, String>,
}

impl Checkpoint {
    /// Reads settings, tokenizer and weight headers of a folder, or of a GGUF file if `path` is a file. What opens may still
    /// have [`Checkpoint::problems`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if path.is_file() {
            let (json, files) = gguf::open(path)?;
            Self::from_gguf(path, &json, files)
        } else {
            Self::open_folder(path)
        }
    }

    fn open_folder(folder: &Path) -> Result<Self, CheckpointError> {
        let json = config::read_json(&folder.join("config.json"))?;
        let config = ModelConfig::from_json(&json)
            .map_err(|reason| CheckpointError::Config { path: folder.join("config.json"), reason })?;
        let quantization = Quantization::from_json(&json, &config)
            .map_err(|reason| CheckpointError::Config { path: folder.join("config.json"), reason })?;
        let generation = GenerationConfig::read(folder, &json)?;
        let tokenizer = Tokenizer::open(folder)?;
        let files = WeightFiles::open(folder)?.quantized(quantization);
        let mask_token_id = mask_token_id(&config, &tokenizer);
        Ok(Self { path: folder.into(), config, generation, tokenizer, files, mask_token_id })
    }

    fn from_gguf(path: &Path, json: &gguf::Folder, files: WeightFiles) -> Result<Self, CheckpointError> {
        let wrong = |reason| CheckpointError::Config { path: path.into(), reason };
        let config = ModelConfig::from_json(&json.config).map_err(wrong)?;
        let generation = GenerationConfig::from_json(&json.generation, &json.config).map_err(wrong)?;
        let tokenizer = Tokenizer::new(json.tokenizer.to_string().as_bytes(), &json.tokenizer_config).map_err(wrong)?;
        let tokenizer = tokenizer.with_chat(ChatTemplate::from_settings(&json.tokenizer_config).map_err(wrong)?);
        let mask_token_id = mask_token_id(&config, &tokenizer);
        Ok(Self { path: path.into(), config, generation, tokenizer, files, mask_token_id })
    }

    /// A short name for the model: its folder's, or its file's without the ending.
    pub fn name(&self) -> String {
        name_of(&self.path)
    }

    /// Everything that keeps this model from being served, each naming what is wrong.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.files.check(&manifest(&self.config));
        let (tokens, rows) = (self.tokenizer.size(), self.config.vocab_size);
        if tokens > rows {
            problems.push(format!("the tokenizer has {tokens} tokens, the embedding only {rows} rows"));
        }
        if let Some(id) = self.generation.eos_token_ids.iter().find(|id| **id as usize >= rows) {
            problems.push(format!("eos_token_id = {id} is outside the vocabulary of {rows}"));
        }
        if let Ok(mask) = self.mask_token_id
            && self.generation.eos_token_ids.contains(&mask)
        {
            problems.push(format!("token {mask} is both the mask and an end-of-text: no text could end"));
        }
        problems
    }

    /// Bytes of the network when it is loaded in `placement`, but for padding.
    pub fn loaded_bytes(&self, placement: Placement) -> usize {
        let specs = manifest(&self.config);
        let matrices = specs.iter().skip(1).map(|spec| self.files.loaded_bytes(spec, placement)).sum::<usize>();
        // The first is the embedding, which is looked up as floats; a head that is tied to it may be held again.
        specs.first().map_or(matrices, |embedding| {
            let floats = embedding.shape.iter().product::<i64>() as usize * placement.dtype.size();
            let head = self.files.loaded_bytes(embedding, placement);
            matrices + floats + if self.config.tied && head != floats { head } else { 0 }
        })
    }

    /// Builds the network in `placement` with a context of at most `positions`. `loaded` is called after each tensor.
    pub fn load(
        &self,
        placement: Placement,
        positions: usize,
        loaded: &mut dyn FnMut(&TensorSpec),
    ) -> Result<Transformer, CheckpointError> {
        self.load_as(None, placement, positions, loaded)
    }

    /// Likewise, with the projections that are stored as floats quantised on the way.
    pub fn load_as(
        &self,
        quantize: Option<Scheme>,
        placement: Placement,
        positions: usize,
        loaded: &mut dyn FnMut(&TensorSpec),
    ) -> Result<Transformer, CheckpointError> {
        let problems = self.problems();
        if !problems.is_empty() {
            return Err(CheckpointError::Problems(problems));
        }
        let mut source = WeightSource { files: &self.files, placement, loaded };
        tch::no_grad(|| match quantize {
            None => Transformer::new(&self.config, placement, positions, &mut source),
            Some(scheme) => Transformer::new(&self.config, placement, positions, &mut Quantizing { source, scheme }),
        })
    }
}

/// The config's word counts first, then the tokenizer's, then the family's; what is found must be a row of the embedding.
fn mask_token_id(config: &ModelConfig, tokenizer: &Tokenizer) -> Result<u32, String> {
    let found = config.mask_token_id.or(tokenizer.mask_token_id()).or(config.family.mask_token_id);
    match found {
        Some(id) if (id as usize) < config.vocab_size => Ok(id),
        Some(id) => Err(format!("its mask token {id} is outside the vocabulary of {}", config.vocab_size)),
        None => {
            Err(format!("neither config.json nor the tokenizer nor the family ({}) names a mask token", config.family.name))
        }
    }
}

/// Writes a file so that a crash leaves the old one or the new one, never half of it.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let fail = |source| CheckpointError::Write { path: path.into(), source };
    write_atomically_with(path, |file| file.write_all(bytes).map_err(fail))
}

/// Likewise, with what `write` writes.
fn write_atomically_with(
    path: &Path,
    write: impl FnOnce(&mut dyn weights::WriteSeek) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let fail = |source| CheckpointError::Write { path: path.into(), source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Temporary files are private by default; this one becomes a file like any other, so the umask decides.
    let mode = std::fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder).map_err(fail)?;
    write(&mut file)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}
