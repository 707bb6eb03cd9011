//! The index of a folder of results: which of them make which section, with what is said about them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use thiserror::Error;

use super::input::Source;
use super::plots;
use super::provenance::Trait;
use super::table::Column;

/// What is wrong with an index.
#[derive(Debug, Error)]
pub enum IndexError {
    #[error("cannot read {file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("{file} is no index of results: {source}")]
    Toml { file: String, source: Box<toml::de::Error> },
    #[error("section '{section}' names {pattern}, and there is no such result beside the index")]
    Missing { section: String, pattern: String },
    #[error("'about' of the index tells {1} of {0}, which tells it itself or is not there: take it out of the index")]
    About(String, &'static str),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    pub title: String,
    /// Markdown, before all sections.
    #[serde(default)]
    pub notes: String,
    /// Where the results are, as seen from the page.
    #[serde(default)]
    pub link: String,
    /// By file, what a result does not tell itself.
    #[serde(default)]
    pub about: BTreeMap<String, Told>,
    #[serde(default, rename = "section")]
    pub sections: Vec<Section>,
}

/// What is known of a result beside what it tells.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Told {
    pub model: Option<String>,
    pub dtype: Option<String>,
    pub device: Option<String>,
    pub threads: Option<u64>,
    pub command: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    pub title: String,
    /// Begins the names of its plots.
    pub name: String,
    /// Markdown, before the tables.
    #[serde(default)]
    pub notes: String,
    /// File names, in the table's order; a `*` stands for any letters. What is named without one must be there, and a section
    /// without any result is left out.
    pub results: Vec<String>,
    /// Unset: what the results' kind usually shows.
    pub columns: Option<Vec<Column>>,
    /// Unset: all that the results have figures for.
    pub plots: Option<Vec<plots::Kind>>,
    /// In what the results may differ.
    #[serde(default)]
    pub allow: Vec<Trait>,
}

impl Index {
    pub fn read(path: &Path) -> Result<Self, IndexError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| IndexError::Io { file: file.clone(), source })?;
        toml::from_str(&text).map_err(|source| IndexError::Toml { file, source: Box::new(source) })
    }
}

impl Told {
    /// Adds it to what a result tells; the name of what that tells already is an error.
    pub fn add(&self, source: &mut Source) -> Result<(), &'static str> {
        let Source { about, points, .. } = source;
        let known = [
            ("the dtype", self.dtype.is_some() && about.dtype.is_some()),
            ("the device", self.device.is_some() && about.device.is_some()),
            ("the threads", self.threads.is_some() && about.threads.is_some()),
            ("the command", self.command.is_some() && !about.commands.is_empty()),
            ("the model", self.model.is_some() && points.iter().any(|point| !point.model.is_empty())),
        ];
        if let Some((name, _)) = known.into_iter().find(|(_, known)| *known) {
            return Err(name);
        }
        about.dtype = about.dtype.take().or_else(|| self.dtype.clone());
        about.device = about.device.take().or_else(|| self.device.clone());
        about.threads = about.threads.or(self.threads);
        about.commands.extend(self.command.clone());
        if let Some(model) = &self.model {
            points.iter_mut().for_each(|point| point.model.clone_from(model));
        }
        Ok(())
    }
}

impl Section {
    /// Of all `files`, those that the section names, in its order.
    pub fn files<'a>(&self, files: &[&'a str]) -> Result<Vec<&'a str>, IndexError> {
        let mut chosen: Vec<&str> = vec![];
        for pattern in &self.results {
            let found: Vec<_> = files.iter().filter(|file| matches(pattern, file)).collect();
            if found.is_empty() && !pattern.contains('*') {
                return Err(IndexError::Missing { section: self.title.clone(), pattern: pattern.clone() });
            }
            chosen.extend(found);
        }
        let mut seen = vec![];
        chosen.retain(|file| {
            !seen.contains(file) && {
                seen.push(*file);
                true
            }
        });
        Ok(chosen)
    }
}

/// Whether a name is of the pattern's form.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            let Some(name) = name.strip_prefix(start) else { return false };
            (0..=name.len()).filter(|at| name.is_char_boundary(*at)).any(|at| matches(rest, &name[at..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_choose_files() {
        assert!(matches("eval-*.json", "eval-nano.json") && matches("*", "") && matches("a*b*c", "axxbyyc"));
        assert!(!matches("eval-*.json", "eval-nano.jsonl") && !matches("a*b*c", "axxcyyb") && !matches("a", "ab"));
    }

    #[test]
    fn a_section_has_its_files_in_its_order() {
        let index: Index = toml::from_str(
            "title = 'T'\n[[section]]\ntitle = 'S'\nname = 's'\nresults = ['b.json', '*.json']\ncolumns = ['pass_at_1']\nplots = ['step-parts']",
        )
        .unwrap();
        let section = &index.sections[0];
        assert_eq!(section.files(&["a.json", "b.json", "c.txt"]).unwrap(), ["b.json", "a.json"]);
        assert_eq!(section.files(&["b.json"]).unwrap(), ["b.json"]);
        let error = section.files(&["c.txt"]).unwrap_err().to_string();
        assert_eq!(error, "section 'S' names b.json, and there is no such result beside the index");
    }

    #[test]
    fn what_an_index_does_not_know_is_refused() {
        for wrong in ["titel = 'T'", "title = 'T'\n[[section]]\ntitle = 'S'\nname = 's'\nresults = []\ncolumns = ['speed']"] {
            assert!(toml::from_str::<Index>(wrong).is_err(), "{wrong}");
        }
    }
}
