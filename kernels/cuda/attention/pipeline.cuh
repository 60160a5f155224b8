// What the persistent forward and backward kernels share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/attention/attention_schedule.h"
#include "kernels/cuda/attention/backward_units.cuh"
#include "kernels/cuda/attention/hopper.cuh"
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/log2_units.cuh"
#include "kernels/cuda/attention/tensor_map.cuh"
#include "kernels/cuda/attention/tree_attention.h"
#include "kernels/cuda/cluster.cuh"

namespace coppice::cuda {

inline constexpr int kConsumers = 2;                     // consumer warpgroups, 64 rows each
inline constexpr int kThreads = 128 * (1 + kConsumers);  // and one producer warpgroup
inline constexpr int kConsumerWarps = 4 * kConsumers;
inline constexpr int kConsumerThreads = 128 * kConsumers;
inline constexpr int kImage = kKeyTile * kBackwardQueryTile;  // elements of a stored dS^T tile
// Registers per thread of the producer and of the consumers: three warpgroups share what the launch
// got, 3 x 168.
template <int kProducer>
inline constexpr int kConsumerRegisters = (3 * 168 - kProducer) / 2;

// Order of the work items (tile, head), handed out by a counter. Heads of one KV head that work at
// the same time share their key tiles in L2, so the first `solo` KV heads go one after the other,
// each longest tile first; the last ones go together, longest tile first across them, so that the
// Multiprocessors finish together.
struct ItemOrder {
  int tile_count, kv_heads, per_kv_head, solo;

  __device__ __forceinline__ int items() const { return tile_count * kv_heads * per_kv_head; }
  // Item to tile, counted longest first, and head, counted as kv_head * per_kv_head + i.
  __device__ __forceinline__ int2 at(int item) const {
    const int first = solo * tile_count * per_kv_head;
    const bool alone = item < first;
    const int heads = (alone ? 1 : kv_heads - solo) * per_kv_head;  // heads that go together
    const int section = alone ? item / (tile_count * per_kv_head) : solo;
    const int inside = item - section * tile_count * per_kv_head;
    return {inside / heads, section * per_kv_head + inside % heads};
  }
};

// Order of (tile, head) for `tiles` tiles with `entries` list entries in all, `longest` at most, of
// which clusters of `blocks` take one each. The heads that go together hold at least twice the
// longest item's work for every cluster.
inline ItemOrder MakeItemOrder(int tiles, int longest, int entries, int kv_heads, int per_kv_head,
                               int blocks = 1) {
  const int64_t work = int64_t{entries} * per_kv_head;
  const int64_t together = (int64_t{2} * longest * (Multiprocessors() / blocks) + work - 1) / work;
  const int solo = kv_heads - static_cast<int>(together < kv_heads ? together : kv_heads);
  return {tiles, kv_heads, per_kv_head, solo};
}
inline ItemOrder BackwardOrder(const AttentionSchedule& s, int kv_heads, int per_kv_head,
                               int blocks = 1) {
  return MakeItemOrder(s.num_backward_tiles, s.longest_backward_list, s.num_backward_entries,
                       kv_heads, per_kv_head, blocks);
}

// Where the blocks of a cluster of two are told their items.
struct ItemMail {
  static constexpr int kPlaces = 2;
  int item[kPlaces];
  Barrier full[kPlaces], empty[kPlaces];  // `empty`: the first block's counts for both

  __device__ void Init() {
    for (int i = 0; i < kPlaces; ++i) full[i].Init(1), empty[i].Init(2);
  }
};

// The producers' items, from a counter, fetched one ahead. In a cluster of two both have the same:
// the first block takes it and tells.
template <int kBlocks>
class ItemSource {
 public:
  __device__ __forceinline__ ItemSource(int* counter, ItemMail& mail)
      : counter_(counter), mail_(mail), rank_(kBlocks > 1 ? ClusterRank() : 0) {
    if (rank_ == 0) next_ = atomicAdd(counter_, 1);
  }
  // `count` or more: there are no more.
  __device__ __forceinline__ int Take(int count) {
    int item = next_;
    if constexpr (kBlocks > 1) {
      Barrier& full = mail_.full[place_.stage];
      full.ArriveExpecting(sizeof(int));
      if (rank_ == 0) {
        mail_.empty[place_.stage].Wait(place_.phase ^ 1);
        for (int to = 0; to < kBlocks; ++to) SendTo(to, &mail_.item[place_.stage], item, full);
      }
      item = Receive(mail_.item[place_.stage], full, place_.phase);
      if (item < count) ArriveAt(mail_.empty[place_.stage], 0);
      place_.Advance();
    }
    if (rank_ == 0 && item < count) next_ = atomicAdd(counter_, 1);
    return item;
  }

