// What lies between a layer's products, a row to a block: the sum with the residual stream and its norm, the gated unit, and codes of 8 bits for
// products that want them. libtorch takes two, two and eight kernels for these, and a row is read once for each.

#include "kernels.h"

namespace lacuna {

constexpr unsigned THREADS = 512;

template <typename T>
__global__ void __launch_bounds__(THREADS) add_norm(AddNorm a) {
  const int64_t row = int64_t(blockIdx.x) * a.width;
  const T *x = static_cast<const T*>(a.x) + row, *more = a.more ? static_cast<const T*>(a.more) + row : nullptr;
  const T* weight = static_cast<const T*>(a.weight);
  T *sum = a.more ? static_cast<T*>(a.sum) + row : nullptr, *normed = static_cast<T*>(a.normed) + row;
  const bool packs = in_packs(x, a.width) && in_packs(weight, a.width) && in_packs(normed, a.width) &&
                     (!more || (in_packs(more, a.width) && in_packs(sum, a.width)));
  float squares = 0;
  walk<T>(a.width, packs, [&](int64_t at, auto count) {
    float mine[count], other[count];
    load(x + at, mine);
    if (more) {
      load(more + at, other);
      // As it is stored: the norm is that of what the next layer is given.
      for (int i = 0; i < count; ++i) mine[i] = wide(narrow<T>(mine[i] + other[i]));
      store(sum + at, mine);
    }
    for (int i = 0; i < count; ++i) squares += mine[i] * mine[i];
  });
  squares = of_block(squares, 0.0f, Add{});
  const float scale = 1.0f / sqrtf(squares / float(a.width) + a.eps);
  const T* stream = more ? sum : x;
  // Each thread reads what it wrote itself.
  walk<T>(a.width, packs, [&](int64_t at, auto count) {
    float mine[count], by[count];
    load(stream + at, mine);
    load(weight + at, by);
    for (int i = 0; i < count; ++i) mine[i] *= scale * by[i];
    store(normed + at, mine);
  });
}

template <typename T>
__global__ void __launch_bounds__(THREADS) gated(Gated a) {
  const T *gate = static_cast<const T*>(a.gate_up) + int64_t(blockIdx.x) * 2 * a.width, *up = gate + a.width;
  T* out = static_cast<T*>(a.out) + int64_t(blockIdx.x) * a.width;
  const bool packs = in_packs(gate, a.width) && in_packs(out, a.width);
  // Several blocks share a row: it is four times as wide as the others.
  const int64_t all = (a.width + Pack<T>::COUNT - 1) / Pack<T>::COUNT;
  const int64_t share = (all + gridDim.y - 1) / gridDim.y * Pack<T>::COUNT, first = share * blockIdx.y;
  const int64_t width = first + share < a.width ? share : a.width - first;
  walk<T>(width, packs, [&](int64_t at, auto count) {
    float x[count], by[count];
    load(gate + first + at, x);
    load(up + first + at, by);
    for (int i = 0; i < count; ++i) x[i] = x[i] / (1.0f + expf(-x[i])) * by[i];
    store(out + first + at, x);
  });
}

// The nearest e4m3 number, of two as near the even one, of one within ±448: 4 bits of exponent less 7, 3 of mantissa, no infinity.
__device__ inline uint8_t e4m3(float x) {
  const uint32_t bits = to_bits(x);
  const uint8_t sign = uint8_t(bits >> 24 & 0x80);
  if (x != x) return sign | 0x7f;
  const float size = from_bits(bits & 0x7fffffff);
  // Below 2^-6 numbers are multiples of 2^-9.
  if (size < 0.015625f) return sign | uint8_t(rintf(size * 512.0f));
  const uint32_t rounded = (bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1);
  return sign | uint8_t((rounded >> 20) - (120 << 3));
}

// So many codes, which a thread writes at once.
template <int COUNT>
struct alignas(COUNT) Codes {
  uint8_t values[COUNT];
};

template <typename T>
__global__ void __launch_bounds__(THREADS) rounded(Rounded a) {
  const T* x = static_cast<const T*>(a.x) + int64_t(blockIdx.x) * a.width;
  uint8_t* codes = static_cast<uint8_t*>(a.codes) + int64_t(blockIdx.x) * a.width;
  const bool packs = in_packs(x, a.width) && reinterpret_cast<uintptr_t>(codes) % Pack<T>::COUNT == 0;
  float largest = 0;
  walk<T>(a.width, packs, [&](int64_t at, auto count) {
    float mine[count];
    load(x + at, mine);
    for (int i = 0; i < count; ++i) largest = Larger{}(fabsf(mine[i]), largest);
  });
  largest = of_block(largest, 0.0f, Larger{});
  const float bound = a.floats ? 448.0f : 127.0f, least = std::numeric_limits<float>::min();
  const float scale = Larger{}(largest / bound, least);
  if (threadIdx.x == 0) a.scales[blockIdx.x] = scale;
  walk<T>(a.width, packs, [&](int64_t at, auto count) {
    float mine[count];
    load(x + at, mine);
    Codes<count> made;
    for (int i = 0; i < count; ++i) {
      const float at_most = mine[i] / scale, share = at_most > bound ? bound : at_most < -bound ? -bound : at_most;
      made.values[i] = a.floats ? e4m3(share) : uint8_t(int8_t(rintf(share)));
    }
    *reinterpret_cast<Codes<count>*>(codes + at) = made;
  });
}

} // namespace lacuna

EXPORT int lacuna_kernels_version() { return 1; }

// Whether they run on a GPU.
EXPORT int lacuna_kernels_cuda() {
#ifdef __CUDACC__
  return 1;
#else
  return 0;
#endif
}

EXPORT int lacuna_add_norm(Place place, const AddNorm* a) {
  using namespace lacuna;
  const dim3 grid{unsigned(a->rows), 1, 1};
  if (a->type == BF16) return put(place, add_norm<Bf16>, grid, threads_for<Bf16>(a->width, THREADS), *a);
  return put(place, add_norm<float>, grid, threads_for<float>(a->width, THREADS), *a);
}

EXPORT int lacuna_gated(Place place, const Gated* a) {
  using namespace lacuna;
  const dim3 grid{unsigned(a->rows), 4, 1};
  if (a->type == BF16) return put(place, gated<Bf16>, grid, threads_for<Bf16>(a->width / 4 + 1, THREADS), *a);
  return put(place, gated<float>, grid, threads_for<float>(a->width / 4 + 1, THREADS), *a);
}

EXPORT int lacuna_rounded(Place place, const Rounded* a) {
  using namespace lacuna;
  const dim3 grid{unsigned(a->rows), 1, 1};
  if (a->type == BF16) return put(place, rounded<Bf16>, grid, threads_for<Bf16>(a->width, THREADS), *a);
  return put(place, rounded<float>, grid, threads_for<float>(a->width, THREADS), *a);
}
