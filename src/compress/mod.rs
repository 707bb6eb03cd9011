//! Writing a checkpoint in fewer bits, as a folder that this loader and others' tools read: compressed-tensors' convention, and
//! DeepSeek's for blocks.
//!
//! One matrix after the other is read, quantised and written, so that no second model is in memory. What codes mean is
//! [`crate::model::quantized`]'s, how they lie in tensors [`crate::checkpoint::quantization`]'s; what became of the model is for
//! others to measure.

mod settings;

use std::path::{Path, PathBuf};

use safetensors::Dtype as StoredType;

use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::quantization::{Form, Layout, projections, tensors};
use crate::checkpoint::weights::{Sink, Slot, save_slots, stored_as};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::model::quantized::{Activations, Codes, Matrix, Quantized, Scheme, Sharing};
use crate::model::{TensorSpec, manifest};
use crate::tensor::{Dtype, Kind, Placement, Tensor};

/// Sizes of groups that kernels elsewhere have, the cheapest first.
const GROUPS: [usize; 3] = [128, 64, 32];
/// Numbers of a matrix that are quantised at a time: searching for scales takes several copies of them in f32.
const AT_A_TIME: i64 = 1 << 24;

/// What is to become of the vocabulary head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Floats, as the embedding.
    Kept,
    /// int8 by rows. A head that is the embedding becomes weights of its own.
    Int8,
}

/// How a model is quantised.
#[derive(Clone, Debug)]
pub struct Plan {
    pub scheme: Scheme,
    pub head: Head,
    /// Of what is not quantised.
    pub floats: Dtype,
    /// Matrices to quantise, with the head in place of the embedding where it becomes weights of its own.
    forms: Vec<(TensorSpec, Form)>,
    /// The embedding that becomes the head, and what the head is called.
    untied: Option<(String, TensorSpec)>,
}

/// What was written.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    pub matrices: usize,
    /// Norm of what all quantised weights lost, over their norm.
    pub error: f64,
}

/// The form in which a scheme is stored.
fn form(scheme: Scheme) -> Form {
    let layout = match scheme {
        Scheme { codes: Codes::Int4, .. } => Layout::Packed(4),
        // Other tools look for weights alone of eight bits in words.
        Scheme { codes: Codes::Int8, activations: Activations::Kept, .. } => Layout::Packed(8),
        Scheme { sharing: Sharing::Block(_), .. } => Layout::DeepSeek,
        _ => Layout::Elements,
    };
    Form { scheme, layout, whole: false }
}

impl Plan {
    /// `group` is the length of a group of int4; unset, the largest usual one that divides every matrix. `head` unset is quantised
    /// beside whole numbers.
    pub fn new(
        checkpoint: &Checkpoint,
        scheme: Scheme,
        group: Option<usize>,
        head: Option<Head>,
        floats: Dtype,
    ) -> Result<Self, String> {
        let config = &checkpoint.config;
        if checkpoint.files.quantization().is_some() {
            return Err(format!("{} is quantised already: name the model that it was made of", checkpoint.path.display()));
        }
        let mut scheme = scheme.storable();
        if let Sharing::Group(_) = scheme.sharing {
            let length = group_length(config, group)?;
            scheme.sharing = Sharing::Group(length);
            // Their groups are those of the weights, for their sums to be.
            if let Activations::Groups(_) = scheme.activations {
                scheme.activations = Activations::Groups(length);
            }
        } else if group.is_some() {
            return Err(format!("--group goes with int4: {scheme} has none"));
        }
        let head = head.unwrap_or(if scheme.codes == Codes::E4m3 { Head::Kept } else { Head::Int8 });
        if head == Head::Int8 && matches!(scheme.sharing, Sharing::Block(_)) {
            return Err("the convention of fp8-block has no quantised head: take --head keep, or --to fp8".into());
        }
        let names = config.family.names;
        let name = format!("{}.weight", names.head);
        let mut forms: Vec<_> = projections(config).into_iter().map(|spec| (spec, form(scheme))).collect();
        forms.retain(|(spec, _)| spec.name != name);
        let spec = TensorSpec { name, shape: vec![config.vocab_size as i64, config.hidden_size as i64] };
        let mut untied = None;
        if head == Head::Int8 {
            forms.push((spec.clone(), form(head_scheme(scheme))));
            untied = config.tied.then(|| (format!("{}.weight", names.embedding), spec));
        }
        Ok(Self { scheme, head, floats, forms, untied })
    }

    fn form(&self, name: &str) -> Option<&Form> {
        self.forms.iter().find(|(spec, _)| spec.name == name).map(|(_, form)| form)
    }

    /// All tensors of the model as it will be.
    fn specs(&self, config: &ModelConfig) -> Vec<TensorSpec> {
        manifest(config).into_iter().chain(self.untied.iter().map(|(_, spec)| spec.clone())).collect()
    }

    /// The places of these in the file, those of large numbers first: each begins at a multiple of its numbers' size.
    fn slots(&self, specs: &[TensorSpec]) -> Vec<Slot> {
        let floats = stored_as(self.floats);
        let slots = specs.iter().flat_map(|spec| match self.form(&spec.name) {
            None => vec![Slot { name: spec.name.clone(), shape: spec.shape.clone(), stored: floats }],
            Some(form) => {
                let parts = form.parts(spec).into_iter().enumerate();
                let stored = |(at, types): (usize, &[StoredType])| {
                    if at == 1 { stored_as(scale_type(form, self.floats)) } else { types[0] }
                };
                parts
                    .map(|(at, part)| Slot { stored: stored((at, part.types)), shape: part.shapes[0].clone(), name: part.name })
                    .collect()
            }
        });
        let mut slots: Vec<_> = slots.collect();
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.stored.bitsize()));
        slots
    }
}

