//! From a GGUF file's metadata to the `config.json` and `generation_config.json` of the same model, and from ggml's names of
//! tensors to Hugging Face's.
//!
//! A key that may change the network is either honoured or refused by name. Sources: ggml's GGUF specification, llama.cpp's
//! `convert_hf_to_gguf.py`, whose work is undone here, and `transformers`' `modeling_gguf_pytorch_utils.py`.

use serde_json::{Map, Value, json};

use super::reader::Gguf;
use crate::model::family::{FAMILIES, Family, Names};

/// An architecture that can be read.
pub struct Architecture {
    ggml: &'static str,
    huggingface: &'static str,
    /// The converter interleaves each head's halves of the rows of queries and keys, for ggml's rotation of neighbours.
    pub interleaved: bool,
}

const ARCHITECTURES: [Architecture; 2] = [
    Architecture { ggml: "llama", huggingface: "LlamaForCausalLM", interleaved: true },
    Architecture { ggml: "qwen2", huggingface: "Qwen2ForCausalLM", interleaved: false },
];

/// Keys under the architecture's name that are read, or that say nothing of the network.
const KNOWN: &[&str] = &[
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "use_parallel_residual",
    "tensor_data_layout",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
];

/// Divisors of the rotary frequencies, one a pair.
const FREQUENCIES: &str = "rope_freqs.weight";

