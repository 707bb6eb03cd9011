#!/usr/bin/env bash
# Starts a server on a port of its own, lets a client fill a canvas before your eyes, and stops the server.
# Usage: demo.sh MODEL [ADDRESS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=$1
address=${2:-127.0.0.1:50061}
prompt=$'# Loop over xs and return the sorted list of the numbers in xs that are greater than 17, each multiplied by 3.\ndef solve(xs):\n'

log=$(mktemp)
target/release/lacuna serve --model "$model" --address "$address" --http none 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT

# A minute is plenty for the models that ship, and a server that cannot start ends the wait at once.
for _ in $(seq 600); do
    # Asked first: where the port is taken, somebody else would answer.
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    grep -q listening "$log" && (: >"/dev/tcp/${address%:*}/${address##*:}") 2>/dev/null && break
    sleep 0.1
done

# First a few cells a step, to watch; then as many at a time as the model is sure of.
for rule in "--steps 12" "--threshold 0.9"; do
    echo "== $rule"
    # shellcheck disable=SC2086 # a flag and its value
    target/release/lacuna generate --server "$address" --show --delay "${DELAY:-250}" $rule "$prompt"
done
