#!/usr/bin/env bash
# A Python environment in .venv with what the tests' gRPC clients need. Quick and offline once it has run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=tests/python/requirements.txt
stamp=.venv/requirements.txt # written last: where it equals what is wanted, the environment is complete

die() {
    echo "error: $*" >&2
    exit 1
}

cmp --silent "$wanted" "$stamp" && exit 0
command -v python3 >/dev/null || die "python3 is not here: install Python 3 with pip and venv"
echo "setting up .venv for the tests" >&2
rm -rf .venv
log=$(mktemp)
trap 'rm -f "$log"' EXIT
python3 -m venv .venv >"$log" 2>&1 || {
    rm -rf .venv
    die "python3 cannot make a virtual environment: install its venv module (python3-venv)"
}
.venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --retries 2 --requirement "$wanted" >"$log" 2>&1 ||
    die "pip could not install $wanted ($(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log")): check the network and run this again"
cp "$wanted" "$stamp"
