//! The `lacuna` command. Exit codes: 0 it is done, 1 it failed, 2 it was asked for what cannot be.

use std::process::ExitCode;

fn main() -> ExitCode {
    match lacuna::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        // `lacuna generate … | head`: the reader has had enough, and nobody is left to tell.
        Err(error) if lacuna::cli::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", lacuna::cli::message(&error));
            ExitCode::from(if lacuna::cli::is_usage(&error) { 2 } else { 1 })
        }
    }
}
