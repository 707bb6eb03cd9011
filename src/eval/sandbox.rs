//! Runs a generated Python program in a separate process that can do little harm: an empty folder that vanishes, limits on time,
//! memory, files and output, no network where the kernel allows it, and a throw-away user where we may choose one.
//!
//! The fences, in the order of what they stop:
//! * a user of its own (when started as root): private files, our processes, and, with a limit of one process, any fork;
//! * resource limits: endless loops, memory hogs, files on disc (none may grow beyond [`Limits::file_bytes`]);
//! * a network namespace: sockets find no interface, not even loopback;
//! * a wall clock and an output cap here, enforced by SIGKILL to the whole process group.
//!
//! What this is not: a jail for determined attackers. There is no system call filter and no private view of the file system, so a
//! program may read what any user of the machine may read. [`capabilities`] tells which fences this machine lacks.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::nano::Task;

/// Users that exist only while a program runs: the range which systemd keeps for the same purpose, so no account has them.
const USERS: std::ops::Range<u32> = 61184..65520;

/// How long a program that has gone quiet may be dead before we notice.
const TICK: Duration = Duration::from_millis(5);

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

/// Whether `body` solves the task: the task's own check prints its verdict as the last line, with a secret drawn for this run.
///
/// # Errors
/// When the program could not be started or watched; a body that fails is `Ok(false)`.
pub fn passes(task: &Task, body: &str, limits: &Limits) -> io::Result<bool> {
    let secret = format!("{:032x}", rand::random::<u128>());
    let outcome = run(&task.test_program(body, &secret), limits)?;
    let verdict = format!("{secret} pass");
    Ok(matches!(outcome, Outcome::Finished { stdout } if stdout.lines().last() == Some(&verdict)))
}

/// Runs a Python program to its end or to a limit.
///
/// # Errors
/// When no interpreter can be started, or the system refuses a pipe, a folder or a limit.
pub fn run(program: &str, limits: &Limits) -> io::Result<Outcome> {
    let fences = fences().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no python3 that the sandbox can start"))?;
    run_within(fences, program, limits)
}

/// What cannot be limited on this machine, one sentence each; empty when every fence stands. Runs a short program or two.
pub fn capabilities() -> Vec<String> {
    let Some(fences) = fences() else { return vec!["no python3 that the sandbox can start".into()] };
    let mut missing = Vec::new();
    if !fences.own_user {
        missing.push("programs run as our own user: they can read its files and signal its processes".into());
    }
    if fences.network == Network::Shared {
        missing.push("programs can use the network: the kernel refuses a network namespace".into());
    }
    let fork = "import os\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)\n";
    if !matches!(run_within(fences, fork, &Limits::default()), Ok(Outcome::Failed { .. })) {
        missing.push("programs can start processes: the process limit does not bind".into());
    }
    missing
}

/// The fences that this machine supports.
#[derive(Clone, Debug)]
struct Fences {
    python: PathBuf,
    own_user: bool,
    network: Network,
}

/// How a program is cut off from the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    /// A new network namespace, which needs privilege.
    Own,
    /// A new user namespace as well, which gives an ordinary user that privilege.
    OwnUser,
    /// Not at all.
    Shared,
}

/// Finds the strongest fences by trying: permissions to unshare depend on the kernel, its settings and the container, and whether
/// an interpreter can be reached depends on the user that it runs as. Done once.
fn fences() -> Option<&'static Fences> {
    static FENCES: OnceLock<Option<Fences>> = OnceLock::new();
    let find = || {
        // SAFETY: takes nothing, cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        for own_user in [true, false].into_iter().filter(|own_user| root || !own_user) {
            for network in [Network::Own, Network::OwnUser, Network::Shared] {
                for python in interpreters() {
                    let fences = Fences { python, own_user, network };
                    let outcome = run_within(&fences, "print(42)", &Limits::default());
                    if matches!(outcome, Ok(Outcome::Finished { stdout }) if stdout == "42\n") {
                        return Some(fences);
                    }
                }
            }
        }
        None
    };
    FENCES.get_or_init(find).as_ref()
}

