//! `config.json` and `generation_config.json`, read once into a validated [`ModelConfig`] and [`GenerationConfig`].
//!
//! What the network needs and cannot run is refused here, by field name. Nothing below looks at JSON again.

use std::path::Path;

use serde_json::Value;

use super::CheckpointError;
use crate::model::family::{Attention, Bias, FAMILIES, Family};
use crate::tensor::Dtype;

/// Larger sizes than any model has; they keep a broken file from asking for absurd memory.
const SIZE_MAX: usize = 1 << 24;
const LAYERS_MAX: usize = 1024;

/// How rotary frequencies are stretched past the trained context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
}

/// A network's shape. Sizes are positive and consistent with one another.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub family: &'static Family,
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    /// Rows of the embedding, which may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    pub norm_eps: f64,
    pub tied: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub max_positions: usize,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub attention: Attention,
    /// Tokens that see one another, where attention is block-causal.
    pub block_length: Option<usize>,
    /// Row `i` of the logits predicts token `i + 1`.
    pub shift: bool,
    /// As `config.json` says, if it does. [`super::Checkpoint`] resolves the rest.
    pub mask_token_id: Option<u32>,
    /// The dtype that the weights were saved in, as `config.json` says.
    pub dtype: Option<Dtype>,
}

impl ModelConfig {
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        Self::from_json(&read_json(path)?).map_err(|reason| CheckpointError::Config { path: path.into(), reason })
    }

    /// Takes the parsed `config.json`; the error says which field is wrong.
    pub fn from_json(json: &Value) -> Result<Self, String> {
        let family = family(json)?;
        for (field, allowed) in family.requires {
            let found = match json.get(field) {
                None | Some(Value::Null) => continue,
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            };
            if found != *allowed {
                return Err(format!("{field} = {found} is not supported for {}: only {allowed} is", family.name));
            }
        }
        let keys = family.keys;
        let size = |field: &str| size(json, field);
        let hidden_size = size(keys.hidden_size)?;
        let heads = size(keys.heads)?;
        let kv_heads = match json.get(keys.kv_heads) {
            None | Some(Value::Null) => heads,
            Some(_) => size(keys.kv_heads)?,
        };
        let head_dim = match json.get("head_dim") {
            None | Some(Value::Null) if hidden_size % heads == 0 => hidden_size / heads,
            None | Some(Value::Null) => {
                return Err(format!("{} = {hidden_size} is not a multiple of {} = {heads}", keys.hidden_size, keys.heads));
            }
            Some(_) => size("head_dim")?,
        };
        if heads % kv_heads != 0 {
            return Err(format!("{} = {heads} is not a multiple of {} = {kv_heads}", keys.heads, keys.kv_heads));
        }
        if head_dim % 2 != 0 {
            return Err(format!("head_dim = {head_dim} is odd: rotary embedding needs pairs"));
        }
        let layers = size(keys.layers)?;
        if layers > LAYERS_MAX {
            return Err(format!("{} = {layers} is more than {LAYERS_MAX}", keys.layers));
        }
        let vocab_field = keys.vocab_size.iter().find(|field| json.get(**field).is_some_and(|v| !v.is_null()));
        let vocab_size = size(vocab_field.unwrap_or(&"vocab_size"))?;
        let mask_token_id = token_id(json, "mask_token_id")?;
        if let Some(id) = mask_token_id.filter(|id| *id as usize >= vocab_size) {
            return Err(format!("mask_token_id = {id} is outside the vocabulary of {vocab_size}"));
        }
        let (rope_theta, rope_scaling) = rope(json, family.rope_theta)?;
        let causal = flag(json, "is_causal")?.unwrap_or(true) && !flag(json, "use_bidirectional_attention")?.unwrap_or(false);
        let bias = |bias: Bias| -> Result<bool, String> {
            let Bias::IfSet(fields) = bias else { return Ok(true) };
            fields.iter().try_fold(false, |set, field| Ok(set | flag(json, field)?.unwrap_or(false)))
        };
        let max_positions = size(keys.max_positions)?;
        let block_length = match &family.blocks {
            Some(blocks) if json.get(blocks.field).is_some_and(|length| !length.is_null()) => Some(size(blocks.field)?),
            blocks => blocks.as_ref().map(|blocks| blocks.length),
        };
        if let Some(length) = block_length.filter(|length| *length > max_positions) {
            return Err(format!("blocks of {length} tokens are longer than {} = {max_positions}", keys.max_positions));
        }
        Ok(Self {
            family,
            hidden_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            intermediate_size: size(keys.intermediate_size)?,
            vocab_size,
            norm_eps: positive(number(json, keys.norm_eps)?.unwrap_or(family.norm_eps), keys.norm_eps)?,
            tied: flag(json, keys.tied)?.unwrap_or(family.tied_by_default),
            qkv_bias: bias(family.qkv_bias)?,
            output_bias: bias(family.output_bias)?,
            mlp_bias: bias(family.mlp_bias)?,
            max_positions,
            rope_theta,
            rope_scaling,
            attention: if causal { family.attention } else { Attention::Full },
            block_length: block_length.filter(|_| causal),
            // A body turned bidirectional and trained as a masked model predicts the token at its own position, unless its
            // config says otherwise (a Dream saved under its body's name).
            shift: flag(json, "shift_logits")?.unwrap_or(family.shift && (causal || family.attention == Attention::Full)),
            mask_token_id,
            dtype: ["torch_dtype", "dtype"].iter().find_map(|field| json.get(field)?.as_str()?.parse().ok()),
        })
    }

    /// Parameters of the network, embedding counted once where it is tied.
    pub fn parameters(&self) -> usize {
        crate::model::manifest(self).iter().map(|spec| spec.shape.iter().product::<i64>() as usize).sum()
    }
}

