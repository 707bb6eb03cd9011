//! What heads read from their folders share: settings checked against the model, weights checked against the settings.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::weights::WeightFiles;
use crate::checkpoint::{CheckpointError, config};
use crate::model::{ModelError, TensorSpec, linear};
use crate::tensor::{Placement, Tensor};

/// A folder of heads: `config.json` beside its weights.
pub struct Folder {
    path: std::path::PathBuf,
    json: Value,
    files: WeightFiles,
}

impl Folder {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Ok(Self { path: path.into(), json: config::read_json(&path.join("config.json"))?, files: WeightFiles::open(path)? })
    }

    /// A whole number from 1 to `max`.
    pub fn number(&self, field: &str, max: usize) -> Result<usize, CheckpointError> {
        let value = self.json.get(field).and_then(Value::as_u64).and_then(|value| usize::try_from(value).ok());
        match value {
            Some(value) if (1..=max).contains(&value) => Ok(value),
            _ => self.wrong(format!("{field} is missing or not a whole number from 1 to {max}")),
        }
    }

    pub fn flag(&self, field: &str, default: bool) -> bool {
        self.json.get(field).and_then(Value::as_bool).unwrap_or(default)
    }

    pub fn has(&self, field: &str) -> bool {
        self.json.get(field).is_some_and(|value| !value.is_null())
    }

    /// A setting of the drafter that must be the model's own.
    pub fn must_be(&self, field: &str, found: usize, model: usize) -> Result<(), CheckpointError> {
        match found == model {
            true => Ok(()),
            false => self.wrong(format!("{field} is {found}, the model's is {model}: this drafter belongs to another model")),
        }
    }

    pub fn wrong<T>(&self, reason: String) -> Result<T, CheckpointError> {
        Err(CheckpointError::Config { path: self.path.join("config.json"), reason })
    }

    /// Ends with the problems of all `specs` together, if any tensor is missing, misshapen or superfluous.
    pub fn check(&self, specs: &[TensorSpec]) -> Result<(), CheckpointError> {
        let problems = self.files.check(specs);
        if problems.is_empty() { Ok(()) } else { Err(CheckpointError::Problems(problems)) }
    }

    pub fn tensor(&self, name: &str, placement: Placement) -> Result<Tensor, CheckpointError> {
        self.files.load(name, placement)
    }
}

/// Name and shape of one tensor.
pub fn spec(name: impl Into<String>, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), shape: shape.iter().map(|n| *n as i64).collect() }
}

/// A product with an optional bias.
pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        linear(&x.f_to_kind(self.weight.f_kind()?)?, &self.weight, self.bias.as_ref())
    }

    pub fn shallow_clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), bias: self.bias.as_ref().map(Tensor::shallow_clone) }
    }

    /// `x + silu(Wx + b)`, the block that both kinds of heads are made of.
    pub fn residual(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.forward(x)?.f_silu()?.f_add(x)?)
    }

    pub fn bytes(&self) -> usize {
        bytes(&self.weight) + self.bias.as_ref().map_or(0, bytes)
    }
}

pub fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}
