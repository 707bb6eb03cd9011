#!/usr/bin/env bash
# What cargo calls for rustc: instruments for libFuzzer what is fuzzed, and leaves the rest as the build has it. These are the flags of
# cargo-fuzz, which needs neither a sanitizer nor a nightly compiler; memory is safe but for libtorch, which no sanitizer was built into.
rustc=$1
shift
case " $* " in
*" --crate-name lacuna "* | *" --crate-name fuzz_"* | *" --crate-name safetensors "*)
    exec "$rustc" "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
*) exec "$rustc" "$@" ;;
esac
