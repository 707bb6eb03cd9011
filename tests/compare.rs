//! `lacuna compare` and `serve` with several models, the real binary on the models that ship.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const TASK: &str = "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n";
const PAIR: [&str; 4] = ["--model", "models/nano", "--model", "models/nano-ar"];

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    command.args(arguments).env_remove("RUST_LOG").env("OMP_NUM_THREADS", "1").current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command(arguments).output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

fn well(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = run(arguments);
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
    stdout
}

fn ill(arguments: &[&str], code: i32) -> String {
    let (found, stdout, stderr) = run(arguments);
    assert_eq!((found, stdout.as_str()), (Some(code), ""), "{arguments:?}: {stderr}");
    stderr
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn without_lanes_the_pair_is_compared_as_it_is() {
    let table = well(&["compare", TASK]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("lane ") && lines[0].contains("tok/fwd") && lines[0].ends_with("nats/tok"), "{table}");
    let names: Vec<&str> = lines[1..].iter().map(|line| line.split("  ").next().expect("a name")).collect();
    assert_eq!(names, ["nano", "nano-ar", "nano-ar redrafter"], "{table}");
}

#[test]
fn what_is_told_of_a_lane_is_what_generate_tells() {
    let flags = [
        "--json",
        "--reference",
        "    return 1",
        "--lane",
        "steps=6 name=few",
        "--lane",
        "ar temperature=0.7 seed=3",
        "--racing",
    ];
    let object = json(&well(&[&["compare", TASK][..], &flags].concat()));
    assert_eq!((object["prompt"].as_str(), object["order"].as_str()), (Some(TASK), Some("racing")));
    assert_eq!(object["models"].as_array().expect("models").len(), 2);
    let [few, drawn] = object["lanes"].as_array().expect("lanes").as_slice() else { panic!("{object}") };
    assert_eq!((few["name"].as_str(), few["model"].as_str()), (Some("few"), Some("nano")));
    assert_eq!((drawn["name"].as_str(), drawn["model"].as_str()), (Some("ar temperature=0.7 seed=3"), Some("nano-ar")));
    assert_eq!(few["usage"]["forwards"]["denoise"], few["usage"]["steps"]);
    let alone = json(&well(&["generate", TASK, "--steps", "6", "--json"]));
    let flags = ["--model", "models/nano-ar", "--temperature", "0.7", "--seed", "3", "--json"];
    let alone = [alone, json(&well(&[&["generate", TASK][..], &flags].concat()))];
    for (lane, alone) in [few, drawn].into_iter().zip(&alone) {
        assert_eq!((&lane["text"], &lane["finish_reason"]), (&alone["text"], &alone["finish_reason"]));
        assert!(lane["error"].is_null() && lane["judge_error"].is_null(), "{lane}");
        assert!(lane["likelihood"]["negative_log_likelihood"].as_f64() > Some(0.0), "{lane}");
        assert_eq!(lane["likelihood"]["judge"], "nano-ar");
        let found = &lane["reference_match"];
        assert_eq!(found["exact"], lane["text"].as_str().map(str::trim) == Some("return 1"));
        assert!(found["normalized_edit_distance"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)), "{lane}");
    }
    assert_eq!(drawn["seed"], 3);
}

#[test]
fn many_prompts_are_compared_one_by_one() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let prompt = |op: &str| format!("# Return the {op} of xs.\ndef solve(xs):\n");
    writeln!(file, "{}", serde_json::json!({"prompt": prompt("sum"), "reference": "    return sum(xs)"})).unwrap();
    writeln!(file, "{}\nplain words", serde_json::json!({"prompt": prompt("largest"), "reference": "return max(xs)"})).unwrap();
    let path = file.path().to_str().unwrap();
    let lanes = ["--prompts", path, "--lane", "ar model=models/nano-ar", "--judge", "none", "--max-new-tokens", "24"];
    let told = well(&[&["compare", "--json"][..], &lanes].concat());
    let objects: Vec<Value> = told.lines().map(json).collect();
    assert_eq!(objects.len(), 3);
    assert_eq!(
        (objects[1]["prompt"].as_str(), objects[2]["prompt"].as_str()),
        (Some(prompt("largest").as_str()), Some("plain words"))
    );
    let matches: Vec<bool> = objects.iter().map(|one| one["lanes"][0]["reference_match"].is_object()).collect();
    assert_eq!(matches, [true, true, false]);
    assert!(objects.iter().all(|one| one["lanes"][0]["likelihood"].is_null()));
    let table = well(&[&["compare"][..], &lanes].concat());
    assert!(table.starts_with("medians of 3 prompts") && table.contains("exact") && !table.contains("nats"), "{table}");
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[test]
fn lanes_are_shown_side_by_side() {
    let shown = well(&["compare", TASK, "--show", "--lane", "steps=4", "--lane", "ar", "--judge", "none"]);
    let last = shown.rsplit("\x1b[J").find(|frame| frame.contains('│')).expect("a frame");
    assert!(last.contains("steps=4") && last.contains("def solve") | last.contains("return"), "{last}");
    assert!(last.contains(" steps, ") && shown.lines().last().expect("a table").starts_with("ar "), "{shown}");
}

