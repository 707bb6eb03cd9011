//! `lacuna eval` as its users meet it: suites from files, several samples, infilling, resuming, and likelihood, on the models that ship.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

const SUM: &str = "# Return the sum of the numbers in xs.\ndef solve(xs):\n";

fn lacuna(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    command.args(arguments).env_remove("RUST_LOG").env("OMP_NUM_THREADS", "1").current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is UTF-8")
}

/// The JSON that `lacuna eval … --json` prints.
fn well(arguments: &[&str]) -> Value {
    let output = lacuna(&[&["eval"], arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output.stdout)))
}

/// What stderr says.
fn ill(arguments: &[&str]) -> String {
    let output = lacuna(&[&["eval"], arguments].concat());
    assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}: {}", text(&output.stdout));
    text(&output.stderr).to_owned()
}

fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn file(folder: &tempfile::TempDir, name: &str, lines: &[Value]) -> String {
    let path = folder.path().join(name);
    let mut file = std::fs::File::create(&path).unwrap();
    lines.iter().for_each(|line| writeln!(file, "{line}").unwrap());
    path.to_str().unwrap().to_owned()
}

fn problems() -> Vec<Value> {
    let test = "assert solve([1, 2]) == 3\nassert solve([]) == 0\n";
    vec![
        json!({"prompt": SUM, "test": test, "id": "sum", "solution": "    return sum(xs)\n"}),
        json!({"prompt": SUM, "test": "assert solve([1]) == 2", "solution": "    return sum(xs)\n"}),
        json!({"prompt": SUM, "reference": "    return sum(xs)\n", "solution": "    return sum(xs)\n"}),
        json!({"prompt": SUM, "entry_point": "solve", "test": "def check(f):\n    assert f([4, 4]) == 8\n", "solution": "    return sum(xs)\n"}),
    ]
}

#[test]
fn tasks_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let data = file(&folder, "mine.jsonl", &problems());
    let outcomes = folder.path().join("outcomes.jsonl");
    let outcomes = outcomes.to_str().unwrap();
    for model in ["models/nano", "models/nano-ar"] {
        let _ = std::fs::remove_file(outcomes);
        let report = well(&["jsonl", "--data", &data, "--model", model, "--outcomes", outcomes]);
        assert_eq!((&report["suite"], &report["tasks"], &report["passed"]), (&json!("mine"), &json!(4), &json!(3)), "{report}");
        let interval = &report["pass_at"][0];
        assert!(interval["k"] == 1 && interval["value"] == 0.75, "{report}");
        assert!(interval["low"].as_f64().unwrap() < 0.75 && interval["high"].as_f64().unwrap() > 0.75, "{report}");
        let found = lines(Path::new(outcomes));
        let told: Vec<_> =
            found[1..].iter().map(|line| (line["task"].as_str().unwrap(), line["passed"].as_bool().unwrap())).collect();
        assert_eq!(told, [("sum", true), ("line 2", false), ("line 3", true), ("line 4", true)]);
        assert!(found[2]["why"].as_str().unwrap().starts_with("AssertionError"), "{}", found[2]);
        assert!(report["entropy"].as_f64().unwrap() > 1.0 && report["distinct_texts"] == 1, "{report}");
    }
    // The same texts, judged once more, as someone else's would be.
    let report = well(&["jsonl", "--data", &data, "--judge", outcomes]);
    assert_eq!((&report["passed"], &report["model"]), (&json!(3), &Value::Null));
    // nano's chat template hands the message on as it is; the last task asks in words that nano has not learnt.
    let report = well(&["jsonl", "--data", &data, "--chat", "--tasks", "1"]);
    assert_eq!(
        (&report["form"], &report["tasks"], &report["passed"]),
        (&json!("chat"), &json!(1), &json!(0)),
        "a body is no script"
    );

    let long = json!({"prompt": SUM.repeat(40), "reference": "", "id": "long"});
    let long = file(&folder, "long.jsonl", &[problems().remove(0), long]);
    let told = ill(&["jsonl", "--data", &long]);
    assert!(told.contains("task long: max_new_tokens: prompt and canvas have"), "{told}");
    assert!(ill(&["jsonl"]).contains("--data FILE"));
    assert!(ill(&["humaneval", "--data", &data]).contains("line 1: a task of HumanEval has a test and an entry_point"));
    let broken = file(&folder, "broken.jsonl", &[problems().remove(0), json!({"prompt": "x"})]);
    assert!(ill(&["jsonl", "--data", &broken]).contains("line 2: there is neither test nor reference to judge by"));
    let strange = file(&folder, "strange.jsonl", &[json!({"task": "none", "text": "x"})]);
    assert!(ill(&["jsonl", "--data", &data, "--judge", &strange]).contains("has no task none"));
}