/// Every python3 on the path, resolved by us because the program gets no path. The first may be out of another user's reach.
fn interpreters() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/local/bin"].map(PathBuf::from);
    let mut found: Vec<PathBuf> = std::env::split_paths(&path).chain(usual).map(|folder| folder.join("python3")).collect();
    let mut seen = std::collections::HashSet::new();
    found.retain(|python| python.is_absolute() && python.is_file() && seen.insert(python.clone()));
    found
}

fn run_within(fences: &Fences, program: &str, limits: &Limits) -> io::Result<Outcome> {
    let user = fences.own_user.then(next_user);
    let folder = tempfile::Builder::new().prefix("lacuna-").tempdir()?;
    if let Some(user) = user {
        std::os::unix::fs::chown(folder.path(), Some(user), Some(user))?;
    }
    let deadline = Instant::now() + limits.wall;
    let mut running = Running(command(fences, user, folder.path(), program, limits)?.spawn()?);
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

/// A user id that no other run of ours has now, so that programs cannot meddle with each other.
fn next_user() -> u32 {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    // Offset by our own process id, because another instance of this program counts from zero as well.
    let run = RUNS.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id().wrapping_mul(97));
    USERS.start + run % (USERS.end - USERS.start)
}

/// The interpreter, alone: `-I` ignores the environment and the folder, `-S` skips site packages, `-B` writes no byte code. The
/// program arrives on stdin from a file that has no name, so its folder stays empty and no writer has to keep up with a pipe.
fn command(fences: &Fences, user: Option<u32>, folder: &Path, program: &str, limits: &Limits) -> io::Result<Command> {
    let mut source = tempfile::tempfile()?;
    source.write_all(program.as_bytes())?;
    source.rewind()?;

    let mut command = Command::new(&fences.python);
    command.args(["-I", "-S", "-B", "-X", "utf8", "-"]).current_dir(folder).env_clear().env("HOME", folder);
    command.stdin(Stdio::from(source)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let network = fences.network;
    let rlimits = rlimits(limits);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; `confine` makes system calls and nothing else, and
    // what it captures is plain data.
    unsafe { command.pre_exec(move || confine(user, network, &rlimits)) };
    Ok(command)
}

type Rlimit = (libc::__rlimit_resource_t, u64, u64);

/// Soft and hard limits. The processor's hard limit is a second later: at the soft one comes SIGXCPU, which we can tell apart.
fn rlimits(limits: &Limits) -> [Rlimit; 6] {
    [
        (libc::RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
        (libc::RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (libc::RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (libc::RLIMIT_NOFILE, limits.open_files, limits.open_files),
        (libc::RLIMIT_NPROC, limits.processes, limits.processes),
        (libc::RLIMIT_CORE, 0, 0),
    ]
}

/// Raises the fences around the calling process. The order matters: namespaces need the privilege that changing user gives up, a
/// change of user clears the parent-death signal, and the process limit must count the new user's processes.
fn confine(user: Option<u32>, network: Network, rlimits: &[Rlimit]) -> io::Result<()> {
    // SAFETY: each call takes integers, a null list of length zero, or a pointer to a live local.
    unsafe {
        check(libc::setsid())?;
        if network == Network::Own {
            check(libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWIPC))?;
        }
        if let Some(id) = user {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(id, id, id))?;
            check(libc::setresuid(id, id, id))?;
        }
        if network == Network::OwnUser {
            check(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWIPC))?;
        }
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong))?;
        let zero: libc::c_ulong = 0;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as libc::c_ulong, zero, zero, zero))?;
        // Rust opens files close-on-exec, but C libraries in our process (CUDA among them) need not. The soft limit on open files
        // does not close what is open. Kernels before 5.11 lack the call, and then such files stay open.
        libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        for &(resource, soft, hard) in rlimits {
            let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::getrlimit(resource, &mut now))?;
            // Only root may raise a hard limit; one that is lower already is as good.
            let fit = libc::rlimit { rlim_cur: soft.min(now.rlim_max), rlim_max: hard.min(now.rlim_max) };
            check(libc::setrlimit(resource, &fit))?;
        }
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A started program; dropped, it is killed with its group and reaped, whatever went wrong on our side.
struct Running(Child);