#[test]
fn what_is_wrong_with_a_lane_is_told_by_its_name() {
    let lane = |spec| ["compare", TASK, "--lane", "ar", "--lane", spec];
    let message = ill(&lane("diffusion steps=many"), 2);
    assert!(message.contains("'diffusion steps=many'") && message.contains("'many' for '--steps"), "{message}");
    for (spec, told) in [
        ("steps=0", "lanes[1].diffusion.steps: lane 1 (steps=0): "),
        ("ar draft-length=3 name=odd", "lanes[1].autoregressive.draft_length: lane 1 (odd): "),
        ("ar model=models/nano", "lane 1 (ar model=models/nano): model nano cannot decode autoregressively"),
        ("model=gpt", "lane 1 (model=gpt): model: there is no 'gpt'; served are nano, nano-ar"),
    ] {
        let message = ill(&lane(spec), 2);
        assert!(message.contains(told), "{spec}: {message}");
    }
    assert!(ill(&["compare", TASK, "--judge", "nano"], 2).contains("judge"));
    assert!(ill(&["compare"], 2).contains("required"));
    assert!(ill(&["compare", "--prompts", "nowhere.jsonl"], 1).contains("nowhere.jsonl"));
}

#[test]
fn a_server_with_both_models_compares_alike() {
    let mut child = command(&[&["serve", "--address", "127.0.0.1:0", "--http", "none"][..], &PAIR].concat())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut log = BufReader::new(child.stderr.take().expect("a log")).lines().map_while(Result::ok);
    let mut loaded = 0;
    let address = loop {
        let line = log.next().expect("it listens before it ends");
        loaded += usize::from(line.contains("loaded"));
        if let Some((_, address)) = line.split_once("listening address=") {
            break address.trim().to_owned();
        }
    };
    assert_eq!(loaded, 2);
    let rest = std::thread::spawn(move || log.collect::<Vec<_>>());
    let lanes = ["--lane", "steps=6", "--lane", "ar drafter=redrafter no-adapt", "--json"];
    let there = json(&well(&[&["compare", TASK, "--server", &address][..], &lanes].concat()));
    let here = json(&well(&[&["compare", TASK][..], &lanes].concat()));
    for lane in 0..2 {
        let (there, here) = (&there["lanes"][lane], &here["lanes"][lane]);
        for field in ["name", "model", "text", "finish_reason", "likelihood"] {
            assert_eq!(there[field], here[field], "{field}");
        }
        assert_eq!(there["usage"]["forwards"], here["usage"]["forwards"]);
    }
    let refused = ill(&["compare", TASK, "--server", &address, "--lane", "steps=0"], 1);
    assert!(refused.contains("lanes[0].diffusion.steps") && refused.contains("lane 0 (steps=0)"), "{refused}");
    // SAFETY: a signal to a process that we started and have not yet waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    let log = rest.join().expect("a log").join("\n");
    assert!(log.contains("model=\"nano\" seconds") && log.contains("model=\"nano-ar\" seconds"), "both are warmed up: {log}");
}

#[test]
fn models_that_cannot_be_served_together_are_refused_before_serving() {
    let twin = tempfile::tempdir().unwrap();
    let folder = twin.path().join("nano");
    std::os::unix::fs::symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar"), twin.path().join("other"))
        .unwrap();
    std::fs::create_dir(&folder).unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano").join(file), folder.join(file)).unwrap();
    }
    let serve = |model: &str| {
        ill(&["serve", "--address", "127.0.0.1:0", "--http", "none", "--model", "models/nano", "--model", model], 2)
    };
    let clash = serve(folder.to_str().unwrap());
    assert!(clash.contains("would both be called nano") && !clash.contains("listening"), "{clash}");
    let gone = serve("models/nowhere");
    assert!(gone.contains("there is no model folder models/nowhere") && !gone.contains("loaded"), "{gone}");
    let flags = ["--drafters", "models/nano-ar/drafters"];
    let many = ill(&[&["serve", "--address", "127.0.0.1:0", "--http", "none"][..], &PAIR, &flags].concat(), 2);
    assert!(many.contains("drafters goes with one model"), "{many}");
}
