//! The transformer: one stack for every dense family, whose differences are data ([`family::Family`]).
//!
//! [`Transformer::forward`] runs the new tokens of any number of sequences, each over what a [`cache::KvCache`] holds of it, to final
//! hidden states; [`Transformer::hidden`] does so for whole sequences of one length, with gradients where they are wanted.
//! [`Transformer::logits`] turns chosen rows of either into logits; the split is what lets decoding pay the vocabulary head for
//! wanted rows only. Weights come from any [`Source`] (a
//! checkpoint, random numbers, a trainer's parameters), and autograd flows through, so training and serving run the same code.
//! The stack knows nothing of sampling, canvases or requests.

mod apart;
mod at_once;
mod attend;
pub mod blocks;
pub mod cache;
pub mod family;
pub mod forward;
mod graphs;
pub mod linear;
pub mod quantized;
pub mod rotary;
pub mod statistics;

use thiserror::Error;

use crate::checkpoint::config::ModelConfig;
use crate::tensor::fused::Fused;
use crate::tensor::kernels::{self, fixed::Fixed};
use crate::tensor::{Device, Dtype, Kind, Placement, TchError, Tensor, flash, pages};
use family::{Attention, Names};
use linear::{Linear, bytes, join};
use quantized::{Matrix, Scheme};
use rotary::{Rotary, rotate};

pub use forward::{Layout, Segment};
pub use graphs::Graphs;
pub use linear::linear;

/// A forward pass could not be run.
#[derive(Debug, Error)]
pub enum ModelError {
    #[error("{length} tokens exceed the model's context of {limit}")]
    TooLong { length: usize, limit: usize },
    #[error("{needed} positions exceed the cache's room for {capacity}")]
    CacheFull { needed: usize, capacity: usize },
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange { id: i64, vocab_size: usize },
    #[error("the model produced logits that are not finite")]
    NotFinite,
    #[error("the device has no memory left: {0}")]
    OutOfMemory(String),
    #[error("libtorch: {0}")]
    Torch(String),
}

impl From<TchError> for ModelError {
    /// libtorch appends its C++ stack to every message; its first line says what went wrong.
    fn from(error: TchError) -> Self {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default().trim_start_matches("Internal torch error: ");
        // What the allocators of CUDA and of the CPU say.
        let memory = ["out of memory", "can't allocate memory", "not enough memory"].iter().any(|words| text.contains(words));
        if memory { Self::OutOfMemory(line.into()) } else { Self::Torch(line.into()) }
    }
}

/// Name and shape of one tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<i64>,
}

/// Where a model's tensors come from, by name. What comes must have the shape that the [`manifest`] says.
pub trait Source {
    type Error: From<ModelError>;
    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, Self::Error>;

    /// The weight of a projection, which may be quantised.
    fn matrix(&mut self, spec: &TensorSpec) -> Result<Matrix, Self::Error> {
        Ok(Matrix::Plain(self.tensor(spec)?))
    }

    /// The vocabulary head, stored as `spec` says. Where that is the `embedding`, which is given then, `None` leaves it to that as it lies.
    fn head(&mut self, spec: &TensorSpec, embedding: Option<&Tensor>) -> Result<Option<Matrix>, Self::Error> {
        if embedding.is_some() { Ok(None) } else { self.matrix(spec).map(Some) }
    }
}

/// Every tensor of the model, in the order that [`Transformer::new`] asks for them.
pub fn manifest(config: &ModelConfig) -> Vec<TensorSpec> {
    manifest_as(config, config.family.names)
}

