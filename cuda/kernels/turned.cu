// Queries and keys on their way to attention: RMSNorm of each head where the family has it, rotation, and keys and values written to where
// their sequence's cache has them, whichever sequence a row is of. A warp to a head. libtorch takes three to six kernels for these and one more for
// each sequence.

#include "kernels.h"

namespace lacuna {

constexpr unsigned HEADS_AT_ONCE = 4;
// Pairs of a head that one thread holds: heads have up to 256 numbers.
constexpr int PAIRS = 4;

template <typename T>
__global__ void __launch_bounds__(HEADS_AT_ONCE * WARP) turned(Turned a) {
  const int lane = int(threadIdx.x % WARP), half = a.dim / 2;
  const int64_t row = blockIdx.x;
  const int head = int(blockIdx.y * HEADS_AT_ONCE + threadIdx.x / WARP);
  if (head >= a.heads + 2 * a.kv_heads) return;
  T* mine = static_cast<T*>(a.qkv) + (row * (a.heads + 2 * a.kv_heads) + head) * a.dim;
  // Of the first and the second half: rotation turns pairs of these.
  float left[PAIRS] = {}, right[PAIRS] = {};
  // This thread's: as many turns for all heads, so that what it holds is in registers.
  const auto pairs = [&](auto work) {
    for (int k = 0; k < PAIRS; ++k) {
      const int i = lane + k * int(WARP);
      if (i < half) work(k, i);
    }
  };
  pairs([&](int k, int i) {
    left[k] = wide(mine[i]);
    right[k] = wide(mine[i + half]);
  });
  const bool value = head >= a.heads + a.kv_heads, query = head < a.heads;
  if (!value) {
    const T* norm = static_cast<const T*>(query ? a.query_norm : a.key_norm);
    if (norm) {
      float squares = 0;
      for (int k = 0; k < PAIRS; ++k) squares += left[k] * left[k] + right[k] * right[k];
      const float scale = 1.0f / sqrtf(of_warp(squares, Add{}) / float(a.dim) + a.eps);
      pairs([&](int k, int i) {
        // As a norm of its own would store them.
        left[k] = wide(narrow<T>(left[k] * scale * wide(norm[i])));
        right[k] = wide(narrow<T>(right[k] * scale * wide(norm[i + half])));
      });
    }
    const float *cosines = a.cosines + a.positions[row] * a.dim, *sines = a.sines + a.positions[row] * a.dim;
    pairs([&](int k, int i) {
      const float x = left[k], y = right[k];
      left[k] = x * cosines[i] - y * sines[i];
      right[k] = y * cosines[i + half] + x * sines[i + half];
    });
  }
  const int64_t *place = a.places + 3 * row, address = place[0], capacity = place[1], slot = place[2];
  T* into = mine;
  if (!query && address != 0) {
    const int64_t which = value ? 1 : 0, of_kind = head - a.heads - which * a.kv_heads;
    const int64_t before = ((a.layer * capacity + slot) * 2 + which) * a.kv_heads + of_kind;
    into = reinterpret_cast<T*>(address) + before * a.dim;
  } else if (value) {
    return;
  }
  pairs([&](int k, int i) {
    into[i] = narrow<T>(left[k]);
    into[i + half] = narrow<T>(right[k]);
  });
}

} // namespace lacuna

EXPORT int lacuna_turned(Place place, const Turned* a) {
  using namespace lacuna;
  const unsigned heads = unsigned(a->heads + 2 * a->kv_heads);
  const dim3 grid{unsigned(a->rows), (heads + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE, 1};
  if (a->type == BF16) return put(place, turned<Bf16>, grid, HEADS_AT_ONCE * WARP, *a);
  return put(place, turned<float>, grid, HEADS_AT_ONCE * WARP, *a);
}
