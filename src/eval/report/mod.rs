//! From result files to a page of tables and plots.
//!
//! [`input`] and `kinds` recognise files and bring them to points with figures, [`index`] says which of them belong together,
//! [`table`](mod@table) and [`plots`] choose what to show of them, [`chart`] and [`bars`] draw with [`svg`], and [`html`] and
//! [`markdown`] write the page. The same results give the same page to the byte. Nothing here measures anything, and nothing is
//! said about figures but what they say by themselves: what they mean stands in the index.

pub mod bars;
pub mod chart;
pub mod command;
pub mod html;
pub mod index;
pub mod input;
mod kinds;
pub mod markdown;
pub mod plots;
pub mod provenance;
pub mod score;
pub mod svg;
pub mod table;

use std::path::{Path, PathBuf};

use thiserror::Error;

use index::{Index, IndexError};
use input::{Kind, Source, Unreadable};
use plots::Plot;
use provenance::{Trait, difference, provenance};
use table::{Column, Table, table};

/// Where the results of a folder are told apart.
pub const INDEX: &str = "index.toml";

/// Why there is no report.
#[derive(Debug, Error)]
pub enum ReportError {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("there are no results in {0}: name files that end in .json, or folders of them")]
    Nothing(String),
    #[error("cannot list {folder}: {source}")]
    Folder { folder: String, source: std::io::Error },
    #[error(
        "results of '{section}' differ in {what} ({values}): report them apart, or say --allow {what} (in an index, allow = [\"{what}\"])"
    )]
    Unlike { section: String, what: &'static str, values: String },
}

/// A page before it is written.
#[derive(Clone, Debug)]
pub struct Page {
    pub title: String,
    pub notes: String,
    /// Where raw results are, as seen from the page; empty where they are not linked.
    pub link: String,
    pub sections: Vec<Section>,
}

#[derive(Clone, Debug)]
pub struct Section {
    pub title: String,
    pub notes: String,
    pub tables: Vec<Table>,
    pub plots: Vec<Plot>,
    /// What was measured with what.
    pub provenance: Vec<String>,
    /// The files that it was made from.
    pub files: Vec<String>,
}

/// Makes a page of files and folders. A folder's index says what its page looks like; without one, and for what no index names,
/// there is a section for each kind of result.
pub fn page(paths: &[PathBuf], allow: &[Trait]) -> Result<Page, ReportError> {
    let mut page = Page { title: "Results".into(), notes: String::new(), link: String::new(), sections: vec![] };
    let mut loose = vec![];
    for path in paths {
        let folder = if path.is_dir() { Some(path.as_path()) } else { path.parent().filter(|_| path.ends_with(INDEX)) };
        let folder = folder.map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
        let Some(folder) = folder else {
            loose.push(input::read(path)?);
            continue;
        };
        let mut sources = files(folder)?.iter().map(|file| input::read(file)).collect::<Result<Vec<_>, _>>()?;
        if folder.join(INDEX).is_file() {
            let index = Index::read(&folder.join(INDEX))?;
            sources = indexed(index, sources, &mut page, allow)?;
        }
        loose.append(&mut sources);
    }
    let mut kinds: Vec<Kind> = loose.iter().map(|source| source.kind).collect();
    kinds.sort();
    kinds.dedup();
    for kind in kinds {
        let sources: Vec<_> = loose.iter().filter(|source| source.kind == kind).collect();
        let name = format!("{kind:?}").to_lowercase();
        page.sections.push(section(kind.title(), &name, &sources, None, &plots::ALL, allow)?);
    }
    match page.sections.is_empty() {
        true => Err(ReportError::Nothing(paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))),
        false => Ok(page),
    }
}

/// The results in a folder, by name.
fn files(folder: &Path) -> Result<Vec<PathBuf>, ReportError> {
    let failed = |source| ReportError::Folder { folder: folder.display().to_string(), source };
    let entries = std::fs::read_dir(folder).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let mut files: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "json"));
    files.sort();
    Ok(files)
}

/// Adds an index's sections to the page; returns the results that none of them names.
fn indexed(index: Index, mut sources: Vec<Source>, page: &mut Page, allow: &[Trait]) -> Result<Vec<Source>, ReportError> {
    for (file, told) in &index.about {
        let source = sources.iter_mut().find(|source| source.file == *file);
        let added = source.ok_or("something").and_then(|source| told.add(source));
        added.map_err(|what| IndexError::About(file.clone(), what))?;
    }
    let mut named = vec![];
    for wanted in &index.sections {
        let all: Vec<&str> = sources.iter().map(|source| source.file.as_str()).collect();
        let files = wanted.files(&all)?;
        let chosen: Vec<&Source> = files.iter().filter_map(|file| sources.iter().find(|source| source.file == *file)).collect();
        named.extend(files.iter().map(|file| (*file).to_owned()));
        if chosen.is_empty() {
            continue;
        }
        let allow = [allow, &wanted.allow].concat();
        let kinds = wanted.plots.as_deref().unwrap_or(&plots::ALL);
        let mut section = section(&wanted.title, &wanted.name, &chosen, wanted.columns.as_deref(), kinds, &allow)?;
        section.notes.clone_from(&wanted.notes);
        page.sections.push(section);
    }
    (page.title, page.notes, page.link) = (index.title, index.notes, index.link);
    sources.retain(|source| !named.contains(&source.file));
    Ok(sources)
}

/// A table for each kind among the sources, and the plots that they allow.
fn section(
    title: &str,
    name: &str,
    sources: &[&Source],
    columns: Option<&[Column]>,
    kinds: &[plots::Kind],
    allow: &[Trait],
) -> Result<Section, ReportError> {
    if let Some((what, values)) = difference(sources, allow) {
        return Err(ReportError::Unlike { section: title.into(), what: what.name(), values });
    }
    let mut tables: Vec<(&[Column], Vec<&Source>)> = vec![];
    for source in sources {
        let columns = columns.unwrap_or(Column::usual(source.kind));
        match tables.iter_mut().find(|(other, _)| *other == columns) {
            Some((_, group)) => group.push(source),
            None => tables.push((columns, vec![source])),
        }
    }
    Ok(Section {
        title: title.into(),
        notes: String::new(),
        tables: tables.iter().map(|(columns, group)| table(group, columns)).collect(),
        plots: plots::plots(sources, kinds, name),
        provenance: provenance(sources),
        files: sources.iter().map(|source| source.file.clone()).collect(),
    })
}

#[cfg(test)]
mod tests;
