// What the kernels of this folder are made of: types, walks over a row, and what a block of threads does together.
//
// Every kernel is compiled twice: by nvcc for GPUs, and by any C++ compiler for the CPU (on_cpu.h), where its threads run one after the other, so
// that the tests hold the very code that a GPU runs to libtorch's results on a machine without one. So a kernel uses nothing of CUDA
// but what on_cpu.h has too. Floats of 16 bits are their bits here: widening is a shift, and only results are rounded.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "on_cpu.h"
#endif

namespace lacuna {

constexpr unsigned WARP = 32;

struct Bf16 {
  uint16_t bits;
};

__device__ inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(Bf16 x) { return from_bits(uint32_t(x.bits) << 16); }

template <typename T>
__device__ T narrow(float x);

template <>
__device__ inline float narrow<float>(float x) {
  return x;
}

// To the nearest, of two as near to the even one.
template <>
__device__ inline Bf16 narrow<Bf16>(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Sixteen bytes, which a thread reads or writes at once.
template <typename T>
struct alignas(16) Pack {
  static constexpr int COUNT = 16 / sizeof(T);
  T values[COUNT];
};

// Whether rows of `width` numbers that begin here can be walked in packs.
template <typename T>
__device__ bool in_packs(const T* rows, int64_t width) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && width % Pack<T>::COUNT == 0;
}

// The part of a row that is this thread's: `work(place, count)` for stretches of one number or of a pack, in rising order.
template <typename T, typename Work>
__device__ void walk(int64_t width, bool packs, Work work) {
  constexpr int COUNT = Pack<T>::COUNT;
  if (packs) {
    for (int64_t at = int64_t(threadIdx.x) * COUNT; at < width; at += int64_t(blockDim.x) * COUNT)
      work(at, std::integral_constant<int, COUNT>{});
  } else {
    for (int64_t at = threadIdx.x; at < width; at += blockDim.x) work(at, std::integral_constant<int, 1>{});
  }
}

template <int COUNT, typename T>
__device__ void load(const T* from, float (&into)[COUNT]) {
  if constexpr (COUNT == 1) {
    into[0] = wide(*from);
  } else {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
    for (int i = 0; i < COUNT; ++i) into[i] = wide(pack.values[i]);
  }
}

template <int COUNT, typename T>
__device__ void store(T* into, const float (&from)[COUNT]) {
  if constexpr (COUNT == 1) {
    *into = narrow<T>(from[0]);
  } else {
    Pack<T> pack;
    for (int i = 0; i < COUNT; ++i) pack.values[i] = narrow<T>(from[i]);
    *reinterpret_cast<Pack<T>*>(into) = pack;
  }
}

// What the thread whose number in the warp differs in these bits holds. All of a warp's threads ask at once.
template <typename V>
__device__ V exchange(const V& value, unsigned bits) {
  static_assert(sizeof(V) % 4 == 0);
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, int(bits));
  V other;
  memcpy(&other, words, sizeof other);
  return other;
}

// All values of a warp's threads in one, for each of them. `merge` must not care which of two comes first.
template <typename V, typename Merge>
__device__ V of_warp(V value, Merge merge) {
  for (unsigned bits = WARP / 2; bits > 0; bits /= 2) value = merge(value, exchange(value, bits));
  return value;
}

// All values of a block's threads in one, for each of them; `none` changes nothing that it is merged with. Blocks are whole warps.
template <typename V, typename Merge>
__device__ V of_block(V value, V none, Merge merge) {
  __shared__ V of_warps[WARP];
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  value = of_warp(value, merge);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  value = of_warp(lane < blockDim.x / WARP ? of_warps[lane] : none, merge);
  __syncthreads(); // Before it is written to again.
  return value;
}

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// The larger; what is no number is larger than all.
struct Larger {
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Threads of a block that walks rows of `width` numbers: a pack for each, whole warps.
template <typename T>
inline unsigned threads_for(int64_t width, unsigned most) {
  const int64_t packs = (width + Pack<T>::COUNT - 1) / Pack<T>::COUNT;
  const int64_t warps = (packs + WARP - 1) / WARP;
  return warps * WARP < int64_t(most) ? unsigned(warps) * WARP : most;
}

} // namespace lacuna
