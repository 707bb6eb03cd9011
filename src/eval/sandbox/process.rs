//! A program while it runs: its output, its end, and making sure that there is one.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::process::Child;
use std::time::{Duration, Instant};

use super::check;

/// How long a program that has gone quiet may be dead before we notice.
const TICK: Duration = Duration::from_millis(5);

/// A started program; dropped, it is killed with its group and reaped, whatever went wrong on our side.
pub struct Running(pub Child);

/// Why watching stopped.
pub enum End {
    Exit { stdout: Vec<u8>, stderr: Vec<u8> },
    Time,
    Output,
}

impl Running {
    /// Collects output until the program exits, prints too much or runs too long. Does not reap it.
    pub fn watch(&mut self, cap: usize, deadline: Instant) -> io::Result<End> {
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

    pub fn kill(&self) {
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
