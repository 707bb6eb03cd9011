// What decoding wants of rows of logits, a row to a block, in one pass: the best token, the sum of all weights as the best so far makes them,
// the second best and the entropy. No copy of the logits is made in any type. Draws take a second pass, and a third over a part of the row.

#include "kernels.h"

namespace lacuna {

// 512, so that each may have as many registers as it wants.
constexpr unsigned THREADS = 512;

// The best logit that may be chosen. Of equal ones the first.
struct Best {
  float logit;
  int32_t token;
};

struct Better {
  __device__ Best operator()(const Best& a, const Best& b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token) ? a : b;
  }
};

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Weights e^(logit − best) of the logits that confidence is taken from: their sum, the sum of each times its logarithm, and the two largest.
// In f64, as the confidences 1 − 10⁻⁹ and 1 − 10⁻⁸ must differ: the best weighs 1 to the bit, whatever is rounded of the others. So scaled logits are
// rounded before anything is taken from them (__fmul_rn): a product and a difference in one would not cancel.
struct Weights {
  float best, second;
  double total, weighted;
};

__device__ inline Weights under(const Weights& w, float best) {
  if (w.best == best || w.total == 0) return {best, w.second, w.total, w.weighted};
  const float by = w.best - best;
  const double factor = expf(by);
  return {best, w.second, factor * w.total, factor * (w.weighted + w.total * by)};
}

struct Together {
  __device__ Weights operator()(const Weights& a, const Weights& b) const {
    const bool first = a.best >= b.best;
    const float best = first ? a.best : b.best, other = first ? b.best : a.best;
    const Weights x = under(a, best), y = under(b, best);
    float second = a.second > b.second ? a.second : b.second;
    if (other > second) second = other;
    return {best, second, x.total + y.total, x.weighted + y.weighted};
  }
};

// Tokens that are treated apart, sorted: most logits are outside their range, and looked up nowhere.
struct Edits {
  const double* list;
  int32_t count;
  int64_t first, last;

  __device__ Edits(const double* list, int32_t count)
      : list(list),
        count(count),
        first(count > 0 ? int64_t(list[0]) : 0),
        last(count > 0 ? int64_t(list[3 * (count - 1)]) : -1) {}

  // A token's logit, and whether confidence is taken from it.
  __device__ float of(int64_t token, float logit, bool& judged) const {
    judged = true;
    if (token < first || token > last) return logit;
    int32_t low = 0, high = count;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (int64_t(list[3 * middle]) < token) low = middle + 1;
      else high = middle;
    }
    if (low == count || int64_t(list[3 * low]) != token) return logit;
    judged = list[3 * low + 2] == 0;
    const float added = float(list[3 * low + 1]);
    return added == NOTHING ? NOTHING : logit + added;
  }
};

// Where a number from 0 to 1 falls in the cumulated weights e^((logit − best) · scale): warps sum a part of the range each, the part in which it
// falls becomes the range, until a warp could sum it alone.
template <typename T>
__device__ int32_t draw(const T* row, int64_t vocab, const Edits& edits, float best, float scale, double uniform) {
  __shared__ double of_warps[WARP];
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const auto weight = [&](int64_t token) {
    bool judged;
    return double(expf((edits.of(token, wide(row[token]), judged) - best) * scale));
  };
  int64_t from = 0, to = vocab;
  double place = -1; // Of all weights' sum, once that is known.
  do {
    const int64_t share = (to - from + warps - 1) / warps, mine = from + share * warp;
    double sum = 0;
    for (int64_t at = mine + lane; at < mine + share && at < to; at += WARP) sum += weight(at);
    sum = of_warp(sum, Add{});
    if (lane == 0) of_warps[warp] = sum;
    __syncthreads();
    if (place < 0) {
      double total = 0;
      for (unsigned w = 0; w < warps; ++w) total += of_warps[w];
      // Below the total, so that rounding cannot reach past the last token that has any weight.
      place = total * (uniform < 1.0 - 1e-12 ? uniform : 1.0 - 1e-12);
    }
    unsigned chosen = 0;
    double before = 0;
    for (unsigned w = 0; w < warps && before <= place; ++w) {
      if (of_warps[w] > 0) {
        chosen = w;
        place -= before;
        before = of_warps[w];
      }
    }
    __syncthreads();
    from += share * chosen;
    to = from + share < to ? from + share : to;
  } while (to - from > WARP);
  int64_t chosen = from;
  double before = 0;
  for (int64_t at = from; at < to && before <= place; ++at) {
    const double mine = weight(at);
    if (mine > 0) {
      chosen = at;
      place -= before;
      before = mine;
    }
  }
  return int32_t(chosen);
}

__device__ inline void weigh(Weights& w, float logit) {
  if (logit > w.best) {
    const float second = w.best;
    w = under(w, logit);
    w.second = second;
    w.total += 1;
    return;
  }
  if (logit > w.second) w.second = logit;
  const float less = logit - w.best;
  const double weight = expf(less);
  w.total += weight;
  w.weighted += weight * less;
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) statistics(Statistics a) {
  const T* row = static_cast<const T*>(a.logits) + int64_t(blockIdx.x) * a.stride;
  const Edits edits(a.edits, a.edit_count);
  Best best{NOTHING, std::numeric_limits<int32_t>::max()};
  Weights weights{NOTHING, NOTHING, 0, 0};
  float broken = 0;
  walk<T>(a.vocab, in_packs(row, a.vocab), [&](int64_t at, auto count) {
    float logits[count];
    load(row + at, logits);
    for (int i = 0; i < count; ++i) {
      bool judged;
      const float logit = edits.of(at + i, logits[i], judged);
      // What is no number or without end breaks its row.
      if (!(logit < -NOTHING)) broken = 1;
      // Of equal ones the first stays: a thread meets them in order.
      if (logit > best.logit) best = {logit, int32_t(at + i)};
      if (judged && logit > NOTHING) weigh(weights, __fmul_rn(logit, a.judged));
    }
  });
  best = of_block(best, Best{NOTHING, std::numeric_limits<int32_t>::max()}, Better{});
  weights = of_block(weights, Weights{NOTHING, NOTHING, 0, 0}, Together{});
  broken = of_block(broken, 0.0f, Larger{});
  const bool none = broken != 0 || best.logit == NOTHING;
  int64_t token = none ? 0 : best.token;
  if (a.pick == 1) token = int64_t(a.picks[blockIdx.x]);
  if (a.pick == 2 && !none) token = draw(row, a.vocab, edits, best.logit, a.drawn, a.picks[blockIdx.x]);
  if (threadIdx.x != 0) return;
  double* out = a.table + int64_t(blockIdx.x) * (2 + (a.margin != 0) + (a.entropy != 0));
  double share = std::numeric_limits<double>::quiet_NaN();
  if (!none && token >= 0 && token < a.vocab) {
    bool judged;
    const float logit = edits.of(token, wide(row[token]), judged);
    share = (judged ? double(expf(__fmul_rn(logit, a.judged) - weights.best)) : 0.0) / weights.total;
  }
  *out++ = double(token);
  *out++ = share;
  if (a.margin) *out++ = (1.0 - expf(weights.second - weights.best)) / weights.total;
  if (a.entropy) *out++ = log(weights.total) - weights.weighted / weights.total;
}

} // namespace lacuna

EXPORT int lacuna_statistics(Place place, const Statistics* a) {
  using namespace lacuna;
  const dim3 grid{unsigned(a->rows), 1, 1};
  if (a->type == BF16) return put(place, statistics<Bf16>, grid, THREADS, *a);
  return put(place, statistics<float>, grid, THREADS, *a);
}
