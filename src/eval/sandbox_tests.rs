use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::eval::nano::{Split, sample};

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

#[test]
fn only_a_right_body_passes() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..20 {
        let task = sample(&mut rng, Split::Train);
        assert!(passes(&task, &task.solution, &quick()).unwrap(), "{task:#?}");
        for wrong in
            ["    import sys\n    sys.exit(0)\n", "    import os\n    os._exit(0)\n", "    return object()\n", "", "  )"]
        {
            assert!(!passes(&task, wrong, &quick()).unwrap(), "{wrong}");
        }
    }
}

/// Each row is a slip that a model makes; where it changes a solution, some argument should show it.
#[test]
fn arguments_catch_slips() {
    let slips = [
        (" > ", " >= "),
        (" < ", " <= "),
        (" >= ", " > "),
        (" == ", " != "),
        (" % ", " // "),
        (" * ", " + "),
        (" + ", " - "),
        ("max(", "min("),
        ("upper", "lower"),
        ("not in", "in"),
        ("sorted(", "list("),
        (", reverse=True", ""),
        ("set(", "list("),
        ("[::-1]", ""),
        ("total += ", "total = "),
        ("startswith", "endswith"),
        ("    return None", "    return 0"),
    ];
    let (mut made, mut missed) = (0, Vec::new());
    let limits = Limits { wall: Duration::from_secs(1), ..Limits::default() };
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for _ in 0..80 {
        let task = sample(&mut rng, Split::Train);
        // Not for a running extreme, where `x >= best` is as right as `x > best`, nor for `while`, which would only run on.
        if ["largest", "smallest", "/while"].iter().any(|part| task.composition.contains(part)) {
            continue;
        }
        for (right, wrong) in slips {
            let body = task.solution.replacen(right, wrong, 1);
            if body != task.solution {
                made += 1;
                if passes(&task, &body, &limits).unwrap() {
                    missed.push(format!("{right} -> {wrong}: {} {:?}", task.solution, task.arguments));
                }
            }
        }
    }
    assert!(missed.len() * 10 < made, "{} of {made}: {missed:#?}", missed.len());
}
