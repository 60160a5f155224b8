// Softmax over the vocabulary. With z = logits * scale:
//   lse = log sum exp z, entropy = lse - sum p z, logprob[t] = z[target t] - lse
//   dL/dlogit_j = scale (sum_t c_t (1[j = target t] - p_j) - e p_j (log p_j + entropy))
// Beside LaunchVocabStats, which holds the logits in registers: statistics of tiles to those of
// rows (12 bytes a row and tile), and the gradient from the exps (2 bytes an element in, 2 out).
// For a chunk of rows whose logits (f32, before the temperature) a GEMM has left in memory: one
// online pass (4 bytes an element) and the gradient (4 bytes in, 2 out). A block per row. All bound
// by memory bandwidth, or by L2 where the chunk stays there.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 512;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

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

// In shared memory.
template <int N>
struct StatsArray {
  float max[N], sum[N], weighted[N];

  __device__ void Set(int i, const Stats& s) {
    max[i] = s.max;
    sum[i] = s.sum;
    weighted[i] = s.weighted;
  }
  // All of first, first + step, ... in this order.
  __device__ Stats MergeFrom(int first, int step) const {
    Stats all;
    for (int i = first; i < N; i += step) {
      Stats other;
      other.max = max[i];
      other.sum = sum[i];
      other.weighted = weighted[i];
      all.Merge(other);
    }
    return all;
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
  __shared__ StatsArray<kThreads / 32> warps;
  s = WarpMerge(s);
  if (threadIdx.x % 32 == 0) warps.Set(threadIdx.x / 32, s);
  __syncthreads();
  return warps.MergeFrom(0, 1);
}

// Writes what is known of a row; returns its lse.
__device__ inline float StoreRow(const Stats& stats, const HeadStats& out, int64_t row) {
  const float log_sum = logf(stats.sum), lse = stats.max + log_sum;
  out.lse[row] = lse;
  out.entropy[row] = log_sum - stats.weighted / stats.sum;
  return lse;
}

constexpr int kFoldRows = 32, kFoldParts = 8;

// A block folds kFoldRows rows, a warp a run of tiles of all of them; then the warps' parts, in
// order.
__global__ void __launch_bounds__(kFoldRows* kFoldParts)
    FoldVocabStatsKernel(VocabMatMulArgs args, VocabPartials partials, HeadStats out) {
  __shared__ StatsArray<kFoldParts * kFoldRows> parts;
  __shared__ float row_lse[kFoldRows];
  const int lane = threadIdx.x % kFoldRows, part = threadIdx.x / kFoldRows;
  const int64_t row = int64_t{blockIdx.x} * kFoldRows + lane,
                tiles = CeilDiv(args.vocab, kVocabTile);
  if (row < args.rows) {
    Stats stats;
#pragma unroll 4
    for (int64_t i = tiles * part / kFoldParts; i < tiles * (part + 1) / kFoldParts; ++i) {
      Stats tile;
      tile.max = partials.max[i * args.rows + row];
      tile.sum = partials.sum[i * args.rows + row];
      tile.weighted = partials.weighted[i * args.rows + row];
      stats.Merge(tile);
    }
    parts.Set(threadIdx.x, stats);
  }
  __syncthreads();
  if (part == 0 && row < args.rows) {
    row_lse[lane] = StoreRow(parts.MergeFrom(lane, kFoldRows), out, row);
  }
  __syncthreads();
  if (row >= args.rows) return;
  const int32_t end = args.target_indptr[row + 1];
  for (int32_t t = args.target_indptr[row] + part; t < end; t += kFoldParts) {
    out.logprobs[t] -= row_lse[lane];
  }
}

// What d_logits of a row and tile needs besides the exps: with t = log2(exp) + offset,
//   d_logit = -2^t (level + slope t), plus scale * d_logprob at a target.
struct TileGradient {
  float level, slope, offset, factor;

