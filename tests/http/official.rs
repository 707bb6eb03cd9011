//! The clients that OpenAI publishes, unchanged: their packages for Python and for JavaScript, streaming and not.

use std::path::Path;
use std::process::Command;

use crate::client::pair;
use crate::harness::TestServer;

async fn run(server: &TestServer, program: &Path, script: &str) {
    assert!(program.exists(), "{} is missing: run `make setup-tests`", program.display());
    let mut command = Command::new(program);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script)).env("LACUNA_URL", format!("http://{}", server.http));
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("it starts");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    println!("{said}");
    server.idle().await;
}

/// LACUNA_PYTHON, else the environment that `make setup-tests` makes.
#[tokio::test(flavor = "multi_thread")]
async fn openai_for_python() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("LACUNA_PYTHON").map_or_else(|| root.join(".venv/bin/python"), Into::into);
    run(&pair().await, &python, "tests/python/test_openai.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_for_javascript() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node/node_modules/openai");
    assert!(package.exists(), "{} is missing: run `make setup-tests`", package.display());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let node = std::env::split_paths(&path).map(|folder| folder.join("node")).find(|file| file.exists());
    run(&pair().await, &node.expect("node is not on PATH"), "tests/node/openai/chat.test.mjs").await;
}
