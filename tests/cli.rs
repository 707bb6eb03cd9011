//! The command line as its users meet it: the real binary on the model that ships.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const MODEL: &str = "models/nano";
const PROMPT: &str = "# Return the sum of xs.\ndef solve(xs):\n";

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    // One thread, so that tests that run side by side do not fight over the cores.
    command.args(arguments).env_remove("RUST_LOG").env("OMP_NUM_THREADS", "1").current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn lacuna(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the binary starts")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("stdout is UTF-8")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("stderr is UTF-8")
}

/// Exit code 0 and nothing on stderr.
fn well(arguments: &[&str]) -> String {
    let output = lacuna(arguments);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""), "{arguments:?}");
    stdout(&output).to_owned()
}

/// The exit code wanted, nothing on stdout, and what stderr says.
fn ill(arguments: &[&str], code: i32) -> String {
    let output = lacuna(arguments);
    assert_eq!((output.status.code(), stdout(&output)), (Some(code), ""), "{arguments:?}: {}", stderr(&output));
    stderr(&output).to_owned()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// A copy of the model with one file's bytes replaced.
fn broken(file: &str, bytes: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL).read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    std::fs::write(folder.path().join(file), bytes).unwrap();
    folder
}

#[test]
fn help_lists_the_commands() {
    let help = well(&["--help"]);
    for name in ["serve", "generate", "compare", "inspect", "import", "train", "eval", "bench", "sweep", "report", "token"] {
        assert!(help.contains(&format!("\n  {name} ")), "{name}: {help}");
        assert!(well(&[name, "--help"]).contains("Usage: lacuna "), "{name}");
    }
    assert!(well(&["--version"]).starts_with("lacuna "));
}

#[test]
fn inspect_describes_the_model() {
    let text = well(&["inspect", MODEL]);
    for line in ["family                 llada", "attention              full", "mask token origin      config.json"] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    let object = json(&well(&["inspect", MODEL, "--json", "--quick"]));
    assert_eq!(object["family"], "llada");
    assert_eq!(object["problems"], serde_json::json!([]));
    assert!(object["parameters"].as_u64().unwrap() > 100_000);
    assert!(object["tokenizer_size"].as_u64() <= object["vocabulary"].as_u64());
}

#[test]
fn inspect_lists_every_problem() {
    let config = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL).join("config.json")).unwrap();
    let mut config = json(&config);
    config["include_qkv_bias"] = true.into();
    config["n_layers"] = 1.into();
    let folder = broken("config.json", config.to_string().as_bytes());
    let output = lacuna(&["inspect", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let problems: Vec<_> = stdout(&output).lines().filter(|line| line.starts_with("problem: ")).collect();
    assert!(problems.contains(&"problem: tensor model.transformer.blocks.0.q_proj.bias is missing"), "{problems:?}");
    assert!(problems.contains(&"problem: tensor model.transformer.blocks.1.q_proj.weight is unexpected"), "{problems:?}");
    assert!(stderr(&output).ends_with(&format!("it has {} problems\n", problems.len())), "{}", stderr(&output));
}

#[test]
fn inspect_looks_at_the_values() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL).join("model.safetensors");
    let mut weights = std::fs::read(path).unwrap();
    let last = weights.len();
    // Half-precision NaN, whatever tensor comes last.
    weights[last - 2..].copy_from_slice(&[0xff, 0x7f]);
    let folder = broken("model.safetensors", &weights);
    let folder = folder.path().to_str().unwrap();
    let output = lacuna(&["inspect", folder]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("holds NaN or infinity"), "{}", stdout(&output));
    well(&["inspect", folder, "--quick"]);
    let message = ill(&["generate", "x", "--model", folder], 1);
    assert!(message.contains("holds NaN or infinity"), "{message}");
}

