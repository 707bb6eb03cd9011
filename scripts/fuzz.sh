#!/usr/bin/env bash
# Builds the fuzzers and runs each for FUZZ_SECONDS (60), or only those named. What makes one fail lies in fuzz/artifacts; it belongs in
# fuzz/corpus, which every test run goes through, once it is mended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../fuzz"

targets=("${@:-request safetensors gguf detokenize stops}")
read -ra targets <<<"${targets[*]}"
libtorch=${LIBTORCH:-$(cd .. && pwd)/.libtorch/site/torch}
export LIBTORCH=$libtorch LD_LIBRARY_PATH=$libtorch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} OMP_NUM_THREADS=1
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-../target/fuzz} RUSTC_WRAPPER=$PWD/rustc.sh
cargo build --release --locked

for target in "${targets[@]}"; do
    mkdir -p "artifacts/$target" "$CARGO_TARGET_DIR/corpus/$target"
    echo "== $target"
    seeds=(corpus/"$target")
    [ "$target" = gguf ] && seeds+=(../tests/fixtures/gguf)
    # New inputs are kept beside the build; `make fuzz` leaves the working tree as it was.
    "$CARGO_TARGET_DIR/release/fuzz_$target" "$CARGO_TARGET_DIR/corpus/$target" "${seeds[@]}" -artifact_prefix="artifacts/$target/" \
        -max_total_time="${FUZZ_SECONDS:-60}" -timeout=20 -rss_limit_mb=4096 -max_len=100000 -print_final_stats=1 2>&1 |
        grep -E "^(==|ERROR|thread|SUMMARY|stat::|#.*(DONE|INITED)|artifact)|panicked" -A1
done
