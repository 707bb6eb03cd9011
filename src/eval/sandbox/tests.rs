use std::fs::File;
use std::os::fd::AsRawFd;

use super::*;

fn quick() -> Limits {
    Limits { wall: Duration::from_secs(3), cpu_seconds: 2, ..Limits::default() }
}

fn fails_with(program: &str, cause: &str) {
    match run(program, &quick()).unwrap() {
        Outcome::Failed { stderr_tail, .. } => assert!(stderr_tail.contains(cause), "{stderr_tail}"),
        other => panic!("{other:?}"),
    }
}

fn fenced(gap: &str) -> bool {
    !capabilities().iter().any(|missing| missing.contains(gap))
}

fn finished(stdout: &str) -> Outcome {
    Outcome::Finished { stdout: stdout.into() }
}

#[test]
fn a_program_runs_alone_in_an_empty_folder() {
    // The interpreter sets LC_CTYPE by itself.
    let program =
        "import os, sys\nprint(os.listdir('.'), sys.flags.isolated, sorted(set(os.environ) - {'LC_CTYPE'}))\nprint('é')";
    assert_eq!(run(program, &quick()).unwrap(), finished("[] 1 ['HOME']\né\n"));
    println!("not fenced here: {:?}", capabilities());
}

#[test]
fn nothing_of_ours_is_open() {
    let file = File::open("/dev/null").unwrap();
    // SAFETY: clears close-on-exec on a descriptor of our own, as a C library might.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
    let program = "import os\nprint([n for n in range(32) if os.path.lexists(f'/proc/self/fd/{n}')])";
    assert_eq!(run(program, &quick()).unwrap(), finished("[0, 1, 2]\n"));
}

#[test]
fn an_endless_loop_is_cut_off() {
    let start = Instant::now();
    let limits = Limits { wall: Duration::from_millis(300), ..quick() };
    assert_eq!(run("import time\ntime.sleep(60)", &limits).unwrap(), Outcome::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(2));
    let limits = Limits { cpu_seconds: 1, wall: Duration::from_secs(20), ..quick() };
    assert_eq!(run("while True: pass", &limits).unwrap(), Outcome::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[test]
fn closed_pipes_do_not_hide_a_running_program() {
    let limits = Limits { wall: Duration::from_millis(500), ..quick() };
    assert_eq!(run("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)", &limits).unwrap(), Outcome::TimedOut);
}

#[test]
fn endless_output_is_cut_off() {
    assert_eq!(run("while True: print('x' * 1000)", &quick()).unwrap(), Outcome::OutputLimit);
    assert_eq!(run("import sys\nwhile True: sys.stderr.write('x' * 1000)", &quick()).unwrap(), Outcome::OutputLimit);
}

#[test]
fn forks_do_not_survive() {
    // Bounded: twenty children at most, even where nothing limits them.
    let program =
        "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        time.sleep(30)\n        break\ntime.sleep(30)";
    if fenced("start processes") {
        fails_with(program, "BlockingIOError");
    } else {
        let limits = Limits { wall: Duration::from_millis(500), ..quick() };
        assert_eq!(run(program, &limits).unwrap(), Outcome::TimedOut);
    }
    // Children are killed with the group when the program itself ends, and a child that holds the pipe does not hold us.
    let limits = Limits { processes: 64, ..quick() };
    let start = Instant::now();
    let program = "import os, time\nif os.fork() == 0:\n    time.sleep(30)\nelse:\n    print(7, flush=True)\n    os._exit(0)";
    assert_eq!(run(program, &limits).unwrap(), finished("7\n"));
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn memory_and_files_are_bounded() {
    fails_with("x = bytearray(2 << 30)", "MemoryError");
    fails_with("f = open('big', 'wb')\nf.write(bytes(1 << 20))\nf.flush()", "File too large");
    fails_with("fs = [open('/dev/null') for _ in range(100)]", "Too many open files");
}

#[test]
fn private_files_and_our_processes_are_out_of_reach() {
    if !fenced("our own user") {
        return;
    }
    let secret = tempfile::NamedTempFile::new().unwrap();
    fails_with(&format!("open({:?}).read()", secret.path()), "PermissionError");
    fails_with("open('/etc/shadow').read()", "PermissionError");
    fails_with("import os\nos.kill(os.getppid(), 9)", "PermissionError");
    fails_with("import os\nos.setuid(0)", "PermissionError");
}

/// Whoever may read it: only the interpreter's own files and the program's folder are there for a program.
#[test]
fn nothing_is_read_or_written_outside_the_folder() {
    use std::os::unix::fs::PermissionsExt;
    if !fenced("Landlock") {
        return;
    }
    let public = tempfile::tempdir().unwrap();
    let file = public.path().join("file");
    std::fs::write(&file, "for all to read").unwrap();
    for (path, mode) in [(public.path(), 0o777), (file.as_path(), 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    for program in [
        format!("open({file:?}).read()"),
        format!("open({file:?}, 'a')"),
        format!("import os\nos.listdir({:?})", public.path()),
        format!("import os\nos.unlink({file:?})"),
        format!("open({:?}, 'w')", public.path().join("new")),
        format!("import os\nos.truncate({file:?}, 0)"),
        format!("import os\nos.symlink({file:?}, 'here')\nopen('here').read()"),
        "open('/etc/passwd').read()".into(),
        "import os\nos.listdir('/')".into(),
        "open('/proc/self/environ').read()".into(),
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'true'])".into(),
    ] {
        fails_with(&program, "PermissionError");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "for all to read");
}

#[test]
fn its_own_folder_is_the_program_s_and_vanishes() {
    let program = "import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nprint(os.listdir('a'), os.path.realpath('.'))";
    let Outcome::Finished { stdout } = run(program, &Limits { file_bytes: 1 << 20, ..quick() }).unwrap() else {
        panic!("it failed")
    };
    let folder = stdout.trim().strip_prefix("['b'] ").unwrap_or_else(|| panic!("{stdout}"));
    assert!(folder.contains("lacuna-") && !std::path::Path::new(folder).exists(), "{folder}");
}

#[test]
fn the_library_can_be_imported() {
    let program = "import collections, decimal, hashlib, heapq, itertools, json, math, random, re, statistics, string, typing\n\
                   import datetime\nprint(math.comb(5, 2), hashlib.md5(b'').hexdigest()[:4], random.random() < 1)";
    assert_eq!(run(program, &quick()).unwrap(), finished("10 d41d True\n"));
}

#[test]
fn sockets_reach_nobody() {
    if !fenced("network") {
        return;
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Debian's interpreter has its socket module under lib-dynload, which -S leaves on the path.
    fails_with(&format!("import _socket\n_socket.socket().connect(('127.0.0.1', {port}))"), "unreachable");
}
