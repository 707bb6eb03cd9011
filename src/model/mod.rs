//! The transformer: one stack for every dense family, whose differences are data ([`family::Family`]).
//!
//! [`Transformer::hidden`] runs whole sequences to final hidden states, [`Transformer::extend`] runs new tokens over what a
//! [`KvCache`] holds of their sequence, [`Transformer::logits`] turns chosen rows of either into logits; the split is what lets
//! decoding pay the vocabulary head for wanted rows only. Weights come from any [`Source`] (a
//! checkpoint, random numbers, a trainer's parameters), and autograd flows through, so training and serving run the same code.
//! The stack knows nothing of sampling, canvases or requests.

pub mod cache;
pub mod family;
pub mod rotary;
pub mod statistics;

use thiserror::Error;

use crate::checkpoint::config::ModelConfig;
use crate::tensor::{Dtype, Kind, Placement, TchError, Tensor, kernels};
use cache::KvCache;
use family::Attention;
use rotary::{Rotary, rotate};

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
    #[error("libtorch: {0}")]
    Torch(String),
}

impl From<TchError> for ModelError {
    /// libtorch appends its C++ stack to every message; its first line says what went wrong.
    fn from(error: TchError) -> Self {
        let text = error.to_string();
        Self::Torch(text.lines().next().unwrap_or_default().trim_start_matches("Internal torch error: ").into())
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
}

/// Every tensor of the model, in the order that [`Transformer::new`] asks for them.
pub fn manifest(config: &ModelConfig) -> Vec<TensorSpec> {
    let c = config;
    let names = c.family.names;
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

struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Runs in the weight's own type. Where that is narrower than the residual stream's (a trainer keeps the stream in f32 and
    /// the projections in bf16), this is the place that narrows; otherwise the conversion is free.
    fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        linear(&x.f_to_kind(self.weight.f_kind()?)?, &self.weight, self.bias.as_ref())
    }
}

/// `x · weightᵀ + bias`, by our own kernel where it has few rows.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
    match kernels::linear::linear(x, weight, bias)? {
        Some(out) => Ok(out),
        None => Ok(x.f_linear(weight, bias)?),
    }
}

struct Layer {
    attention_norm: Tensor,
    /// Queries, keys and values in one product.
    qkv: Linear,
    output: Linear,
    qk_norm: Option<(Tensor, Tensor)>,
    mlp_norm: Tensor,
    /// Gate and up in one product.
    gate_up: Linear,
    down: Linear,
}

/// How the tokens of [`Transformer::extend`] stand to one another.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// Each follows the one before it.
    Causal,
    /// Each follows its parent (an index before its own; the first token is the root). It sees its ancestors and itself.
    Tree(&'a [usize]),
    /// Causal for so many tokens, with filling behind them: a forward whose every shape, its view of the cache included, is the
    /// same for one token as for several, so that the rows agree to the bit.
    Canonical(usize),
}

enum Mask {
    None,
    Causal,
    Given(Tensor),
    /// None is needed: the kernel for few rows goes by [`Past::parents`].
    Few,
}

/// What a forward's tokens follow.
struct Past<'a> {
    cache: &'a KvCache,
    /// Positions of the cache that its queries look at.
    visible: usize,
    parents: Option<&'a [usize]>,
}

/// Depth of every node, and which nodes are its ancestors or itself.
fn tree(parents: &[usize], length: usize) -> Result<(Vec<usize>, Vec<Vec<bool>>), ModelError> {
    let ordered = parents.len() == length && parents.iter().enumerate().skip(1).all(|(node, parent)| *parent < node);
    if !ordered {
        return Err(ModelError::Torch("a tree's parents must stand before their children, one for each token".into()));
    }
    let (mut depths, mut ancestors) = (vec![0; length], vec![vec![false; length]; length]);
    for node in 0..length {
        if node > 0 {
            depths[node] = depths[parents[node]] + 1;
            ancestors[node] = ancestors[parents[node]].clone();
        }
        ancestors[node][node] = true;
    }
    Ok((depths, ancestors))
}

