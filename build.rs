//! Generates the service's code from `proto/`, without protoc, and makes binaries find libtorch.

use std::error::Error;
use std::path::PathBuf;

const PROTOS: [&str; 3] = ["lacuna/v1/generation.proto", "lacuna/v1/models.proto", "lacuna/v1/tokenization.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    // Reflection serves this file.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("lacuna.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        // Ordered, so that a bias is applied in the same order each time.
        .btree_map(".lacuna.v1.Sampling.logit_bias")
        .compile_fds(descriptors)?;
    Ok(())
}