  __device__ float At(float exp) const {
    const float p = exp * factor;
    if (slope == 0.0f) return -p * level;
    return p > 0.0f ? -p * fmaf(slope, __log2f(exp) + offset, level) : 0.0f;
  }
};

// A row, which may be in place: the few target columns are set aside first and written last.
template <typename E>
__global__ void __launch_bounds__(kThreads)
    ExpsGradientKernel(VocabMatMulArgs args, HeadGradientArgs a, VocabExps from, E* to) {
  const int64_t row = blockIdx.x, ld = CeilDiv(args.vocab, 8) * 8;
  const E* const exps = static_cast<const E*>(from.exps) + row * ld;
  E* const gradient = to + row * ld;
  const int32_t begin = args.target_indptr[row], end = args.target_indptr[row + 1];
  const int32_t first = begin + static_cast<int32_t>(threadIdx.x);
  for (int32_t t = first; t < end; t += kThreads)
    a.target_logits[t] = ToFloat(exps[args.targets[t]]);
  float coefficient = 0;
  for (int32_t t = begin; t < end; ++t) coefficient += a.d_logprobs[t];
  const float d_entropy = a.d_entropy == nullptr ? 0 : a.d_entropy[row], lse = a.lse[row];
  const float level = args.scale * (coefficient + d_entropy * a.entropy[row]);
  const float slope = args.scale * d_entropy * kLn2;
  const auto tile_of = [&](int64_t token) {
    const float max = from.max[token / kVocabTile * from.max_stride + row];
    const float offset = (max - lse) * kLog2e;
    return TileGradient{level, slope, offset, exp2f(offset)};
  };
  __syncthreads();
#pragma unroll 4
  for (int64_t i = threadIdx.x * 8; i < ld; i += kThreads * 8) {
    const TileGradient tile = tile_of(i);
    Pack<E, 8> x = Load<E, 8>(exps + i);
    for (int j = 0; j < 8; ++j) x.v[j] = FromFloat<E>(tile.At(ToFloat(x.v[j])));
    Store<E, 8>(gradient + i, x);
  }
  __syncthreads();
  for (int32_t t = first; t < end; t += kThreads) {
    const int32_t token = args.targets[t];
    float d = 0;
    for (int32_t same = begin; same < end; ++same) {  // ascending, whoever writes
      if (args.targets[same] == token) d += a.d_logprobs[same];
    }
    gradient[token] = FromFloat<E>(fmaf(d, args.scale, tile_of(token).At(a.target_logits[t])));
  }
}

__global__ void HeadStatsKernel(HeadChunk chunk, HeadStats out) {
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
  const float lse = stats.max + logf(stats.sum);
  if (threadIdx.x == 0) StoreRow(stats, out, row);
  for (int32_t t = chunk.target_indptr[row] + threadIdx.x; t < chunk.target_indptr[row + 1];
       t += kThreads) {
    out.logprobs[t] = logits[chunk.targets[t]] * chunk.scale - lse;
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
template <typename E>
__global__ void __launch_bounds__(kThreads)
    HeadGradientKernel(HeadChunk chunk, HeadGradientArgs a) {
  const int64_t row = blockIdx.x;
  const float* logits = chunk.logits + row * chunk.ld;
  E* gradient = reinterpret_cast<E*>(chunk.logits + row * chunk.ld);
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
    Pack<E, 8> d;
    for (int j = 0; j < 8; ++j) d.v[j] = FromFloat<E>(g.At(z[j / 4].v[j % 4]) * chunk.scale);
    Store<E, 8>(gradient + i, d);
  }
  __syncthreads();
  for (int32_t t = begin + static_cast<int32_t>(threadIdx.x); t < end; t += kThreads) {
    float d = g.At(a.target_logits[t]);
    for (int32_t same = begin; same < end; ++same) {  // ascending, whoever writes
      if (chunk.targets[same] == chunk.targets[t]) d += a.d_logprobs[same];
    }
    gradient[chunk.targets[t]] = FromFloat<E>(d * chunk.scale);
  }
}

}  // namespace

cudaError_t LaunchFoldVocabStats(const VocabMatMulArgs& args, const VocabPartials& partials,
                                 const HeadStats& out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(CeilDiv(args.rows, kFoldRows));
  FoldVocabStatsKernel<<<blocks, kFoldRows * kFoldParts, 0, stream>>>(args, partials, out);
  return cudaGetLastError();
}

cudaError_t LaunchExpsGradient(const VocabMatMulArgs& args, const HeadGradientArgs& gradient,
                               const VocabExps& exps, void* d_logits, cudaStream_t stream) {
  return ForElement(args.dtype, [&](auto e) {
    using E = decltype(e);
    ExpsGradientKernel<E><<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(
        args, gradient, exps, static_cast<E*>(d_logits));
    return cudaGetLastError();
  });
}

cudaError_t LaunchHeadStats(const HeadChunk& chunk, const HeadStats& out, cudaStream_t stream) {
  if (chunk.rows == 0) return cudaSuccess;
  HeadStatsKernel<<<static_cast<unsigned>(chunk.rows), kThreads, 0, stream>>>(chunk, out);
  return cudaGetLastError();
}

cudaError_t LaunchHeadGradient(const HeadChunk& chunk, const HeadGradientArgs& args,
                               cudaStream_t stream) {
  if (chunk.rows == 0) return cudaSuccess;
  return ForElement(args.dtype, [&](auto e) {
    HeadGradientKernel<decltype(e)>
        <<<static_cast<unsigned>(chunk.rows), kThreads, 0, stream>>>(chunk, args);
    return cudaGetLastError();
  });
}

}  // namespace coppice::cuda
