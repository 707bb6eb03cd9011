#!/usr/bin/env bash
# Builds what is opened beside the binary on a machine with a GPU: liblacuna_graphs.so of cuda/graphs.cpp, and liblacuna_kernels.so of
# cuda/kernels. Needs no GPU and no CUDA toolkit: headers and nvcc come from packages, unless CUDA_HOME names a toolkit. Quick once it has run.
#
#   build-cuda.sh [graphs|kernels] [OUT]    one of them, or both
#   build-cuda.sh kernels-on-cpu OUT        the kernels for the CPU, which the tests use
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cudart=13.0.96 # as scripts/setup-libtorch.sh
tools=13.0.88  # nvcc, its code generator, and crt/host_defines.h, which the runtime's headers include
# GPUs that code is generated for; later ones translate that of the last when it is loaded.
architectures=(80 90)
libtorch=${LIBTORCH:-$PWD/.libtorch/site/torch}
headers=$PWD/.libtorch/cuda compiler=$PWD/.libtorch/nvcc

die() {
    echo "error: $*" >&2
    exit 1
}

# Whether $1 is there and newer than all the others.
fresh() {
    local out=$1 source
    shift
    [ -e "$out" ] || return 1
    for source in "$@"; do [ "$out" -nt "$source" ] || return 1; done
}

# Installs packages into $1, all at once, what they weigh being $2.
install() {
    local into=$1 weight=$2
    shift 2
    echo "installing $* into ${into#"$PWD/"} ($weight from the package registry)" >&2
    rm -rf "$into" "$into.partial"
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip install --quiet --no-input --disable-pip-version-check --retries 2 \
        --only-binary :all: --no-deps --no-compile --target "$into.partial" "$@" ||
        die "pip could not install them: name a CUDA 13 toolkit in CUDA_HOME"
    mv "$into.partial" "$into"
}

graphs() {
    local out=$1 include
    [ -e "$libtorch/include/ATen/cuda/CUDAGraph.h" ] || die "there are no headers of libtorch in $libtorch: run scripts/setup-libtorch.sh"
    fresh "$out" scripts/build-cuda.sh cuda/graphs.cpp "$libtorch/include/ATen/cuda/CUDAGraph.h" && return
    include=${CUDA_HOME:-$headers/nvidia/cu13}/include
    [ -n "${CUDA_HOME:-}" ] || [ -e "$include/crt/host_defines.h" ] ||
        install "$headers" "4 MB" "nvidia-cuda-runtime==$cudart" "nvidia-cuda-crt==$tools"
    [ -e "$include/cuda_runtime_api.h" ] || die "there is no cuda_runtime_api.h in $include: name a CUDA 13 toolkit in CUDA_HOME"
    mkdir -p "$(dirname "$out")"
    # Libraries are left out on purpose: whoever opens it has opened libtorch's CUDA half before.
    "${CXX:-c++}" -std=c++20 -O2 -fPIC -shared -Wall -Wextra -Wno-unused-parameter -fvisibility=default \
        -isystem "$libtorch/include" -isystem "$libtorch/include/torch/csrc/api/include" -isystem "$include" \
        cuda/graphs.cpp -o "$out.partial"
    mv "$out.partial" "$out"
    echo "built $out" >&2
}

kernels() {
    local out=$1 toolkit=${CUDA_HOME:-$compiler/nvidia/cu13} code=() architecture
    fresh "$out" scripts/build-cuda.sh cuda/kernels/* && return
    [ -n "${CUDA_HOME:-}" ] || [ -x "$toolkit/bin/nvcc" ] ||
        install "$compiler" "90 MB" "nvidia-cuda-nvcc==$tools" "nvidia-nvvm==$tools" "nvidia-cuda-crt==$tools" "nvidia-cuda-runtime==$cudart"
    [ -x "$toolkit/bin/nvcc" ] || die "there is no nvcc in $toolkit/bin: name a CUDA 13 toolkit in CUDA_HOME"
    for architecture in "${architectures[@]}"; do code+=(-gencode "arch=compute_$architecture,code=sm_$architecture"); done
    mkdir -p "$(dirname "$out")"
    # The runtime is left out likewise. Lambdas that kernels walk rows with have integral_constant's conversions to numbers in them.
    "$toolkit/bin/nvcc" -std=c++17 -O3 --expt-relaxed-constexpr -shared -Xcompiler -fPIC,-fvisibility=hidden --cudart none \
        "${code[@]}" -gencode "arch=compute_$architecture,code=compute_$architecture" cuda/kernels/*.cu -o "$out.partial"
    mv "$out.partial" "$out"
    echo "built $out" >&2
}

kernels_on_cpu() {
    # Without the fusing of products and sums, and with every warning: this is the sources' other reader.
    "${CXX:-c++}" -x c++ -std=c++17 -O2 -fPIC -shared -Wall -Wextra -Werror -fvisibility=hidden cuda/kernels/*.cu -o "$1.partial"
    mv "$1.partial" "$1"
}

case "${1:-both}" in
both)
    graphs target/release/liblacuna_graphs.so
    kernels target/release/liblacuna_kernels.so
    ;;
graphs) graphs "${2:-target/release/liblacuna_graphs.so}" ;;
kernels) kernels "${2:-target/release/liblacuna_kernels.so}" ;;
kernels-on-cpu) kernels_on_cpu "${2:?the library to write}" ;;
*) die "unknown part '$1': use graphs, kernels or kernels-on-cpu" ;;
esac