#[test]
fn holes_are_filled_by_models_that_can() {
    let report = well(&["nano", "--infill", "--tasks", "20", "--concurrency", "4"]);
    assert_eq!((&report["suite"], &report["form"]), (&json!("nano-infill"), &json!("infill")));
    // nano has learnt whole bodies with their end in sight, and fills holes as often as not with what stands beside them.
    assert!(report["passed"].as_u64().unwrap() >= 3, "{report}");
    assert!(report["forwards"]["denoise"].as_u64().unwrap() >= 20, "{report}");
    let folder = tempfile::tempdir().unwrap();
    let hole = json!({"prompt": format!("{SUM}    return"), "suffix": "(xs)\n", "test": "assert solve([1, 2]) == 3"});
    let data = file(&folder, "holes.jsonl", &[hole]);
    let report = well(&["jsonl", "--data", &data, "--infill", "--max-new-tokens", "1"]);
    assert_eq!(report["passed"], 1, "{report}");
    assert!(ill(&["jsonl", "--data", &data, "--infill"]).contains("does not say how long its hole is"));
    assert!(ill(&["jsonl", "--data", &data]).contains("ask for the infilling form"));
    let told = ill(&["nano", "--infill", "--model", "models/nano-ar"]);
    assert!(told.contains("cannot fill a hole before given text: infilling takes a diffusion model"), "{told}");
    let unsolved = file(&folder, "unsolved.jsonl", &[json!({"prompt": SUM, "test": ""})]);
    assert!(ill(&["jsonl", "--data", &unsolved, "--infill"]).contains("line 1 has no solution"));
}

#[test]
fn samples_are_drawn_by_seeds_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let outcomes = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let asked = ["nano", "--model", "models/nano-ar", "--tasks", "5", "--samples", "4", "--k", "2,4", "--temperature", "3"];
    let run = |more: &[&str]| well(&[&asked[..], more].concat());
    let (first, second, other) = (outcomes("1"), outcomes("2"), outcomes("3"));
    let report = run(&["--seed", "5", "--outcomes", &first]);
    assert_eq!((&report["tasks"], &report["samples"], &report["seed"]), (&json!(5), &json!(4), &json!(5)));
    let at = |k: usize| report["pass_at"][k]["value"].as_f64().unwrap();
    assert_eq!(report["pass_at"].as_array().unwrap().iter().map(|at| at["k"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 4]);
    assert!(at(0) <= at(1) && at(1) <= at(2), "{report}");
    assert!((at(0) - report["passed"].as_f64().unwrap() / 20.0).abs() < 1e-12, "{report}");
    run(&["--seed", "5", "--outcomes", &second, "--concurrency", "3"]);
    run(&["--seed", "6", "--outcomes", &other]);
    let texts = |path: &str| lines(Path::new(path))[1..].iter().map(|line| line["text"].clone()).collect::<Vec<_>>();
    assert_eq!(texts(&first), texts(&second), "how many run side by side changes no text");
    assert_ne!(texts(&first), texts(&other));
    let seeds: std::collections::BTreeSet<u64> =
        lines(Path::new(&first))[1..].iter().map(|line| line["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds.len(), 20);
    assert!(ill(&["nano", "--tasks", "2", "--samples", "3"]).contains("all samples of a task are one text"));
    assert!(ill(&["nano", "--tasks", "2", "--k", "3"]).contains("pass@3 takes at least 3 samples"));
}

#[test]
fn a_run_that_was_cut_off_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outcomes.jsonl");
    let name = path.to_str().unwrap();
    let asked = ["nano", "--tasks", "6", "--outcomes", name];
    let whole = well(&asked);
    let kept = std::fs::read_to_string(&path).unwrap();
    // As after a kill: the settings, two texts that were not judged yet, and part of a third.
    let mut cut: Vec<String> =
        kept.lines().take(3).map(|line| line.replace("\"passed\":true", "\"passed\":null") + "\n").collect();
    cut.push(kept.lines().nth(3).unwrap()[..40].to_owned());
    std::fs::write(&path, cut.concat()).unwrap();
    let rest = well(&asked);
    assert_eq!((&whole["taken_over"], &rest["taken_over"]), (&json!(0), &json!(2)));
    for field in ["tasks", "passed", "generated_tokens", "forwards", "entropy"] {
        assert_eq!(whole[field], rest[field], "{field}");
    }
    let facts = |line: &Value| ["task", "text", "passed", "sample", "seed"].map(|field| line[field].clone());
    let before: Vec<Value> = kept.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines(&path)[1..].iter().map(facts).eq(before.iter().map(facts)));
    // All is known: nothing is decoded.
    assert_eq!(well(&asked)["taken_over"], 6);
    let others = [
        (&["--tasks-seed", "8"][..], "(fingerprint "),
        (&["--threshold", "0.5"], "(diffusion []; here [\"threshold: Some(0.5)\"])"),
        (&["--temperature", "1"], "(sampling []; here [\"temperature: Some(1.0)\"])"),
        (&["--method", "diffusion"], "(method []; here [\"Some(Diffusion)\"])"),
        (&["--seed", "1"], "(seed 0; here 1)"),
        (&["--model", "models/nano-ar"], "(model \"models/nano\"; here \"models/nano-ar\")"),
    ];
    for (other, told) in others {
        let error = ill(&[&asked[..], other].concat());
        assert!(error.contains("was made with other settings") && error.contains(told), "{other:?}: {error}");
    }
}

