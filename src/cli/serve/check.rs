//! `lacuna serve --check`: what would be in force and where each value comes from, as a file that could be given to `--config`; and
//! everything that would keep the server from starting. Nothing is served, and no weights are loaded.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use anyhow::Result;

use super::Options;
use super::config::{InForce, Problems};
use super::settings::Settings;
use crate::checkpoint::Checkpoint;
use crate::cli::load::{ByRequest, RunOptions, open};
use crate::draft::Drafters;
use crate::engine::Limits;
use crate::service::Loader;
use crate::tensor::mebibytes;

pub fn check(options: &Options, in_force: &InForce) -> Result<()> {
    let mut problems = vec![];
    let mut notes = vec![];
    match Settings::new(options) {
        Ok(settings) => notes.extend(settings.warnings().into_iter().map(|warning| format!("warning: {warning}"))),
        Err(found) => problems.extend(found.0),
    }
    problems.extend(port("address", options.address));
    problems.extend(options.http.0.filter(|http| *http != options.address).and_then(|http| port("http", http)));
    for path in options.model.iter().filter(|path| path.exists()) {
        match model(path, options) {
            Ok(note) => notes.push(note),
            Err(found) => problems.extend(found.into_iter().map(|problem| format!("model {}: {problem}", path.display()))),
        }
    }
    print(in_force, &notes)?;
    if problems.is_empty() { Ok(()) } else { Err(Problems(problems).into()) }
}

/// Takes a port and leaves it again.
fn port(name: &str, address: SocketAddr) -> Option<String> {
    TcpListener::bind(address).err().map(|error| format!("{name}: cannot listen on {address}: {error}"))
}

/// What a model would take, or what is wrong with it, by its headers.
fn model(path: &Path, options: &Options) -> Result<String, Vec<String>> {
    let checkpoint = open(path).map_err(|error| vec![format!("{error:#}")])?;
    let mut problems = checkpoint.problems();
    problems.extend(drafters(&checkpoint, &options.run).err());
    let loader = ByRequest { run: options.run.clone(), limits: Limits { resident: options.max_resident, ..Limits::default() } };
    match loader.measure(path) {
        Err(problem) => problems.push(problem),
        Ok(need) => {
            problems.extend(need.within(&checkpoint.name(), None, &[]).err());
            if problems.is_empty() {
                let weights = mebibytes(need.weights + need.drafters);
                return Ok(format!("model {}: {}, {weights} of weights", checkpoint.name(), checkpoint.config.family.name));
            }
        }
    }
    Err(problems)
}

fn drafters(checkpoint: &Checkpoint, run: &RunOptions) -> Result<(), String> {
    let folder = run.drafters.clone().unwrap_or_else(|| checkpoint.path.join("drafters"));
    let loaded = Drafters::load(&folder, &checkpoint.config, run.placement(checkpoint)?);
    loaded.map(drop).map_err(|error| error.to_string())
}

fn print(in_force: &InForce, notes: &[String]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    for setting in &in_force.0 {
        match &setting.value {
            Some(value) => writeln!(stdout, "{:<44} # {}", format!("{} = {value}", setting.name), setting.origin)?,
            None => writeln!(stdout, "# {} is not set", setting.name)?,
        }
    }
    for note in notes {
        writeln!(stdout, "# {note}")?;
    }
    Ok(stdout.flush()?)
}
