//! The file of a run's outcomes, one JSON object a line behind a line of the run's settings: a run that was cut off goes on from it.
//!
//! While texts are decoded each is appended as it finishes; at the end the file is written anew, in the order of the tasks and with
//! the verdicts. A file made with other settings is refused, as its outcomes would not be this run's.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

use super::score::Outcome;

/// A file that outcomes cannot be kept in.
#[derive(Debug, Error)]
pub enum RecordError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} line {line}: {reason}: it is no file of outcomes; name another, or delete it")]
    Line { path: PathBuf, line: usize, reason: String },
    #[error("{path} was made with other settings ({field} {there}; here {here}): name another file, or delete it")]
    Settings { path: PathBuf, field: String, there: String, here: String },
}

/// An open file of outcomes.
pub struct Record {
    path: PathBuf,
    file: File,
    settings: Value,
}

impl Record {
    /// Opens or creates the file for a run with these settings (an object), and returns the outcomes that are in it.
    pub fn open(path: &Path, settings: Value) -> Result<(Self, Vec<Outcome>), RecordError> {
        let failed = |source| RecordError::Io { path: path.into(), source };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let mut known = vec![];
        let (mut whole, mut line) = (0, 0);
        let mut reader = BufReader::new(&mut file);
        let mut text = String::new();
        // A last line without its end was being written when the run was cut off.
        while reader.read_line(&mut text).map_err(failed)? > 0 && text.ends_with('\n') {
            line += 1;
            whole += text.len() as u64;
            let wrong = |reason: serde_json::Error| RecordError::Line { path: path.into(), line, reason: reason.to_string() };
            if line == 1 {
                let head: Value = serde_json::from_str(&text).map_err(wrong)?;
                same(&head["settings"], &settings).map_err(|(field, there, here)| RecordError::Settings {
                    path: path.into(),
                    field,
                    there,
                    here,
                })?;
            } else {
                known.push(serde_json::from_str(&text).map_err(wrong)?);
            }
            text.clear();
        }
        file.set_len(whole).and_then(|()| file.seek(io::SeekFrom::End(0))).map_err(failed)?;
        let mut record = Self { path: path.into(), file, settings };
        if line == 0 {
            record.write(&json!({"settings": record.settings}))?;
        }
        Ok((record, known))
    }

    /// Adds one outcome.
    pub fn append(&mut self, outcome: &Outcome) -> Result<(), RecordError> {
        self.write(&json!(outcome))
    }

    fn write(&mut self, value: &Value) -> Result<(), RecordError> {
        // One call for the whole line, so that lines do not mix with another process's.
        let line = format!("{value}\n");
        self.file.write_all(line.as_bytes()).map_err(|source| RecordError::Io { path: self.path.clone(), source })
    }

    /// Writes all outcomes anew; cut off in between, the old file stays.
    pub fn finish(self, outcomes: &[Outcome]) -> Result<(), RecordError> {
        let failed = |source| RecordError::Io { path: self.path.clone(), source };
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut text = format!("{}\n", json!({"settings": self.settings}));
        outcomes.iter().for_each(|outcome| text.push_str(&format!("{}\n", json!(outcome))));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        // As a file that was made by its name would have.
        file.as_file().set_permissions(self.file.metadata().map_err(failed)?.permissions()).map_err(failed)?;
        file.persist(&self.path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

/// The first field in which two objects differ, with both values.
fn same(there: &Value, here: &Value) -> Result<(), (String, String, String)> {
    let fields = |value: &Value| value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    match fields(here).into_iter().chain(fields(there)).find(|field| there[field] != here[field]) {
        Some(field) => Err((field.clone(), there[&field].to_string(), here[&field].to_string())),
        None => Ok(()),
    }
}

/// Outcomes of others: one object with `task` and `text` a line, and a line of settings or none.
pub fn texts(path: &Path) -> Result<Vec<Outcome>, RecordError> {
    let failed = |source| RecordError::Io { path: path.into(), source };
    let mut found = vec![];
    for (index, text) in BufReader::new(File::open(path).map_err(failed)?).lines().enumerate() {
        let text = text.map_err(failed)?;
        if text.trim().is_empty() || (index == 0 && text.starts_with("{\"settings\":")) {
            continue;
        }
        let wrong =
            |reason: serde_json::Error| RecordError::Line { path: path.into(), line: index + 1, reason: reason.to_string() };
        found.push(Outcome { passed: None, why: None, ..serde_json::from_str(&text).map_err(wrong)? });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(task: &str) -> Outcome {
        serde_json::from_value(json!({"task": task, "text": "x\n", "generated_tokens": 3})).unwrap()
    }

    #[test]
    fn a_run_goes_on_where_it_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outcomes.jsonl");
        let settings = json!({"seed": 1, "model": "m"});
        let (mut record, known) = Record::open(&path, settings.clone()).unwrap();
        assert_eq!(known, []);
        record.append(&outcome("a")).unwrap();
        record.append(&outcome("b")).unwrap();
        drop(record);
        // Cut off within a line.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"task\": \"c\", \"te").unwrap();
        let (mut record, known) = Record::open(&path, settings.clone()).unwrap();
        assert_eq!(known, [outcome("a"), outcome("b")]);
        record.append(&outcome("c")).unwrap();
        let judged = ["a", "b", "c"].map(|task| Outcome { passed: Some(true), ..outcome(task) });
        record.finish(&judged).unwrap();
        assert_eq!(Record::open(&path, settings).unwrap().1, judged);
        assert_eq!(texts(&path).unwrap(), ["a", "b", "c"].map(outcome));

        for (other, told) in
            [(json!({"seed": 2, "model": "m"}), "(seed 1; here 2)"), (json!({"seed": 1}), "(model \"m\"; here null)")]
        {
            let error = Record::open(&path, other).err().unwrap().to_string();
            assert!(error.contains(told), "{error}");
        }
        std::fs::write(&path, "hello\n").unwrap();
        let error = Record::open(&path, json!({})).err().unwrap().to_string();
        assert!(error.contains("line 1: expected value"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "hello\n", "a file of something else is left alone");
    }
}
