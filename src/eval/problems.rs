//! Suites from files: one JSON object a line, in HumanEval's published format or a plain one; `.gz` is unpacked.
//!
//! | field | |
//! |---|---|
//! | `prompt` | what stands before the answer; required |
//! | `test` | Python that runs behind prompt and answer and raises if the answer is wrong |
//! | `reference` | the right answer; instead of `test` |
//! | `entry_point` | a function's name: `check(name)` is called at the end, as HumanEval's `test` defines it |
//! | `solution`, `canonical_solution` | a right answer, whose middle the infilling variant removes |
//! | `suffix` | what stands behind the answer: the task is one of infilling, as in github.com/openai/human-eval-infilling |
//! | `id`, `task_id` | how outcomes call the task; else its line's number |
//!
//! Further fields are passed over, as published files carry such. A line that is not a task is refused by its number.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::task::{Check, Hole, Suite, Task};

/// Where completions of HumanEval end, by its authors (Chen et al. 2021, arXiv 2107.03374, section 2.1).
const HUMANEVAL_STOPS: [&str; 5] = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"];
/// Bytes that a file of tasks may have, unpacked: a small file can hold very much.
const BYTES_MAX: u64 = 1 << 30;

/// A file that is no suite.
#[derive(Debug, Error)]
pub enum ProblemsError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} line {line}: {reason}")]
    Line { path: PathBuf, line: usize, reason: String },
    #[error("{path} holds no task: give one JSON object a line")]
    Empty { path: PathBuf },
    #[error("{path} has more than {BYTES_MAX} bytes")]
    TooLong { path: PathBuf },
}

#[derive(Deserialize)]
struct Line {
    prompt: String,
    test: Option<String>,
    reference: Option<String>,
    entry_point: Option<String>,
    #[serde(alias = "canonical_solution")]
    solution: Option<String>,
    suffix: Option<String>,
    #[serde(alias = "task_id")]
    id: Option<Value>,
}

/// Whether lines must be HumanEval's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    HumanEval,
    Plain,
}

/// Reads a file of tasks, the first `limit` of them.
pub fn read(path: &Path, format: Format, limit: usize) -> Result<Suite, ProblemsError> {
    let (mut tasks, mut ids) = (vec![], BTreeSet::new());
    for (line, text) in lines(path)?.into_iter().take(limit) {
        let wrong = |reason: String| ProblemsError::Line { path: path.into(), line, reason };
        let found: Line = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let task = task(found, format, line).map_err(wrong)?;
        if !ids.insert(task.id.clone()) {
            return Err(wrong(format!("the id {} stands on an earlier line too", task.id)));
        }
        tasks.push(task);
    }
    let (name, stops) = match format {
        Format::HumanEval => ("humaneval".into(), HUMANEVAL_STOPS.map(String::from).to_vec()),
        Format::Plain => (path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), vec![]),
    };
    Ok(Suite { name, stops, tasks })
}

fn task(line: Line, format: Format, number: usize) -> Result<Task, String> {
    if line.prompt.is_empty() {
        return Err("the prompt is empty".into());
    }
    if format == Format::HumanEval && (line.test.is_none() || line.entry_point.is_none()) {
        return Err("a task of HumanEval has a test and an entry_point: for other tasks use the suite jsonl".into());
    }
    let named = |name: &String| name.chars().all(|c| c == '_' || c.is_alphanumeric()) && !name.is_empty();
    if let Some(name) = line.entry_point.as_ref().filter(|name| !named(name)) {
        return Err(format!("entry_point {name:?} is no function's name"));
    }
    let check = match (line.test, line.reference) {
        (Some(test), None) => Check::Program { test, entry_point: line.entry_point },
        (None, Some(_)) if line.entry_point.is_some() => return Err("entry_point goes with test".into()),
        (None, Some(reference)) => Check::Reference(reference),
        (Some(_), Some(_)) => return Err("give test or reference, not both".into()),
        (None, None) => return Err("there is neither test nor reference to judge by".into()),
    };
    let id = match line.id {
        Some(Value::String(id)) => id,
        Some(id @ Value::Number(_)) => id.to_string(),
        Some(_) => return Err("the id is neither a string nor a number".into()),
        None => format!("line {number}"),
    };
    let solution = match &check {
        Check::Reference(reference) => line.solution.or(Some(reference.clone())),
        _ => line.solution,
    };
    // Of a task that comes with a hole, the solution is what stood in it; and the test knows nothing of where the prompt ends.
    let hole = line.suffix.map(|after| Hole { before: String::new(), middle: solution.clone(), after });
    if hole.is_some() && matches!(check, Check::Reference(_)) {
        return Err("a suffix goes with test: a reference says what the whole answer is".into());
    }
    Ok(Task { id, prompt: line.prompt, solution, hole, check })
}