/// The same tensors in the same order, as another family calls them.
pub fn manifest_as(config: &ModelConfig, names: &Names) -> Vec<TensorSpec> {
    let c = config;
    let mut specs = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        specs.push(TensorSpec { name, shape: shape.iter().map(|n| *n as i64).collect() });
    };
    add(format!("{}.weight", names.embedding), &[c.vocab_size, c.hidden_size]);
    for layer in 0..c.layers {
        let prefix = names.layer.replace("{}", &layer.to_string());
        let mut linear = |name: &str, out: usize, inputs: usize, bias: bool| {
            add(format!("{prefix}.{name}.weight"), &[out, inputs]);
            if bias {
                add(format!("{prefix}.{name}.bias"), &[out]);
            }
        };
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        linear(names.query, queries, c.hidden_size, c.qkv_bias);
        linear(names.key, keys, c.hidden_size, c.qkv_bias);
        linear(names.value, keys, c.hidden_size, c.qkv_bias);
        linear(names.output, c.hidden_size, queries, c.output_bias);
        linear(names.gate, c.intermediate_size, c.hidden_size, c.mlp_bias);
        linear(names.up, c.intermediate_size, c.hidden_size, c.mlp_bias);
        linear(names.down, c.hidden_size, c.intermediate_size, c.mlp_bias);
        add(format!("{prefix}.{}.weight", names.attention_norm), &[c.hidden_size]);
        add(format!("{prefix}.{}.weight", names.mlp_norm), &[c.hidden_size]);
        if c.family.qk_norm {
            add(format!("{prefix}.{}.weight", names.query_norm), &[c.head_dim]);
            add(format!("{prefix}.{}.weight", names.key_norm), &[c.head_dim]);
        }
    }
    add(format!("{}.weight", names.norm), &[c.hidden_size]);
    if !c.tied {
        add(format!("{}.weight", names.head), &[c.vocab_size, c.hidden_size]);
    }
    specs
}

/// Only who cut the text into blocks knows who sees whom.
const BY_SPANS: &str = "a block-causal sequence is run by spans over a cache";

struct Layer {
    attention_norm: Fixed,
    /// Queries, keys and values in one product.
    qkv: Linear,
    output: Linear,
    qk_norm: Option<(Fixed, Fixed)>,
    mlp_norm: Fixed,
    /// Gate and up in one product.
    gate_up: Linear,
    down: Linear,
}

/// What turns final hidden states into logits.
enum Head {
    /// The embedding, row by row.
    Embedding,
    Plain(Tensor),
    /// In codes, or floats of 16 bits.
    Packed(Linear),
}

/// As [`Transformer::precision`] says it.
pub fn precision(dtype: Dtype, quantization: Option<Scheme>) -> String {
    let scheme = quantization.map(|scheme| format!("/{scheme}"));
    format!("{}{}", dtype.name(), scheme.unwrap_or_default())
}

/// A loaded network.
pub struct Transformer {
    config: ModelConfig,
    placement: Placement,
    embedding: Fixed,
    layers: Vec<Layer>,
    norm: Fixed,
    head: Head,
    rotary: Rotary,
    weight_bytes: usize,
    /// Where the work between attentions is recorded and replayed.
    graphs: Option<Graphs>,
    /// What the device has instead of libtorch's small operations.
    fused: Option<&'static Fused>,
    /// What attends over sequences of many lengths at once, where the device has that.
    ragged: Option<flash::Attend>,
}

