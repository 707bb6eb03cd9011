//! Runs a generated Python program in a separate process that can do little harm: an empty folder that vanishes, limits on time,
//! memory, files and output, nothing else of the file system but the interpreter's own, no network where the kernel allows it, and a
//! throw-away user where we may choose one.
//!
//! The fences, in the order of what they stop:
//! * Landlock: reading and writing outside the folder, and signals to our processes;
//! * a user of its own (when started as root): private files, our processes, and, with a limit of one process, any fork;
//! * resource limits: endless loops, memory hogs, files on disc (none may grow beyond [`Limits::file_bytes`]);
//! * a network namespace: sockets find no interface, not even loopback;
//! * a wall clock and an output cap here, enforced by SIGKILL to the whole process group.
//!
//! What this is not: a jail for determined attackers. There is no system call filter, and names and sizes of files (not what they hold)
//! can be asked for anywhere. [`capabilities`] tells which fences this machine lacks. `fences` raises them, `process` watches.

mod fences;
mod landlock;
mod process;

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use fences::Fences;
use process::{End, Running};

/// How much of the end of stderr is kept for the report; a Python traceback ends with its cause.
const STDERR_TAIL: usize = 4096;

/// What a program may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time on the clock, after which the program is killed. Default is 5 s.
    pub wall: Duration,
    /// Seconds of processor time. Default is 4.
    pub cpu_seconds: u64,
    /// Address space in bytes. Default is 512 MiB; the interpreter itself takes about 30.
    pub memory_bytes: u64,
    /// Size of the largest file it may write. Default is 0: answers go to stdout, and many small files would fill a disc too.
    pub file_bytes: u64,
    /// Open files, the standard three included. Default is 32.
    pub open_files: u64,
    /// Processes and threads, the program included. Default is 1: nothing can outlive the program unseen.
    pub processes: u64,
    /// Bytes of stdout and stderr together. Default is 64 KiB.
    pub output_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            wall: Duration::from_secs(5),
            cpu_seconds: 4,
            memory_bytes: 512 << 20,
            file_bytes: 0,
            open_files: 32,
            processes: 1,
            output_bytes: 64 << 10,
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The program ended by itself with status 0.
    Finished {
        /// All that it printed; bytes that are not UTF-8 are replaced.
        stdout: String,
    },
    /// The program ended with another status or by a signal.
    Failed {
        /// As the system reports it.
        status: ExitStatus,
        /// The end of stderr, where Python names the exception.
        stderr_tail: String,
    },
    /// Killed for running longer than the wall clock or the processor limit.
    TimedOut,
    /// Killed for printing more than the limit.
    OutputLimit,
}

/// Runs a Python program to its end or to a limit.
///
/// # Errors
/// When no interpreter can be started, or the system refuses a pipe, a folder or a limit.
pub fn run(program: &str, limits: &Limits) -> io::Result<Outcome> {
    let fences =
        fences::found().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no python3 that the sandbox can start"))?;
    run_within(fences, program, limits)
}

/// What cannot be limited on this machine, one sentence each; empty when every fence stands. Runs a short program or two.
pub fn capabilities() -> Vec<String> {
    fences::found().map_or_else(|| vec!["no python3 that the sandbox can start".into()], Fences::gaps)
}

fn run_within(fences: &Fences, program: &str, limits: &Limits) -> io::Result<Outcome> {
    let user = fences.user();
    let folder = tempfile::Builder::new().prefix("lacuna-").tempdir()?;
    if let Some(user) = user {
        std::os::unix::fs::chown(folder.path(), Some(user), Some(user))?;
    }
    let deadline = Instant::now() + limits.wall;
    let (mut command, rules) = fences.command(user, folder.path(), program, limits)?;
    let mut running = Running(command.spawn()?);
    drop(rules);
    let end = running.watch(limits.output_bytes, deadline);
    // The group is killed before its leader is reaped: until then no other process can bear the group's number.
    running.kill();
    let status = running.0.wait()?;
    Ok(match end? {
        End::Time => Outcome::TimedOut,
        End::Output => Outcome::OutputLimit,
        End::Exit { .. } if status.signal() == Some(libc::SIGXCPU) => Outcome::TimedOut,
        End::Exit { stdout, .. } if status.success() => Outcome::Finished { stdout: lossy(&stdout) },
        End::Exit { stderr, .. } => {
            let tail = &stderr[stderr.len().saturating_sub(STDERR_TAIL)..];
            Outcome::Failed { status, stderr_tail: lossy(tail) }
        }
    })
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
