#!/usr/bin/env bash
# Makes a machine ready to build: checks the tools, puts libtorch where the build looks for it, and fetches the crates.
# Quick and offline once it has run. A libtorch that LIBTORCH names is checked and used instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=2.11.0 # what tch 0.24 binds
cudart=13.0.96
cupti=13.0.85 # libtorch_cpu.so links these two even where there is no GPU
site=.libtorch/site # .cargo/config.toml names it

die() {
    echo "error: $*" >&2
    exit 1
}

command -v cargo >/dev/null || die "cargo is not here: install Rust 1.90 or newer (rustup does it)"
command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler (${CXX:-c++}): install g++ or clang, or name one in CXX"

# The version that a libtorch says it has: a PyTorch wheel keeps it in version.py, the plain archive in build-version.
version() {
    if [ -f "$1/build-version" ]; then
        head -n 1 "$1/build-version"
    elif [ -f "$1/version.py" ]; then
        sed -n "s/^__version__ = '\(.*\)'.*/\1/p" "$1/version.py"
    fi
}

check() {
    local found
    [ -e "$1/lib/libtorch_cpu.so" ] || die "there is no libtorch in $1: it lacks lib/libtorch_cpu.so; $2"
    found=$(version "$1")
    case $found in
    2.11 | 2.11.*) ;;
    *) die "the libtorch in $1 is ${found:-of unknown version}, not 2.11: $2" ;;
    esac
}

# pip writes these folders, and the site appears only when all of it is there, so they are stamp enough.
complete() {
    [ -d "$site/torch-$torch.dist-info" ] && [ -d "$site/nvidia_cuda_runtime-$cudart.dist-info" ] &&
        [ -d "$site/nvidia_cuda_cupti-$cupti.dist-info" ]
}

install() {
    [ "$(uname -sm)" = "Linux x86_64" ] || die "libtorch is installed on Linux x86-64 only: name a libtorch 2.11 in LIBTORCH"
    command -v python3 >/dev/null || die "python3 is not here: install Python 3 with pip, or name a libtorch 2.11 in LIBTORCH"
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip: install it (python3-pip), or name a libtorch 2.11 in LIBTORCH"
    echo "installing libtorch $torch into $site (550 MB from the package registry)" >&2
    mkdir -p .libtorch
    rm -rf .libtorch/partial
    # Without dependencies: those of the GPU would be another 4 GB. PIP_USER from a configuration does not go with --target.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip install --quiet --no-input --disable-pip-version-check --retries 2 \
        --only-binary :all: --no-deps --no-compile --target .libtorch/partial \
        "torch==$torch" "nvidia-cuda-runtime==$cudart" "nvidia-cuda-cupti==$cupti" >.libtorch/pip.log 2>&1 ||
        die "pip could not install torch $torch (.libtorch/pip.log says why): check the network and Python (3.10 to 3.14), or name a libtorch 2.11 in LIBTORCH"
    rm -rf "$site"
    mv .libtorch/partial "$site"
}

if [ -n "${LIBTORCH:-}" ]; then
    # Build scripts run elsewhere: there, a relative path would name something else.
    [ "${LIBTORCH:0:1}" = / ] || die "LIBTORCH=$LIBTORCH is not an absolute path: write it in full"
    check "$LIBTORCH" "name a libtorch 2.11 in LIBTORCH, or unset it to have one installed"
else
    complete || install
    check "$site/torch" "remove .libtorch and run this again"
fi

# For this machine's target alone; with everything at hand it does not touch the network.
host=$(rustc -vV | sed -n 's/^host: //p')
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo fetch --quiet --locked --target "$host" 2>"$log" ||
    die "could not fetch the crates that Cargo.lock lists ($(sed -n 's/^error: //p' "$log" | head -n 1)): check the network and run this again"
