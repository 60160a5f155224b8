// The shared memory of a block of stacked_attention.cu, and what its consumer warpgroups do:
// softmax sums of 64 stacked rows each over an item's keys, on wgmma.
#pragma once

#include "kernels/cuda/attention/chunk_attention.cuh"
#include "kernels/cuda/attention/decode_merge.cuh"
#include "kernels/cuda/attention/leaf_sums.cuh"
#include "kernels/cuda/attention/pipeline.cuh"
#include "kernels/cuda/attention/softmax.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {

constexpr int kStepKeys = 64;
constexpr int kKeyStages = 5;  // of keys, and of values
constexpr int kLeafWarps = 2;
constexpr int kGroupRows = 64;  // stacked rows of a consumer warpgroup

template <typename E, int D>
struct StackedShared {
  alignas(1024) E q[kConsumers][kGroupRows * D];
  alignas(1024) E k[kKeyStages][kStepKeys * D];
  alignas(1024) E v[kKeyStages][kStepKeys * D];
  LeafShared<E, D> leaves[kLeafWarps];
  BlockMerges merges;
  Barrier k_full[kKeyStages], k_empty[kKeyStages], v_full[kKeyStages], v_empty[kKeyStages];
};

__device__ __forceinline__ int Steps(const ChunkWork& item) {
  return (item.key_end - item.key_begin) / kStepKeys;
}

// Of lane 0: the compiler keeps what it knows to be the same for the warp, and matrix descriptors
// made of it, in uniform registers, from where products take them.
__device__ __forceinline__ int Uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Items of a slot in a list.
struct SlotItems {
  const ChunkWork* first;
  int count;
  __device__ SlotItems(const ChunkWork* items, const int32_t* slots, int slot) {
    const int begin = slots[slot];
    first = items + begin, count = slots[slot + 1] - begin;
  }
};
__device__ __forceinline__ SlotItems StackedItems(const AttentionSchedule& schedule, int slot) {
  return {schedule.stacked_chunks, schedule.stacked_slots, slot};
}

// Writes this thread's accumulators as partial results.
template <int D, bool kPacked, typename E>
__device__ void StorePartial(const ChunkParameters<E>& p, const ChunkWork& item, int kv_head,
                             int first, const float (&o)[D / 2], const LateSoftmax& softmax) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int stacked = first + 8 * h, row = stacked / p.group_size;
    const int head = kv_head * p.group_size + stacked % p.group_size;
    const int64_t part = int64_t{item.partial + row} * p.q_heads + head;
    const PartialRow<D> to{row < item.num_rows ? part : -1, static_cast<int>(threadIdx.x % 4), 1};
    to.template Store<kPacked>(p, softmax.base[h], softmax.sum[h],
                               [&](int j, int e) { return o[4 * j + 2 * h + e]; });
  }
}

struct ConsumerRings {
  Ring<kKeyStages> keys, values;
};

// The warpgroup's query rows of an item, from stacked row `first` on, into its tile, zeros behind
// the item's. Not by TMA, where they would queue up behind the keys.
template <int D, typename E>
__device__ __forceinline__ void GatherQueries(const ChunkParameters<E>& p, const ChunkWork& item,
                                              int kv_head, int first, int group, E* tile) {
  constexpr int kPieces = D / 8, kRowsAtOnce = 128 / kPieces;
  const int thread = threadIdx.x % 128, piece = thread % kPieces;
  const E* from[kGroupRows / kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kGroupRows / kRowsAtOnce; ++i) {
    const int stacked = first + thread / kPieces + i * kRowsAtOnce;
    const int row = min(stacked / p.group_size, item.num_rows - 1);
    const int head = kv_head * p.group_size + stacked % p.group_size;
    from[i] = p.q + p.schedule.chunk_rows[item.rows_begin + row] * p.q_stride + head * D;
  }
  WaitForPredecessor();
  NamedSync(1 + group, 128);  // all warps are through with the item before
#pragma unroll
  for (int i = 0; i < kGroupRows / kRowsAtOnce; ++i) {
    const int row = thread / kPieces + i * kRowsAtOnce;
    E* line = tile + (piece / 8 * kGroupRows + row) * kPanel;
    CopyAsync(SharedAddress(line + ((piece % 8) ^ (row & 7)) * 8), from[i] + piece * 8,
              first + row < item.num_rows * p.group_size);
  }
  CommitCopies();
  WaitCopies<0>();
  FenceAsyncShared();
  NamedSync(1 + group, 128);
}

