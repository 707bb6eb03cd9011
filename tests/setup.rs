//! Setting up on a machine that lacks something: one line that says what to do, and nothing changed.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// Runs the set-up script with these programs on PATH and nothing else; returns what it said.
fn refused(programs: &[&str], libtorch: Option<&Path>) -> String {
    let path = tempfile::tempdir().unwrap();
    for program in ["bash", "dirname", "sed", "head", "uname", "mkdir", "rm", "mv"].iter().chain(programs) {
        let found = ["/usr/bin", "/bin"].iter().map(|folder| Path::new(folder).join(program)).find(|file| file.exists());
        // What is not where it usually is stands for itself: the script only asks whether it is there.
        symlink(found.unwrap_or_else(|| "/bin/true".into()), path.path().join(program)).unwrap();
    }
    // A copy, so that a machine that is set up is not found to be.
    let project = tempfile::tempdir().unwrap();
    std::fs::create_dir(project.path().join("scripts")).unwrap();
    let script = project.path().join("scripts/setup-libtorch.sh");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/setup-libtorch.sh"), &script).unwrap();
    let mut command = Command::new("/bin/bash");
    command.arg(&script).env_clear().env("PATH", path.path());
    if let Some(libtorch) = libtorch {
        command.env("LIBTORCH", libtorch);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{said}");
    said
}

#[test]
fn a_missing_tool_is_named() {
    assert!(refused(&["c++", "python3"], None).contains("install Rust"));
    assert!(refused(&["cargo", "python3"], None).contains("install g++ or clang"));
    assert!(refused(&["cargo", "c++"], None).contains("install Python 3 with pip"));
}

#[test]
fn a_libtorch_of_another_version_is_refused() {
    let libtorch = tempfile::tempdir().unwrap();
    assert!(refused(&["cargo", "c++"], Some(libtorch.path())).contains("there is no libtorch in"));
    std::fs::create_dir(libtorch.path().join("lib")).unwrap();
    std::fs::write(libtorch.path().join("lib/libtorch_cpu.so"), "").unwrap();
    std::fs::write(libtorch.path().join("build-version"), "2.9.1+cpu\n").unwrap();
    assert!(refused(&["cargo", "c++"], Some(libtorch.path())).contains("is 2.9.1+cpu, not 2.11"));
}
