// Online softmax over a tile of scores in wgmma accumulators (Milakov & Gimelshein 2018).
#pragma once

#include "kernels/cuda/attention/hopper.cuh"

namespace coppice::cuda {

// The base of the exponentials may lag the row maximum by this much (log2 units): probabilities
// stay under 2^8, and most tiles need no rescaling of O.
inline constexpr float kMaximumSlack = 8.f;

// Scores to probabilities: m is the base of the exponentials in raw scores, l this thread's share
// of the running row sum, shrink the factor that moves older sums to a new base. A row that saw no
// key yet keeps m = -inf, l = 0.
template <int kCount>
__device__ __forceinline__ void OnlineSoftmax(float (&s)[kCount], float (&m)[2], float (&l)[2],
                                              float (&shrink)[2], float scale_log2) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = m[h];
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j)
      top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    if ((top - m[h]) * scale_log2 <= kMaximumSlack) top = m[h];
    const float base = top == -INFINITY ? 0.f : top * scale_log2;
    shrink[h] = Exp2(m[h] * scale_log2 - base);
    m[h] = top;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * h + e];
        x = Exp2(x * scale_log2 - base);
        sum += x;
      }
    }
    l[h] = l[h] * shrink[h] + sum;
  }
}

// The same with a base that is looked after when its exponentials have grown, not before: the
// maxima of most tiles are never asked for. `base` in log2 units, `sum` this thread's share of the
// running row sums.
struct LateSoftmax {
  float base[2] = {0.f, 0.f}, sum[2] = {0.f, 0.f};

  // What the exponentials that a lane has of a tile and row may add up to. Bounds each of them,
  // too.
  static constexpr float kMostSum = 256.f;

  // Scores to probabilities as an A operand. `rescale` moves older sums to a new base: called with
  // the factor of either row. The first tile sets the base.
  template <typename E, int kCount, typename Rescale>
  __device__ __forceinline__ void Add(const float (&s)[kCount],
                                      uint32_t (&probabilities)[kCount / 2], float scale_log2,
                                      bool is_first, const Rescale& rescale) {
    float added[2];
    Exponentials<E>(s, probabilities, scale_log2, added);
    if (is_first || __any_sync(~0u, fmaxf(added[0], added[1]) > kMostSum)) {
      float shrink[2];
      MoveBase(s, scale_log2, is_first, shrink);
      rescale(shrink);
      Exponentials<E>(s, probabilities, scale_log2, added);
    }
    sum[0] += added[0], sum[1] += added[1];
  }

 private:
  template <typename E, int kCount>
  __device__ __forceinline__ void Exponentials(const float (&s)[kCount],
                                               uint32_t (&probabilities)[kCount / 2],
                                               float scale_log2, float (&added)[2]) const {
    float even[2] = {0.f, 0.f}, odd[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int h = i % 2;
      const float x = Exp2(__fmaf_rn(s[2 * i], scale_log2, -base[h]));
      const float y = Exp2(__fmaf_rn(s[2 * i + 1], scale_log2, -base[h]));
      even[h] += x, odd[h] += y;
      probabilities[i] = PackPair<E>(x, y);
    }
    added[0] = even[0] + odd[0], added[1] = even[1] + odd[1];
  }

  // To the greatest score so far.
  template <int kCount>
  __device__ __forceinline__ void MoveBase(const float (&s)[kCount], float scale_log2,
                                           bool is_first, float (&shrink)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s[2 * h];
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j)
        top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale_log2;
      shrink[h] = 0.f;
      if (!is_first) {
        top = fmaxf(top, base[h]);
        shrink[h] = Exp2(base[h] - top);
      }
      base[h] = top, sum[h] *= shrink[h];
    }
  }
};

}  // namespace coppice::cuda
