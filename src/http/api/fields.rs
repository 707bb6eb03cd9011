//! A JSON object read field by field: each is taken by its name, and whatever is left at the end is refused by its name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::error::Error;

pub struct Fields {
    /// Where the object stands in the body; empty for the body itself.
    at: String,
    map: Map<String, Value>,
}

impl Fields {
    /// A body's.
    pub fn read(body: &[u8]) -> Result<Self, Error> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { at: String::new(), map }),
            Ok(_) => Err(Error::invalid(None, "the body is not a JSON object")),
            Err(error) => Err(Error::invalid(None, format!("the body is not JSON: {error}"))),
        }
    }

    /// Those of an object at `at` in the body.
    pub fn at(at: String, map: Map<String, Value>) -> Self {
        Self { at, map }
    }

    /// Where a field of this object stands in the body.
    pub fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.into() } else { format!("{}.{name}", self.at) }
    }

    /// A field's value; null is as good as absent.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, Error> {
        let value = self.map.shift_remove(name).filter(|value| !value.is_null());
        let parsed = value.map(serde_path_to_error::deserialize).transpose();
        parsed.map_err(|error: serde_path_to_error::Error<serde_json::Error>| {
            let path = match error.path().to_string().as_str() {
                // A key that is none has no name.
                "." | "?" => self.path(name),
                inner if inner.starts_with('[') => format!("{}{inner}", self.path(name)),
                inner => format!("{}.{inner}", self.path(name)),
            };
            Error::field(&path, error.inner().to_string())
        })
    }

    /// A field that is an object, if it is there.
    pub fn object(&mut self, name: &str) -> Result<Option<Self>, Error> {
        Ok(self.take(name)?.map(|map| Self::at(self.path(name), map)))
    }

    /// Refuses what nobody took. What asks for nothing may stay.
    pub fn finish(self) -> Result<(), Error> {
        let harmless = |name: &str, value: &Value| value.is_null() || (self.at.is_empty() && neutral(name, value));
        match self.map.iter().find(|(name, value)| !harmless(name, value)) {
            None => Ok(()),
            Some((name, _)) => Err(Error::unknown(&self.path(name))),
        }
    }
}

/// Whether a field that clients of this kind of API send asks for nothing with this value.
fn neutral(name: &str, value: &Value) -> bool {
    match name {
        // A label, for the one who sends it.
        "user" => value.is_string(),
        "best_of" => *value == json!(1),
        "echo" | "store" => *value == json!(false),
        "modalities" => *value == json!(["text"]),
        "response_format" => *value == json!({"type": "text"}),
        "service_tier" => *value == json!("auto") || *value == json!("default"),
        "tool_choice" => *value == json!("none"),
        "tools" => *value == json!([]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str, read: impl Fn(&mut Fields) -> Result<(), Error>) -> Option<String> {
        let mut fields = Fields::read(body.as_bytes()).expect("an object");
        let result = read(&mut fields).and_then(|()| fields.finish());
        result.err().and_then(|error| error.param)
    }

    #[test]
    fn the_innermost_field_that_is_wrong_is_named() {
        let read = |fields: &mut Fields| {
            fields.take::<Vec<Vec<u32>>>("rows")?;
            let mut inner = fields.object("lacuna")?.expect("it is there");
            inner.take::<u32>("steps")?;
            inner.finish()
        };
        for (body, param) in [
            (r#"{"rows": null, "lacuna": {"steps": 3}, "echo": false, "tools": null, "user": "me"}"#, None),
            (r#"{"rows": [[1], [2, -3]], "lacuna": {}}"#, Some("rows[1][1]")),
            (r#"{"lacuna": {"steps": "3"}}"#, Some("lacuna.steps")),
            (r#"{"lacuna": {"steps": 3, "echo": false}}"#, Some("lacuna.echo")),
            (r#"{"lacuna": {}, "tools": [{}]}"#, Some("tools")),
            (r#"{"lacuna": {}, "echo": true}"#, Some("echo")),
            (r#"{"lacuna": {}, "Lacuna": {}}"#, Some("Lacuna")),
        ] {
            assert_eq!(refused(body, read).as_deref(), param, "{body}");
        }
    }
}
