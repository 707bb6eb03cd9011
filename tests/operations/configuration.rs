//! Settings by file, environment and flags, and `--check`.

use std::net::TcpListener;
use std::path::Path;

use crate::certificates::path;
use crate::server::{Server, command, lacuna, stderr, stdout, write};

/// What `--check` prints of one setting: its value and where it comes from.
fn setting(printed: &str, name: &str) -> (String, String) {
    let line = printed.lines().find(|line| line.starts_with(&format!("{name} = "))).expect(name);
    let (value, origin) = line.split_once(" # ").expect("an origin");
    (value.trim_end().split_once(" = ").expect("a value").1.into(), origin.into())
}

#[test]
fn a_check_tells_what_is_in_force_and_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = write(
        folder.path(),
        "lacuna.toml",
        "queue = 7\nmax-resident = 3\nrequest-seconds = 50\naddress = \"127.0.0.1:0\"\nhttp = \"none\"\n",
    );
    let mut command = command(&["serve", "--check", "--config", path(&config), "--queue", "9"]);
    let output = command.env("LACUNA_QUEUE", "8").env("LACUNA_MAX_RESIDENT", "4").output().expect("it starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let printed = stdout(&output);
    let told = |name| setting(printed, name);
    assert_eq!(told("queue"), ("9".into(), "--queue".into()));
    assert_eq!(told("max-resident"), ("4".into(), "LACUNA_MAX_RESIDENT".into()));
    assert_eq!(told("request-seconds"), ("50".into(), format!("{}:3", path(&config))));
    assert_eq!(told("drain-seconds"), ("30".into(), "default".into()));
    assert_eq!(told("model"), ("[\"models/nano\"]".into(), "default".into()));
    assert!(printed.contains("# tokens is not set") && printed.contains("# model nano: llada, "), "{printed}");
    // What it prints is a file that says the same.
    let copy = write(folder.path(), "copy.toml", printed);
    let again = lacuna(&["serve", "--check", "--config", path(&copy)]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(setting(stdout(&again), "queue").0, "9");
}

#[test]
fn whoever_listens_beyond_the_machine_is_warned() {
    let warned = |flags: &[&str]| {
        let output = lacuna(&[&["serve", "--check", "--http", "127.0.0.1:0"][..], flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).lines().filter(|line| line.starts_with("# warning: listening on 0.0.0.0:0 beyond")).count()
    };
    let folder = tempfile::tempdir().expect("a folder");
    let entry = lacuna(&["token", "x"]);
    let tokens = write(folder.path(), "tokens.toml", stderr(&entry));
    assert_eq!(warned(&["--address", "127.0.0.1:0"]), 0);
    assert_eq!(warned(&["--address", "0.0.0.0:0"]), 2, "neither TLS nor tokens");
    assert_eq!(warned(&["--address", "0.0.0.0:0", "--tokens", path(&tokens)]), 1, "no TLS");
}

#[test]
fn a_check_names_every_problem() {
    let folder = tempfile::tempdir().expect("a folder");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = taken.local_addr().expect("an address").to_string();
    let broken = folder.path().join("broken");
    std::fs::create_dir(&broken).expect("a folder");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano").join(name);
        std::fs::copy(from, broken.join(name)).expect("a copy");
    }
    let weights = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano/model.safetensors")).expect("weights");
    std::fs::write(broken.join("model.safetensors"), &weights[..weights.len() - 8]).expect("a file");
    let tokens = write(folder.path(), "tokens.toml", "[[token]]\nname = \"x\"\n");
    let flags = [
        "--check",
        "--address",
        &taken,
        "--http",
        "127.0.0.1:0",
        "--model",
        "nowhere",
        "--model",
        path(&broken),
        "--tls-certificate",
        "nowhere.pem",
        "--tls-key",
        "nowhere.key",
        "--tokens",
        path(&tokens),
        "--max-resident",
        "0",
        "--max-tokens",
        "10",
        "--prefix-tokens",
        "11",
        "--memory-budget",
        "1GiB",
        "--device",
        "abacus",
    ];
    let output = lacuna(&[&["serve"], &flags[..]].concat());
    assert_eq!(output.status.code(), Some(2));
    let told = stderr(&output);
    for problem in [
        "address: cannot listen on 127.0.0.1",
        "there is no model folder nowhere",
        "broken: ",
        "TLS: cannot read nowhere.pem",
        "tokens.toml:1: missing field `sha256`",
        "max-resident is 0",
        "prefix-tokens is 11, more than max-tokens",
        "memory-budget is for models that are loaded by request",
        "unknown device 'abacus'",
    ] {
        assert!(told.contains(problem), "{problem}: {told}");
    }
    // And a server that is not only to be checked does not start.
    let output = lacuna(&[&["serve"], &flags[1..]].concat());
    assert_eq!((output.status.code(), stdout(&output)), (Some(2), ""));
}

#[test]
fn a_file_with_mistakes_is_told_by_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = write(folder.path(), "lacuna.toml", "queue = \"many\"\n\nqueues = 7\nhttp = \"here\"\n");
    let output = lacuna(&["serve", "--config", path(&config)]);
    assert_eq!(output.status.code(), Some(2));
    let told = stderr(&output);
    for problem in
        ["lacuna.toml:1: queue is string", "lacuna.toml:3: there is no setting 'queues'", "lacuna.toml:4: invalid value"]
    {
        assert!(told.contains(problem), "{problem}: {told}");
    }
    let output = lacuna(&["serve", "--config", "nowhere.toml"]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("cannot read nowhere.toml"), "{}", stderr(&output));
}

#[test]
fn whoever_listens_openly_is_warned() {
    let printed = |flags: &[&str]| {
        let output = lacuna(&[&["serve", "--check", "--http", "none"], flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).to_owned()
    };
    let open = printed(&["--address", "0.0.0.0:0"]);
    assert!(open.contains("without TLS") && open.contains("without tokens"), "{open}");
    assert!(!printed(&["--address", "127.0.0.1:0"]).contains("warning"));
    let mut server = {
        let folder = tempfile::tempdir().expect("a folder");
        let config = write(folder.path(), "lacuna.toml", "address = \"0.0.0.0:0\"\nlog-format = \"json\"\n");
        let mut command = command(&["serve", "--config", path(&config), "--http", "127.0.0.1:0"]);
        command.env("LACUNA_THREADS", "1");
        Server::run(command)
    };
    server.logged("without TLS");
    server.logged("without tokens");
    server.stop();
}