#[test]
fn likelihood_tells_what_a_model_has_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let known = json!({"prompt": SUM, "text": "    return sum(xs)\n"});
    let strange = json!({"prompt": SUM, "text": "    xs(sum) return\n"});
    let (known, strange) = (file(&folder, "known.jsonl", &[known]), file(&folder, "strange.jsonl", &[strange]));
    for (model, kind) in [("models/nano-ar", "exact"), ("models/nano", "bound"), ("models/nano-block", "bound")] {
        let told = |file: &str| well(&["likelihood", file, "--model", model, "--samples", "64"]);
        let (learnt, other) = (told(&known), told(&strange));
        let number = |report: &Value, field: &str| report[field].as_f64().unwrap_or_else(|| panic!("no {field}: {report}"));
        assert_eq!((&learnt["kind"], &learnt["bytes"]), (&json!(kind), &json!(19)), "{learnt}");
        assert!(number(&learnt, "perplexity") < 3.0 && number(&other, "perplexity") > 20.0, "{model}: {learnt} {other}");
        let tokens = number(&learnt, "tokens");
        assert!((number(&learnt, "nats_per_token") * tokens - number(&learnt, "nats")).abs() < 1e-9);
        assert!((number(&learnt, "bits_per_byte") * 19.0 * 2f64.ln() - number(&learnt, "nats")).abs() < 1e-9);
        assert_eq!(number(&other, "standard_error") > 0.0, kind == "bound", "{other}");
    }
    let plain = folder.path().join("text.py");
    std::fs::write(&plain, format!("{SUM}    return sum(xs)\n").repeat(60)).unwrap();
    let plain = plain.to_str().unwrap();
    let report = well(&["likelihood", plain, "--model", "models/nano-ar", "--window", "100", "--overlap", "20"]);
    assert_eq!((&report["window"], &report["overlap"], &report["texts"]), (&json!(100), &json!(20), &json!(1)));
    assert!(report["tokens"].as_u64().unwrap() > 1000, "{report}");
    assert!(ill(&["likelihood", plain, "--window", "9", "--overlap", "9"]).contains("the window must be the larger"));
    assert!(ill(&["likelihood", plain, "--window", "9000"]).contains("exceeds the model's context"));
    assert!(ill(&["likelihood", "no/such.txt"]).contains("cannot read no/such.txt"));
}
