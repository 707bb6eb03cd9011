//! From a GGUF file's vocabulary to the `tokenizer.json` and `tokenizer_config.json` that the same model has elsewhere.
//!
//! Two of ggml's tokenizers are known: `gpt2`, which is byte-level BPE with a way to cut text that `tokenizer.ggml.pre` names,
//! and `llama`, which is SentencePiece's BPE. What cannot be rebuilt faithfully is refused by name. Sources: llama.cpp's
//! `llama-vocab.cpp` and `transformers`' converters.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::reader::Gguf;

/// Longest token from whose parts merges are derived; the work grows with its square.
const PIECE_MAX: usize = 512;

/// How a byte-level tokenizer cuts text before it merges.
struct Pre {
    names: &'static [&'static str],
    /// Each cuts what the one before has left; `None` among them isolates every digit.
    splits: &'static [Option<&'static str>],
    /// Composed characters first (Unicode NFC), as the model's own tokenizer does and llama.cpp does not.
    normalized: bool,
    /// A word that is a token is not taken apart, whatever its merges.
    whole_words: bool,
    /// Whether a text begins with a begin-of-text token where the file does not say.
    begins: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Pre = Pre { names: &["gpt-2"], splits: &[Some(GPT2)], normalized: false, whole_words: false, begins: false };

const PRES: &[Pre] = &[
    PLAIN,
    // What llama.cpp does for a file that names no better way.
    Pre {
        names: &["default"],
        splits: &[Some(r"[\p{P}\$\+<=>\^~\|]+"), Some(GPT2), Some(r"\p{N}+"), Some("[0-9][0-9][0-9]")],
        ..PLAIN
    },
    Pre { names: &["smollm"], splits: &[None, Some(GPT2)], ..PLAIN },
    Pre { names: &["llama-bpe", "llama3", "llama-v3"], splits: &[Some(LLAMA3)], whole_words: true, begins: true, ..PLAIN },
    Pre { names: &["qwen2"], splits: &[Some(QWEN2)], normalized: true, ..PLAIN },
    Pre { names: &["deepseek-r1-qwen"], splits: &[Some(QWEN2)], ..PLAIN },
];

/// Values of `tokenizer.ggml.token_type`.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Special tokens by their name in `tokenizer_config.json`, and what ggml calls them where that is something else.
const SPECIAL: [(&str, &str); 5] =
    [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"), ("mask_token", "mask")];

/// `tokenizer.json` and `tokenizer_config.json`.
pub fn tokenizer(gguf: &Gguf<impl AsRef<[u8]>>) -> Result<(Value, Value), String> {
    let model = gguf.text("tokenizer.ggml.model")?.ok_or("key tokenizer.ggml.model is missing")?;
    let tokens = gguf.texts("tokenizer.ggml.tokens")?.ok_or("key tokenizer.ggml.tokens is missing")?;
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(other) = ids.insert(*token, id) {
            return Err(format!("tokens {other} and {id} are both {token:?}"));
        }
    }
    let (mut json, begins) = match model {
        "gpt2" => byte_level(gguf)?,
        "llama" => (sentencepiece(gguf, &tokens, &ids)?, true),
        other => return Err(format!("tokenizer.ggml.model = {other} cannot be read: gpt2 and llama can")),
    };
    let token = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = gguf.token(&key)? else { return Ok(None) };
        tokens
            .get(id as usize)
            .map(|token| Some((id, *token)))
            .ok_or_else(|| format!("{key} = {id} is not one of {} tokens", tokens.len()))
    };
    let mut settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    for (field, name) in SPECIAL {
        if let Some((_, text)) = token(name)? {
            settings[field] = text.into();
        }
    }
    if let Some(template) = gguf.text("tokenizer.chat_template")? {
        settings["chat_template"] = template.into();
    }
    // Some files give the types of ordinary tokens to the ones that they end texts with.
    let mut control = vec![];
    for name in ["bos", "eos", "eot", "eom", "mask"] {
        control.extend(token(name)?.map(|(id, _)| id as usize));
    }
    json["added_tokens"] = added(gguf, &tokens, &control)?.into();
    let mut around =
        |key: &str, name: &str, default: bool| match gguf.flag(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default) {
            false => Ok(None),
            true => {
                settings[key] = true.into();
                token(name)?
                    .map(Some)
                    .ok_or_else(|| format!("texts need a {name} token, which tokenizer.ggml.{name}_token_id lacks"))
            }
        };
    let (begin, end) = (around("add_bos_token", "bos", begins)?, around("add_eos_token", "eos", false)?);
    json["post_processor"] = template(begin, end);
    json["model"]["vocab"] = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_owned(), Value::from(id)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    Ok((json, settings))
}