/// The lines of a text file that are not blank, with their numbers from 1.
pub fn lines(path: &Path) -> Result<Vec<(usize, String)>, ProblemsError> {
    let unreadable = |source| ProblemsError::Read { path: path.into(), source };
    let file = File::open(path).map_err(unreadable)?;
    let packed = path.extension().is_some_and(|extension| extension == "gz");
    let bytes: Box<dyn Read> = if packed { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut reader = BufReader::new(bytes.take(BYTES_MAX + 1));
    let (mut found, mut text, mut read, mut number) = (vec![], String::new(), 0, 0);
    loop {
        text.clear();
        number += 1;
        match reader.read_line(&mut text).map_err(unreadable)? {
            0 => break,
            bytes => read += bytes as u64,
        }
        if read > BYTES_MAX {
            return Err(ProblemsError::TooLong { path: path.into() });
        }
        if !text.trim().is_empty() {
            found.push((number, text.trim_end_matches(['\n', '\r']).to_owned()));
        }
    }
    if found.is_empty() { Err(ProblemsError::Empty { path: path.into() }) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn suite(text: &str, format: Format, limit: usize) -> Result<Suite, String> {
        let mut file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        read(file.path(), format, limit).map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_plain_and_packed() {
        let line = r#"{"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n"}"#;
        let mut file = tempfile::Builder::new().suffix(".jsonl.gz").tempfile().unwrap();
        let mut packed = flate2::write::GzEncoder::new(&mut file, flate2::Compression::fast());
        writeln!(packed, "{line}").unwrap();
        packed.finish().unwrap();
        let published = read(file.path(), Format::HumanEval, 9).unwrap();
        assert_eq!((published.name.as_str(), published.stops.len(), published.tasks.len()), ("humaneval", 5, 1));
        let task = &published.tasks[0];
        assert_eq!((task.id.as_str(), task.solution.as_deref()), ("HumanEval/0", Some("    return 1\n")));
        assert!(matches!(&task.check, Check::Program { entry_point: Some(name), .. } if name == "f"));

        let plain = "\n{\"prompt\": \"1 + 1 = \", \"reference\": \"2\"}\n\n{\"prompt\": \"x\", \"test\": \"\", \"id\": 7, \"suffix\": \"y\"}";
        let tasks = suite(plain, Format::Plain, 9).unwrap().tasks;
        assert_eq!(tasks.iter().map(|task| task.id.as_str()).collect::<Vec<_>>(), ["line 2", "7"]);
        assert_eq!(tasks[1].hole.as_ref().map(|hole| hole.after.as_str()), Some("y"));
        assert_eq!(suite(plain, Format::Plain, 1).unwrap().tasks.len(), 1);
    }

    #[test]
    fn a_bad_line_is_refused_by_its_number() {
        let good = r#"{"prompt": "x", "reference": "y", "id": "a"}"#;
        let cases = [
            ("{", "line 2: EOF"),
            ("[]", "line 2: "),
            (r#"{"reference": "y"}"#, "line 2: missing field `prompt`"),
            (r#"{"prompt": "", "reference": "y"}"#, "line 2: the prompt is empty"),
            (r#"{"prompt": "x"}"#, "line 2: there is neither test nor reference"),
            (r#"{"prompt": "x", "test": "", "reference": "y"}"#, "line 2: give test or reference, not both"),
            (r#"{"prompt": "x", "reference": "y", "entry_point": "f"}"#, "line 2: entry_point goes with test"),
            (r#"{"prompt": "x", "test": "", "entry_point": "f()"}"#, "line 2: entry_point \"f()\" is no function's name"),
            (r#"{"prompt": "x", "reference": "y", "suffix": "z"}"#, "line 2: a suffix goes with test"),
            (r#"{"prompt": "x", "reference": "y", "id": [1]}"#, "line 2: the id is neither"),
            (good, "line 2: the id a stands on an earlier line too"),
        ];
        for (line, told) in cases {
            let error = suite(&format!("{good}\n{line}\n"), Format::Plain, 9).unwrap_err();
            assert!(error.contains(told), "{line}: {error}");
        }
        assert!(suite(good, Format::HumanEval, 9).unwrap_err().contains("line 1: a task of HumanEval has a test"));
        assert!(suite(" \n", Format::Plain, 9).unwrap_err().contains("holds no task"));
        let missing = read(Path::new("no/such.jsonl"), Format::Plain, 9).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read no/such.jsonl: "), "{missing}");
    }
}
