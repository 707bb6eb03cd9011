//! What can be said of the GPU's path on a machine without one: the shim over libtorch's graphs builds, and has what is looked up in it.
//! That graphs compute what the plain path computes is a test of the library, to be run on a GPU (`scripts/cuda`).

use std::path::Path;
use std::process::Command;

#[test]
fn the_shim_builds_without_a_gpu() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("liblacuna_graphs.so");
    let built = Command::new(root.join("scripts/build-cuda.sh")).arg(&library).output().expect("the script starts");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let bytes = std::fs::read(&library).unwrap();
    let source = std::fs::read_to_string(root.join("src/model/graphs.rs")).unwrap();
    let wanted: Vec<&str> = source.split("find(c\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(wanted.len(), 10, "{wanted:?}");
    for name in wanted {
        let name = [name.as_bytes(), b"\0"].concat();
        assert!(bytes.windows(name.len()).any(|window| window == name), "it lacks {}", String::from_utf8_lossy(&name));
    }
}
