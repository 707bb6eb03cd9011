#!/usr/bin/env bash
# Builds cuda/graphs.cpp into liblacuna_graphs.so beside the binary. Needs no GPU and no CUDA toolkit: the headers that libtorch's own
# headers include come from two packages. Quick once it has run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cudart=13.0.96 # as scripts/setup-libtorch.sh
crt=13.0.88    # crt/host_defines.h, which the runtime's headers include
libtorch=${LIBTORCH:-$PWD/.libtorch/site/torch}
headers=.libtorch/cuda
out=${1:-target/release/liblacuna_graphs.so}

die() {
    echo "error: $*" >&2
    exit 1
}

[ -e "$libtorch/include/ATen/cuda/CUDAGraph.h" ] || die "there are no headers of libtorch in $libtorch: run scripts/setup-libtorch.sh"
if [ -e "$out" ] && [ "$out" -nt cuda/graphs.cpp ] && [ "$out" -nt "$libtorch/include/ATen/cuda/CUDAGraph.h" ]; then
    exit 0
fi
if [ -n "${CUDA_HOME:-}" ]; then
    include=$CUDA_HOME/include
else
    include=$headers/nvidia/cu13/include
    if [ ! -e "$include/cuda_runtime_api.h" ] || [ ! -e "$include/crt/host_defines.h" ]; then
        echo "installing the CUDA runtime's headers into $headers (4 MB from the package registry)" >&2
        rm -rf "$headers" "$headers.partial"
        PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip install --quiet --no-input --disable-pip-version-check --retries 2 \
            --only-binary :all: --no-deps --no-compile --target "$headers.partial" \
            "nvidia-cuda-runtime==$cudart" "nvidia-cuda-crt==$crt" || die "pip could not install them: name a CUDA 13 toolkit in CUDA_HOME"
        mv "$headers.partial" "$headers"
    fi
fi
[ -e "$include/cuda_runtime_api.h" ] || die "there is no cuda_runtime_api.h in $include: name a CUDA 13 toolkit in CUDA_HOME"
mkdir -p "$(dirname "$out")"
# Libraries are left out on purpose: whoever opens it has opened libtorch's CUDA half before.
"${CXX:-c++}" -std=c++20 -O2 -fPIC -shared -Wall -Wextra -Wno-unused-parameter -fvisibility=default \
    -isystem "$libtorch/include" -isystem "$libtorch/include/torch/csrc/api/include" -isystem "$include" \
    cuda/graphs.cpp -o "$out.partial"
mv "$out.partial" "$out"
echo "built $out" >&2
