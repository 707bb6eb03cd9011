//! The heads under training: either kind's network on trainable parameters, its first values, and the files that serving loads.
//!
//! The networks are those of [`crate::draft`]; what is added here is how they are unrolled along a known text. It knows nothing of
//! losses or optimisers.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::batches::Step;
use crate::checkpoint::{weights, write_atomically};
use crate::draft::medusa::{self, Medusa};
use crate::draft::redrafter::{self, Redrafter};
use crate::model::{ModelError, Source, TensorSpec, Transformer};
use crate::tensor::{Device, Dtype, Kind, Tensor};
use crate::train::parameters::Parameters;

/// Which heads, and of what size.
#[derive(Clone, Copy, Debug)]
pub enum Settings {
    Redrafter(redrafter::Settings),
    Medusa(medusa::Settings),
}

impl Settings {
    pub fn name(self) -> &'static str {
        match self {
            Self::Redrafter(_) => "redrafter",
            Self::Medusa(_) => "medusa",
        }
    }

    fn manifest(self) -> Vec<TensorSpec> {
        match self {
            Self::Redrafter(settings) => settings.manifest(),
            Self::Medusa(settings) => settings.manifest(),
        }
    }

    /// What `config.json` says.
    fn config(self, vocab_size: usize) -> Value {
        match self {
            Self::Redrafter(settings) => {
                let mut config = json!({
                    "architectures": ["Drafter"],
                    "model_type": "recurrent_drafting_drafter",
                    "hidden_size": settings.hidden_size,
                    "vocab_size": vocab_size,
                    "exit_dim": settings.exit_dim,
                    "num_draft_layers": settings.layers,
                    "rnn": settings.recurrent,
                });
                if settings.trimmed {
                    config["draft_vocab_size"] = settings.rows.into();
                }
                config
            }
            Self::Medusa(settings) => json!({
                "hidden_size": settings.hidden_size,
                "vocab_size": vocab_size,
                "medusa_num_heads": settings.heads,
                "medusa_num_layers": settings.layers,
            }),
        }
    }
}

/// Heads and what they are trained by.
pub struct Heads {
    pub settings: Settings,
    pub parameters: Parameters,
    /// The token of each of the head's rows, ascending, where they are a part of the vocabulary.
    pub tokens: Option<Tensor>,
    /// In which the networks run; parameters and optimiser stay in f32.
    dtype: Dtype,
}

/// Trainable parameters, and beside them the table of a trimmed vocabulary, which nothing trains.
struct HeadSource<'a> {
    parameters: &'a mut Parameters,
    offsets: Option<Tensor>,
    dtype: Dtype,
}

impl Source for HeadSource<'_> {
    type Error = ModelError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
        match &self.offsets {
            Some(offsets) if spec.name == "d2t" => Ok(offsets.shallow_clone()),
            _ => Ok(self.parameters.tensor(spec)?.f_to_kind(self.dtype.kind())?),
        }
    }
}

impl Heads {
    /// Heads that run in the teacher's type. Blocks that change nothing at first, and the teacher's own vocabulary head behind Medusa's and behind a ReDrafter's that is
    /// as wide; all else is drawn, narrower where more is summed.
    pub fn new(settings: Settings, teacher: &Transformer, tokens: Option<&[i64]>, seed: u64) -> Result<Self> {
        let tokens = tokens.map(Tensor::f_from_slice).transpose()?;
        let (kind, device, dtype) = (Kind::Float, Device::Cpu, teacher.placement().dtype);
        let width = teacher.config().hidden_size as i64;
        // The head's logits of the unit vectors are its columns.
        let unit = Tensor::f_eye(width, (kind, device))?.f_to_kind(dtype.kind())?;
        let own = tch::no_grad(|| teacher.logits(&unit))?.f_to_kind(kind)?.f_transpose(0, 1)?.f_contiguous()?;
        let own = if let Some(tokens) = &tokens { own.f_index_select(0, tokens)? } else { own };
        let initial = |TensorSpec { name, shape }: &TensorSpec| -> Result<Tensor> {
            Ok(match **shape {
                _ if name.ends_with(".linear.weight") => Tensor::f_zeros(shape, (kind, device))?,
                [_] => Tensor::f_zeros(shape, (kind, device))?,
                _ if own.size() == *shape && !name.starts_with("rnn") => own.f_detach_copy()?,
                [.., inputs] => Tensor::f_randn(shape, (kind, device))?.f_mul_scalar(1.0 / (inputs as f64).sqrt())?,
                [] => Tensor::f_zeros(shape, (kind, device))?,
            })
        };
        let specs: Vec<_> = settings.manifest().into_iter().filter(|spec| spec.name != "d2t").collect();
        Ok(Self { settings, parameters: Parameters::from_specs(&specs, seed, initial)?, tokens, dtype })
    }