/// Why watching stopped.
enum End {
    Exit { stdout: Vec<u8>, stderr: Vec<u8> },
    Time,
    Output,
}

impl Running {
    /// Collects output until the program exits, prints too much or runs too long. Does not reap it.
    fn watch(&mut self, cap: usize, deadline: Instant) -> io::Result<End> {
        let mut stdout = Stream::new(self.0.stdout.take());
        let mut stderr = Stream::new(self.0.stderr.take());
        loop {
            // Asked before reading: what was printed before the exit is then in the pipe, even if a grandchild keeps it open.
            let exited = self.has_exited()?;
            stdout.read(cap)?;
            stderr.read(cap)?;
            if stdout.bytes.len() + stderr.bytes.len() > cap {
                return Ok(End::Output);
            }
            if exited {
                return Ok(End::Exit { stdout: stdout.bytes, stderr: stderr.bytes });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(End::Time);
            }
            wait_readable([stdout.descriptor(), stderr.descriptor()], left.min(TICK))?;
        }
    }

    fn has_exited(&self) -> io::Result<bool> {
        // SAFETY: all-zero is a valid siginfo_t, and waitid writes only to it; WNOWAIT leaves the child to be reaped later.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            check(libc::waitid(libc::P_PID, self.0.id(), &mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT))?;
            Ok(info.si_pid() != 0)
        }
    }

    fn kill(&self) {
        // SAFETY: the child made itself leader of a group before it ran, and has not been reaped, so the number is still its own.
        // A failure means that nobody is left to kill.
        unsafe { libc::kill(-(self.0.id() as libc::pid_t), libc::SIGKILL) };
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After a reaping `try_wait` answers at once and the group's number may be somebody else's; then there is nothing to do.
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            self.kill();
            let _ = self.0.wait();
        }
    }
}

/// One of the program's output pipes and what has come out of it.
struct Stream {
    pipe: Option<File>,
    bytes: Vec<u8>,
}

impl Stream {
    fn new(pipe: Option<impl Into<std::os::fd::OwnedFd>>) -> Self {
        Stream { pipe: pipe.map(|pipe| File::from(pipe.into())), bytes: Vec::new() }
    }

    /// The descriptor to wait for; poll passes over −1, which stands for a pipe that has ended.
    fn descriptor(&self) -> RawFd {
        self.pipe.as_ref().map_or(-1, |pipe| pipe.as_raw_fd())
    }

    /// Takes what is there without waiting, and stops soon after `cap`: a fast printer would keep us here for ever.
    fn read(&mut self, cap: usize) -> io::Result<()> {
        let mut buffer = [0; 8192];
        while self.bytes.len() <= cap {
            let Some(pipe) = &mut self.pipe else { break };
            if !wait_readable([pipe.as_raw_fd(), -1], Duration::ZERO)? {
                break;
            }
            match pipe.read(&mut buffer)? {
                0 => self.pipe = None,
                count => self.bytes.extend_from_slice(&buffer[..count]),
            }
        }
        Ok(())
    }
}

/// Waits until one of the pipes has something to read or has ended.
fn wait_readable(descriptors: [RawFd; 2], wait: Duration) -> io::Result<bool> {
    let mut polls = descriptors.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the pointer and the length are those of a live array.
    match unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, wait.as_millis() as libc::c_int) } {
        -1 => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
        ready => Ok(ready > 0),
    }
}

#[cfg(test)]
#[path = "sandbox_tests.rs"]
mod tests;
