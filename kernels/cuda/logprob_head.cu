// Softmax over the vocabulary for a chunk of rows whose logits (f32, before the temperature) a GEMM
// has left in memory. One block per row. With z = logits * scale:
//   lse = log sum exp z, entropy = lse - sum p z, logprob[t] = z[target t] - lse      (one online
//   pass; 4 bytes an element) dL/dlogit_j = scale (sum_t c_t (1[j = target t] - p_j) - e p_j (log
//   p_j + entropy))   (4 bytes in, 2 out)
// Both bound by memory bandwidth, or by L2 where the chunk stays there.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 512;

// sum = sum exp(z - max), weighted = sum exp(z - max) (z - max).
struct Stats {
  float max = -INFINITY, sum = 0, weighted = 0;

  // The reference point moves once for all of them, which seldom happens.
  template <int N>
  __device__ void Add(const float (&z)[N]) {
    float top = z[0];
    for (int j = 1; j < N; ++j) top = fmaxf(top, z[j]);
    if (top > max) Rescale(top);
    for (int j = 0; j < N; ++j) {
      const float shifted = z[j] - max, e = __expf(shifted);
      sum += e;
      weighted += e > 0.0f ? e * shifted : 0.0f;
    }
  }
  // Moves the reference point to `to` >= max.
  __device__ void Rescale(float to) {
    if (sum > 0.0f) {
      const float shift = max - to, factor = __expf(shift);
      weighted = factor > 0.0f ? factor * (weighted + sum * shift) : 0.0f;
      sum *= factor;
    }
    max = to;
  }
  __device__ void Merge(Stats other) {
    const float top = fmaxf(max, other.max);
    Rescale(top);
    other.Rescale(top);
    sum += other.sum;
    weighted += other.weighted;
  }
};

__device__ inline Stats WarpMerge(Stats s) {
  for (int d = 16; d > 0; d /= 2) {
    Stats other;
    other.max = __shfl_down_sync(~0u, s.max, d);
    other.sum = __shfl_down_sync(~0u, s.sum, d);
    other.weighted = __shfl_down_sync(~0u, s.weighted, d);
    s.Merge(other);
  }
  return s;
}

