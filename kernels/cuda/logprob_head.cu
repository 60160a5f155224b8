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

  __device__ void Add(float z) {
    if (z > max) Rescale(z);
    const float shifted = z - max, e = __expf(shifted);
    sum += e;
    weighted += e > 0.0f ? e * shifted : 0.0f;
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
  const int64_t whole = chunk.vocab / 4 * 4;
  for (int64_t i = threadIdx.x * 4; i < whole; i += kThreads * 4) {
    const Pack<float, 4> z = Load<float, 4>(logits + i);
    for (int j = 0; j < 4; ++j) stats.Add(z.v[j] * chunk.scale);
  }
  if (whole + threadIdx.x < chunk.vocab) stats.Add(logits[whole + threadIdx.x] * chunk.scale);
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

// In place: a step reads 4 kThreads logits, waits, and writes their gradients below everything that
// is still unread.
__global__ void HeadGradientKernel(HeadChunk chunk, const float* lse, const float* entropy,
                                   const float* d_logprobs, const float* d_entropy) {
  const int64_t row = blockIdx.x;
  const float* logits = chunk.logits + row * chunk.ld;
  bf16* gradient = reinterpret_cast<bf16*>(chunk.logits + row * chunk.ld);
  const int32_t begin = chunk.target_indptr[row], end = chunk.target_indptr[row + 1];
  const float row_lse = lse[row], row_entropy = entropy[row],
              e = d_entropy == nullptr ? 0.0f : d_entropy[row];
  float coefficient = 0;
  for (int32_t t = begin; t < end; ++t) coefficient += d_logprobs[t];
  for (int64_t base = 0; base < chunk.vocab; base += kThreads * 4) {
    const int64_t i = base + threadIdx.x * 4;
    Pack<float, 4> z = {};
    if (i < chunk.ld) z = Load<float, 4>(logits + i);
    __syncthreads();
    if (i >= chunk.ld) continue;
    Pack<bf16, 4> d;
    for (int j = 0; j < 4; ++j) {
      const float log_p = z.v[j] * chunk.scale - row_lse, p = __expf(log_p);
      float g = -coefficient * p;
      if (e != 0.0f && p > 0.0f) g -= e * p * (log_p + row_entropy);
      for (int32_t t = begin; t < end; ++t) {
        if (chunk.targets[t] == i + j) g += d_logprobs[t];
      }
      d.v[j] = FromFloat<bf16>(g * chunk.scale);
    }
    Store<bf16, 4>(gradient + i, d);
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

cudaError_t LaunchHeadGradient(const HeadChunk& chunk, const float* lse, const float* entropy,
                               const float* d_logprobs, const float* d_entropy,
                               cudaStream_t stream) {
  if (chunk.rows == 0) return cudaSuccess;
  HeadGradientKernel<<<static_cast<unsigned>(chunk.rows), kThreads, 0, stream>>>(
      chunk, lse, entropy, d_logprobs, d_entropy);
  return cudaGetLastError();
}

}  // namespace coppice::cuda
