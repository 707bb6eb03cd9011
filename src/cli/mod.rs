//! The command line: one file per command, each with its `Options` and a `run` that takes them.
//!
//! Data goes to stdout, logs and progress to stderr. Commands return errors and leave the words around them and the exit code to
//! `main`. This is a front end like the gRPC service: it validates through [`crate::engine::request`] and knows no decoding.

mod bench;
mod compare;
mod connection;
mod display;
mod eval;
mod generate;
mod import;
mod inspect;
mod load;
mod method;
mod outcome;
mod quantize;
mod remote;
mod report;
mod serve;
mod sweep;
mod token;
mod train;

use std::ffi::OsString;
use std::io::ErrorKind;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::engine::request::Invalid;

/// Runs diffusion language models: fills a canvas of masked tokens in parallel.
#[derive(Parser)]
#[command(name = "lacuna", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Form of the log on stderr; RUST_LOG says how much of it
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Serve models over gRPC and HTTP
    Serve(Box<serve::Options>),
    /// Make a token for a server's clients
    Token(token::Options),
    /// Fill a canvas and print its text
    Generate(Box<generate::Options>),
    /// Generate from one prompt in several ways, side by side
    Compare(Box<compare::Options>),
    /// Say what a model folder holds and what is wrong with it
    Inspect(inspect::Options),
    /// Turn a GGUF file into a model folder
    Import(import::Options),
    /// Write a model in fewer bits, and say what that changes
    Quantize(Box<quantize::Options>),
    /// Train the small model that ships
    Train(train::Options),
    /// Measure how often a model is right
    Eval(Box<eval::Options>),
    /// Measure how fast a model is
    Bench(bench::Options),
    /// Measure methods by settings by requests in flight, in turn, as a plan says
    Sweep(sweep::Options),
    /// Make a page of tables and plots of results
    Report(report::Options),
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Parses the command line, and what `serve` finds in its file and the environment, and runs it. A command line that does not parse ends the process here, with exit code 2.
pub fn run() -> Result<()> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let parsed = serve::config::parse(Arguments::command(), &arguments, |name| std::env::var_os(name));
    let (matches, in_force) = parsed.unwrap_or_else(|error| error.exit())?;
    let Arguments { command, log_format } = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // A server's log tells its story; a command that prints a text should print nothing else unless something is wrong.
    let level = if matches!(command, Command::Serve(_)) { "info" } else { "warn" };
    start_log(log_format, level);
    match command {
        Command::Serve(options) => serve::run(*options, &in_force),
        Command::Token(options) => token::run(&options),
        Command::Generate(options) => generate::run(*options),
        Command::Compare(options) => compare::run(*options),
        Command::Inspect(options) => inspect::run(options),
        Command::Import(options) => import::run(options),
        Command::Quantize(options) => quantize::run(*options),
        Command::Train(options) => train::run(options),
        Command::Eval(options) => eval::run(*options),
        Command::Bench(options) => bench::run(options),
        Command::Sweep(options) => sweep::run(&options),
        Command::Report(options) => report::run(&options),
    }
}

fn start_log(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(console::colors_enabled_stderr());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// The error and its causes on one line. Some errors tell their cause themselves, which is not repeated.
pub fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |message, cause| match message.as_str() {
        "" => cause,
        told if told.contains(&cause) => message,
        _ => format!("{message}: {cause}"),
    })
}

/// Whether the request itself is at fault, as a wrong flag would be.
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Invalid>() || error.is::<compare::Unusable>() || error.is::<serve::config::Problems>()
}

/// Whether the reader of our output has gone.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &std::io::Error| cause.kind() == ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(broken))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn flags_do_not_clash() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_cause_is_told_once() {
        let cause = std::io::Error::other("disc on fire");
        let error = anyhow::Error::new(cause).context("cannot read config.json: disc on fire").context("no model");
        assert_eq!(message(&error), "no model: cannot read config.json: disc on fire");
    }
}
