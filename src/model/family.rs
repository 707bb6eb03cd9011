//! Model families as data: what an architecture calls its settings and its weights, and where its network differs.
//!
//! A new dense family is one entry in [`FAMILIES`]. Nothing here reads a file or runs a tensor.

/// Which positions a position may attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Every token sees every token (masked diffusion).
    Full,
    /// A token sees itself and what precedes it (autoregression).
    Causal,
    /// A token sees the whole of its own block and of those before it (block diffusion). How long blocks are is the model's.
    BlockCausal,
}

impl Attention {
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Causal => "causal",
            Self::BlockCausal => "block_causal",
        }
    }
}

/// The blocks of a block-causal family, and how its authors fill them where nobody says otherwise.
#[derive(Debug)]
pub struct Blocks {
    /// What `config.json` calls a block's length, and what it is where that is absent.
    pub field: &'static str,
    pub length: usize,
    /// Cells of a block that are filled before those behind them, where not all are filled together.
    pub sub_block: Option<usize>,
    /// Confidence at which a token is taken.
    pub threshold: f64,
}

/// Whether a projection carries a bias.
#[derive(Clone, Copy, Debug)]
pub enum Bias {
    Always,
    /// If any of these `config.json` fields is true.
    IfSet(&'static [&'static str]),
}

/// What `config.json` calls each setting. The first name that is present counts.
#[derive(Debug)]
pub struct Keys {
    pub hidden_size: &'static str,
    pub layers: &'static str,
    pub heads: &'static str,
    pub kv_heads: &'static str,
    pub intermediate_size: &'static str,
    pub vocab_size: &'static [&'static str],
    pub norm_eps: &'static str,
    pub tied: &'static str,
    pub max_positions: &'static str,
}

/// What the checkpoint calls each tensor (without `.weight`); `{}` stands for the layer's number.
#[derive(Debug)]
pub struct Names {
    pub embedding: &'static str,
    pub layer: &'static str,
    pub attention_norm: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub output: &'static str,
    pub query_norm: &'static str,
    pub key_norm: &'static str,
    pub mlp_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub norm: &'static str,
    pub head: &'static str,
}

/// One architecture.
#[derive(Debug)]
pub struct Family {
    /// What we call it.
    pub name: &'static str,
    /// Values of `architectures[0]` in `config.json`.
    pub architectures: &'static [&'static str],
    /// Values of `model_type`, where `architectures` is absent.
    pub model_types: &'static [&'static str],
    pub keys: &'static Keys,
    pub names: &'static Names,
    pub attention: Attention,
    /// Of block-causal families.
    pub blocks: Option<Blocks>,
    /// Row `i` of the logits predicts token `i + 1` (Dream, and every autoregressive body).
    pub shift: bool,
    pub qkv_bias: Bias,
    pub output_bias: Bias,
    pub mlp_bias: Bias,
    /// RMSNorm over each head of queries and keys (Qwen3).
    pub qk_norm: bool,
    /// The mask token, where neither `config.json` nor the tokenizer names it.
    pub mask_token_id: Option<u32>,
    /// Whether embedding and head share their weights where `config.json` does not say.
    pub tied_by_default: bool,
    /// `rope_theta` where `config.json` does not say.
    pub rope_theta: f64,
    /// Likewise of the norms.
    pub norm_eps: f64,
    /// Settings under which the network would be another one: `(field, the only value we run)`.
    pub requires: &'static [(&'static str, &'static str)],
}

const HF_KEYS: Keys = Keys {
    hidden_size: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    kv_heads: "num_key_value_heads",
    intermediate_size: "intermediate_size",
    vocab_size: &["vocab_size"],
    norm_eps: "rms_norm_eps",
    tied: "tie_word_embeddings",
    max_positions: "max_position_embeddings",
};

const HF_NAMES: Names = Names {
    embedding: "model.embed_tokens",
    layer: "model.layers.{}",
    attention_norm: "input_layernorm",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    output: "self_attn.o_proj",
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
    mlp_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    norm: "model.norm",
    head: "lm_head",
};

/// LLaDA keeps OLMo's names: `ff_proj` is the gate and `ff_out` the way down (and, at the top, the vocabulary head).
const LLADA_NAMES: Names = Names {
    embedding: "model.transformer.wte",
    layer: "model.transformer.blocks.{}",
    attention_norm: "attn_norm",
    query: "q_proj",
    key: "k_proj",
    value: "v_proj",
    output: "attn_out",
    query_norm: "q_norm",
    key_norm: "k_norm",
    mlp_norm: "ff_norm",
    gate: "ff_proj",
    up: "up_proj",
    down: "ff_out",
    norm: "model.transformer.ln_f",
    head: "model.transformer.ff_out",
};

