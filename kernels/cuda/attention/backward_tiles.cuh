// What the dK/dV kernels share: scores transposed, [64 keys, 64 queries] a step and warpgroup, so
// that P and dS leave the accumulators as A operands.
#pragma once

#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace coppice::cuda {

inline constexpr int kColumns = kBackwardQueryTile;

struct KeysParameters {
  CUtensorMap q, dout, k, v, dk, dv;
  CUtensorMap lse, delta;            // row sums
  CUtensorMap context_k, context_v;  // of the gathered context
  AttentionSchedule schedule;
  ItemOrder order;
  void* ds;                          // images of E
  float *d_context_k, *d_context_v;  // pages, or null
  float* sums;                       // of tiles that go on in a later round
  int* counter;
  int padded, first_kv_head, kv_heads, group_size;  // kv_heads: of the model
  int run_slots;                                    // of a context tile: slots of a run
  float scale;
};

// Steps of an item: query tiles from the last to the first, for each the heads of the group.
struct KeysWork {
  int tile, head, half;  // packed key tile or ~context tile; half: of the wide kernel
  int part;              // of KeyWork
  int steps;             // < 0: no more work
  int run, runs_end;     // of key_runs
};

__device__ __forceinline__ KeysWork WorkOf(const KeysParameters& p, int index, int head, int half) {
  const KeyWork work = p.schedule.key_work[index];
  int tiles = 0;
  for (int i = 0; i < work.num_runs; ++i) {
    const KeyRun& run = p.schedule.key_runs[work.runs_begin + i];
    tiles += run.last - run.first;
  }
  return {work.tile,
          head,
          half,
          work.part,
          tiles * p.group_size,
          work.runs_begin,
          work.runs_begin + work.num_runs};
}

// Calls load(query head, first row) for each step of an item.
template <typename Load>
__device__ __forceinline__ void ForEachStep(const KeysParameters& p, const KeysWork& work,
                                            Load load) {
  for (int run = work.run; run < work.runs_end; ++run) {
    for (int tile = p.schedule.key_runs[run].last - 1; tile >= p.schedule.key_runs[run].first;
         --tile)
      for (int i = 0; i < p.group_size; ++i) load(work.head * p.group_size + i, tile * kColumns);
  }
}

// A thread's two keys: a query sees one iff query - base lies in [0, span).
struct KeySpans {
  int base[2], span[2];
};

// Keys `key` and `key` + 8 of the tile.
template <bool kContext>
__device__ __forceinline__ KeySpans SpansOf(const KeysParameters& p, int tile, int key,
                                            const KeyRun& run) {
  KeySpans keys;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (kContext && tile < 0) {
      const int* end = p.schedule.context_ends + p.schedule.context_tiles[~tile].first_end;
      keys.base[h] = run.row_begin;
      keys.span[h] = end[key + 8 * h] > 0 ? run.row_end - run.row_begin : 0;
    } else {
      keys.base[h] = tile * kKeyTile + key + 8 * h;
      keys.span[h] = max(p.schedule.subtree_end[keys.base[h]] - keys.base[h], 0);
    }
  }
  return keys;
}

// Where an item stands. Without context it has one run, known when it begins.
template <bool kContext>
struct StepCursor {
  KeyRun run;
  int step = 0, in_group = 0, query_tile, run_idx, runs_end;

  __device__ __forceinline__ StepCursor(const KeysParameters& p, const KeysWork& work)
      : run(p.schedule.key_runs[work.run]),
        query_tile(run.last - 1),
        run_idx(work.run),
        runs_end(work.runs_end) {}
  __device__ __forceinline__ bool partial() const {
    return query_tile < run.full_first || query_tile >= run.full_last;
  }
  // True if another run begins.
  __device__ __forceinline__ bool Advance(const KeysParameters& p) {
    ++step;
    if (++in_group < p.group_size) return false;
    in_group = 0, --query_tile;
    if (!kContext || query_tile >= run.first || ++run_idx == runs_end) return false;
    run = p.schedule.key_runs[run_idx];
    query_tile = run.last - 1;
    return true;
  }
};

// S^T to P^T; `lse` holds the columns' values.
__device__ __forceinline__ void ColumnProbabilities(float (&x)[kColumns / 2], const float* lse,
                                                    float scale_log2) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float2 base = *reinterpret_cast<const float2*>(lse + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[4 * j + 2 * h] = Exp2(x[4 * j + 2 * h] * scale_log2 - base.x);
      x[4 * j + 2 * h + 1] = Exp2(x[4 * j + 2 * h + 1] * scale_log2 - base.y);
    }
  }
}

// Clears P^T where the query does not see the key.
__device__ __forceinline__ void MaskColumns(float (&x)[kColumns / 2], int first_query,
                                            const KeySpans& keys) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = first_query + 8 * j + threadIdx.x % 4 * 2 + e;
        if (unsigned(query - keys.base[h]) >= unsigned(keys.span[h])) x[4 * j + 2 * h + e] = 0.f;
      }
}

// dP^T to dS^T (without the scale).
__device__ __forceinline__ void ColumnGradients(float (&dp)[kColumns / 2],
                                                const float (&probability)[kColumns / 2],
                                                const float* delta) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float2 base = *reinterpret_cast<const float2*>(delta + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * j + 2 * h;
      dp[i] = probability[i] * (dp[i] - base.x);
      dp[i + 1] = probability[i + 1] * (dp[i + 1] - base.y);
    }
  }
}