/// A head of eight bits beside matrices of a scheme.
fn head_scheme(scheme: Scheme) -> Scheme {
    match scheme.activations {
        Activations::Kept => Scheme::INT8_WEIGHT_ONLY,
        Activations::Rows => Scheme::INT8_DYNAMIC,
        Activations::Groups(_) | Activations::Mixed(_) => Scheme::INT8.storable(),
    }
}

/// A scale of few weights is stored in 16 bits as they would be; those of many are few, and exact.
fn scale_type(form: &Form, floats: Dtype) -> Dtype {
    if matches!(form.scheme.sharing, Sharing::Group(_)) { floats } else { Dtype::F32 }
}

/// `asked`, or the longest usual group, so that every matrix has whole ones: other tools have no others.
fn group_length(config: &ModelConfig, asked: Option<usize>) -> Result<usize, String> {
    let matrices = projections(config);
    let ragged = |length: usize| matrices.iter().find(|spec| spec.shape[1] % length.max(1) as i64 != 0);
    match asked {
        Some(length) => match ragged(length) {
            _ if length < 8 => {
                Err(format!("groups of {length} weights would take more for scales than for codes: use 8 or more"))
            }
            Some(spec) => {
                Err(format!("tensor {} has {} inputs, which are no whole groups of {length}", spec.name, spec.shape[1]))
            }
            None => Ok(length),
        },
        None => GROUPS.into_iter().find(|length| ragged(*length).is_none()).ok_or_else(|| {
            format!("no group of {GROUPS:?} weights divides the inputs of every matrix: name another with --group, or use int8")
        }),
    }
}

/// Writes `checkpoint` into `folder` as `plan` says. `config.json` comes last: a folder that was left half written does not open.
/// `done` is called after each tensor.
pub fn write(
    checkpoint: &Checkpoint,
    folder: &Path,
    plan: &Plan,
    done: &mut dyn FnMut(&TensorSpec),
) -> Result<Written, CheckpointError> {
    let problems = checkpoint.problems();
    if !problems.is_empty() {
        return Err(CheckpointError::Problems(problems));
    }
    settings::begin(folder)?;
    let specs = plan.specs(&checkpoint.config);
    let mut tally = Tally::default();
    save_slots(&weights_file(folder), &plan.slots(&specs), &mut |sink| {
        for spec in &specs {
            let source = match &plan.untied {
                Some((embedding, head)) if head.name == spec.name => embedding,
                _ => &spec.name,
            };
            let read = |dtype| checkpoint.files.load(source, Placement { dtype, ..Placement::CPU_F32 });
            match plan.form(&spec.name) {
                None => sink.put(&spec.name, &read(plan.floats)?)?,
                Some(form) => quantise(&read(Dtype::F32)?, spec, form, plan.floats, sink, &mut tally)?,
            }
            done(spec);
        }
        Ok(())
    })?;
    settings::finish(checkpoint, folder, plan)?;
    Ok(Written { matrices: plan.forms.len(), error: (tally.lost / tally.all.max(f64::MIN_POSITIVE)).sqrt() })
}

pub fn weights_file(folder: &Path) -> PathBuf {
    folder.join("model.safetensors")
}

/// Sums of squares.
#[derive(Default)]
struct Tally {
    lost: f64,
    all: f64,
}

fn quantise(
    weight: &Tensor,
    spec: &TensorSpec,
    form: &Form,
    floats: Dtype,
    sink: &mut Sink,
    tally: &mut Tally,
) -> Result<(), CheckpointError> {
    let (outputs, inputs) = weight.size2()?;
    let (rows, _) = form.scheme.grid(inputs as usize);
    let step = ((AT_A_TIME / inputs.max(1)).max(1) as usize).next_multiple_of(rows) as i64;
    let scale_type = scale_type(form, floats);
    let mut pieces = vec![];
    for first in (0..outputs).step_by(step as usize) {
        let piece = weight.f_narrow(0, first, step.min(outputs - first))?;
        let mut quantized = Quantized::of(&piece, form.scheme)?;
        // What counts is what will be read.
        quantized.scales = quantized.scales.f_to_kind(scale_type.kind())?.f_to_kind(Kind::Float)?;
        let lost = quantized.dequantized(Kind::Float)?.f_sub(&piece)?;
        let squares =
            |x: &Tensor| -> Result<f64, CheckpointError> { Ok(x.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?) };
        tally.lost += squares(&lost)?;
        tally.all += squares(&piece)?;
        pieces.push(Matrix::Quantized(quantized));
    }
    let Matrix::Quantized(quantized) = Matrix::join(pieces, Kind::Float)? else {
        return Err(CheckpointError::Problems(vec![format!("tensor {} has no rows", spec.name)]));
    };
    let stored = tensors::write(&quantized, form, scale_type.kind())?;
    form.parts(spec).iter().zip(&stored).try_for_each(|(part, tensor)| sink.put(&part.name, tensor))
}