impl Transformer {
    /// Builds the stack from `source`. `positions` bounds the context (and the rotary tables); it is cut to the model's own.
    pub fn new<S: Source>(
        config: &ModelConfig,
        placement: Placement,
        positions: usize,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let mut specs = manifest(config).into_iter();
        let mut next = || match specs.next() {
            Some(spec) => spec,
            None => unreachable!("the manifest and the stack list the same tensors"),
        };
        let first = next();
        let embedding = Fixed::of(source.tensor(&first)?);
        let mut layers = Vec::with_capacity(config.layers);
        for _ in 0..config.layers {
            let mut linear = |parts: usize, bias: bool| -> Result<Linear, S::Error> {
                let (mut weights, mut biases) = (vec![], vec![]);
                for _ in 0..parts {
                    weights.push(source.matrix(&next())?);
                    biases.extend(if bias { Some(source.tensor(&next())?) } else { None });
                }
                Ok(join(weights, biases, placement)?)
            };
            let (qkv, output) = (linear(3, config.qkv_bias)?, linear(1, config.output_bias)?);
            let (gate_up, down) = (linear(2, config.mlp_bias)?, linear(1, config.mlp_bias)?);
            let mut norm = || Ok::<_, S::Error>(Fixed::of(source.tensor(&next())?));
            let (attention_norm, mlp_norm) = (norm()?, norm()?);
            let qk_norm = if config.family.qk_norm { Some((norm()?, norm()?)) } else { None };
            layers.push(Layer { attention_norm, qkv, output, qk_norm, mlp_norm, gate_up, down });
        }
        let norm = Fixed::of(source.tensor(&next())?);
        let (spec, tied) = if config.tied { (first, Some(&*embedding)) } else { (next(), None) };
        let head = match source.head(&spec, tied)? {
            None => Head::Embedding,
            // It has the few rows that are wanted, and is as well read as it lies.
            Some(Matrix::Plain(weight)) => Head::Plain(weight),
            Some(other) => Head::Packed(Linear::new(other, None, placement)?),
        };
        let rotary = Rotary::new(config, positions.min(config.max_positions), placement.device)?;
        let (config, fused) = (config.clone(), Fused::on(placement.device));
        let ragged = flash::ragged(placement.dtype.kind(), placement.device, config.head_dim);
        let mut model =
            Self { config, placement, embedding, layers, norm, head, rotary, weight_bytes: 0, graphs: None, fused, ragged };
        model.weight_bytes = model.bytes();
        if !model.stays_in_cache() {
            model.linears().for_each(Linear::read_from_memory);
        }
        if placement.device == Device::Cpu {
            let head = match &model.head {
                Head::Embedding => Some(model.embedding.memory()),
                Head::Plain(weight) => Some((weight.data_ptr() as usize, bytes(weight))),
                Head::Packed(_) => None,
            };
            pages::enlarge(model.linears().filter_map(|linear| linear.memory()).chain(head));
        }
        Ok(model)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// How the projections' weights are held, if not as floats.
    pub fn quantization(&self) -> Option<Scheme> {
        self.layers.first().and_then(|layer| layer.down.scheme())
    }

    /// Type of activations, and the scheme behind a slash where weights have another: "f32", "bf16/int8".
    pub fn precision(&self) -> String {
        precision(self.placement.dtype, self.quantization())
    }

    /// Bytes of all weights, as they are held.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Those of them that a forward and its head read: all, less an embedding that is not the head, of which a forward reads a few rows.
    pub fn bytes_read(&self) -> usize {
        self.weight_bytes - if matches!(self.head, Head::Embedding) { 0 } else { bytes(&self.embedding) }
    }

    /// Whether it does so.
    pub fn graphs(&self) -> bool {
        self.graphs.is_some()
    }

    /// Kernels that do more than one of libtorch's operations, where the device has them.
    pub fn fused(&self) -> Option<&'static Fused> {
        self.fused
    }

    /// Whether sequences of different lengths attend in one operation.
    pub fn attends_ragged(&self) -> bool {
        self.ragged.is_some()
    }

    /// Has forwards of few rows replayed from [`Graphs`].
    pub fn use_graphs(&mut self, graphs: Graphs) {
        self.graphs = Some(graphs);
    }

    fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let head = if let Head::Packed(head) = &mut self.head { Some(head) } else { None };
        fn of(layer: &mut Layer) -> [&mut Linear; 4] {
            [&mut layer.qkv, &mut layer.output, &mut layer.gate_up, &mut layer.down]
        }
        self.layers.iter_mut().flat_map(of).chain(head)
    }

    fn bytes(&self) -> usize {
        let linears =
            |layer: &Layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down].map(Linear::bytes).iter().sum::<usize>();
        let norms = |layer: &Layer| {
            let (query, key) = layer.qk_norm.as_ref().map_or((0, 0), |(query, key)| (bytes(query), bytes(key)));
            bytes(&layer.attention_norm) + bytes(&layer.mlp_norm) + query + key
        };
        let head = match &self.head {
            Head::Embedding => 0,
            Head::Plain(weight) => bytes(weight),
            Head::Packed(head) => head.bytes(),
        };
        let layers: usize = self.layers.iter().map(|layer| linears(layer) + norms(layer)).sum();
        bytes(&self.embedding) + layers + bytes(&self.norm) + head
    }

    /// Longest sequence that [`Transformer::hidden`] takes.
    pub fn context(&self) -> usize {
        self.rotary.positions()
    }

    /// Final hidden states (after the last norm) of `tokens: [batch, seq]` (i64): `[batch, seq, hidden]`. For training, and as the
    /// plain form that [`Transformer::forward`] is held to.
    pub fn hidden(&self, tokens: &Tensor, attention: Attention) -> Result<Tensor, ModelError> {
        if attention == Attention::BlockCausal {
            return Err(ModelError::Torch(BY_SPANS.into()));
        }
        let (_, length) = tokens.size2()?;
        let angles = self.rotary.window(0, length as usize, self.placement.dtype.kind())?;
        self.stack(tokens, |_, layer, qkv| self.attend_whole(layer, qkv, &angles, attention == Attention::Causal, None))
    }

    /// Likewise where each token's position is given, and which tokens it sees: `sees: [seq, seq]` (bool), rows see columns. For
    /// training on several copies of a text at once.
    pub fn hidden_where(&self, tokens: &Tensor, positions: &[usize], sees: &Tensor) -> Result<Tensor, ModelError> {
        // Rotation by f32 makes the attention run in f32: on short sequences libtorch's takes a third of bf16's time, gradients included.
        let angles = self.rotary.at(positions, Kind::Float)?;
        self.stack(tokens, |_, layer, qkv| self.attend_whole(layer, qkv, &angles, false, Some(sees)))
    }

    /// The layers over `tokens: [...]`; `mix` turns a layer's queries, keys and values (`[..., (heads + 2 · kv_heads) · dim]`) into what
    /// its heads see, `[..., heads · dim]`.
    fn stack(
        &self,
        tokens: &Tensor,
        mut mix: impl FnMut(usize, &Layer, &Tensor) -> Result<Tensor, ModelError>,
    ) -> Result<Tensor, ModelError> {
        let (mut x, mut next) = self.piece(0, tokens, None)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let mixed = mix(index, layer, &next)?;
            (x, next) = self.piece(index + 1, tokens, Some((&x, &mixed)))?;
        }
        Ok(next)
    }

    /// What lies before the attention of layer `index`, or behind the last one: the residual stream, given the stream and what the
    /// attention came to `before` it, and with it the layer's queries, keys and values, or the final hidden states.
    fn piece(&self, index: usize, tokens: &Tensor, before: Option<(&Tensor, &Tensor)>) -> Result<(Tensor, Tensor), ModelError> {
        let layer = self.layers.get(index);
        let norm = layer.map_or(&self.norm, |layer| &layer.attention_norm);
        let (x, normed) = match index.checked_sub(1).and_then(|before| self.layers.get(before)).zip(before) {
            Some((layer, (x, mixed))) => {
                let (x, normed) = self.add_norm(x, Some(&layer.output.forward(mixed)?), &layer.mlp_norm)?;
                self.add_norm(&x, Some(&self.mlp(layer, &normed)?), norm)?
            }
            None => self.add_norm(&Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?, None, norm)?,
        };
        Ok((x, layer.map_or(Ok(normed.shallow_clone()), |layer| layer.qkv.forward(&normed))?))
    }

    /// Logits of chosen rows, `hidden: [rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let head = match &self.head {
            Head::Embedding => &self.embedding,
            Head::Plain(weight) => weight,
            Head::Packed(head) => return head.forward(hidden),
        };
        linear(&hidden.f_to_kind(head.f_kind()?)?, head, None)
    }

    /// The embedding table, `[vocab, hidden]`: draft heads share it.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Attention within each of several sequences of one length.
    fn attend_whole(
        &self,
        layer: &Layer,
        qkv: &Tensor,
        angles: &(Tensor, Tensor),
        causal: bool,
        sees: Option<&Tensor>,
    ) -> Result<Tensor, ModelError> {
        let c = &self.config;
        let (heads, kv_heads, head_dim) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let (batch, length, _) = qkv.size3()?;
        let qkv = qkv.f_view([batch, length, heads + 2 * kv_heads, head_dim])?;
        let query_key = rotate(&self.query_key(layer, &qkv)?, angles)?;
        let query = query_key.f_narrow(2, 0, heads)?.f_transpose(1, 2)?;
        let key = self.repeat_heads(query_key.f_narrow(2, heads, kv_heads)?.f_transpose(1, 2)?)?;
        let value = self.repeat_heads(qkv.f_narrow(2, heads + kv_heads, kv_heads)?.f_transpose(1, 2)?)?;
        let value = value.f_to_kind(query.f_kind()?)?;
        let mixed = Tensor::f_scaled_dot_product_attention(&query, &key, &value, sees, 0.0, causal, None::<f64>, false)?;
        Ok(mixed.f_transpose(1, 2)?.f_reshape([batch, length, heads * head_dim])?)
    }

    /// Queries and keys of `qkv: [batch, seq, heads + 2 · kv_heads, dim]`, normalised where the family does so. They are rotated
    /// together: one rotation instead of two.
    fn query_key(&self, layer: &Layer, qkv: &Tensor) -> Result<Tensor, ModelError> {
        let (heads, kv_heads) = (self.config.heads as i64, self.config.kv_heads as i64);
        let query_key = qkv.f_narrow(2, 0, heads + kv_heads)?;
        let Some((query_norm, key_norm)) = &layer.qk_norm else { return Ok(query_key) };
        // A trainer keeps the norms in f32 where its projections are narrower; otherwise the conversion is free.
        let kind = query_key.f_kind()?;
        let query = self.rms_norm(&query_key.f_narrow(2, 0, heads)?, &query_norm.f_to_kind(kind)?)?;
        let key = self.rms_norm(&query_key.f_narrow(2, heads, kv_heads)?, &key_norm.f_to_kind(kind)?)?;
        Ok(Tensor::f_cat(&[query, key], 2)?)
    }

    /// Grouped-query attention: each key/value head serves `heads / kv_heads` query heads. `[batch, kv_heads, seq, dim]`.
    fn repeat_heads(&self, x: Tensor) -> Result<Tensor, ModelError> {
        let groups = (self.config.heads / self.config.kv_heads) as i64;
        if groups == 1 {
            return Ok(x);
        }
        let (batch, kv_heads, length, dim) = x.size4()?;
        let x = x.f_unsqueeze(2)?.f_expand([batch, kv_heads, groups, length, dim], false)?;
        Ok(x.f_reshape([batch, kv_heads * groups, length, dim])?)
    }

    /// SwiGLU: `down(silu(gate(x)) * up(x))`.
    fn mlp(&self, layer: &Layer, x: &Tensor) -> Result<Tensor, ModelError> {
        let width = self.config.intermediate_size as i64;
        let gate_up = layer.gate_up.forward(x)?;
        if let Some(gated) = kernels::pointwise::swiglu(&gate_up)? {
            return layer.down.forward(&gated);
        }
        if let Some(gated) = self.fused.map_or(Ok(None), |fused| fused.gated(&gate_up))? {
            return layer.down.forward(&gated);
        }
        let gate = gate_up.f_narrow(-1, 0, width)?.f_silu()?;
        layer.down.forward(&gate.f_mul(&gate_up.f_narrow(-1, width, width)?)?)
    }

    /// `x + more`, and its norm.
    fn add_norm(&self, x: &Tensor, more: Option<&Tensor>, weight: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
        if let Some(both) = self.fused.map_or(Ok(None), |fused| fused.add_norm(x, more, weight, self.config.norm_eps))? {
            return Ok(both);
        }
        let x = more.map_or_else(|| Ok(x.shallow_clone()), |more| x.f_add(more))?;
        let normed = self.rms_norm(&x, weight)?;
        Ok((x, normed))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, ModelError> {
        if let Some(normed) = kernels::pointwise::rms_norm(x, weight, self.config.norm_eps)? {
            return Ok(normed);
        }
        Ok(x.f_rms_norm(weight.size(), Some(weight), self.config.norm_eps)?)
    }
}

