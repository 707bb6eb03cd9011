//! The page: its parts on what a real server sends, and the whole of it in Chromium, both under Node's own test runner.

use std::path::Path;
use std::process::Command;

/// Runs a file of tests in `tests/node` with the binary under test.
fn node(file: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node");
    assert!(folder.join("node_modules/playwright-core").exists(), "the tests' packages are missing: run `make setup-tests`");
    let mut command = Command::new("node");
    command.args(["--test", "--test-reporter=spec", file]).current_dir(folder).env("LACUNA", env!("CARGO_BIN_EXE_lacuna"));
    let output = command.output().expect("node starts: install Node.js 20 or later");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    println!("{said}");
}

#[test]
fn its_parts_read_and_replay_what_a_server_sends() {
    node("page/parts.test.mjs");
}

#[test]
fn it_works_in_a_browser() {
    let browser = std::env::var_os("CHROMIUM").unwrap_or("/usr/bin/chromium".into());
    assert!(Path::new(&browser).exists(), "{browser:?} is missing: run `make setup-tests`, or name a Chromium in CHROMIUM");
    node("page/browser.test.mjs");
}
