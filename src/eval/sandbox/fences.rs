//! What can be raised around a program on this machine, and raising it.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Limits, Outcome, check, landlock, run_within};

/// Users that exist only while a program runs: the range which systemd keeps for the same purpose, so no account has them.
const USERS: std::ops::Range<u32> = 61184..65520;

/// The fences that this machine supports.
#[derive(Clone, Debug)]
pub struct Fences {
    /// No symbolic link.
    python: PathBuf,
    own_user: bool,
    network: Network,
    /// Version of Landlock; 0 for none.
    landlock: u32,
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
pub fn found() -> Option<&'static Fences> {
    static FENCES: OnceLock<Option<Fences>> = OnceLock::new();
    let find = || {
        // SAFETY: takes nothing, cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        let landlocks = [landlock::version(), 0];
        for own_user in [true, false].into_iter().filter(|own_user| root || !own_user) {
            for landlock in &landlocks[usize::from(landlocks[0] == 0)..] {
                for network in [Network::Own, Network::OwnUser, Network::Shared] {
                    for python in interpreters() {
                        let fences = Fences { python, own_user, network, landlock: *landlock };
                        let outcome = run_within(&fences, "print(42)", &Limits::default());
                        if matches!(outcome, Ok(Outcome::Finished { stdout }) if stdout == "42\n") {
                            return Some(fences);
                        }
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
    let candidates = std::env::split_paths(&path).chain(usual).map(|folder| folder.join("python3"));
    let mut seen = std::collections::HashSet::new();
    let resolved = candidates.filter_map(|python| python.canonicalize().ok());
    resolved.filter(|python| python.is_file() && seen.insert(python.clone())).collect()
}

impl Fences {
    /// What is missing, one sentence each. Runs a short program.
    pub fn gaps(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.landlock == 0 {
            missing.push("programs can read what any user may read: the kernel has no Landlock".into());
        }
        if !self.own_user {
            missing.push(match self.landlock {
                0 => "programs run as our own user: they can read and change its files and signal its processes".into(),
                version if !landlock::scopes(version) => {
                    "programs run as our own user: they can signal its processes, as the kernel's Landlock is too old to hinder it".into()
                }
                _ => "programs run as our own user: they can change its processes' limits and priorities".into(),
            });
        }
        if self.network == Network::Shared {
            missing.push("programs can use the network: the kernel refuses a network namespace".into());
        }
        let fork = "import os\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)\n";
        if !matches!(run_within(self, fork, &Limits::default()), Ok(Outcome::Failed { .. })) {
            missing.push("programs can start processes: the process limit does not bind".into());
        }
        missing
    }

    /// A user id that no other run of ours has now, so that programs cannot meddle with each other; `None` where we cannot choose.
    pub fn user(&self) -> Option<u32> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        // Offset by our own process id, because another instance of this program counts from zero as well.
        let run = || RUNS.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id().wrapping_mul(97));
        self.own_user.then(|| USERS.start + run() % (USERS.end - USERS.start))
    }

    /// The interpreter, alone: `-I` ignores the environment and the folder, `-S` skips site packages, `-B` writes no byte code. The
    /// program arrives on stdin from a file that has no name, so its folder stays empty and no writer has to keep up with a pipe.
    ///
    /// The rules returned must be kept open until the command has been started.
    pub fn command(
        &self,
        user: Option<u32>,
        folder: &Path,
        program: &str,
        limits: &Limits,
    ) -> io::Result<(Command, Option<OwnedFd>)> {
        let mut source: File = tempfile::tempfile()?;
        source.write_all(program.as_bytes())?;
        source.rewind()?;

        let mut command = Command::new(&self.python);
        command.args(["-I", "-S", "-B", "-X", "utf8", "-"]).current_dir(folder).env_clear().env("HOME", folder);
        command.stdin(Stdio::from(source)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let rules = match self.landlock {
            0 => None,
            version => Some(landlock::ruleset(version, &self.python, folder)?),
        };
        let (network, rlimits, number) = (self.network, rlimits(limits), rules.as_ref().map(AsRawFd::as_raw_fd));
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; `confine` makes system calls and nothing else, and
        // what it captures is plain data.
        unsafe { command.pre_exec(move || confine(user, network, number, &rlimits)) };
        Ok((command, rules))
    }
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
/// change of user clears the parent-death signal, Landlock needs privileges to be given up for good, and the process limit must
/// count the new user's processes.
fn confine(user: Option<u32>, network: Network, rules: Option<RawFd>, rlimits: &[Rlimit]) -> io::Result<()> {
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
        if let Some(rules) = rules {
            landlock::restrict(rules)?;
        }
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
