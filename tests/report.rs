//! Sweeps and reports as their users meet them, and the page that is committed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const RESULTS: &str = "benches/results/cpu-2-threads";

fn lacuna(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    // One thread, so that tests that run side by side do not fight over the cores.
    command.args(arguments).env_remove("RUST_LOG").env("OMP_NUM_THREADS", "1").current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("the binary starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn well(arguments: &[&str]) -> String {
    let output = lacuna(arguments);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""), "{arguments:?}");
    String::from_utf8(output.stdout).expect("stdout is UTF-8")
}

fn ill(arguments: &[&str]) -> String {
    let output = lacuna(arguments);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

/// Names and contents of the plots in a folder.
fn plots(folder: &Path) -> BTreeMap<String, String> {
    let files = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(path).unwrap()))
        .collect()
}

/// Nobody typed a figure, and nothing was measured and not told: the page is what the results give.
#[test]
fn the_committed_page_is_what_the_committed_results_give() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("BENCHMARKS.md");
    well(&["report", RESULTS, "-o", page.to_str().unwrap()]);
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let told = "run 'make report' and commit what it makes";
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    assert!(read(&page) == read(&committed.join("BENCHMARKS.md")), "docs/BENCHMARKS.md is not what {RESULTS} gives: {told}");
    let (made, kept) = (plots(&folder.path().join("plots")), plots(&committed.join("plots")));
    assert_eq!(made.keys().collect::<Vec<_>>(), kept.keys().collect::<Vec<_>>(), "docs/plots: {told}");
    assert!(made == kept, "docs/plots is not what {RESULTS} gives: {told}");
    // Small enough to be kept, and whole.
    for (name, plot) in kept {
        assert!(plot.len() < 40_000, "{name} has {} bytes", plot.len());
        roxmltree::Document::parse(&plot).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn a_sweep_goes_on_and_becomes_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let plan = |settings: &str| {
        format!(
            "name = 'small'\nsuite = 'nano'\ntasks = 3\ntasks_seed = 7\nrounds = 1\nwarm_up = 1\nthreads = 1\ndevice = 'cpu'\ndtype = 'f32'\n\
             in_flight = [1, 2]\n[[path]]\nname = 'diffusion'\nmodel = 'models/nano'\nsettings = [{settings}]\n\
             [[path]]\nname = 'autoregressive'\nmodel = 'models/nano-ar'\nsettings = ['--drafter none']\n"
        )
    };
    std::fs::write(at("plan.toml"), plan("'--threshold 0.9', '--steps 4'")).unwrap();
    let list = well(&["sweep", &at("plan.toml"), "-o", &at("results"), "--list"]);
    assert_eq!(list.lines().count(), 6, "{list}");
    assert!(list.starts_with("lacuna eval nano --json --model models/nano --dtype f32"), "{list}");
    assert!(!folder.path().join("results").exists());

    let file = at("results/small.json");
    assert_eq!(well(&["sweep", &at("plan.toml"), "-o", &at("results")]).trim(), file);
    let first = std::fs::read_to_string(&file).unwrap();
    let result: Value = serde_json::from_str(&first).unwrap();
    let cells = result["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 6);
    for cell in cells {
        let run = &cell["runs"][0];
        assert_eq!((cell["runs"].as_array().unwrap().len(), &cell["tasks"]), (1, &3.into()), "{cell}");
        assert!(run["tokens_per_second"].as_f64().unwrap() > 0.0 && run["first_ms"]["p50"].as_f64().unwrap() > 0.0, "{cell}");
        assert!(run["first_ms"]["p50"].as_f64() <= run["total_ms"]["max"].as_f64(), "{cell}");
    }
    // Texts do not depend on what is decoded beside them.
    assert_eq!((&cells[0]["passed"], &cells[0]["forwards"]), (&cells[1]["passed"], &cells[1]["forwards"]));

    // A round more: what is there stays, and what is missing is run. Another plan is refused.
    let error = ill(&["sweep", &at("plan.toml"), "-o", &at("results"), "--rounds", "2"]);
    assert!(error.contains("the result there is of another plan"), "{error}");
    let cut = {
        let mut cut = result.clone();
        cut["cells"][2]["runs"] = Value::Array(vec![]);
        cut
    };
    std::fs::write(&file, cut.to_string()).unwrap();
    well(&["sweep", &at("plan.toml"), "-o", &at("results")]);
    let again: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!((&again["cells"][0], &again["cells"][5]), (&result["cells"][0], &result["cells"][5]));
    assert_eq!(again["cells"][2]["runs"].as_array().unwrap().len(), 1);

    let page = well(&["report", &file, "-o", &at("page")]);
    assert_eq!(page.trim(), at("page/index.html"));
    let html = std::fs::read_to_string(at("page/index.html")).unwrap();
    for wanted in ["autoregressive", "steps 4", "suite nano", "threads 1", "seed 7", "f32", "lacuna sweep", "AUP", "<svg"] {
        assert!(html.contains(wanted), "'{wanted}' is not on the page");
    }
    let names: Vec<String> = plots(&folder.path().join("page/plots")).into_keys().collect();
    let wanted = ["accuracy-forward", "accuracy-speed-1", "accuracy-speed-2", "first-token", "speed-batch"];
    assert_eq!(names, wanted.map(|name| format!("sweep-{name}.svg")));

    // A wrong setting is told before anything is run.
    std::fs::write(at("plan.toml"), plan("'--speed 9'")).unwrap();
    let error = ill(&["sweep", &at("plan.toml"), "-o", &at("other")]);
    assert!(error.contains("setting '--speed 9' of path 'diffusion': unexpected argument '--speed'"), "{error}");
}

#[test]
fn a_sweep_takes_tasks_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let task = |name: &str| {
        format!(
            "{{\"prompt\": \"# Return the sum of {name}.\\ndef solve({name}):\\n\", \"reference\": \"    return sum({name})\"}}\n"
        )
    };
    std::fs::write(at("tasks.jsonl"), task("xs") + &task("ys") + &task("zs")).unwrap();
    let plan = format!(
        "name = 'file'\nsuite = 'jsonl'\ndata = '{}'\ntasks = 2\ntasks_seed = 7\nrounds = 2\nwarm_up = 0\nthreads = 1\ndevice = 'cpu'\n\
         dtype = 'f32'\nin_flight = [2]\n[[path]]\nname = 'nano'\nmodel = 'models/nano'\nsettings = ['']\n",
        at("tasks.jsonl")
    );
    std::fs::write(at("plan.toml"), plan).unwrap();
    well(&["sweep", &at("plan.toml"), "-o", &at("results")]);
    let result: Value = serde_json::from_str(&std::fs::read_to_string(at("results/file.json")).unwrap()).unwrap();
    let cell = &result["cells"][0];
    assert_eq!((&result["suite"], &cell["tasks"], &cell["runs"].as_array().unwrap().len()), (&"jsonl".into(), &2.into(), &2));
    assert!(cell["command"].as_str().unwrap().ends_with(&format!("--concurrency 2 --data {}", at("tasks.jsonl"))), "{cell}");
    // Greedy texts do not change from run to run.
    assert_eq!(cell["runs"][0]["passed"], cell["runs"][1]["passed"]);
    assert_eq!(cell["runs"][0]["generated_tokens"], cell["runs"][1]["generated_tokens"]);
}

#[test]
fn what_is_no_result_is_no_report() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("page");
    let error = ill(&["report", "Cargo.toml", "-o", out.to_str().unwrap()]);
    assert!(error.starts_with("error: Cargo.toml is not JSON ("), "{error}");
    let error = ill(&["report", "models/nano/config.json", "-o", out.to_str().unwrap()]);
    assert!(error.contains("models/nano/config.json has the fields of no result that a report knows"), "{error}");
    assert!(!out.exists());
}
