//! The same server, spoken to by grpcio: a client that shares no code with it.

use std::path::{Path, PathBuf};

use crate::harness::server;

/// LACUNA_PYTHON, else the environment that `make setup-tests` makes.
fn python(root: &Path) -> PathBuf {
    std::env::var_os("LACUNA_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_finds_the_same() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = python(root);
    assert!(python.exists(), "{} is missing: run `make setup-tests`", python.display());
    let server = server().await;
    let mut command = std::process::Command::new(&python);
    command.arg(root.join("tests/python/test_service.py")).env("LACUNA_ADDRESS", server.address.to_string());
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("python starts");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    println!("{said}");
    server.idle().await;
}
