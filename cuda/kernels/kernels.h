// The C interface: what each kernel is given. src/tensor/fused/calls.rs has the same in Rust, and VERSION is of both.

#pragma once

#include <cstdint>

#include "block.h"

// Of numbers in a tensor.
enum Type : int32_t { F32 = 0, BF16 = 1 };

// Where a kernel runs.
struct Place {
  void* stream;
  int32_t device;
};

// x + more and its RMSNorm, rows of `width`: `sum` and `normed`. Without `more` the norm of `x` alone.
struct AddNorm {
  const void *x, *more, *weight;
  void *sum, *normed;
  int64_t rows, width;
  float eps;
  int32_t type;
};

// silu(gate) · up: `gate_up` has rows of 2 · width, `out` of width.
struct Gated {
  const void* gate_up;
  void* out;
  int64_t rows, width;
  int32_t type;
};

// Rows as codes of 8 bits and a scale for each.
struct Rounded {
  const void* x;
  void* codes;
  float* scales;
  int64_t rows, width;
  int32_t type;
  // 0: whole numbers to ±127; 1: e4m3 to ±448.
  int32_t floats;
};

// Queries and keys normed, if there are norms, and rotated; keys and values to where a cache has them.
struct Turned {
  // [rows, heads + 2 · kv_heads, dim]: queries are changed in place, and keys where they have no cache.
  void* qkv;
  // [positions, dim]
  const float *cosines, *sines;
  // [rows]
  const int64_t* positions;
  // [rows, 3]: address of a cache [layers, capacity, 2, kv_heads, dim] or 0, its capacity, and the row's slot in it.
  const int64_t* places;
  // [dim], or null.
  const void *query_norm, *key_norm;
  int64_t rows;
  int32_t heads, kv_heads, dim, layer;
  float eps;
  int32_t type;
};

// Token, confidence, and if they are asked for margin and entropy of rows of logits.
struct Statistics {
  // [rows, vocab], `stride` numbers from row to row.
  const void* logits;
  // [rows]: a token, or a number from 0 to 1 that draws one; nothing for the best.
  const double* picks;
  // [edits, 3], by rising token: token, what is added to its logit (−∞ forbids it), and 1 if no confidence is taken from it.
  const double* edits;
  // [rows, columns]
  double* table;
  int64_t rows, vocab, stride;
  int32_t edit_count;
  // 0: best; 1: given; 2: drawn.
  int32_t pick;
  // What logits are multiplied by for draws, and for confidence.
  float drawn, judged;
  int32_t margin, entropy, type;
};

namespace lacuna {

// Puts a kernel on the stream of a place; an error of CUDA's, or 0.
template <typename Kernel, typename... Arguments>
int put(Place place, Kernel kernel, dim3 grid, unsigned threads, Arguments... arguments) {
#ifdef __CUDACC__
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != place.device) error = cudaSetDevice(place.device);
  if (error != cudaSuccess) return int(error);
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(place.stream)>>>(arguments...);
  error = cudaGetLastError();
  if (before != place.device) cudaSetDevice(before);
  return int(error);
#else
  (void)place;
  on_cpu::launch(kernel, grid, threads < on_cpu::THREADS ? threads : on_cpu::THREADS, arguments...);
  return 0;
#endif
}

} // namespace lacuna

#if defined(__CUDACC__) || defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
