// What the kernels of chunk_attention.cu are made of: softmax sums of 16 stacked rows over a split
// of keys on mma.sync, and the folding of such sums in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/attention/async_copy.cuh"
#include "kernels/cuda/attention/device_math.cuh"
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/log2_units.cuh"
#include "kernels/cuda/element.cuh"

namespace coppice::cuda {

constexpr int kChunkThreads = 128;
constexpr int kChunkWarps = 4;
constexpr int kChunkStages = 3;

template <int D>
constexpr int kTileKeys = D == 256 ? 16 : 32;

template <typename E>
struct ChunkParameters {
  AttentionSchedule schedule;
  const ChunkWork* items;
  const E *q, *k, *v, *context_k, *context_v;
  int64_t q_stride, k_stride, v_stride, out_stride;
  E* out;
  float* lse;
  ChunkScratch partial;
  int block_shift, q_heads, kv_heads, group_size;
  float scale;
};

inline int Log2(int x) {
  int shift = 0;
  while ((1 << shift) < x) ++shift;
  return shift;
}

template <typename E>
ChunkParameters<E> ParametersOf(const TreeAttentionArgs& a, const ChunkScratch& scratch) {
  ChunkParameters<E> p{};
  p.schedule = a.schedule;
  p.q = static_cast<const E*>(a.q.data);
  p.k = static_cast<const E*>(a.k.data);
  p.v = static_cast<const E*>(a.v.data);
  p.context_k = static_cast<const E*>(a.context.k);
  p.context_v = static_cast<const E*>(a.context.v);
  p.q_stride = a.q.row_stride, p.k_stride = a.k.row_stride, p.v_stride = a.v.row_stride;
  p.out_stride = a.out.row_stride;
  p.out = static_cast<E*>(a.out.data);
  p.lse = a.lse;
  p.partial = scratch;
  p.block_shift = Log2(a.context.block_tokens);
  p.q_heads = a.shape.q_heads, p.kv_heads = a.shape.kv_heads;
  p.group_size = p.q_heads / p.kv_heads;
  p.scale = a.shape.scale;
  return p;
}

__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8]. Lane l holds rows l / 4 and l / 4 + 8 of d, columns 2 (l % 4) and
// the next.
template <typename E>
__device__ __forceinline__ void Multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (kIsF16<E>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Factors that bring two sums to their common maximum; both are exact no-ops on an empty side.
struct FoldFactors {
  float max, a, b;
};
__device__ __forceinline__ FoldFactors Factors(float max_a, float max_b) {
  const float top = fmaxf(max_a, max_b);
  if (top == -INFINITY) return {top, 1.f, 0.f};
  return {top, Exp2(max_a - top), Exp2(max_b - top)};
}
__device__ __forceinline__ float Fold(const FoldFactors& f, float a, float b) {
  return __fmaf_rn(a, f.a, __fmul_rn(b, f.b));
}

// Softmax sums of 16 stacked rows as the lanes of a warp hold them: this lane's elements of row
// half h are out[n][2 h + e].
template <int D>
struct RowSums {
  float out[D / 8][4];
  float max[2], sum[2];
};
// The same in shared memory, lane by lane.
template <int D>
struct SharedSums {
  float out[D / 8][4][32];
  float max[2][32], sum[2][32];

  __device__ void Clear(int lane) {
    for (int n = 0; n < D / 8; ++n)
      for (int e = 0; e < 4; ++e) out[n][e][lane] = 0.f;
    for (int h = 0; h < 2; ++h) max[h][lane] = -INFINITY, sum[h][lane] = 0.f;
  }
  template <typename Sums>
  __device__ __forceinline__ void FoldIn(const Sums& s, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const FoldFactors f = Factors(max[h][lane], s.Max(h));
      max[h][lane] = f.max;
      sum[h][lane] = Fold(f, sum[h][lane], s.Sum(h));
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e)
          out[n][e][lane] = Fold(f, out[n][e][lane], s.Out(n, e));
    }
  }
};
template <int D>
struct InRegisters {
  const RowSums<D>& s;
  __device__ float Max(int h) const { return s.max[h]; }
  __device__ float Sum(int h) const { return s.sum[h]; }
  __device__ float Out(int n, int e) const { return s.out[n][e]; }
};
template <int D>
struct InShared {
  const SharedSums<D>& s;
  int lane;
  __device__ float Max(int h) const { return s.max[h][lane]; }
  __device__ float Sum(int h) const { return s.sum[h][lane]; }
  __device__ float Out(int n, int e) const { return s.out[n][e][lane]; }
};

