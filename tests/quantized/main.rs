//! Quantised checkpoints: those of other tools (`reading`), and those that `lacuna quantize` writes (`writing`).

#[path = "../common/mod.rs"]
mod common;
mod reading;
mod writing;

use std::path::Path;

use lacuna::checkpoint::CheckpointError;
use lacuna::checkpoint::config::ModelConfig;
use lacuna::checkpoint::quantization::Quantization;
use lacuna::checkpoint::weights::{WeightFiles, WeightSource};
use lacuna::model::quantized::Matrix;
use lacuna::model::{Source, TensorSpec, Transformer, manifest};
use lacuna::tensor::{Placement, Tensor};
use serde_json::Value;

fn json_of(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// A folder with its config changed.
fn open(folder: &Path, change: impl FnOnce(&mut Value)) -> Result<(ModelConfig, WeightFiles), String> {
    let mut json = json_of(folder);
    change(&mut json);
    let config = ModelConfig::from_json(&json)?;
    let quantization = Quantization::from_json(&json, &config)?;
    Ok((config, WeightFiles::open(folder).unwrap().quantized(quantization)))
}

fn network(config: &ModelConfig, files: &WeightFiles) -> Result<Transformer, String> {
    lacuna::tensor::set_threads(1);
    let problems = files.check(&manifest(config));
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    let mut source = WeightSource { files, placement: Placement::CPU_F32, loaded: &mut |_| {} };
    Transformer::new(config, Placement::CPU_F32, 64, &mut source).map_err(|error| error.to_string())
}

fn logits(model: &Transformer, ids: &Tensor) -> Tensor {
    tch::no_grad(|| model.logits(&model.hidden(ids, model.config().attention).unwrap()).unwrap())
}

/// Takes the activations out of a config's schemes.
fn weights_only(json: &mut Value) {
    if let Some(groups) = json["quantization_config"]["config_groups"].as_object_mut() {
        groups.values_mut().for_each(|group| group["input_activations"] = Value::Null);
    }
}

/// A source whose matrices are floats again.
struct Dequantised<'a>(WeightSource<'a>);

impl Source for Dequantised<'_> {
    type Error = CheckpointError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, Self::Error> {
        self.0.tensor(spec)
    }

    fn matrix(&mut self, spec: &TensorSpec) -> Result<Matrix, Self::Error> {
        Ok(Matrix::Plain(self.0.matrix(spec)?.floats()?))
    }
}

/// The network with floats in the place of codes.
fn dequantised(config: &ModelConfig, files: &WeightFiles) -> Transformer {
    lacuna::tensor::set_threads(1);
    assert_eq!(files.check(&manifest(config)), [""; 0]);
    let source = WeightSource { files, placement: Placement::CPU_F32, loaded: &mut |_| {} };
    Transformer::new(config, Placement::CPU_F32, 64, &mut Dequantised(source)).unwrap()
}