impl Architecture {
    pub fn of(gguf: &Gguf<impl AsRef<[u8]>>) -> Result<&'static Self, String> {
        let name = gguf.text("general.architecture")?.ok_or("key general.architecture is missing")?;
        ARCHITECTURES.iter().find(|architecture| architecture.ggml == name).ok_or_else(|| {
            let known: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.ggml).collect();
            format!("architecture {name} cannot be read from GGUF: {} can", known.join(" and "))
        })
    }

    /// The family's name of a ggml tensor; `None` for what is no weight. Names that are not known stay, and get reported with
    /// everything else that does not fit the network.
    pub fn rename(&self, tensor: &str) -> Option<String> {
        if tensor == FREQUENCIES {
            return None;
        }
        let family = FAMILIES.iter().find(|family| family.architectures.contains(&self.huggingface));
        Some(family.and_then(|family: &Family| rename(tensor, family.names)).unwrap_or_else(|| tensor.into()))
    }

    /// `config.json`.
    pub fn config(&self, gguf: &Gguf<impl AsRef<[u8]>>) -> Result<Value, String> {
        let key = |name: &str| format!("{}.{name}", self.ggml);
        let count = |name: &str| gguf.unsigned(&key(name));
        let need = |name: &str| count(name)?.ok_or_else(|| format!("key {} is missing", key(name)));
        for name in gguf.keys().filter_map(|name| name.strip_prefix(self.ggml)?.strip_prefix('.')) {
            if !KNOWN.contains(&name) {
                return Err(format!("key {} is not known: the network may depend on it", key(name)));
            }
        }
        if let Some(experts) = count("expert_count")?.filter(|n| *n > 0) {
            return Err(format!("it is a mixture of {experts} experts: only dense models can be run"));
        }
        if gguf.flag(&key("use_parallel_residual"))? == Some(true) {
            return Err(format!("{} is set: such networks cannot be run", key("use_parallel_residual")));
        }
        let (width, heads) = (need("embedding_length")?, need("attention.head_count")?);
        let head_dim = match count("attention.key_length")? {
            Some(length) => length,
            None => width.checked_div(heads).filter(|length| length * heads == width).ok_or_else(|| {
                format!("{} = {width} is not a multiple of {} = {heads}", key("embedding_length"), key("attention.head_count"))
            })?,
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = count(name)?.filter(|other| *other != head_dim) {
                return Err(format!("{} = {other} is not the head's size of {head_dim}: such heads cannot be run", key(name)));
            }
        }
        let embedding = gguf.tensors().get("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
        let theta = gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let has = |suffix: &str| gguf.tensors().keys().any(|name| name.ends_with(suffix));
        let mut config = json!({
            "architectures": [self.huggingface],
            "model_type": self.ggml,
            "vocab_size": embedding.shape[0],
            "hidden_size": width,
            "intermediate_size": need("feed_forward_length")?,
            "num_hidden_layers": need("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": count("attention.head_count_kv")?.unwrap_or(heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": need("context_length")?,
            "rms_norm_eps": gguf.float(&eps_key)?.ok_or_else(|| format!("key {eps_key} is missing"))?,
            "rope_theta": theta,
            "rope_scaling": self.scaling(gguf, theta, head_dim)?,
            "tie_word_embeddings": !gguf.tensors().contains_key("output.weight"),
        });
        let mut set = |field: &str, value: Value| config[field] = value;
        if self.ggml == "llama" {
            set("attention_bias", has(".attn_q.bias").into());
            set("mlp_bias", has(".ffn_gate.bias").into());
        }
        if gguf.flag(&key("attention.causal"))? == Some(false) {
            set("is_causal", false.into());
        }
        for (field, key) in [("bos_token_id", "tokenizer.ggml.bos_token_id"), ("eos_token_id", "tokenizer.ggml.eos_token_id")] {
            if let Some(id) = gguf.token(key)? {
                set(field, id.into());
            }
        }
        Ok(config)
    }

    /// How rotary frequencies are stretched: by a factor, or by [`FREQUENCIES`], which must then be Llama 3's to the last bits.
    fn scaling(&self, gguf: &Gguf<impl AsRef<[u8]>>, theta: f64, head_dim: u64) -> Result<Value, String> {
        let key = |name: &str| format!("{}.rope.{name}", self.ggml);
        let kind = gguf.text(&key("scaling.type"))?.unwrap_or("linear");
        let factor = match gguf.float(&key("scaling.factor"))? {
            Some(factor) => Some(factor),
            None => gguf.float(&key("scale_linear"))?,
        };
        let factor = factor.filter(|factor| *factor != 0.0 && *factor != 1.0);
        let by_factor = match (kind, factor) {
            ("none", _) | ("linear", None) => Value::Null,
            ("linear", Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
            (other, _) => return Err(format!("{} = {other} is not supported: none and linear are", key("scaling.type"))),
        };
        let Some(info) = gguf.tensors().get(FREQUENCIES) else { return Ok(by_factor) };
        let divisors = info.block.dequantize(gguf.tensor_bytes(info));
        if divisors.len() as u64 != head_dim / 2 {
            return Err(format!("tensor {FREQUENCIES} has {} numbers for {} pairs", divisors.len(), head_dim / 2));
        }
        if divisors.iter().all(|divisor| *divisor == 1.0) {
            return Ok(by_factor);
        }
        let original = gguf.unsigned(&key("scaling.original_context_length"))?.unwrap_or(8192) as f64;
        let factor = divisors.iter().copied().fold(0.0, f32::max) as f64;
        // The converter's own rule, with the two settings that every Llama 3 has.
        let expected = (0..divisors.len()).map(|pair| {
            let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * pair as f64 / head_dim as f64);
            let smooth = ((original / wavelength - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        });
        let same = expected.zip(&divisors).all(|(expected, found)| (*found as f64 / expected - 1.0).abs() < 1e-4);
        if !same || !by_factor.is_null() {
            return Err(format!(
                "tensor {FREQUENCIES} stretches rotary frequencies by another rule than Llama 3's: not supported"
            ));
        }
        Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }))
    }
}

/// `generation_config.json`: the tokens that begin and end a text.
pub fn generation(gguf: &Gguf<impl AsRef<[u8]>>) -> Result<Value, String> {
    let mut ends = vec![];
    // The end of a turn and of a message end a text as well; many files name the former alone as their end of text.
    for key in ["eos", "eot", "eom"] {
        ends.extend(gguf.token(&format!("tokenizer.ggml.{key}_token_id"))?.filter(|id| !ends.contains(id)));
    }
    let mut object = Map::new();
    if let Some(id) = gguf.token("tokenizer.ggml.bos_token_id")? {
        object.insert("bos_token_id".into(), id.into());
    }
    object.insert("eos_token_id".into(), json!(ends));
    Ok(Value::Object(object))
}

fn rename(tensor: &str, names: &Names) -> Option<String> {
    let (path, leaf) = tensor.rsplit_once('.')?;
    let name = match path {
        "token_embd" => names.embedding.to_owned(),
        "output_norm" => names.norm.to_owned(),
        "output" => names.head.to_owned(),
        _ => {
            let (layer, part) = path.strip_prefix("blk.")?.split_once('.')?;
            let part = match part {
                "attn_norm" => names.attention_norm,
                "attn_q" => names.query,
                "attn_k" => names.key,
                "attn_v" => names.value,
                "attn_output" => names.output,
                "ffn_norm" => names.mlp_norm,
                "ffn_gate" => names.gate,
                "ffn_up" => names.up,
                "ffn_down" => names.down,
                _ => return None,
            };
            format!("{}.{part}", names.layer.replace("{}", layer))
        }
    };
    Some(format!("{name}.{leaf}"))
}
