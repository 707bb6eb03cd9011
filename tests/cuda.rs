//! What can be said of the GPU's path on a machine without one: the shim over libtorch's graphs and the fused kernels build, have what is
//! looked up in them, and the binary decodes by these kernels what it decodes without them, where they are built for the CPU.
//! That graphs and kernels compute what the plain path computes on a GPU are tests of the library, to be run there (`scripts/cuda`).

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::kernels_on_cpu;

fn build(part: &str, library: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-cuda.sh");
    let built = Command::new(script).arg(part).arg(library).output().expect("the script starts");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// Every function that this source looks up by name is in the library.
fn has_what_is_looked_up(library: &Path, source: &str, count: usize) {
    let bytes = std::fs::read(library).unwrap();
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(source)).unwrap();
    let mut wanted: Vec<&str> = source.split("(c\"lacuna_").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    wanted.sort();
    wanted.dedup();
    assert_eq!(wanted.len(), count, "{wanted:?}");
    for name in wanted {
        let name = [b"lacuna_", name.as_bytes(), b"\0"].concat();
        assert!(bytes.windows(name.len()).any(|window| window == name), "it lacks {}", String::from_utf8_lossy(&name));
    }
}

#[test]
fn the_shim_builds_without_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("liblacuna_graphs.so");
    build("graphs", &library);
    has_what_is_looked_up(&library, "src/model/graphs.rs", 11);
}

#[test]
fn the_kernels_build_for_gpus_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("liblacuna_kernels.so");
    build("kernels", &library);
    has_what_is_looked_up(&library, "src/tensor/fused/mod.rs", 7);
    let bytes = std::fs::read(&library).unwrap();
    for kernel in ["add_norm", "gated", "rounded", "turned", "statistics"] {
        assert!(bytes.windows(kernel.len()).any(|window| window == kernel.as_bytes()), "{kernel}");
    }
    // It opens, with all that it needs of the CUDA runtime that libtorch brings; and is not taken for the CPU's.
    let (_, log) = generate(Some(library), &["--model", "models/nano-ar", "--max-new-tokens", "2", "def solve(xs):\n"]);
    assert!(log.contains("there are no fused kernels") && log.contains("the library is for GPUs"), "{log}");
}

/// What `generate` prints and logs, with everything left to libtorch but what `library` has.
fn generate(library: Option<PathBuf>, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    command.args(["generate", "--threads", "1"]).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env("LACUNA_KERNELS", "off").env("RUST_LOG", "info").env_remove("LACUNA_FUSED_LIBRARY");
    command.envs(library.map(|library| ("LACUNA_FUSED_LIBRARY", library)));
    let output = command.output().expect("the binary starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_binary_decodes_alike_by_fused_kernels() {
    let prompt = "# Return the sum of the numbers in xs.\ndef solve(xs):\n";
    let cases: [&[&str]; 3] = [
        &["--max-new-tokens", "16", "--steps", "4", prompt],
        &["--max-new-tokens", "16", "--steps", "4", "--temperature", "0.9", "--seed", "4", prompt],
        &["--model", "models/nano-ar", "--max-new-tokens", "12", prompt],
    ];
    for arguments in cases {
        let ((with, log), (without, _)) = (generate(Some(kernels_on_cpu()), arguments), generate(None, arguments));
        assert!(log.contains("opened fused kernels") && !log.contains("WARN"), "{log}");
        assert!(!with.trim().is_empty());
        assert_eq!(with, without, "{arguments:?}");
    }
}

/// Canvases and masks are the decoders' and stay on the host, everything else on the device: tokens, positions and places go up in one copy,
/// and all statistics come down in one, whatever the number of sequences. The tokens that are ruled out, such as the mask, go up beside them.
/// (Where some rows are wanted and not all, their numbers do, too.)
#[test]
fn a_step_is_few_copies_however_many_sequences_it_serves() {
    for (model, up) in [("models/nano-ar", 1), ("models/nano-block", 2)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
        command.args([
            "bench",
            "step",
            "--model",
            model,
            "--window",
            "1,4",
            "--prefix",
            "16",
            "--sequences",
            "1,3,8",
            "--runs",
            "1",
        ]);
        command.args(["--warm-up", "0", "--threads", "1", "--json"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = command.env("LACUNA_KERNELS", "off").output().expect("the binary starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let cells = told["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 6);
        for cell in cells {
            assert_eq!(cell["copies"], serde_json::json!({"up": up, "down": 1}), "{cell}");
        }
    }
}

#[test]
fn a_library_that_is_none_is_told_and_done_without() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.so");
    std::fs::write(&broken, "no library").unwrap();
    let arguments = ["--model", "models/nano-ar", "--max-new-tokens", "4", "def solve(xs):\n"];
    let ((with, log), (without, _)) = (generate(Some(broken), &arguments), generate(None, &arguments));
    assert!(log.contains("there are no fused kernels") && log.contains("broken.so"), "{log}");
    assert_eq!(with, without);
}
