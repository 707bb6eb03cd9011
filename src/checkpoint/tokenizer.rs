//! The model's tokenizer: a door to the `tokenizers` crate that adds the special tokens and the chat template of the folder.

use std::path::Path;

use serde_json::Value;

use super::CheckpointError;
use super::chat::ChatTemplate;

/// A loaded `tokenizer.json` with what `tokenizer_config.json` adds.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    mask_token_id: Option<u32>,
    chat: Option<ChatTemplate>,
}

impl Tokenizer {
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join("tokenizer.json");
        let wrong = |reason: String| CheckpointError::Config { path: path.clone(), reason };
        let bytes = std::fs::read(&path).map_err(|source| CheckpointError::Read { path: path.clone(), source })?;
        let settings = folder.join("tokenizer_config.json");
        let settings = if settings.exists() { super::config::read_json(&settings)? } else { Value::Null };
        let tokenizer = Self::new(&bytes, &settings).map_err(wrong)?;
        Ok(tokenizer.with_chat(ChatTemplate::read(folder, &settings)?))
    }

    /// Takes the bytes of `tokenizer.json` and the parsed `tokenizer_config.json`, but for its chat template.
    pub fn new(json: &[u8], settings: &Value) -> Result<Self, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        // Truncation or padding saved with the file would silently change prompts.
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        let mask_token_id = special(settings, "mask_token").and_then(|token| inner.token_to_id(&token));
        Ok(Self { inner, mask_token_id, chat: None })
    }

    pub fn with_chat(self, chat: Option<ChatTemplate>) -> Self {
        Self { chat, ..self }
    }

    /// One more than the largest token id.
    pub fn size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    pub fn mask_token_id(&self) -> Option<u32> {
        self.mask_token_id
    }

    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Token ids of `text`. `special` adds what the tokenizer puts around a text (a begin-of-text token, say).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| e.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; special tokens are left out unless `special`.
    pub fn decode(&self, ids: &[u32], special: bool) -> Result<String, String> {
        self.inner.decode(ids, !special).map_err(|e| e.to_string())
    }

    /// The text of one token for display, special tokens included. Part of a character shows as U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_default()
    }
}

/// A special token in `tokenizer_config.json`: a string, or an object with `content`.
fn special(settings: &Value, field: &str) -> Option<String> {
    let value = settings.get(field)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}
