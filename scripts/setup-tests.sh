#!/usr/bin/env bash
# What the tests' clients need: a Python environment in .venv, Node's packages in tests/node, and Chromium. Quick and offline once it
# has run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "error: $*" >&2
    exit 1
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT

python_clients() {
    local wanted=tests/python/requirements.txt
    local stamp=.venv/requirements.txt # written last: where it equals what is wanted, the environment is complete
    if cmp --silent "$wanted" "$stamp"; then return; fi
    command -v python3 >/dev/null || die "python3 is not here: install Python 3 with pip and venv"
    echo "setting up .venv for the tests" >&2
    rm -rf .venv
    python3 -m venv .venv >"$log" 2>&1 || {
        rm -rf .venv
        die "python3 cannot make a virtual environment: install its venv module (python3-venv)"
    }
    .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --retries 2 --requirement "$wanted" >"$log" 2>&1 ||
        die "pip could not install $wanted ($(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log")): check the network and run this again"
    cp "$wanted" "$stamp"
}

node_clients() {
    local wanted=tests/node/package-lock.json
    local stamp=tests/node/node_modules/lock.json # likewise
    if cmp --silent "$wanted" "$stamp"; then return; fi
    command -v npm >/dev/null || die "npm is not here: install Node.js 20 or later"
    [[ $(node --version) =~ ^v([0-9]+) && ${BASH_REMATCH[1]} -ge 20 ]] || die "Node.js is too old: install version 20 or later"
    echo "setting up tests/node for the tests" >&2
    (cd tests/node && npm ci --no-audit --no-fund --ignore-scripts) >"$log" 2>&1 ||
        die "npm could not install $wanted ($(grep -m 1 'npm error' "$log" || tail -n 1 "$log")): check the network and run this again"
    cp "$wanted" "$stamp"
}

chromium() {
    if [[ -x ${CHROMIUM:-/usr/bin/chromium} ]]; then return; fi
    [[ -z ${CHROMIUM:-} ]] || die "CHROMIUM names $CHROMIUM, which is no program"
    local advice="install Debian's chromium, or name a Chromium in CHROMIUM"
    command -v apt-get >/dev/null || die "/usr/bin/chromium is not here: $advice"
    [[ $EUID == 0 ]] || die "/usr/bin/chromium is not here, and only root may install it: $advice"
    echo "installing chromium for the tests" >&2
    # The lists of packages may be old, or not there.
    local install=(apt-get install --yes --quiet --no-install-recommends chromium fonts-dejavu-core)
    export DEBIAN_FRONTEND=noninteractive
    "${install[@]}" >"$log" 2>&1 || { apt-get update --quiet && "${install[@]}"; } >"$log" 2>&1 ||
        die "apt-get could not install chromium ($(grep -m 1 '^E:' "$log" || tail -n 1 "$log")): check the network and run this again"
}

python_clients
node_clients
chromium
