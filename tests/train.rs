//! Training on a network small enough for seconds: it learns, and a run in sittings is the unbroken run.

use std::path::Path;

use lacuna::checkpoint::Checkpoint;
use lacuna::tensor::{Dtype, Placement};
use lacuna::train::data::Objective;
use lacuna::train::progress::Budget;
use lacuna::train::{Options, run};
use serde_json::Value;

fn options(out: &Path, stop_after: Option<u64>) -> Options {
    Options {
        out: out.into(),
        objective: Objective::Diffusion,
        tokenizer: None,
        seed: 3,
        budget: Budget { steps: Some(60), minutes: None, stop_after },
        batch: 4,
        learning_rate: 3e-3,
        hidden_size: 32,
        layers: 1,
        heads: 2,
        dtype: Dtype::F32,
        threads: 1,
    }
}

fn curve(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("training/curve.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_in_sittings_is_the_unbroken_run_and_it_learns() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&options(whole.path(), None)).unwrap();
    // The second sitting begins amid a pool of batches and ends in a file that a later kill would have to respect.
    for sitting in [Some(7), Some(30), None] {
        run(&options(parts.path(), sitting)).unwrap();
    }
    let read = |folder: &Path, file: &str| std::fs::read(folder.join(file)).unwrap();
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(read(whole.path(), file) == read(parts.path(), file), "{file}");
    }
    let (whole_curve, parts_curve) = (curve(whole.path()), curve(parts.path()));
    assert_eq!(whole_curve.len(), parts_curve.len());
    let last = whole_curve.last().unwrap();
    assert_eq!((&last["step"], &last["held_out_loss"]), (&60.into(), &parts_curve.last().unwrap()["held_out_loss"]));
    // The loss of a network that knows nothing is the logarithm of the vocabulary, about 6.9.
    assert!(last["held_out_loss"].as_f64().unwrap() < 5.5, "{last}");
    // What it wrote is a model folder like any other.
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.problems(), [""; 0]);
    checkpoint.load(Placement::CPU_F32, 256, &mut |_| {}).unwrap();
}

#[test]
fn a_training_state_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    run(&options(folder.path(), Some(1))).unwrap();
    let error = run(&Options { hidden_size: 64, ..options(folder.path(), None) }).unwrap_err();
    assert!(error.to_string().contains("another shape"), "{error}");
}

/// A kill at any moment costs what came after the last checkpoint, and nothing else.
#[test]
fn a_killed_run_goes_on_from_its_checkpoint() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&options(whole.path(), None)).unwrap();
    run(&options(killed.path(), Some(20))).unwrap();
    let flags =
        "--steps 60 --seed 3 --batch 4 --learning-rate 3e-3 --hidden-size 32 --layers 1 --heads 2 --dtype f32 --threads 1";
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .args(["train", "--out"])
        .arg(killed.path())
        .args(flags.split(' '))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(child.try_wait().unwrap().is_none_or(|status| status.success()), "the command did not run");
    child.kill().unwrap();
    child.wait().unwrap();
    run(&options(killed.path(), None)).unwrap();
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(whole.path()) == weights(killed.path()), "the killed run ended with other weights");
}
