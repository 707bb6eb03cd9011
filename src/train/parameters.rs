//! A model's trainable tensors, the AdamW that moves them, and the file that lets a killed run go on.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::progress::Progress;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::weights::{WeightFiles, save as save_tensors};
use crate::model::{ModelError, Source, TensorSpec, manifest, manifest_as};
use crate::tensor::{Device, Dtype, Kind, Placement, Tensor, seeded};

/// Gradients longer than this are scaled down to it.
const CLIP_NORM: f64 = 1.0;

/// The f32 parameters by name. As a [`Source`] it hands out its projections in the training dtype, so that products run in
/// bf16 while the residual stream, the norms and the embedding stay in f32.
pub struct Parameters {
    tensors: BTreeMap<String, Tensor>,
    embedding: String,
    dtype: Dtype,
}

impl Parameters {
    /// Normal initialisation with σ = 0.02, the projections back into the residual stream shrunk by √(2 · layers) (GPT-2).
    pub fn new(config: &ModelConfig, dtype: Dtype, seed: u64) -> Result<Self> {
        let names = config.family.names;
        let into_residual = [format!("{}.weight", names.output), format!("{}.weight", names.down)];
        let deviation = |name: &str| {
            let inner = into_residual.iter().any(|end| name.ends_with(&format!(".{end}")));
            if inner { 0.02 / (2.0 * config.layers as f64).sqrt() } else { 0.02 }
        };
        let initial = |TensorSpec { name, shape }: &TensorSpec| {
            let options = (Kind::Float, Device::Cpu);
            Ok(match shape.len() {
                1 => Tensor::f_ones(shape, options)?,
                _ => Tensor::f_randn(shape, options)?.f_mul_scalar(deviation(name))?,
            })
        };
        let tensors = Self::from_specs(&manifest(config), seed, initial)?;
        Ok(Self { embedding: format!("{}.weight", names.embedding), dtype, ..tensors })
    }

    /// One parameter, in f32 throughout, for each of `specs`; `initial` may draw from libtorch's generator, which is seeded.
    pub fn from_specs(specs: &[TensorSpec], seed: u64, initial: impl Fn(&TensorSpec) -> Result<Tensor>) -> Result<Self> {
        let _generator = seeded(seed);
        let tensor = |spec: &TensorSpec| Ok((spec.name.clone(), initial(spec)?.f_set_requires_grad(true)?));
        let tensors = specs.iter().map(tensor).collect::<Result<_>>()?;
        Ok(Self { tensors, embedding: String::new(), dtype: Dtype::F32 })
    }

    /// Takes all of them to a device, before anything is made of them.
    pub fn move_to(&mut self, device: Device) -> Result<()> {
        for tensor in self.tensors.values_mut() {
            *tensor = tensor.f_detach()?.f_to_device(device)?.f_set_requires_grad(true)?;
        }
        Ok(())
    }

    /// Where they are.
    pub fn device(&self) -> Device {
        self.tensors.values().next().map_or(Device::Cpu, Tensor::device)
    }

    /// Begins with another model's weights, by what they are for rather than by name. Where this network normalises queries and
    /// keys and the other does not, the norms begin with the length that they can be expected to have: a projection of inputs of
    /// unit variance, scaled by the norm before it, has its own root mean square over all rows.
    pub fn take_over(&mut self, config: &ModelConfig, from: &Checkpoint) -> Result<()> {
        let names = config.family.names;
        let ours = manifest_as(&from.config, names);
        for (spec, theirs) in ours.iter().zip(manifest(&from.config)) {
            let stored = from.files.load(&theirs.name, Placement::CPU_F32)?;
            let Some(tensor) = self.tensors.get_mut(&spec.name) else { continue };
            ensure!(stored.size() == tensor.size(), "--from has another shape for {}: give it the same sizes", theirs.name);
            tch::no_grad(|| tensor.f_copy_(&stored))?;
        }
        if !config.family.qk_norm || from.config.family.qk_norm {
            return Ok(());
        }
        for layer in 0..config.layers {
            let name = |part: &str| format!("{}.{part}.weight", names.layer.replace("{}", &layer.to_string()));
            for (projection, norm) in [(names.query, names.query_norm), (names.key, names.key_norm)] {
                let scaled = self.get(&name(projection))?.f_mul(self.get(&name(names.attention_norm))?)?;
                let length = scaled.f_square()?.f_sum_dim_intlist(1, false, Kind::Float)?.f_mean(Kind::Float)?.f_sqrt()?;
                let length = length.f_double_value(&[])?;
                let norm = self.tensors.get_mut(&name(norm)).context("no norm of the queries")?;
                let _ = tch::no_grad(|| norm.f_fill_(length))?;
            }
        }
        Ok(())
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("no parameter {name}"))
    }

    /// The same tensors under another handle.
    pub fn shallow_clone(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Self { tensors, embedding: self.embedding.clone(), dtype: self.dtype }
    }
}

impl Source for Parameters {
    type Error = ModelError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
        let tensor = &self.tensors[&spec.name];
        if spec.shape.len() == 1 || spec.name == self.embedding {
            return Ok(tensor.shallow_clone());
        }
        Ok(tensor.f_to_kind(self.dtype.kind())?)
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with decay on matrices only and a clipped global gradient norm.
pub struct AdamW {
    mean: BTreeMap<String, Tensor>,
    square: BTreeMap<String, Tensor>,
    steps: i32,
    decay: f64,
}

impl AdamW {
    const BETA: (f64, f64) = (0.9, 0.98);
    const EPSILON: f64 = 1e-9;