/// A loaded network.
pub struct Transformer {
    config: ModelConfig,
    placement: Placement,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Option<Tensor>,
    rotary: Rotary,
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
            Some(spec) => source.tensor(&spec),
            None => unreachable!("the manifest and the stack list the same tensors"),
        };
        let embedding = next()?;
        let mut layers = Vec::with_capacity(config.layers);
        for _ in 0..config.layers {
            let mut linear = |bias: bool| -> Result<Linear, S::Error> {
                Ok(Linear { weight: next()?, bias: if bias { Some(next()?) } else { None } })
            };
            let qkv = join(&[linear(config.qkv_bias)?, linear(config.qkv_bias)?, linear(config.qkv_bias)?])?;
            let output = linear(config.output_bias)?;
            let gate_up = join(&[linear(config.mlp_bias)?, linear(config.mlp_bias)?])?;
            let down = linear(config.mlp_bias)?;
            let (attention_norm, mlp_norm) = (next()?, next()?);
            let qk_norm = if config.family.qk_norm { Some((next()?, next()?)) } else { None };
            layers.push(Layer { attention_norm, qkv, output, qk_norm, mlp_norm, gate_up, down });
        }
        let norm = next()?;
        let head = if config.tied { None } else { Some(next()?) };
        let rotary = Rotary::new(config, positions.min(config.max_positions), placement.device)?;
        Ok(Self { config: config.clone(), placement, embedding, layers, norm, head, rotary })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Longest sequence that [`Transformer::hidden`] takes.
    pub fn context(&self) -> usize {
        self.rotary.positions()
    }

    /// Final hidden states (after the last norm) of `tokens: [batch, seq]` (i64): `[batch, seq, hidden]`.
    pub fn hidden(&self, tokens: &Tensor, attention: Attention) -> Result<Tensor, ModelError> {
        let (_, length) = tokens.size2()?;
        let mask = if attention == Attention::Causal { Mask::Causal } else { Mask::None };
        let angles = self.rotary.window(0, length as usize, self.placement.dtype.kind())?;
        self.stack(tokens, &angles, &mask, None)
    }

    /// Final hidden states of `tokens: [batch, seq]` that follow what `cache` keeps: `[batch, seq, hidden]`. Every token sees all
    /// that is kept, and of the tokens beside it what `layout` says. Their keys are written; [`KvCache::keep`] then says which stay.
    pub fn extend(&self, tokens: &Tensor, layout: Layout, cache: &KvCache) -> Result<Tensor, ModelError> {
        let (_, length) = tokens.size2()?;
        let (length, past, kind) = (length as usize, cache.len(), self.placement.dtype.kind());
        if past + length > cache.capacity() {
            return Err(ModelError::CacheFull { needed: past + length, capacity: cache.capacity() });
        }
        if length * cache.batch() <= kernels::ROWS_MAX
            && cache.batch() == 1
            && kernels::attention::fits(kind, self.placement.device, self.config.head_dim)
        {
            return self.extend_few(tokens, layout, cache);
        }
        let (angles, mask, visible) = match layout {
            Layout::Causal if length == 1 => (self.rotary.window(past, 1, kind)?, Mask::None, past + 1),
            Layout::Causal if past == 0 && self.config.heads == self.config.kv_heads => {
                (self.rotary.window(0, length, kind)?, Mask::Causal, length)
            }
            Layout::Causal => {
                let mask = self.mask(length, past + length, |row, column| column <= past + row)?;
                (self.rotary.window(past, length, kind)?, mask, past + length)
            }
            Layout::Tree(parents) => {
                let (depths, ancestors) = tree(parents, length)?;
                let positions: Vec<usize> = depths.iter().map(|depth| past + depth).collect();
                let seen = |row: usize, column: usize| column < past || ancestors[row][column - past];
                (self.rotary.at(&positions, kind)?, self.mask(length, past + length, seen)?, past + length)
            }
            Layout::Canonical(used) => {
                // Rows behind `used` are filling: they see the first position only, and nobody sees them.
                let seen = |row: usize, column: usize| column <= if row < used { past + row } else { 0 };
                let last = self.rotary.positions().saturating_sub(1);
                let positions: Vec<usize> = (0..length).map(|row| (past + row).min(last)).collect();
                (self.rotary.at(&positions, kind)?, self.mask(length, cache.capacity(), seen)?, cache.capacity())
            }
        };
        self.stack(tokens, &angles, &mask, Some(Past { cache, visible, parents: None }))
    }

    /// [`Transformer::extend`] for the few rows of a decoding step on the CPU. Its kernels need no mask, and since each row is
    /// computed on its own, the canonical layout is no different from a causal one.
    fn extend_few(&self, tokens: &Tensor, layout: Layout, cache: &KvCache) -> Result<Tensor, ModelError> {
        let (_, length) = tokens.size2()?;
        let (length, past) = (length as usize, cache.len());
        let last = self.rotary.positions().saturating_sub(1);
        let (positions, parents): (Vec<usize>, _) = match layout {
            Layout::Causal => ((past..past + length).collect(), None),
            Layout::Canonical(_) => ((past..past + length).map(|position| position.min(last)).collect(), None),
            Layout::Tree(parents) => {
                let (depths, _) = tree(parents, length)?;
                (depths.iter().map(|depth| past + depth).collect(), Some(parents))
            }
        };
        let angles = self.rotary.at(&positions, Kind::Float)?;
        self.stack(tokens, &angles, &Mask::Few, Some(Past { cache, visible: past + length, parents }))
    }

    /// `[groups · rows, columns]`, true where a row sees a column; once for each query head that shares a key head.
    fn mask(&self, rows: usize, columns: usize, sees: impl Fn(usize, usize) -> bool) -> Result<Mask, ModelError> {
        let groups = self.config.heads / self.config.kv_heads;
        let bits: Vec<bool> =
            (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).map(|(r, c)| sees(r, c)).collect();
        let mask = Tensor::f_from_slice(&bits)?.f_view([rows as i64, columns as i64])?.f_to_device(self.placement.device)?;
        Ok(Mask::Given(if groups == 1 { mask } else { mask.f_repeat([groups as i64, 1])? }))
    }

    fn stack(&self, tokens: &Tensor, angles: &(Tensor, Tensor), mask: &Mask, past: Option<Past>) -> Result<Tensor, ModelError> {
        let mut x = Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = self.rms_norm(&x, &layer.attention_norm)?;
            let past = past.as_ref().map(|past| (past, index));
            x = x.f_add(&self.attend(layer, &normed, angles, mask, past)?)?;
            let normed = self.rms_norm(&x, &layer.mlp_norm)?;
            x = x.f_add(&self.mlp(layer, &normed)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// Logits of chosen rows, `hidden: [rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        linear(&hidden.f_to_kind(head.f_kind()?)?, head, None)
    }

    /// The embedding table, `[vocab, hidden]`: draft heads share it.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    fn attend(
        &self,
        layer: &Layer,
        x: &Tensor,
        angles: &(Tensor, Tensor),
        mask: &Mask,
        past: Option<(&Past, usize)>,
    ) -> Result<Tensor, ModelError> {
        let c = &self.config;
        let (heads, kv_heads, head_dim) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let (batch, length, _) = x.size3()?;
        let qkv = layer.qkv.forward(x)?;
        if let (Mask::Few, Some((past, index))) = (mask, past) {
            return self.attend_few(layer, &qkv, angles, past, index);
        }
        let qkv = qkv.f_view([batch, length, heads + 2 * kv_heads, head_dim])?;
        let value = qkv.f_narrow(2, heads + kv_heads, kv_heads)?;
        // Queries and keys turn together: one rotation instead of two.
        let mut query_key = qkv.f_narrow(2, 0, heads + kv_heads)?;
        if let Some((query_norm, key_norm)) = &layer.qk_norm {
            query_key = Tensor::f_cat(
                &[
                    self.rms_norm(&query_key.f_narrow(2, 0, heads)?, query_norm)?,
                    self.rms_norm(&query_key.f_narrow(2, heads, kv_heads)?, key_norm)?,
                ],
                2,
            )?;
        }
        let query_key = rotate(&query_key, angles)?;
        let mut query = query_key.f_narrow(2, 0, heads)?.f_transpose(1, 2)?;
        let key = query_key.f_narrow(2, heads, kv_heads)?.f_transpose(1, 2)?;
        let value = value.f_transpose(1, 2)?;
        let (key, value) = match past {
            // Copying all cached keys for every query head that shares them would cost more than the attention itself: the heads
            // of a group become further rows of the one key head.
            Some((past, index)) => {
                query = query.f_reshape([batch, kv_heads, heads / kv_heads * length, head_dim])?;
                past.cache.write(index, &key, &value, past.visible)?
            }
            None => (self.repeat_heads(key)?, self.repeat_heads(value)?),
        };
        let (given, causal) = match mask {
            Mask::Given(mask) => (Some(mask), false),
            Mask::Causal => (None, true),
            Mask::None | Mask::Few => (None, false),
        };
        let mixed = Tensor::f_scaled_dot_product_attention(&query, &key, &value, given, 0.0, causal, None::<f64>, false)?;
        let mixed = if past.is_some() { mixed.f_view([batch, heads, length, head_dim])? } else { mixed };
        layer.output.forward(&mixed.f_transpose(1, 2)?.f_reshape([batch, length, heads * head_dim])?)
    }

    fn attend_few(
        &self,
        layer: &Layer,
        qkv: &Tensor,
        angles: &(Tensor, Tensor),
        past: &Past,
        index: usize,
    ) -> Result<Tensor, ModelError> {
        let c = &self.config;
        let query = kernels::attention::Query {
            qkv,
            heads: c.heads,
            kv_heads: c.kv_heads,
            dim: c.head_dim,
            angles,
            norms: layer.qk_norm.as_ref().map(|(query, key)| (query, key)),
            eps: c.norm_eps,
            past: past.cache.len(),
            parents: past.parents,
        };
        let (keys, values) = past.cache.layer(index);
        match kernels::attention::attention(&query, keys, values)? {
            Some(mixed) => layer.output.forward(&mixed),
            None => Err(ModelError::Torch("a step was given tensors that its kernel does not take".into())),
        }
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
        let gate = gate_up.f_narrow(-1, 0, width)?.f_silu()?;
        layer.down.forward(&gate.f_mul(&gate_up.f_narrow(-1, width, width)?)?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, ModelError> {
        if let Some(normed) = kernels::pointwise::rms_norm(x, weight, self.config.norm_eps)? {
            return Ok(normed);
        }
        Ok(x.f_rms_norm(weight.size(), Some(weight), self.config.norm_eps)?)
    }
}

/// Several products of one input as one: their outputs side by side.
fn join(parts: &[Linear]) -> Result<Linear, ModelError> {
    let weights: Vec<_> = parts.iter().map(|part| &part.weight).collect();
    let biases: Option<Vec<_>> = parts.iter().map(|part| part.bias.as_ref()).collect();
    let bias = biases.map(|biases| Tensor::f_cat(&biases, 0)).transpose()?;
    Ok(Linear { weight: Tensor::f_cat(&weights, 0)?, bias })
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
