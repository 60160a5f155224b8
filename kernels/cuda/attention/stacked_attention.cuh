// What a block of a decode kernel does for its slot and KV head: softmax sums of up to 128 stacked
// rows over runs of keys on wgmma, and of leaves on mma.sync. For stacked_attention.cu, which says
// how the work is shared.
//
// `Shared` is the block's shared memory: Element, kHeadDim, Leaves (a ChunkShared), tiles
// queries(consumer) [kGroupRows, D], keys(stage) and values(stage) [kStepKeys, D], barriers
// k_full(stage), k_empty(stage) of kConsumerWarps arrivals, v_full, v_empty.
#pragma once

#include "kernels/cuda/attention/chunk_attention.cuh"
#include "kernels/cuda/attention/decode_merge.cuh"
#include "kernels/cuda/attention/pipeline.cuh"
#include "kernels/cuda/attention/softmax.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {

constexpr int kStepKeys = 64;
constexpr int kKeyStages = 4;  // of keys, and of values
constexpr int kLeafWarps = 2;
constexpr int kGroupRows = 64;  // stacked rows of a consumer warpgroup
// Loads of keys or of values that a block has on their way at a time, 48 KiB: enough to keep memory
// busy. With more, what others wait for, queries and partial results, queues behind them.
template <int D>
constexpr int kKeyLoads = 3 * 128 / D;

template <typename E>
struct StackedParameters {
  CUtensorMap k, v;
  ChunkParameters<E> common;
  int pieces;   // boxes of a step: pages, or one
  bool merges;  // the last step is the kernel's own
};

template <typename E, int D>
cudaError_t MakeStackedParameters(StackedParameters<E>& p, const TreeAttentionArgs& a,
                                  const ChunkScratch& scratch) {
  const ContextPages& c = a.context;
  const int32_t kv_heads = a.shape.kv_heads;
  if (a.schedule.num_arrivals < kv_heads) return cudaErrorInvalidValue;
  const int piece = c.block_tokens < kStepKeys ? c.block_tokens : kStepKeys;
  const int64_t slots = c.num_blocks * c.block_tokens, stride = int64_t{kv_heads} * D;
  p.common = ParametersOf<E>(a, scratch);
  p.pieces = kStepKeys / piece;
  // Blocks may wait for each other only where the device holds them all.
  p.merges = int64_t{a.schedule.num_stacked_slots} * kv_heads <= Multiprocessors() &&
             int64_t{a.schedule.num_merges} * p.common.group_size <=
                 int64_t{BlockMerges::kCount} * a.schedule.num_stacked_slots;
  if (auto e = MakeMap(p.k, {c.k, slots, stride, kv_heads, D}, piece)) return e;
  return MakeMap(p.v, {c.v, slots, stride, kv_heads, D}, piece);
}

__device__ __forceinline__ int Steps(const ChunkWork& item) {
  return (item.key_end - item.key_begin) / kStepKeys;
}