/// Byte-level BPE, still without its vocabulary, and whether its texts begin with a begin-of-text token.
fn byte_level(gguf: &Gguf<impl AsRef<[u8]>>) -> Result<(Value, bool), String> {
    let name = gguf.text("tokenizer.ggml.pre")?.ok_or(
        "key tokenizer.ggml.pre is missing: the file is too old to say how it cuts text; convert it anew from its model",
    )?;
    let pre = PRES.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let known: Vec<_> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
        format!("tokenizer.ggml.pre = {name} is not known: {} are", known.join(", "))
    })?;
    let merges = gguf.texts("tokenizer.ggml.merges")?.ok_or("key tokenizer.ggml.merges is missing")?;
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        // The space between the two; a token of the byte alphabet holds none.
        let (left, right) = merge
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty())
            .ok_or_else(|| format!("merge {merge:?} is not two tokens"))?;
        pairs.push(json!([left, right]));
    }
    let mut steps: Vec<Value> = pre
        .splits
        .iter()
        .map(|split| match split {
            None => json!({"type": "Digits", "individual_digits": true}),
            Some(regex) => json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}),
        })
        .collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": if pre.normalized { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.whole_words, "vocab": {}, "merges": pairs,
        },
    });
    Ok((json, pre.begins))
}

/// SentencePiece's BPE, still without its vocabulary, as the `tokenizer.json` of such models has it: a space before every text,
/// then all spaces visible, and bytes for what is no token.
fn sentencepiece(gguf: &Gguf<impl AsRef<[u8]>>, tokens: &[&str], ids: &HashMap<&str, usize>) -> Result<Value, String> {
    let scores = gguf.floats("tokenizer.ggml.scores")?.ok_or("key tokenizer.ggml.scores is missing")?;
    if scores.len() != tokens.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(format!("tokenizer.ggml.scores are not {} numbers", tokens.len()));
    }
    let unknown = gguf.token("tokenizer.ggml.unknown_token_id")?.and_then(|id| tokens.get(id as usize));
    let prefix = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": {},
            "merges": derived(tokens, ids, &scores)?,
        },
    }))
}

/// The merges that scores imply: every way to make a token of two others, the best token first (`generate_merges` there).
fn derived<'a>(tokens: &[&'a str], ids: &HashMap<&'a str, usize>, scores: &[f32]) -> Result<Vec<(&'a str, &'a str)>, String> {
    let mut merges = vec![];
    for (id, token) in tokens.iter().enumerate() {
        if token.len() > PIECE_MAX {
            return Err(format!("token {id} has {} bytes; at most {PIECE_MAX} are taken", token.len()));
        }
        let mut ways = vec![];
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                ways.push((l, r, left, right));
            }
        }
        ways.sort_by_key(|(l, r, ..)| (*l, *r));
        merges.extend(
            ways.into_iter().map(|(_, _, left, right)| (scores[id], left.chars().count(), right.chars().count(), left, right)),
        );
    }
    // Stable: what is equal stays in the vocabulary's order.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
    Ok(merges.into_iter().map(|(.., left, right)| (left, right)).collect())
}

/// Tokens that are found in a text before anything else: control tokens, which decoding leaves out, and the model's own words.
fn added(gguf: &Gguf<impl AsRef<[u8]>>, tokens: &[&str], control: &[usize]) -> Result<Vec<Value>, String> {
    let types = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(format!("tokenizer.ggml.token_type has {} entries for {} tokens", types.len(), tokens.len()));
    }
    let mut list = vec![];
    for (id, token) in tokens.iter().enumerate() {
        let kind = types.get(id).copied().unwrap_or_default();
        let special = matches!(kind, UNKNOWN | CONTROL) || control.contains(&id);
        // Nothing can be found by an empty text.
        if (special || kind == USER_DEFINED) && !token.is_empty() {
            list.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": special,
            }));
        }
    }
    Ok(list)
}

/// What goes around a text.
fn template(begin: Option<(u32, &str)>, end: Option<(u32, &str)>) -> Value {
    if begin.or(end).is_none() {
        return Value::Null;
    }
    let special = |token: Option<(u32, &str)>| token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": 0}}));
    let around = |sequence: &str| -> Vec<Value> {
        [special(begin), Some(json!({"Sequence": {"id": sequence, "type_id": 0}})), special(end)]
            .into_iter()
            .flatten()
            .collect()
    };
    let pair = [around("A"), around("B")].concat();
    let tokens = [begin, end].into_iter().flatten();
    let ids = tokens.map(|(id, text)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})));
    let ids: serde_json::Map<_, _> = ids.collect();
    json!({"type": "TemplateProcessing", "single": around("A"), "pair": pair, "special_tokens": ids})
}