// Statistics of the block, for every thread.
__device__ inline Stats BlockMerge(Stats s) {
  __shared__ float shared[3][kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  s = WarpMerge(s);
  if (lane == 0) {
    shared[0][warp] = s.max;
    shared[1][warp] = s.sum;
    shared[2][warp] = s.weighted;
  }
  __syncthreads();
  Stats all;
  for (int w = 0; w < kThreads / 32; ++w) {
    Stats other;
    other.max = shared[0][w];
    other.sum = shared[1][w];
    other.weighted = shared[2][w];
    all.Merge(other);
  }
  return all;
}

__global__ void HeadStatsKernel(HeadChunk chunk, float* logprobs, float* entropy, float* lse) {
  const int64_t row = blockIdx.x;
  const float* logits = chunk.logits + row * chunk.ld;
  Stats stats;
  const int64_t whole = chunk.vocab / 8 * 8;
  for (int64_t i = threadIdx.x * 8; i < whole; i += kThreads * 8) {
    const Pack<float, 4> low = Load<float, 4>(logits + i), high = Load<float, 4>(logits + i + 4);
    float z[8];
    for (int j = 0; j < 4; ++j) {
      z[j] = low.v[j] * chunk.scale;
      z[j + 4] = high.v[j] * chunk.scale;
    }
    stats.Add(z);
  }
  if (whole + threadIdx.x < chunk.vocab) {
    const float z[1] = {logits[whole + threadIdx.x] * chunk.scale};
    stats.Add(z);
  }
  stats = BlockMerge(stats);
  const float log_sum = logf(stats.sum), row_lse = stats.max + log_sum;
  if (threadIdx.x == 0) {
    lse[row] = row_lse;
    entropy[row] = log_sum - stats.weighted / stats.sum;
  }
  for (int32_t t = chunk.target_indptr[row] + threadIdx.x; t < chunk.target_indptr[row + 1];
       t += kThreads) {
    logprobs[t] = logits[chunk.targets[t]] * chunk.scale - row_lse;
  }
}

// One row's derivative by z_j, without the targets' own terms.
struct RowGradient {
  float lse, entropy, coefficient, d_entropy, scale;

  __device__ float At(float logit) const {
    const float log_p = logit * scale - lse, p = __expf(log_p);
    float g = -coefficient * p;
    if (d_entropy != 0.0f && p > 0.0f) g -= d_entropy * p * (log_p + entropy);
    return g;
  }
};

// In place: a step reads the logits of the next step, waits until all threads have, and writes the
// gradients of its own below everything that is still unread. The few target columns are set aside
// first and written last.
__global__ void __launch_bounds__(kThreads)
    HeadGradientKernel(HeadChunk chunk, HeadGradientArgs a) {
  const int64_t row = blockIdx.x;
  const float* logits = chunk.logits + row * chunk.ld;
  bf16* gradient = reinterpret_cast<bf16*>(chunk.logits + row * chunk.ld);
  const int32_t begin = chunk.target_indptr[row], end = chunk.target_indptr[row + 1];
  RowGradient g = {a.lse[row], a.entropy[row], 0, a.d_entropy == nullptr ? 0 : a.d_entropy[row],
                   chunk.scale};
  for (int32_t t = begin; t < end; ++t) g.coefficient += a.d_logprobs[t];
  for (int32_t t = begin + static_cast<int32_t>(threadIdx.x); t < end; t += kThreads) {
    a.target_logits[t] = logits[chunk.targets[t]];
  }
  constexpr int64_t kStep = kThreads * 8;
  Pack<float, 4> low = {}, high = {};
  const auto read = [&](int64_t i) {
    if (i >= chunk.ld) return;  // a multiple of 8
    low = Load<float, 4>(logits + i);
    high = Load<float, 4>(logits + i + 4);
  };
  read(threadIdx.x * 8);
  for (int64_t base = 0; base < chunk.vocab; base += kStep) {
    const int64_t i = base + threadIdx.x * 8;
    const Pack<float, 4> z[2] = {low, high};
    read(i + kStep);
    __syncthreads();
    if (i >= chunk.ld) continue;
    Pack<bf16, 8> d;
    for (int j = 0; j < 8; ++j) d.v[j] = FromFloat<bf16>(g.At(z[j / 4].v[j % 4]) * chunk.scale);
    Store<bf16, 8>(gradient + i, d);
  }
  __syncthreads();
  for (int32_t t = begin + static_cast<int32_t>(threadIdx.x); t < end; t += kThreads) {
    float d = g.At(a.target_logits[t]);
    for (int32_t same = begin; same < end; ++same) {  // ascending, whoever writes
      if (chunk.targets[same] == chunk.targets[t]) d += a.d_logprobs[same];
    }
    gradient[chunk.targets[t]] = FromFloat<bf16>(d * chunk.scale);
  }
}

}  // namespace

cudaError_t LaunchHeadStats(const HeadChunk& chunk, float* logprobs, float* entropy, float* lse,
                            cudaStream_t stream) {
  if (chunk.rows == 0) return cudaSuccess;
  HeadStatsKernel<<<static_cast<unsigned>(chunk.rows), kThreads, 0, stream>>>(chunk, logprobs,
                                                                              entropy, lse);
  return cudaGetLastError();
}

cudaError_t LaunchHeadGradient(const HeadChunk& chunk, const HeadGradientArgs& args,
                               cudaStream_t stream) {
  if (chunk.rows == 0) return cudaSuccess;
  HeadGradientKernel<<<static_cast<unsigned>(chunk.rows), kThreads, 0, stream>>>(chunk, args);
  return cudaGetLastError();
}

}  // namespace coppice::cuda