    pub fn new(parameters: &Parameters, decay: f64) -> Result<Self> {
        let zeros = || -> Result<BTreeMap<String, Tensor>> {
            let zero = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.f_detach()?.f_zeros_like()?));
            parameters.tensors.iter().map(zero).collect()
        };
        Ok(Self { mean: zeros()?, square: zeros()?, steps: 0, decay })
    }

    /// Moves every parameter along its gradient and clears the gradients.
    pub fn step(&mut self, parameters: &mut Parameters, rate: f64) -> Result<()> {
        self.steps += 1;
        let (beta1, beta2) = Self::BETA;
        let correction1 = 1.0 - beta1.powi(self.steps);
        let correction2 = (1.0 - beta2.powi(self.steps)).sqrt();
        tch::no_grad(|| {
            let mut squares = Vec::with_capacity(parameters.tensors.len());
            for tensor in parameters.tensors.values() {
                squares.push(tensor.f_grad()?.f_square()?.f_sum(Kind::Float)?);
            }
            let norm = Tensor::f_stack(&squares, 0)?.f_sum(Kind::Float)?.f_double_value(&[])?.sqrt();
            let scale = (CLIP_NORM / (norm + 1e-6)).min(1.0);
            for (name, tensor) in &mut parameters.tensors {
                let gradient = tensor.f_grad()?.f_mul_scalar(scale)?;
                let (mean, square) = match (self.mean.get_mut(name), self.square.get_mut(name)) {
                    (Some(mean), Some(square)) => (mean, square),
                    _ => anyhow::bail!("the optimiser has no state for {name}"),
                };
                let _ = mean.f_mul_scalar_(beta1)?.f_add_(&gradient.f_mul_scalar(1.0 - beta1)?)?;
                let _ = square.f_mul_scalar_(beta2)?.f_addcmul_(&gradient, &gradient.f_mul_scalar(1.0 - beta2)?)?;
                if tensor.dim() > 1 {
                    let _ = tensor.f_mul_scalar_(1.0 - rate * self.decay)?;
                }
                let denominator = square.f_sqrt()?.f_div_scalar_(correction2)?.f_add_scalar_(Self::EPSILON)?;
                let _ = tensor.f_addcdiv_(&mean.f_mul_scalar(-rate / correction1)?, &denominator)?;
                tensor.zero_grad();
            }
            Ok(())
        })
    }
}

/// Writes weights, optimiser and progress as one safetensors file.
pub fn save(path: &Path, parameters: &Parameters, optimizer: &AdamW, progress: Progress) -> Result<()> {
    let mut tensors = Vec::new();
    for (kind, map) in [("parameter", &parameters.tensors), ("mean", &optimizer.mean), ("square", &optimizer.square)] {
        tensors.extend(map.iter().map(|(name, tensor)| (format!("{kind}.{name}"), tensor.shallow_clone())));
    }
    // Progress travels inside the tensor file, so that the two can never disagree after a kill.
    let numbers = [progress.step as f64, progress.tokens as f64, progress.seconds, f64::from(optimizer.steps)];
    let words: Vec<f32> = numbers.iter().flat_map(|n| [(n / 65_536.0).floor() as f32, (n % 65_536.0) as f32]).collect();
    tensors.push(("progress".into(), Tensor::f_from_slice(&words)?));
    Ok(save_tensors(path, &tensors, Dtype::F32)?)
}

/// Restores what [`save`] wrote, if it is there.
pub fn resume(path: &Path, parameters: &mut Parameters, optimizer: &mut AdamW) -> Result<Option<Progress>> {
    if !path.exists() {
        return Ok(None);
    }
    // The loader reads `model.safetensors` of a folder; the state is such a file under another name.
    let folder = tempfile::tempdir()?;
    std::fs::hard_link(path, folder.path().join("model.safetensors"))
        .or_else(|_| std::fs::copy(path, folder.path().join("model.safetensors")).map(|_| ()))
        .context("cannot open the training state")?;
    let files = WeightFiles::open(folder.path())?;
    tch::no_grad(|| {
        for (kind, map) in
            [("parameter", &mut parameters.tensors), ("mean", &mut optimizer.mean), ("square", &mut optimizer.square)]
        {
            for (name, tensor) in map {
                let stored = files.load(&format!("{kind}.{name}"), Placement::CPU_F32)?;
                ensure!(stored.size() == tensor.size(), "the training state holds another shape for {name}: remove {path:?}");
                tensor.f_copy_(&stored)?;
            }
        }
        anyhow::Ok(())
    })?;
    let words: Vec<f32> = Vec::try_from(&files.load("progress", Placement::CPU_F32)?)?;
    ensure!(words.len() == 8, "the training state's progress is broken: remove {path:?}");
    let number = |at: usize| f64::from(words[2 * at]) * 65_536.0 + f64::from(words[2 * at + 1]);
    optimizer.steps = number(3) as i32;
    Ok(Some(Progress { step: number(0) as u64, tokens: number(1) as u64, seconds: number(2) }))
}