// Lets an item pass that the other warpgroup works on.
template <typename E, int D>
__device__ void PassItem(StackedShared<E, D>& s, int count, ConsumerRings& rings) {
  for (int i = 0; i < count; ++i, rings.keys.Advance(), rings.values.Advance()) {
    s.k_full[rings.keys.stage].Wait(rings.keys.phase);
    Release(s.k_empty[rings.keys.stage]);
    s.v_full[rings.values.stage].Wait(rings.values.phase);
    Release(s.v_empty[rings.values.stage]);
  }
}

// The item's sums for the 64 stacked rows from `first` on. Scores of a step, then the output of the
// step before are queued; issuing products takes as long as they do, so a warpgroup has its softmax
// while the other one multiplies.
template <typename E, int D, bool kPacked>
__device__ void ConsumeItem(const ChunkParameters<E>& p, StackedShared<E, D>& s,
                            const ChunkWork& item, int kv_head, int first, int group,
                            ConsumerRings& rings) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float scale_log2 = p.scale * kLog2e;
  const int count = Steps(item);
  const uint64_t q = ColumnsAreK(s.q[Uniform(group)]);
  LateSoftmax softmax;
  float o[D / 2], scores[kStepKeys / 2];
  uint32_t probabilities[kStepKeys / 4];
  Clear(o);

  const auto start_scores = [&] {
    const uint64_t keys = ColumnsAreK(s.k[Uniform(rings.keys.stage)]);
    s.k_full[rings.keys.stage].Wait(rings.keys.phase);
    MultiplyAbt<E, D, kGroupRows>(scores, q, keys);
  };
  const auto finish_scores = [&](bool is_first) {
    Pin(scores);
    Release(s.k_empty[rings.keys.stage]);
    rings.keys.Advance();
    softmax.Add<E>(scores, probabilities, scale_log2, is_first, [&](const float(&shrink)[2]) {
#pragma unroll
      for (int j = 0; j < D / 2; ++j) o[j] *= shrink[j / 2 % 2];
    });
  };
  const auto start_output = [&] {
    const uint64_t values = RowsAreK(s.v[Uniform(rings.values.stage)], kStepKeys);
    s.v_full[rings.values.stage].Wait(rings.values.phase);
    MultiplyAdd<E, kStepKeys>(o, probabilities, values);
  };
  const auto finish_output = [&] {
    WgmmaWait<0>();
    Pin(o);
    Release(s.v_empty[rings.values.stage]);
    rings.values.Advance();
  };

  GatherQueries<D>(p, item, kv_head, first, group, s.q[group]);
  start_scores();
  WgmmaWait<0>();
  finish_scores(true);
  for (int i = 1; i < count; ++i) {
    start_scores();
    start_output();
    finish_output();
    finish_scores(false);
  }
  start_output();
  finish_output();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    softmax.sum[h] += __shfl_xor_sync(~0u, softmax.sum[h], 1);
    softmax.sum[h] += __shfl_xor_sync(~0u, softmax.sum[h], 2);
  }
  StorePartial<D, kPacked>(p, item, kv_head, first + warp * 16 + lane / 4, o, softmax);
}

template <typename E, int D, bool kPacked>
__device__ void Consume(const ChunkParameters<E>& p, StackedShared<E, D>& s, const DecodePlace& at,
                        int group) {
  ConsumerRings rings;
  const SlotItems items = StackedItems(p.schedule, at.slot);
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = items.first[n];
    const bool is_small = item.num_rows * p.group_size <= kGroupRows;
    if (is_small && n % 2 != group) {
      PassItem(s, Steps(item), rings);
    } else {
      ConsumeItem<E, D, kPacked>(p, s, item, at.kv_head, is_small ? 0 : group * kGroupRows, group,
                                 rings);
    }
  }
}

}  // namespace coppice::cuda