#[test]
fn a_broken_folder_is_one_clear_line() {
    let cases = [
        ("config.json", "{".as_bytes(), "config.json"),
        ("config.json", br#"{"architectures": ["GPT2LMHeadModel"]}"#, "architecture GPT2LMHeadModel is not known"),
        ("tokenizer.json", b"[]", "tokenizer.json"),
        ("model.safetensors", b"short", "model.safetensors"),
    ];
    for (file, bytes, told) in cases {
        let folder = broken(file, bytes);
        for command in [&["inspect"][..], &["generate", "x", "--model"]] {
            let message = ill(&[command, &[folder.path().to_str().unwrap()]].concat(), 1);
            assert!(message.starts_with("error: ") && message.contains(told), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
    }
    let message = ill(&["inspect", "models/none"], 1);
    assert_eq!(message, "error: there is no model folder models/none: name one that holds config.json, or a GGUF file\n");
}

#[test]
fn a_gguf_file_is_imported_or_run_as_it_is() {
    let file = "tests/fixtures/gguf/llama.gguf";
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("new/model");
    let folder = folder.to_str().unwrap();
    let arguments = ["import", file, folder, "--dtype", "f16"];
    let summary = well(&arguments);
    for line in ["architecture  LlamaForCausalLM", "parameters    875776", "written as    f16"] {
        assert!(summary.lines().any(|l| l == line), "{line}: {summary}");
    }
    assert!(summary.contains("tensors       1 bf16, 1 f16, 5 f32, 2 q4_0, 1 q4_1, 3 q4_k, "), "{summary}");
    let message = ill(&arguments, 1);
    assert!(message.contains("is not empty: name another folder, or write into it with --force"), "{message}");
    well(&[&arguments[..], &["--force"]].concat());
    let facts = |model: &str| {
        let mut facts = json(&well(&["inspect", model, "--json"]));
        assert_eq!(facts["problems"], serde_json::json!([]), "{model}");
        for field in ["name", "dtype_stored", "bytes_stored"] {
            facts[field] = Value::Null;
        }
        let held = facts["bytes_loaded_f32"].take().as_u64().unwrap();
        (facts, held)
    };
    let ((of_file, in_blocks), (of_folder, in_floats)) = (facts(file), facts(folder));
    assert_eq!(of_file, of_folder);
    // The file's matrices stay in its blocks, the folder's are floats.
    assert!(2 * in_blocks < in_floats, "{in_blocks} bytes of the file, {in_floats} of the folder");

    let message = ill(&["import", MODEL, folder], 1);
    assert!(message.contains("is a folder: import takes a GGUF file"), "{message}");
    let message = ill(&["import", "Cargo.toml", folder, "--force"], 1);
    assert_eq!(message, "error: Cargo.toml: it does not begin with GGUF: it is no GGUF file\n");
    let message = ill(&["import", file, "Cargo.toml"], 1);
    assert!(message.contains("cannot read Cargo.toml: "), "{message}");
}

#[test]
fn generate_prints_the_text_alone() {
    let text = well(&["generate", PROMPT, "--seed", "1"]);
    assert!(text.contains("return"), "{text}");
    assert!(!text.contains('\x1b') && !text.contains("<|"), "{text}");
    assert!(!text.contains("def solve"), "the prompt is not part of the text: {text}");
    assert_eq!(well(&["generate", PROMPT, "--seed", "1"]), text);

    let mut child =
        command(&["generate", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(PROMPT.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((stdout(&output), stderr(&output)), (text.as_str(), ""));
}

#[test]
fn generate_json_has_text_and_usage() {
    let arguments =
        ["generate", PROMPT, "--json", "--steps", "4", "--max-new-tokens", "16", "--no-finish-early", "--seed", "7"];
    let object = json(&well(&arguments));
    assert_eq!(object["seed"], 7);
    assert!(!object["token_ids"].as_array().unwrap().is_empty());
    assert!(["stop", "length"].contains(&object["finish_reason"].as_str().unwrap()));
    let usage = &object["usage"];
    assert_eq!((&usage["steps"], &usage["forwards"]["denoise"]), (&4.into(), &4.into()));
    for kind in ["prefill", "cache_store", "verify", "draft"] {
        assert_eq!(usage["forwards"][kind], 0, "{kind}");
    }
    let generated = usage["generated_tokens"].as_u64().unwrap();
    assert_eq!(usage["tokens_per_forward"].as_f64().unwrap(), generated as f64 / 4.0);
    for time in ["queued_seconds", "seconds_to_first_commit", "decoding_seconds", "tokens_per_second"] {
        assert!(usage[time].as_f64().unwrap() > 0.0, "{time}: {usage}");
    }
}

#[test]
fn generate_fills_between_fixed_text() {
    let ways: [&[&str]; 3] = [
        &[PROMPT, "--suffix", "\n# end\n", "--max-new-tokens", "12"],
        &[PROMPT, "--template", r#"[12, "\n# end\n"]"#],
        &[PROMPT, "--piece", "hole:12", "--piece", "text:\n# end\n"],
    ];
    let texts = ways.map(|way| well(&[&["generate", "--suppress-end"], way].concat()));
    assert!(texts[0].ends_with("\n# end\n"), "{}", texts[0]);
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    let chat = well(&["generate", "--chat", PROMPT]);
    assert_eq!(chat, well(&["generate", PROMPT]), "nano's chat template hands the message on as it is");
}

#[test]
fn generate_shows_the_canvas() {
    let arguments = ["generate", PROMPT, "--show", "--steps", "4", "--no-finish-early"];
    let output = command(&arguments).env("NO_COLOR", "1").output().unwrap();
    let shown = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(shown.starts_with("\x1b[K# Return the sum of xs.\n\x1b[Kdef solve(xs):\n\x1b[K░░"), "{shown}");
    assert!(!shown.contains("\x1b[0m"), "no colour code: {shown}");
    assert!(shown.ends_with("\n\x1b[J"), "{shown}");
    assert!(stderr(&output).contains(" tokens in 4 steps, 4 forwards"), "{}", stderr(&output));
    assert!(stdout(&command(&arguments).env_remove("NO_COLOR").output().unwrap()).contains("\x1b[2m░"));
}

#[test]
fn a_wrong_request_exits_with_2() {
    let cases: [(&[&str], &str); 10] = [
        (&["gnerate"], "unrecognized subcommand"),
        (&["generate"], "required arguments"),
        (&["generate", "x", "--order", "best"], "use confidence, margin, entropy, random or left_to_right"),
        (&["generate", "x", "--steps", "4", "--threshold", "0.5"], "cannot be used with"),
        (&["generate", "x", "--template", "[\"x\", 8"], "--template"),
        (&["generate", "x", "--max-new-tokens", "100000"], "max_new_tokens: 100000 is not from 1 to"),
        (&["generate", "x", "--temperature", "-1"], "temperature: -1 is not a number from 0 to 10"),
        (&["generate", "x", "--dtype", "f8"], "use f32, f16 or bf16"),
        (
            &["generate", "x", "--quantize", "int7"],
            "unknown quantisation 'int7': use int8, int8-dynamic, int8-weight-only, int4",
        ),
        (&["train", "--out", "nowhere"], "--steps"),
    ];
    for (arguments, told) in cases {
        let message = ill(arguments, 2);
        assert!(message.starts_with("error: ") && message.contains(told), "{arguments:?}: {message}");
    }
    let message = ill(&["generate", "x", "--device", "tpu"], 1);
    assert_eq!(message, "error: unknown device 'tpu': use auto, cpu or cuda:N\n");
    // Before anything is read: not even that the model is not there is seen.
    for command in [&["generate", "x"][..], &["compare", "x"], &["eval", "nano"], &["bench", "step"]] {
        let message = ill(&[command, &["--model", "nowhere", "--device", "cuda:4096"]].concat(), 1);
        assert!(message.starts_with("error: device 'cuda:4096' "), "{command:?}: {message}");
    }
}

/// A shape that no machine has room for.
#[test]
fn too_little_memory_is_told_with_its_sum() {
    let shape = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/shapes/llada-8b.json");
    let mut shape = json(&std::fs::read_to_string(shape).unwrap());
    shape["n_layers"] = 1024.into();
    shape["mlp_hidden_size"] = (1 << 18).into();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(file, "{shape}").unwrap();
    let message = ill(&["bench", "step", "--device", "cpu", "--random-weights", file.path().to_str().unwrap()], 1);
    for part in ["there is no room for", "of weights", "for 4096 tokens", "are free on the device: try a smaller --context"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = command(&["generate", PROMPT, "--show", "--delay", "20"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
}

/// A server on a free port, and the address that its log tells.
fn server() -> (std::process::Child, String) {
    let mut child = command(&["serve", "--address", "127.0.0.1:0", "--http", "none"]).stderr(Stdio::piped()).spawn().unwrap();
    let log = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut lines = std::io::BufRead::lines(log);
    let address = lines.by_ref().map(Result::unwrap).find_map(|line| Some(line.split("address=").nth(1)?.trim().to_owned()));
    // The log must be read on, or the server would wait for room in the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (child, address.expect("the log tells the address"))
}

#[test]
fn generate_by_a_server_gives_what_generate_here_gives_and_sigterm_ends_the_server() {
    let (mut child, address) = server();
    let here = json(&well(&["generate", PROMPT, "--json", "--seed", "3"]));
    let there = json(&well(&["generate", PROMPT, "--json", "--seed", "3", "--server", &address]));
    for field in ["text", "token_ids", "finish_reason", "seed"] {
        assert_eq!(here[field], there[field], "{field}");
    }
    assert_eq!(here["usage"]["forwards"], there["usage"]["forwards"]);
    // Settings hold there too, whether or not their method is named.
    let stepwise = json(&well(&["generate", PROMPT, "--json", "--steps", "5", "--no-finish-early", "--server", &address]));
    assert_eq!(stepwise["usage"]["steps"], 5);
    let torn = ill(&["generate", PROMPT, "--server", &address, "--steps", "5", "--drafter", "lookup"], 1);
    assert!(torn.contains("both methods"), "{torn}");
    let refused = ill(&["generate", PROMPT, "--server", &address, "--max-new-tokens", "100000"], 1);
    assert!(refused.contains("stopping.max_new_tokens"), "{refused}");
    // SAFETY: the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let gone = ill(&["generate", PROMPT, "--server", &address], 1);
    assert!(gone.contains("no server answers"), "{gone}");
}

#[test]
fn where_to_listen_is_checked_before_anything_is_loaded() {
    for (flag, value) in [
        ("--http", "localhost:80"),
        ("--http-allow-origin", "example.org"),
        ("--http-allow-origin", "https://example.org/path"),
        ("--http-allow-origin", "https://example.org/"),
    ] {
        let said = ill(&["serve", flag, value], 2);
        assert!(said.contains(&format!("'{value}' for '{flag}")), "{said}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = ill(&["serve", "--address", "127.0.0.1:0", "--http", &address], 1);
    assert!(said.contains(&format!("cannot listen on {address}: --http")) && !said.contains("loaded"), "{said}");
}

#[test]
fn eval_counts_what_passes_one_by_one_and_side_by_side() {
    let mut alone: Vec<Value> = vec![];
    for concurrency in ["1", "4"] {
        let outcomes = tempfile::NamedTempFile::new().unwrap();
        let path = outcomes.path().to_str().unwrap();
        let arguments = ["eval", "nano", "--tasks", "6", "--json", "--outcomes", path, "--concurrency", concurrency];
        // What the machine cannot fence off would be on stderr.
        let report = json(stdout(&lacuna(&arguments)));
        // The first line holds the settings.
        let lines: Vec<Value> = std::fs::read_to_string(path).unwrap().lines().skip(1).map(json).collect();
        let passed = lines.iter().filter(|line| line["passed"] == true).count();
        assert_eq!((lines.len(), &report["tasks"], &report["passed"]), (6, &6.into(), &passed.into()));
        assert_eq!(report["pass_at_1"].as_f64().unwrap(), passed as f64 / 6.0);
        let tokens: u64 = lines.iter().map(|line| line["generated_tokens"].as_u64().unwrap()).sum();
        let forwards: u64 = lines.iter().map(|line| line["forwards"]["denoise"].as_u64().unwrap()).sum();
        assert_eq!((&report["generated_tokens"], &report["forwards"]["denoise"]), (&tokens.into(), &forwards.into()));
        let number = |field: &str| report[field].as_f64().unwrap_or_else(|| panic!("no {field}: {report}"));
        assert!((number("tokens_per_forward") - tokens as f64 / forwards as f64).abs() < 1e-9);
        assert!((number("wall_tokens_per_second") * number("wall_seconds") - tokens as f64).abs() < 1e-6);
        assert_eq!(report["concurrency"].to_string(), concurrency);
        let facts = |line: &Value| ["task", "text", "passed", "forwards"].map(|field| line[field].clone());
        if alone.is_empty() {
            assert_eq!(number("concurrency_peak"), 1.0);
            assert!(number("decoding_seconds") <= number("wall_seconds"), "{report}");
            alone = lines;
        } else {
            assert!(number("concurrency_peak") > 1.0 && number("decoding_seconds") > number("wall_seconds"), "{report}");
            assert!(lines.iter().map(facts).eq(alone.iter().map(facts)), "{lines:#?} {alone:#?}");
        }
    }
}

#[test]
fn bench_step_takes_a_step_apart() {
    let shape = "tests/fixtures/llada/config.json";
    for model in [&["--model", MODEL][..], &["--random-weights", shape]] {
        let arguments = [&["bench", "step", "--json", "--runs", "5", "--warm-up", "1", "--canvas", "24"], model].concat();
        let report = json(&well(&arguments));
        let median = |part: &str| report[part]["median"].as_f64().unwrap();
        assert!(["forward", "head", "selection", "event", "total"].iter().all(|part| median(part) > 0.0), "{report}");
        assert!(median("total") >= median("forward"), "{report}");
        let share = report["overhead_share"].as_f64().unwrap();
        assert!((0.0..1.0).contains(&share), "{report}");
    }
    let error = ill(&["bench", "step", "--random-weights", "no/such.json"], 1);
    assert!(error.contains("no/such.json"), "{error}");
}

#[test]
fn bench_speculate_compares_every_drafter_with_plain_decoding() {
    let arguments =
        ["bench", "speculate", "--model", "models/nano-ar", "--json", "--count", "6", "--rounds", "2", "--threads", "1"];
    let report = json(&well(&arguments));
    assert_eq!((&report["prompts"], &report["rounds"]), (&6.into(), &2.into()));
    assert!(report["plain_tokens_per_second"].as_f64().unwrap() > 0.0, "{report}");
    for name in ["redrafter", "medusa", "chain", "lookup"] {
        let lane = &report[name];
        let number = |field: &str| lane[field].as_f64().unwrap_or_else(|| panic!("{name} has no {field}: {report}"));
        let ratio = number("tokens_per_second") / report["plain_tokens_per_second"].as_f64().unwrap();
        assert!((number("speedup") - ratio).abs() < 1e-9 && number("speedup_least") > 0.0, "{name}: {report}");
        assert_eq!(lane["same_text"], 6, "{name}: {report}");
        let (drafts, accepted) = (number("drafts"), number("accepted_tokens"));
        let length = if drafts > 0.0 { 1.0 + accepted / drafts } else { 0.0 };
        assert!((number("acceptance_length") - length).abs() < 1e-9, "{name}: {report}");
        // Short texts are decoded several times in each of the two rounds.
        let runs = lane["by_prompt"].as_array().unwrap().iter().map(|prompt| prompt["runs"].as_u64().unwrap());
        assert!(runs.clone().all(|runs| runs >= 2 && runs % 2 == 0) && runs.max() > Some(2), "{name}: {report}");
    }
    let curve = report["cost_curve"].as_array().unwrap();
    assert_eq!((&curve[0]["tokens"], &curve[0]["ratio"]), (&1.into(), &1.0.into()));
    assert!(curve.windows(2).all(|pair| pair[0]["ratio"].as_f64() <= pair[1]["ratio"].as_f64()), "{report}");
    let error = ill(&["bench", "speculate", "--model", MODEL, "--rounds", "1"], 2);
    assert!(error.contains("decode autoregressively") || error.contains("drafter"), "{error}");
}

/// The heads that ship foresee what the model that ships says, and the kernels change no text.
#[test]
fn the_heads_that_ship_are_right_and_the_kernels_change_no_text() {
    let prompt = "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n";
    for drafter in ["redrafter", "medusa", "chain"] {
        let arguments = ["generate", "--model", "models/nano-ar", "--drafter", drafter, "--no-adapt", "--json", prompt];
        let with = json(&well(&arguments));
        let speculation = &with["usage"]["speculation"];
        assert!(speculation["acceptance_length"].as_f64().unwrap() > 2.0, "{with}");
        let without = command(&arguments).env("LACUNA_KERNELS", "off").output().unwrap();
        let without = json(stdout(&without));
        assert_eq!(without["text"], with["text"], "{drafter}");
        assert_eq!(without["usage"]["speculation"]["accepted_exactly"], speculation["accepted_exactly"], "{drafter}");
    }
}

#[test]
fn a_flag_of_both_methods_goes_to_the_one_asked_for() {
    let arguments =
        ["generate", "--model", "models/nano-ar", "--method", "autoregressive", "--suppress-end", "--json", "# x\n"];
    let told = json(&well(&arguments));
    assert_eq!((&told["finish_reason"], &told["usage"]["generated_tokens"]), (&"length".into(), &48.into()), "{told}");
}

/// Weights of fewer bits decode, and whatever is measured with them says so.
#[test]
fn weights_are_quantised_when_they_are_loaded() {
    let mut totals = vec![];
    for scheme in ["int8", "int8-dynamic", "int8-weight-only", "int4", "int4-dynamic", "fp8", "fp8-block"] {
        let arguments = ["bench", "step", "--quantize", scheme, "--json", "--runs", "1", "--warm-up", "0"];
        let output = lacuna(&arguments);
        assert!(output.status.success(), "{scheme}: {output:?}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["dtype"], format!("f32/{scheme}"));
        totals.push(json["total"]["median"].as_f64().unwrap());
    }
    assert!(totals.iter().all(|total| *total > 0.0));
}

/// Every kind of model runs windows over a prefix, alone and beside others, and the result says what they cost at least.
#[test]
fn steps_of_a_grid_are_told_beside_their_floors() {
    for model in ["models/nano", "models/nano-block", "models/nano-ar"] {
        let grid = ["--window", "1,4", "--prefix", "0,8", "--sequences", "1,2", "--runs", "1", "--warm-up", "0"];
        let told = json(&well(&[&["bench", "step", "--model", model, "--device", "cpu", "--json"], &grid[..]].concat()));
        let cells = told["cells"].as_array().unwrap();
        assert_eq!((cells.len(), &told["skipped"]), (8, &serde_json::json!([])), "{model}");
        for cell in cells {
            let number = |name: &str| cell.pointer(name).and_then(Value::as_f64).unwrap_or_else(|| panic!("{name}: {cell}"));
            assert!(number("/total/median") > 0.0 && number("/network/median") > 0.0, "{cell}");
            let times = number("/total/median") / number("/floor/milliseconds");
            assert!((number("/times_floor") - times).abs() < 1e-9 * times, "{cell}");
            let rate = number("/sequences") / number("/total/median") * 1e3;
            assert!((number("/tokens_per_second/1") - rate).abs() < 1e-9 * rate, "{cell}");
            assert_eq!(cell["tokens_per_second"].get("3").is_some(), cell["window"] == 4, "no more than the window: {cell}");
        }
        let bytes = |cell: usize| cells[cell]["floor"]["bytes"].as_f64();
        assert!(bytes(2) > bytes(0), "a prefix is read");
        assert!(told["ceilings"]["bytes_per_second"].as_f64() > Some(1e8), "{told}");
    }
    let message = ill(&["bench", "step", "--window", "200", "--prefix", "0,100", "--device", "cpu"], 1);
    assert!(message.contains("have 300 tokens, the context 256"), "{message}");
    assert!(ill(&["bench", "step", "--window", "0", "--device", "cpu"], 1).contains("must be above 0"));
    ill(&["bench", "step", "--window", "1", "--canvas", "3"], 2);
    ill(&["bench", "step", "--prefix", "1"], 2);
}