template <typename E>
__device__ __forceinline__ int SlotOf(const ChunkParameters<E>& p, const ChunkWork& item, int key) {
  const int block = p.schedule.chunk_blocks[item.first_block + (key >> p.block_shift) -
                                            (item.key_begin >> p.block_shift)];
  return (block << p.block_shift) + (key & ((1 << p.block_shift) - 1));
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

// Keys or values of a step into their stage. One warp: each lane its pages.
template <typename E, typename Shared>
struct KeyLoader {
  static constexpr int D = Shared::kHeadDim;
  const StackedParameters<E>& p;
  int kv_head;
  uint64_t policy = p.common.schedule.stacked_once ? EvictFirst() : EvictNormal();
  int lane = threadIdx.x % 32, rows = kStepKeys / p.pieces;

  // Where this lane's page of the step at `key` begins.
  __device__ __forceinline__ int SlotAt(const ChunkWork& item, int key) const {
    return lane < p.pieces ? SlotOf(p.common, item, key + lane * rows) : 0;
  }
  __device__ __forceinline__ void Load(E* to, const CUtensorMap& map, int slot,
                                       Barrier& full) const {
    if (lane == 0) full.ArriveExpecting(kStepKeys * D * 2);
    __syncwarp();
    if (lane >= p.pieces) return;
#pragma unroll
    for (int panel = 0; panel < D / kPanel; ++panel)
      LoadBox(to + (panel * kStepKeys + lane * rows) * kPanel, map, panel * kPanel, kv_head, slot,
              full, policy);
  }
};

// One of kLeafWarps: every so many of the slot's leaves.
template <int D, typename E, typename Leaves>
__device__ void SumLeaves(const ChunkParameters<E>& p, const DecodePlace& at, Leaves& shared,
                          int first) {
  const SlotItems items(p.schedule.leaf_chunks, p.schedule.leaf_slots, at.slot);
  const int lane = threadIdx.x % 32;
  WaitForPredecessor();
  for (int n = first; n < items.count; n += kLeafWarps) {
    const WarpWork<D, 1, Leaves> work{p, items.first[n], at.kv_head, lane, 0, shared};
    const int begin = work.item.key_begin, end = work.item.key_end;
    work.StartSplit(begin, end);
    uint32_t q[D / 16][4];
    int rows[2];
    work.LoadQueries(q, rows);
    RowSums<D> sums;
    work.SumSplit(sums, q, rows, begin, end);
    work.Write(InRegisters<D>{sums});
  }
}

// Writes this thread's accumulators, not normalised, as partial results.
template <int D, typename E>
__device__ void StorePartial(const ChunkParameters<E>& p, const ChunkWork& item, int kv_head,
                             int first, const float (&o)[D / 2], const LateSoftmax& softmax) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int stacked = first + 8 * h, row = stacked / p.group_size;
    if (row >= item.num_rows) continue;
    const int head = kv_head * p.group_size + stacked % p.group_size;
    const int64_t part = int64_t{item.partial + row} * p.q_heads + head;
    float* to = p.partial.out + part * D + column;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = {o[4 * j + 2 * h], o[4 * j + 2 * h + 1]};
    if (column == 0) p.partial.sums[part] = {softmax.base[h], softmax.sum[h]};
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
template <typename Shared, typename Rings>
__device__ void PassItem(Shared& s, int count, Rings& rings) {
  for (int i = 0; i < count; ++i, rings.keys.Advance(), rings.values.Advance()) {
    s.k_full(rings.keys.stage).Wait(rings.keys.phase);
    Release(s.k_empty(rings.keys.stage));
    s.v_full(rings.values.stage).Wait(rings.values.phase);
    Release(s.v_empty(rings.values.stage));
  }
}

// The item's sums for the 64 stacked rows from `first` on. Scores of a step, then the output of the
// step before are queued; issuing products takes as long as they do, so a warpgroup has its softmax
// while the other one multiplies.
template <typename E, typename Shared, typename Rings>
__device__ void ConsumeItem(const ChunkParameters<E>& p, Shared& s, const ChunkWork& item,
                            int kv_head, int first, int group, Rings& rings) {
  constexpr int D = Shared::kHeadDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float scale_log2 = p.scale * kLog2e;
  const int count = Steps(item);
  const uint64_t q = ColumnsAreK(s.queries(Uniform(group)));
  LateSoftmax softmax;
  float o[D / 2], scores[kStepKeys / 2];
  uint32_t probabilities[kStepKeys / 4];
  Clear(o);

  const auto start_scores = [&] {
    const uint64_t keys = ColumnsAreK(s.keys(Uniform(rings.keys.stage)));
    s.k_full(rings.keys.stage).Wait(rings.keys.phase);
    MultiplyAbt<E, D, kGroupRows>(scores, q, keys);
  };
  const auto finish_scores = [&](bool is_first) {
    Pin(scores);
    Release(s.k_empty(rings.keys.stage));
    rings.keys.Advance();
    softmax.Add<E>(scores, probabilities, scale_log2, is_first, [&](const float(&shrink)[2]) {
#pragma unroll
      for (int j = 0; j < D / 2; ++j) o[j] *= shrink[j / 2 % 2];
    });
  };
  const auto start_output = [&] {
    const uint64_t values = RowsAreK(s.values(Uniform(rings.values.stage)), kStepKeys);
    s.v_full(rings.values.stage).Wait(rings.values.phase);
    MultiplyAdd<E, kStepKeys>(o, probabilities, values);
  };
  const auto finish_output = [&] {
    WgmmaWait<0>();
    Pin(o);
    Release(s.v_empty(rings.values.stage));
    rings.values.Advance();
  };

  GatherQueries<D>(p, item, kv_head, first, group, s.queries(group));
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
  StorePartial<D>(p, item, kv_head, first + warp * 16 + lane / 4, o, softmax);
}

template <typename E, typename Shared, typename Rings>
__device__ void Consume(const ChunkParameters<E>& p, Shared& s, const DecodePlace& at, int group,
                        Rings& rings) {
  const SlotItems items = StackedItems(p.schedule, at.slot);
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = items.first[n];
    const bool is_small = item.num_rows * p.group_size <= kGroupRows;
    if (is_small && n % 2 != group) {
      PassItem(s, Steps(item), rings);
    } else {
      ConsumeItem(p, s, item, at.kv_head, is_small ? 0 : group * kGroupRows, group, rings);
    }
  }
}

}  // namespace coppice::cuda