const LLAMA: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM"],
    model_types: &["llama"],
    keys: &HF_KEYS,
    names: &HF_NAMES,
    attention: Attention::Causal,
    blocks: None,
    shift: true,
    qkv_bias: Bias::IfSet(&["attention_bias"]),
    output_bias: Bias::IfSet(&["attention_bias"]),
    mlp_bias: Bias::IfSet(&["mlp_bias"]),
    qk_norm: false,
    mask_token_id: None,
    tied_by_default: false,
    rope_theta: 10_000.0,
    norm_eps: 1e-6,
    requires: &[("hidden_act", "silu")],
};

/// Every family that can be loaded. Sources: the authors' modelling files (ML-GSAI/LLaDA, DreamLM/Dream, JetAstra/SDAR,
/// NVlabs/Fast-dLLM) and `transformers`.
pub static FAMILIES: &[Family] = &[
    Family {
        name: "llada",
        architectures: &["LLaDAModelLM"],
        model_types: &["llada"],
        keys: &Keys {
            hidden_size: "d_model",
            layers: "n_layers",
            heads: "n_heads",
            kv_heads: "n_kv_heads",
            intermediate_size: "mlp_hidden_size",
            // The embedding may be padded past the tokenizer's vocabulary.
            vocab_size: &["embedding_size", "vocab_size"],
            norm_eps: "rms_norm_eps",
            tied: "weight_tying",
            max_positions: "max_sequence_length",
        },
        names: &LLADA_NAMES,
        attention: Attention::Full,
        shift: false,
        qkv_bias: Bias::IfSet(&["include_bias", "include_qkv_bias"]),
        output_bias: Bias::IfSet(&["include_bias"]),
        mlp_bias: Bias::IfSet(&["include_bias"]),
        mask_token_id: Some(126_336),
        tied_by_default: true,
        norm_eps: 1e-5,
        requires: &[
            ("block_type", "llama"),
            ("layer_norm_type", "rms"),
            ("activation_type", "silu"),
            ("rope", "true"),
            ("alibi", "false"),
            ("attention_layer_norm", "false"),
            ("input_emb_norm", "false"),
            ("scale_logits", "false"),
            ("clip_qkv", "null"),
        ],
        ..LLAMA
    },
    Family {
        name: "dream",
        architectures: &["DreamModel"],
        model_types: &["Dream", "dream"],
        attention: Attention::Full,
        qkv_bias: Bias::Always,
        mask_token_id: Some(151_666),
        output_bias: Bias::IfSet(&[]),
        requires: &[("hidden_act", "silu"), ("use_sliding_window", "false"), ("use_mrope", "false")],
        ..LLAMA
    },
    Family {
        name: "sdar",
        architectures: &["SDARForCausalLM"],
        model_types: &["sdar"],
        attention: Attention::BlockCausal,
        blocks: Some(Blocks { field: "block_size", length: 4, sub_block: None, threshold: 0.85 }),
        shift: false,
        qk_norm: true,
        mask_token_id: Some(151_669),
        requires: &[("hidden_act", "silu"), ("use_sliding_window", "false")],
        ..LLAMA
    },
    Family {
        name: "fast_dllm_v2",
        architectures: &["Fast_dLLM_QwenForCausalLM"],
        model_types: &["Fast_dLLM_Qwen"],
        attention: Attention::BlockCausal,
        blocks: Some(Blocks { field: "bd_size", length: 32, sub_block: Some(8), threshold: 0.9 }),
        qkv_bias: Bias::Always,
        output_bias: Bias::IfSet(&[]),
        mask_token_id: Some(151_665),
        requires: &[("hidden_act", "silu"), ("use_sliding_window", "false")],
        ..LLAMA
    },
    LLAMA,
    Family {
        name: "qwen2",
        architectures: &["Qwen2ForCausalLM"],
        model_types: &["qwen2"],
        qkv_bias: Bias::Always,
        output_bias: Bias::IfSet(&[]),
        requires: &[("hidden_act", "silu"), ("use_sliding_window", "false")],
        ..LLAMA
    },
    Family {
        name: "qwen3",
        architectures: &["Qwen3ForCausalLM"],
        model_types: &["qwen3"],
        qk_norm: true,
        requires: &[("hidden_act", "silu"), ("use_sliding_window", "false")],
        ..LLAMA
    },
];