// Shared memory of a block. Keys [tile keys][D] in 16-byte pieces, piece c of a row at c ^ (row &
// 7).
template <typename E, int D, int kKeys = kTileKeys<D>, int kRing = kChunkStages>
struct ChunkShared {
  using Element = E;
  static constexpr int kTile = kKeys, kStages = kRing;
  alignas(128) E keys[kStages][2][kTile * D];
};

// What one warp works on. Its block has kWarps warps of 16 stacked rows each, which share the keys.
template <int D, int kWarps, typename Shared>
struct WarpWork {
  using E = typename Shared::Element;
  static constexpr int kT = Shared::kTile, kStages = Shared::kStages;
  const ChunkParameters<E>& p;
  const ChunkWork item;
  const int kv_head, lane, warp;
  Shared& shared;

  __device__ int FirstStacked() const { return warp * 16; }
  // Batch row and query head of a stacked row; row -1: none.
  __device__ int2 RowAndHead(int stacked) const {
    const int i = stacked / p.group_size;
    if (i >= item.num_rows) return {-1, 0};
    return {p.schedule.chunk_rows[item.rows_begin + i],
            kv_head * p.group_size + stacked % p.group_size};
  }

  __device__ void LoadQueries(uint32_t (&q)[D / 16][4], int (&rows)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int2 at = RowAndHead(FirstStacked() + lane / 4 + 8 * h);
      rows[h] = at.x;
      const E* from = p.q + at.x * p.q_stride + at.y * D + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        q[i][h] = at.x < 0 ? 0 : *reinterpret_cast<const uint32_t*>(from + i * 16);
        q[i][h + 2] = at.x < 0 ? 0 : *reinterpret_cast<const uint32_t*>(from + i * 16 + 8);
      }
    }
  }

  // Issues the copies of keys [key, key + kT) into a stage. Narrow: by this warp alone; wide: by
  // all.
  __device__ void LoadTile(int key, int end, int stage) const {
    const int j = key + lane % kT;
    const E *k = p.k, *v = p.v;
    if (j < item.context_tokens) {
      const int block = p.schedule.chunk_blocks[item.first_block + (j >> p.block_shift) -
                                                (item.key_begin >> p.block_shift)];
      const int64_t slot = (int64_t{block} << p.block_shift) + (j & ((1 << p.block_shift) - 1));
      k = p.context_k + (slot * p.kv_heads + kv_head) * D;
      v = p.context_v + (slot * p.kv_heads + kv_head) * D;
    } else if (j < end) {
      const int64_t row = item.packed_begin + j - item.context_tokens;
      k = p.k + row * p.k_stride + kv_head * D;
      v = p.v + row * p.v_stride + kv_head * D;
    }
    constexpr int kPieces = D / 8;
    constexpr int kLoaders = 32 * kWarps;
    auto& to = shared.keys[stage];
    const uint32_t to_k = SharedAddress(to[0]), to_v = SharedAddress(to[1]);
    const int thread = warp * 32 + lane;
#pragma unroll 4
    for (int i = thread; i < kT * kPieces; i += kLoaders) {
      const int row = i / kPieces, piece = i % kPieces;
      const auto* from_k = reinterpret_cast<const E*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(k), row));
      const auto* from_v = reinterpret_cast<const E*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(v), row));
      const uint32_t at = (row * kPieces + (piece ^ (row & 7))) * 16;
      CopyAsync(to_k + at, from_k + piece * 8, key + row < end);
      CopyAsync(to_v + at, from_v + piece * 8, key + row < end);
    }
  }

  __device__ bool Sees(int row, int key, int end) const {
    if (key >= end) return false;
    if (key < item.context_tokens) return true;
    const int k = item.packed_begin + key - item.context_tokens;
    return k <= row && row < p.schedule.subtree_end[k];
  }

  // Adds keys [key, key + kT) in a stage to the sums.
  __device__ void AddTile(RowSums<D>& s, const uint32_t (&q)[D / 16][4], const int (&rows)[2],
                          int key, int end, int stage) const {
    auto& tile = shared.keys[stage];
    const uint32_t keys = SharedAddress(tile[0]), values = SharedAddress(tile[1]);
    float scores[kT / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kT / 16; ++j) {
        uint32_t b[4];
        const int row = j * 16 + lane / 16 * 8 + lane % 8, piece = 2 * i + lane / 8 % 2;
        LoadMatrices(b, keys + (row * (D / 8) + (piece ^ (row & 7))) * 16);
        Multiply<E>(scores[2 * j], q[i], b[0], b[1]);
        Multiply<E>(scores[2 * j + 1], q[i], b[2], b[3]);
      }
    }
    const bool masked = key + kT > min(item.context_tokens, end);
    const float scale_log2 = p.scale * kLog2e;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kT / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = scores[j][2 * h + e];
          x = __fmul_rn(x, scale_log2);
          if (masked && !Sees(rows[h], key + 8 * j + lane % 4 * 2 + e, end)) x = -INFINITY;
          top = fmaxf(top, x);
        }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, s.max[h]);
      const float base = top == -INFINITY ? 0.f : top;
      const float shrink = Exp2(s.max[h] - base);
      s.max[h] = top;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kT / 8; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          scores[j][e] = Exp2(scores[j][e] - base);
          sum += scores[j][e];
        }
      s.sum[h] = __fmaf_rn(s.sum[h], shrink, sum);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) s.out[n][2 * h] *= shrink, s.out[n][2 * h + 1] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < kT / 16; ++j) {
      const uint32_t a[4] = {PackPair<E>(scores[2 * j][0], scores[2 * j][1]),
                             PackPair<E>(scores[2 * j][2], scores[2 * j][3]),
                             PackPair<E>(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                             PackPair<E>(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        uint32_t b[4];
        const int row = j * 16 + lane / 8 % 2 * 8 + lane % 8, piece = 2 * i + lane / 16;
        LoadMatricesTransposed(b, values + (row * (D / 8) + (piece ^ (row & 7))) * 16);
        Multiply<E>(s.out[2 * i], a, b[0], b[1]);
        Multiply<E>(s.out[2 * i + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ void Arrive() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Issues the first copies of a split of keys [begin, end).
  __device__ void StartSplit(int begin, int end) const {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (begin + i * kT < end) LoadTile(begin + i * kT, end, i);
      CommitCopies();
    }
  }

  // Sums over keys [begin, end) of a split that has started.
  __device__ void SumSplit(RowSums<D>& s, const uint32_t (&q)[D / 16][4], const int (&rows)[2],
                           int begin, int end) const {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.out[n][e] = 0.f;
    s.max[0] = s.max[1] = -INFINITY, s.sum[0] = s.sum[1] = 0.f;
    const int tiles = (end - begin + kT - 1) / kT;
    for (int i = 0; i < tiles; ++i) {
      WaitCopies<kStages - 2>();
      Arrive();
      const int next = i + kStages - 1;
      if (next < tiles) LoadTile(begin + next * kT, end, next % kStages);
      CommitCopies();
      AddTile(s, q, rows, begin + i * kT, end, i % kStages);
    }
    WaitCopies<0>();
    Arrive();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s.sum[h] += __shfl_xor_sync(~0u, s.sum[h], 1);
      s.sum[h] += __shfl_xor_sync(~0u, s.sum[h], 2);
    }
  }

  // Writes the item's result: final, or partial.
  template <typename Sums>
  __device__ void Write(const Sums& s) const {
    const int column = lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int stacked = FirstStacked() + lane / 4 + 8 * h;
      const int2 at = RowAndHead(stacked);
      if (at.x < 0) continue;
      if (item.partial < 0) {
        const float inverse = 1.f / s.Sum(h);
        E* to = p.out + at.x * p.out_stride + at.y * D + column;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
          *reinterpret_cast<uint32_t*>(to + 8 * n) =
              PackPair<E>(s.Out(n, 2 * h) * inverse, s.Out(n, 2 * h + 1) * inverse);
        if (p.lse && column == 0)
          p.lse[int64_t{at.x} * p.q_heads + at.y] = s.Max(h) * kLn2 + logf(s.Sum(h));
        continue;
      }
      const int64_t part = (int64_t{item.partial} + stacked / p.group_size) * p.q_heads + at.y;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(p.partial.out + part * D + 8 * n + column) =
            float2{s.Out(n, 2 * h), s.Out(n, 2 * h + 1)};
      if (column == 0) p.partial.sums[part] = float2{s.Max(h), s.Sum(h)};
    }
  }
};

}  // namespace coppice::cuda