    /// How far each row's token lies behind its row.
    fn offsets(&self) -> Result<Option<Tensor>> {
        let offset = |tokens: &Tensor| -> Result<Tensor> {
            Ok(tokens.f_sub(&Tensor::f_arange(tokens.size()[0], (Kind::Int64, Device::Cpu))?)?)
        };
        self.tokens.as_ref().map(offset).transpose()
    }

    /// Logits of each of `steps`, `[live, head rows]`, from the teacher's states at the contexts, `[contexts, hidden]`. Each step
    /// sees the text's tokens, as it will those that it has drafted rightly.
    pub fn logits(&self, teacher: &Transformer, contexts: &Tensor, steps: &[Step]) -> Result<Vec<Tensor>> {
        let mut parameters = self.parameters.shallow_clone();
        let mut source = HeadSource { parameters: &mut parameters, offsets: self.offsets()?, dtype: self.dtype };
        let mut all = Vec::with_capacity(steps.len());
        match self.settings {
            Settings::Redrafter(settings) => {
                let head = Redrafter::new(settings, &mut source)?;
                let mut state: Option<Tensor> = None;
                for step in steps {
                    let before = state.map(|state| state.f_narrow(0, 0, step.live)).transpose()?;
                    let now = head.advance(&Redrafter::embed(teacher, &step.seen)?, before.as_ref())?;
                    all.push(head.logits(&contexts.f_narrow(0, 0, step.live)?, &now)?);
                    state = Some(now);
                }
            }
            Settings::Medusa(settings) => {
                let heads = Medusa::new(settings, &mut source)?;
                for (index, step) in steps.iter().enumerate().take(heads.heads()) {
                    all.push(heads.logits(index, &contexts.f_narrow(0, 0, step.live)?)?);
                }
            }
        }
        Ok(all)
    }

    /// Writes `config.json` and the weights where [`crate::draft::Drafters::load`] looks for them.
    pub fn save(&self, folder: &Path, vocab_size: usize) -> Result<()> {
        let config = serde_json::to_vec_pretty(&self.settings.config(vocab_size))?;
        let offsets = self.offsets()?;
        let tensor = |spec: TensorSpec| -> Result<(String, Tensor)> {
            let tensor = match (spec.name.as_str(), &offsets) {
                ("d2t", Some(offsets)) => offsets.shallow_clone(),
                (name, _) => self.parameters.get(name)?.shallow_clone(),
            };
            Ok((spec.name, tensor))
        };
        let mut tensors = self.settings.manifest().into_iter().map(tensor).collect::<Result<Vec<_>>>()?;
        // Whole numbers of eight bytes each stand before the halves, on their boundaries.
        tensors.sort_by_key(|(name, _)| name != "d2t");
        std::fs::create_dir_all(folder).context("cannot create the heads' folder")?;
        write_atomically(&folder.join("config.json"), &config)?;
        Ok(weights::save(&folder.join("model.safetensors"), &tensors, Dtype::F16)?)
    }
}
