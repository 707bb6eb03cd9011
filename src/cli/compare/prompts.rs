//! A file of prompts: one a line, plain or as JSON.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Bytes of the largest file: prompts of hours of work.
const BYTES_MAX: u64 = 64 << 20;

/// A prompt, and the right answer if there is one. Fields that are none of these are somebody else's.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Task {
    pub prompt: String,
    pub reference: Option<String>,
}

/// Reads a file; empty lines are none.
pub fn read(path: &Path) -> Result<Vec<Task>> {
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    file.take(BYTES_MAX + 1).read_to_string(&mut text).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(text.len() as u64 <= BYTES_MAX, "{} has more than {} MiB: split it", path.display(), BYTES_MAX >> 20);
    let tasks = parse(&text).with_context(|| path.display().to_string())?;
    ensure!(!tasks.is_empty(), "{} has no prompt", path.display());
    Ok(tasks)
}

fn parse(text: &str) -> Result<Vec<Task>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let task = |(at, line): (usize, &str)| match line.trim_start().starts_with('{') {
        true => {
            serde_json::from_str(line).with_context(|| format!("line {}: write {{\"prompt\": …, \"reference\": …}}", at + 1))
        }
        false => Ok(Task { prompt: line.into(), reference: None }),
    };
    lines.map(task).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_plain_or_json() {
        let text = "one\n\n{\"prompt\": \"two\\n\", \"reference\": \"2\", \"id\": 7}\r\n {\"prompt\": \"three\"}\n";
        let task = |prompt: &str, reference: Option<&str>| Task { prompt: prompt.into(), reference: reference.map(Into::into) };
        assert_eq!(parse(text).unwrap(), [task("one", None), task("two\n", Some("2")), task("three", None)]);
        let error = format!("{:#}", parse("a\n{\"text\": \"b\"}").unwrap_err());
        assert!(error.starts_with("line 2: ") && error.contains("prompt"), "{error}");
    }
}