/// What `generation_config.json` (or, for the ids, `config.json`) says of decoding. Every field is optional there.
#[derive(Clone, Debug, Default)]
pub struct GenerationConfig {
    /// Any of these ends the text.
    pub eos_token_ids: Vec<u32>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u32>,
    pub max_new_tokens: Option<usize>,
    /// The `diffusion` object: our own extension, holding the decoder's defaults for this model.
    pub diffusion: Option<Value>,
    /// Likewise ours: the parts of a block that are filled one after another, for block-causal models.
    pub sub_block_length: Option<usize>,
    /// The `autoregressive` object, likewise.
    pub autoregressive: Option<Value>,
}

impl GenerationConfig {
    /// Reads the folder's generation settings; a folder without the file falls back to `config.json`.
    pub fn read(folder: &Path, config: &Value) -> Result<Self, CheckpointError> {
        let path = folder.join("generation_config.json");
        let json = if path.exists() { read_json(&path)? } else { Value::Null };
        Self::from_json(&json, config).map_err(|reason| CheckpointError::Config { path, reason })
    }

    /// Takes the parsed `generation_config.json`, null where there is none, and `config.json`.
    pub fn from_json(json: &Value, config: &Value) -> Result<Self, String> {
        let mut eos_token_ids = token_ids(json, "eos_token_id")?;
        if eos_token_ids.is_empty() {
            eos_token_ids = token_ids(config, "eos_token_id")?;
        }
        let sampled = flag(json, "do_sample")?.unwrap_or(true);
        Ok(Self {
            eos_token_ids,
            temperature: if sampled { number(json, "temperature")? } else { None },
            top_p: number(json, "top_p")?,
            // 0 means all tokens there.
            top_k: token_id(json, "top_k")?.filter(|k| *k > 0),
            max_new_tokens: token_id(json, "max_new_tokens")?.map(|n| n as usize),
            diffusion: json.get("diffusion").filter(|value| !value.is_null()).cloned(),
            sub_block_length: token_id(json, "sub_block_length")?.map(|n| n as usize),
            autoregressive: json.get("autoregressive").filter(|value| !value.is_null()).cloned(),
        })
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value, CheckpointError> {
    let text = std::fs::read(path).map_err(|source| CheckpointError::Read { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|e| CheckpointError::Config { path: path.into(), reason: e.to_string() })
}

fn family(json: &Value) -> Result<&'static Family, String> {
    let architecture = json.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let model_type = json.get("model_type").and_then(Value::as_str);
    let found = FAMILIES.iter().find(|family| match architecture {
        Some(name) => family.architectures.contains(&name),
        None => model_type.is_some_and(|name| family.model_types.contains(&name)),
    });
    found.ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().flat_map(|family| family.architectures).copied().collect();
        let asked = architecture.or(model_type).unwrap_or("none");
        format!("architecture {asked} is not known; known are {}", known.join(", "))
    })
}

/// `transformers` 5 writes `rope_parameters`, older ones `rope_theta` beside `rope_scaling`.
fn rope(json: &Value, default_theta: f64) -> Result<(f64, RopeScaling), String> {
    let object = |field: &str| json.get(field).filter(|value| value.is_object());
    let scaling = object("rope_parameters").or(object("rope_scaling"));
    let theta = match scaling.map(|json| number(json, "rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => number(json, "rope_theta")?.unwrap_or(default_theta),
    };
    if theta <= 1.0 {
        return Err(format!("rope_theta = {theta} is not above 1"));
    }
    let Some(scaling) = scaling else { return Ok((theta, RopeScaling::None)) };
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str).unwrap_or("default");
    let need = |field: &str| {
        let value = number(scaling, field)?.ok_or_else(|| format!("rope scaling '{kind}' lacks {field}"))?;
        if value > 0.0 { Ok(value) } else { Err(format!("rope scaling's {field} = {value} is not positive")) }
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: need("original_max_position_embeddings")?,
        },
        other => return Err(format!("rope scaling '{other}' is not supported: only default, linear and llama3 are")),
    };
    Ok((theta, scaling))
}

fn size(json: &Value, field: &str) -> Result<usize, String> {
    match json.get(field) {
        None | Some(Value::Null) => Err(format!("{field} is missing")),
        Some(value) => match value.as_u64() {
            Some(size) if size > 0 && size as usize <= SIZE_MAX => Ok(size as usize),
            _ => Err(format!("{field} = {value} is not a whole number from 1 to {SIZE_MAX}")),
        },
    }
}

fn number(json: &Value, field: &str) -> Result<Option<f64>, String> {
    match json.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(format!("{field} = {value} is not a number")),
        },
    }
}

fn positive(value: f64, field: &str) -> Result<f64, String> {
    if value > 0.0 { Ok(value) } else { Err(format!("{field} = {value} is not above 0")) }
}

fn flag(json: &Value, field: &str) -> Result<Option<bool>, String> {
    match json.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_bool().map(Some).ok_or_else(|| format!("{field} = {value} is not true or false")),
    }
}

fn token_id(json: &Value, field: &str) -> Result<Option<u32>, String> {
    match json.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(format!("{field} = {value} is not a token id")),
        },
    }
}

fn token_ids(json: &Value, field: &str) -> Result<Vec<u32>, String> {
    match json.get(field) {
        Some(Value::Array(ids)) => ids
            .iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| format!("{field} holds something that is not a token id")),
        _ => Ok(token_id(json, field)?.into_iter().collect()),
    }
}
