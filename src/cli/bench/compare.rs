//! `lacuna bench compare`: two results of `bench serve --json`, figure by figure.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::eval::load::compare::{Comparison, Report, compare};

#[derive(Args, Debug)]
pub struct Options {
    /// Result to compare with
    #[arg(value_name = "A.json")]
    a: PathBuf,
    /// Result to compare; ratios are its figures by A's
    #[arg(value_name = "B.json")]
    b: PathBuf,
    /// Compare results of different models, types or devices too
    #[arg(long)]
    anyway: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let Comparison { differences, rows } = compare(&read(&options.a)?, &read(&options.b)?, options.anyway)?;
    for found in differences {
        println!("{}: {} and {}", found.name, found.a, found.b);
    }
    println!("{:<16} {:<24} {:>10} {:>10} {:>7}", "lane", "figure", "A", "B", "B/A");
    for row in rows {
        let ratio = row.ratio().map_or("-".into(), |ratio| format!("{ratio:.2}"));
        println!("{:<16} {:<24} {:>10.2} {:>10.2} {ratio:>7}", row.lane, row.figure, row.a, row.b);
    }
    Ok(())
}

fn read(path: &Path) -> Result<Report> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no result of a load: make one with 'lacuna bench serve --json'", path.display()))
}
