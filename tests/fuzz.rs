//! The fuzzers' bodies (fuzz/targets.rs) on what they have found so far, and for a few seconds on what grows out of it.

use std::path::Path;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "../fuzz/targets.rs"]
mod targets;

/// For each target.
const TIME: Duration = Duration::from_secs(2);

/// Inputs that are kept: one of each kind that is whole, small ones that the fuzzers found to be different, and those that once failed.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("fuzz/corpus").join(target);
    let files = folder.read_dir().unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> = files.map(|entry| entry.expect("an entry").path()).collect();
    // In one order, so that a failure comes again.
    paths.sort();
    if target == "gguf" {
        paths.push(root.join("tests/fixtures/gguf/spm.gguf"));
    }
    paths.iter().map(|path| std::fs::read(path).expect("a file")).collect()
}

/// One of `inputs` with a few changes.
fn mutated(inputs: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = inputs[rng.random_range(0..inputs.len())].clone();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = rng.random(),
            2 => bytes.insert(at, rng.random()),
            3 => drop(bytes.drain(at..(at + rng.random_range(0..9)).min(bytes.len()))),
            _ => {
                let other = &inputs[rng.random_range(0..inputs.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[rng.random_range(0..=other.len())..]);
            }
        }
    }
    bytes
}

/// Says which input it was.
fn run(name: &str, body: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = std::panic::catch_unwind(|| body(input)) {
        let file = std::env::temp_dir().join(format!("lacuna-fuzz-{name}"));
        let kept = std::fs::write(&file, input);
        eprintln!("{name} failed on {} bytes, kept in {} ({kept:?})", input.len(), file.display());
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn nothing_that_was_found_fails_any_more_and_nothing_near_it() {
    for (name, body) in targets::TARGETS {
        let inputs = corpus(name);
        inputs.iter().for_each(|input| run(name, body, input));
        let (mut rng, begun, mut count) = (ChaCha8Rng::seed_from_u64(7), Instant::now(), 0);
        while begun.elapsed() < TIME {
            run(name, body, &mutated(&inputs, &mut rng));
            count += 1;
        }
        println!("{name}: {} kept inputs, {count} new ones", inputs.len());
    }
}