 private:
  int* counter_;
  ItemMail& mail_;
  int rank_, next_ = 0;
  Ring<ItemMail::kPlaces> place_;
};

// A tile of kRows rows x kWidth columns of one head, from `column` on, panel by panel.
template <int kWidth, int kRows, typename E>
__device__ __forceinline__ void LoadTile(E* to, const CUtensorMap& map, int head, int row,
                                         Barrier& full, int column = 0) {
#pragma unroll
  for (int panel = 0; panel < kWidth / kPanel; ++panel)
    LoadBox(to + panel * kPanel * kRows, map, column + panel * kPanel, head, row, full);
}

// Rows [row0, row0 + 64) of a staged tile of kRows rows, to rows from `row` and columns from
// `column` of the tensor. One thread.
template <int kWidth, int kRows, typename E>
__device__ __forceinline__ void StoreRows(const CUtensorMap& map, const E* tile, int row0, int head,
                                          int row, int column = 0) {
#pragma unroll
  for (int panel = 0; panel < kWidth / kPanel; ++panel)
    StoreBox(map, tile + (panel * kRows + row0) * kPanel, column + panel * kPanel, head, row);
}

// The same in a cluster of two: each block loads half of the columns, for both.
template <int kWidth, int kRows, typename E>
__device__ __forceinline__ void LoadTileForBoth(E* to, const CUtensorMap& map, int head, int row,
                                                Barrier& full, int column = 0) {
  constexpr int kOwn = kWidth / kPanel / 2;
  const int first = ClusterRank() * kOwn;
#pragma unroll
  for (int panel = first; panel < first + kOwn; ++panel)
    LoadBoxForBoth(to + panel * kPanel * kRows, map, column + panel * kPanel, head, row, full);
}

// A consumer warp has finished reading a buffer that the copy engine fills, in a cluster of two for
// both blocks: the tensor cores have read what the other block copied here, and ordinary loads only
// what this one did. (Ordinary stores to it, forward's zeros behind the last token, are fenced, and
// the tensor cores have read them, too. What the producer writes by ordinary stores, the work item,
// every reader releases for itself: so racecheck can follow.)
template <int kBlocks = 1>
__device__ __forceinline__ void Release(Barrier& empty) {
  const int lane = threadIdx.x % 32;
  if constexpr (kBlocks == 1) {
    if (lane == 0) empty.Arrive();
  } else {
    if (lane < kBlocks) ArriveAt(empty, lane);
  }
}

// Until all threads that share memory came here: at a kernel's begin before barriers are used, at a
// cluster's end so that nobody leaves while the other block may write here.
template <int kBlocks>
__device__ __forceinline__ void SyncBlocks() {
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
    ClusterSync();
  }
}

// The consumer warpgroups queue their products by turns, a step's at a time: else both multiply at
// once, then both leave the tensor cores idle over their arithmetic. A warpgroup waits at a named
// barrier of its own, at which the other arrives when it passes the turn. Both take as many turns;
// who has one waits for copies and its own products alone, so it passes it.
class Turns {
 public:
  __device__ __forceinline__ explicit Turns(int group) : group_(group) {
    if (group_ == 1) Pass();
  }
  __device__ __forceinline__ void Take() { NamedSync(kFirstBarrier + group_, kConsumerThreads); }
  __device__ __forceinline__ void Pass() {
    NamedArrive(kFirstBarrier + 1 - group_, kConsumerThreads);
  }
  // Leaves no arrival behind.
  __device__ __forceinline__ void End() {
    if (group_ == 0) Take();
  }

 private:
  static constexpr int kFirstBarrier = 3;  // 1 and 2: all threads of a warpgroup
  int group_;
};

// This thread's warpgroup. The compiler knows it to be one for the warp, so that matrix descriptors
// which depend on it are computed in uniform registers; else they are moved there one by one
// between products.
__device__ __forceinline__ int Warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

template <int kCount>
__device__ __forceinline__ void Clear(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) r[i] = 0.f;
}
template <int kParts, int kCount>
__device__ __forceinline__ void Clear(float (&r)[kParts][kCount]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) Clear(r[part]);
}

// Sets scores [64 queries, 2 kCount keys] to `value` where the query does not see the key. `row` is
// this thread's first query row, the other one is 8 below; `end` holds subtree_end of the keys.
template <int kCount>
__device__ __forceinline__ void MaskRows(float (&x)[kCount], int row, int key0, const int* end,
                                         float value) {
  const int column0 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const int2 last = *reinterpret_cast<const int2*>(end + 8 * j + column0);
    const int key = key0 + 8 * j + column0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row + 8 * h;
      if (key > query || query >= last.x) x[4 * j + 2 * h] = value;
      if (key + 1 > query || query >= last.y) x[4 * j + 2 * h + 1] = value;
    }
  }
}

// The [rows, heads, head_dim] tensor of a row matrix.
inline MapShape MapOf(const RowMatrix& m, const AttentionShape& shape, int32_t heads) {
  return {m.data, shape.rows, m.row_stride, heads, shape.head_dim};
}

// Maps of subtree_end and context_ends, boxes of `box` keys.
inline cudaError_t MakeEndMaps(CUtensorMap& ends, CUtensorMap& context_ends,
                               const AttentionSchedule& s, int box) {
  if (s.num_context_ends > 0) {
    if (auto e = MakeWordMap(context_ends, s.context_ends, s.num_context_ends, box)) return e;
  }
  return MakeWordMap(ends, s.subtree_end, PaddedRows(s.rows), box);
}

// Context that LaunchGatherContext gathered into `data`.
inline MapShape GatheredContext(const BackwardPass& b, const void* data) {
  const AttentionShape& shape = b.args->shape;
  return {data, int64_t{b.args->schedule.num_context_tiles} * kKeyTile,
          int64_t{shape.kv_heads} * shape.head_dim, shape.kv_heads, shape.head_dim};
}

// Launches one CTA per multiprocessor, with its work counter at zero; in clusters of `blocks`, as
// many as fit.
template <class Shared, class Parameters>
cudaError_t LaunchPersistent(void (*kernel)(Parameters), const Parameters& p, int* counter,
                             cudaStream_t stream, int blocks = 1) {
  const int bytes = sizeof(Shared);
  if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return e;
  if (auto e = cudaMemsetAsync(counter, 0, sizeof(int), stream)) return e;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = Multiprocessors();
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  if (blocks > 1) {
    config.gridDim = blocks;
    int clusters = 0;
    if (auto e = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return e;
    config.gridDim = std::max(1, clusters) * blocks;  // none fits: the launch says so
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace coppice::cuda
