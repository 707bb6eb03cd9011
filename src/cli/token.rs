//! `lacuna token`: a random token for a client, and its entry for the server's file. The token is kept nowhere.

use std::io::Write;

use anyhow::{Result, ensure};
use clap::Args;

use crate::service::tokens::{is_name, make};

#[derive(Args, Debug)]
pub struct Options {
    /// Who it is for, as logs will tell
    name: String,
    /// Let it load and unload models
    #[arg(long)]
    admin: bool,
}

/// The token goes to stdout, for whoever is to have it; the entry to stderr, for the file.
pub fn run(options: &Options) -> Result<()> {
    ensure!(is_name(&options.name), "'{}' is no name for a token: use 1 to 64 of A-Z a-z 0-9 . _ -", options.name);
    let (token, entry) = make(&options.name, options.admin);
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{token}")?;
    stdout.flush()?;
    eprint!("{entry}");
    Ok(())
}
