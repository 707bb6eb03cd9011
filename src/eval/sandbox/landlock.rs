//! Which files a program may touch, by Landlock (Linux 5.13 and later): the interpreter and its library to read, a few devices, and its
//! own folder. Everything else is refused, whoever may read it.
//!
//! Three system calls, by hand: the kernel's interface is a few integers (`linux/landlock.h`), and this is all we need of it. A ruleset is
//! made before the fork, as that takes memory; [`restrict`] is safe behind it.

use std::ffi::{CString, c_int, c_uint};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const CREATE_RULESET_VERSION: c_uint = 1;
const RULE_PATH_BENEATH: c_int = 1;

const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const READ: u64 = EXECUTE | READ_FILE | READ_DIR;
/// What may be done to a plain file; the rest is for folders.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
/// Signals and abstract sockets reach only processes of the same sandbox.
const SCOPED: u64 = 0b11;

#[repr(C)]
struct Ruleset {
    handled_files: u64,
    handled_network: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: c_int,
}

/// The version of the kernel's interface; 0 where there is none, or where it is switched off.
pub fn version() -> u32 {
    // SAFETY: with this flag the call takes no pointer.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<Ruleset>(), 0_usize, CREATE_RULESET_VERSION)
    };
    u32::try_from(version).unwrap_or(0)
}

/// Rights that this version knows, so that all of them are taken but for those granted.
fn handled(version: u32) -> u64 {
    let count = match version {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    (1 << count) - 1
}

/// Whether a program can be kept from signalling processes outside.
pub fn scopes(version: u32) -> bool {
    version >= 6
}

/// A set of rules for a program of `python` in `folder`.
pub fn ruleset(version: u32, python: &Path, folder: &Path) -> io::Result<OwnedFd> {
    let scoped = if scopes(version) { SCOPED } else { 0 };
    let attributes = Ruleset { handled_files: handled(version), handled_network: 0, scoped };
    // Each version knows so much of the structure.
    let size = match version {
        0..=3 => 8_usize,
        4 | 5 => 16,
        _ => 24,
    };
    // SAFETY: the pointer is to a live structure of at least `size` bytes; the number returned is a new descriptor, ours to close.
    let rules = unsafe {
        let number = libc::syscall(libc::SYS_landlock_create_ruleset, &attributes, size, 0 as c_uint);
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(number as RawFd)
    };
    for path in readable(python) {
        allow(&rules, &path, READ)?;
    }
    for device in ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"] {
        allow(&rules, Path::new(device), READ_FILE | WRITE_FILE)?;
    }
    allow(&rules, folder, handled(version))?;
    Ok(rules)
}

/// The interpreter, its library, and the libraries that it is linked to. `python` is no symbolic link.
fn readable(python: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime"]
            .map(PathBuf::from)
            .to_vec();
    paths.push(python.into());
    let home = python.parent().and_then(Path::parent);
    paths.extend(home.iter().flat_map(|home| [home.join("lib"), home.join("lib64")]));
    paths
}

/// Grants rights to a path and what is beneath it. One that is not there needs none.
fn allow(rules: &OwnedFd, path: &Path, rights: u64) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the name ends with a zero byte; a number above 0 is a new descriptor, ours to close.
    let opened = unsafe {
        match libc::open(name.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) {
            -1 => return Ok(()),
            number => OwnedFd::from_raw_fd(number),
        }
    };
    let allowed = if path.is_dir() { rights } else { rights & OF_FILES };
    let rule = PathBeneath { allowed, parent: opened.as_raw_fd() };
    // SAFETY: the pointer is to a live structure of the layout that the rule's kind asks for.
    let done = unsafe { libc::syscall(libc::SYS_landlock_add_rule, rules.as_raw_fd(), RULE_PATH_BENEATH, &rule, 0 as c_uint) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts the calling thread under the rules, and whatever it executes. It must have given up new privileges before.
///
/// Async-signal-safe: one system call.
pub fn restrict(rules: RawFd) -> io::Result<()> {
    // SAFETY: takes a descriptor and a flag.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules, 0 as c_uint) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
