//! Chat templates: Jinja from the model's folder, rendered with bounds on work and on output.
//!
//! A template is a program from a checkpoint: it gets fuel, a bound on what it prints and no files. Its memory cannot be bounded
//! here (a few concatenations double a string), so a folder's template is trusted as far as its weights are.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use super::CheckpointError;

/// Instructions that one rendering may take; a 200-message conversation needs a few thousand.
const FUEL: u64 = 2_000_000;
/// Bytes of the longest rendered prompt.
const OUTPUT_MAX: usize = 4 << 20;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, … that templates refer to.
    special: serde_json::Map<String, Value>,
}

impl ChatTemplate {
    /// `chat_template.jinja` where present, else the `chat_template` of `tokenizer_config.json`; `None` without either.
    pub fn read(folder: &Path, settings: &Value) -> Result<Option<Self>, CheckpointError> {
        let path = folder.join("chat_template.jinja");
        let read = if path.exists() {
            let source = std::fs::read_to_string(&path).map_err(|source| CheckpointError::Read { path, source })?;
            Self::compile(source, settings).map(Some)
        } else {
            Self::from_settings(settings)
        };
        read.map_err(|reason| CheckpointError::Config { path: folder.join("tokenizer_config.json"), reason })
    }

    /// The `chat_template` of a parsed `tokenizer_config.json`, if it has one.
    pub fn from_settings(settings: &Value) -> Result<Option<Self>, String> {
        let source = match settings.get("chat_template") {
            Some(Value::String(source)) => Some(source.clone()),
            // Several named templates: the default one serves.
            Some(Value::Array(list)) => list.iter().find_map(|entry| {
                (entry.get("name")?.as_str()? == "default").then(|| entry.get("template")?.as_str().map(str::to_owned))?
            }),
            _ => None,
        };
        source.map(|source| Self::compile(source, settings)).transpose()
    }

    fn compile(source: String, settings: &Value) -> Result<Self, String> {
        Self::compiled(source, settings).map_err(|e| format!("chat template: {e:#}"))
    }

    fn compiled(source: String, settings: &Value) -> Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source)?;
        let mut special = serde_json::Map::new();
        for (field, value) in settings.as_object().into_iter().flatten().filter(|(field, _)| field.ends_with("_token")) {
            if let Some(token) = value.as_str().or_else(|| value.get("content")?.as_str()) {
                special.insert(field.clone(), Value::String(token.into()));
            }
        }
        Ok(Self { environment, special })
    }

    /// The prompt for `messages`, ending where the assistant's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, String> {
        let template = self.environment.get_template("chat").map_err(|e| e.to_string())?;
        let special = minijinja::Value::from(Serde(&self.special));
        let prompt = template
            .render(context! { messages => Serde(messages), add_generation_prompt => true, ..special })
            .map_err(|e| format!("the chat template refused the messages: {e}"))?;
        if prompt.len() > OUTPUT_MAX {
            return Err(format!("the rendered prompt has {} bytes; at most {OUTPUT_MAX} are taken", prompt.len()));
        }
        Ok(prompt)
    }
}
