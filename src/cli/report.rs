//! `lacuna report`: result files to a page of tables and plots.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::checkpoint::write_atomically;
use crate::eval::report::provenance::Trait;
use crate::eval::report::{self, html, markdown};

/// Plots lie here beside the page.
const PLOTS: &str = "plots";

#[derive(Args, Debug)]
pub struct Options {
    /// Results that eval, sweep, bench step, bench speculate or bench serve wrote as JSON, or folders of them; a folder's
    /// index.toml says what belongs together
    #[arg(value_name = "RESULTS", required = true)]
    results: Vec<PathBuf>,
    /// Folder for index.html and plots/*.svg; or a file that ends in .md, for a page in Markdown with plots/ beside it
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Set results side by side although they differ in this
    #[arg(long, value_enum, value_name = "TRAIT,…", value_delimiter = ',')]
    allow: Vec<Trait>,
}

pub fn run(options: &Options) -> Result<()> {
    let page = report::page(&options.results, &options.allow)?;
    let out = &options.out;
    let (file, text) = match out.extension().is_some_and(|ending| ending == "md") {
        true => (out.clone(), markdown::page(&page, PLOTS)),
        false => (out.join("index.html"), html::page(&page)),
    };
    let plots = file.parent().unwrap_or(Path::new("")).join(PLOTS);
    std::fs::create_dir_all(&plots).with_context(|| format!("cannot make the folder {}", plots.display()))?;
    for plot in page.sections.iter().flat_map(|section| &section.plots) {
        write_atomically(&plots.join(format!("{}.svg", plot.name)), plot.svg().as_bytes())?;
    }
    write_atomically(&file, text.as_bytes())?;
    println!("{}", file.display());
    Ok(())
}
