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

}  // namespace coppice::cuda