// Stores a warpgroup's half of a dS^T tile [128 keys, 64 queries] straight from the A operand
// registers: a warp's words of an 8 x 8 block are 128 contiguous bytes, a core matrix of the
// unswizzled layout that the dQ kernel multiplies from. Streaming stores: 16 KB per step, read
// once, by another kernel.
template <typename E>
__device__ __forceinline__ void StoreImage(E* image, int half, const uint32_t (&ds)[kColumns / 4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  constexpr int kRowOfBlocks = kColumns / 8 * 32;  // words
  uint32_t* to = reinterpret_cast<uint32_t*>(image) + (8 * half + 2 * warp) * kRowOfBlocks + lane;
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) __stcs(to + i % 2 * kRowOfBlocks + i / 2 * 32, ds[i]);
}

// Adds this thread's accumulators, keys `key` and `key` + 8 of a context tile, columns from
// `column` on, to the pages. Each element of the pages has one owner.
template <int D, int kAccumulators>
__device__ __forceinline__ void AddToPages(const KeysParameters& p, float* pages, int tile, int key,
                                           int head, int column, const float (&d)[kAccumulators],
                                           float factor) {
  const ContextTile context = p.schedule.context_tiles[~tile];
  const int64_t stride = int64_t{p.kv_heads} * D;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = key + 8 * h;
    if (p.schedule.context_ends[context.first_end + row] == 0) continue;
    const int64_t slot =
        p.schedule.context_slots[context.first_piece + row / p.run_slots] + row % p.run_slots;
    float* to = pages + slot * stride + head * D + column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < kAccumulators / 4; ++j) {
      float2* at = reinterpret_cast<float2*>(to + 8 * j);
      const float2 old = *at;
      *at = {old.x + d[4 * j + 2 * h] * factor, old.y + d[4 * j + 2 * h + 1] * factor};
    }
  }
}

// Sums of dK and dV of a packed tile that the next round goes on with, in f32: where share `part`
// of `parts` is. A share is kSharers threads' accumulators; the same threads add them to their own.
template <int D>
__device__ __forceinline__ float* SumsOf(const KeysParameters& p, const KeysWork& work, int part,
                                         int parts) {
  constexpr int kTileSums = 2 * kKeyTile * D;  // dK and dV
  return p.sums + (size_t(work.tile) * p.kv_heads + work.head) * kTileSums +
         kTileSums / parts * part;
}

template <int kSharers, int kAccumulators>
__device__ __forceinline__ void KeepSums(float* to, int thread, const float (&x)[kAccumulators]) {
#pragma unroll
  for (int j = 0; j < kAccumulators / 4; ++j)
    reinterpret_cast<float4*>(to)[j * kSharers + thread] =
        make_float4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
}

template <int kSharers, int kAccumulators>
__device__ __forceinline__ void AddSums(const float* from, int thread, float (&x)[kAccumulators]) {
#pragma unroll
  for (int j = 0; j < kAccumulators / 4; ++j) {
    const float4 sums = reinterpret_cast<const float4*>(from)[j * kSharers + thread];
    x[4 * j] += sums.x, x[4 * j + 1] += sums.y, x[4 * j + 2] += sums.z, x[4 * j + 3] += sums.w;
  }
}

// All but the order. `key_rows`: rows of K and V that a block owns.
inline cudaError_t MakeKeysParameters(KeysParameters& p, const BackwardPass& b, int key_rows) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const AttentionShape& shape = a.shape;
  if (auto e = MakeMap(p.q, MapOf(a.q, shape, shape.q_heads), kColumns)) return e;
  if (auto e = MakeMap(p.dout, MapOf(a.d_out, shape, shape.q_heads), kColumns)) return e;
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), key_rows)) return e;
  if (auto e = MakeMap(p.v, MapOf(a.v, shape, shape.kv_heads), key_rows)) return e;
  if (auto e = MakeMap(p.dk, MapOf(a.d_k, shape, shape.kv_heads), 64)) return e;
  if (auto e = MakeMap(p.dv, MapOf(a.d_v, shape, shape.kv_heads), 64)) return e;
  if (a.schedule.num_context_tiles > 0) {
    if (auto e = MakeMap(p.context_k, GatheredContext(b, b.context_k), key_rows)) return e;
    if (auto e = MakeMap(p.context_v, GatheredContext(b, b.context_v), key_rows)) return e;
    p.run_slots = RunSlots(a.context);
  }
  const int64_t sums = shape.q_heads * PaddedRows(shape.rows);
  if (auto e = MakeWordMap(p.lse, b.row_lse, sums, kColumns)) return e;
  if (auto e = MakeWordMap(p.delta, b.row_delta, sums, kColumns)) return e;
  p.schedule = a.schedule;
  p.ds = b.ds;
  p.d_context_k = a.d_context.k;
  p.d_context_v = a.d_context.v;
  p.sums = b.sums;
  p.counter = b.counters;
  p.padded = static_cast<int>(PaddedRows(shape.rows));
  p.first_kv_head = b.first_kv_head;
  p.kv_heads = shape.kv_heads;
  p.group_size = shape.q_heads / shape.kv_heads;
  p.scale = shape.scale;
  return cudaSuccess;
}

}  // namespace coppice::cuda
