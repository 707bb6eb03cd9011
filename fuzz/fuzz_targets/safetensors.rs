#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code, reason = "each fuzzer calls one")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::safetensors(data));