/// Weights drawn from a normal distribution, for benchmarks of a shape whose weights are not at hand.
pub struct RandomWeights {
    pub placement: Placement,
}

impl Source for RandomWeights {
    type Error = ModelError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
        let options = (self.placement.dtype.kind(), self.placement.device);
        if spec.shape.len() == 1 {
            return Ok(Tensor::f_ones(&spec.shape, options)?);
        }
        let kind = if self.placement.dtype == Dtype::F16 { Kind::Float } else { options.0 };
        Ok(Tensor::f_randn(&spec.shape, (kind, options.1))?.f_mul_scalar(0.02)?.f_to_kind(options.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;

    /// More than any machine has, asked of libtorch itself: its words may change from version to version.
    #[test]
    fn an_allocation_that_fails_is_told_from_other_errors() {
        let options = (Kind::Float, Device::Cpu);
        let failed = Tensor::f_empty([1 << 50], options).map(drop).expect_err("there are no such machines");
        assert!(matches!(ModelError::from(failed), ModelError::OutOfMemory(_)));
        let wrong = Tensor::ones([2, 3], options).f_matmul(&Tensor::ones([2, 3], options)).map(drop).expect_err("sizes");
        assert!(matches!(ModelError::from(wrong), ModelError::Torch(line) if !line.contains('\n')));
    }
}
