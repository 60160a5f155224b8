// Decode in one launch, mostly on wgmma: all rows below a context node attend to its keys at once.
//
//   out = softmax(scale Q K^T) V, from sums over runs of keys that are folded at the end
//
// An item is up to 128 stacked rows (row x query head of one KV head) and a run of whole key tiles
// of 128, in pages; no mask. Block (slot, KV head) takes the slot's items in turn; slots hold equal
// work and all blocks run at once. One warp streams K and V by TMA in steps of 64 keys, across
// items; two consumer warpgroups take 64 stacked rows each, or, of items of up to 64 rows, every
// second one; two warps take the slot's leaves, short runs of keys of few rows, on mma.sync
// (chunk_attention.cuh). Then the blocks wait for each other and fold all partial results. Traffic:
// each key once per item, 4 head_dim bytes; bound by it (4.3 TB/s) up to about 128 stacked rows, by
// the tensor cores beyond.
#include "kernels/cuda/attention/chunk_attention.cuh"
#include "kernels/cuda/attention/decode_merge.cuh"
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"
#include "kernels/cuda/attention/softmax.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {
namespace {

constexpr int kStepKeys = 64;
constexpr int kStages = 4;
constexpr int kLeafWarps = 2;
constexpr int kFirstLeafWarp = 2;  // behind one for keys and one that looks ahead
constexpr int kGroupRows = 64;     // stacked rows of a consumer warpgroup
// Loads of keys or of values that a block has on their way at a time, 48 KiB: enough to keep memory
// busy. With more, what others wait for, queries and partial results, queues behind them.
template <int D>
constexpr int kInFlight = 3 * 128 / D;

template <typename E>
struct StackedParameters {
  CUtensorMap k, v;
  ChunkParameters<E> common;
  int pieces;   // boxes of a step: pages, or one
  bool merges;  // the last step is the kernel's own
};

template <typename E, int D>
using LeafShared = ChunkShared<E, D, 16, 4>;

template <typename E, int D>
struct StackedShared {
  alignas(1024) E q[kConsumers][kGroupRows * D];
  alignas(1024) E k[kStages][kStepKeys * D];
  alignas(1024) E v[kStages][kStepKeys * D];
  LeafShared<E, D> leaves[kLeafWarps];
  BlockMerges merges;
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

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

// Items of this block's slot in a list.
struct SlotItems {
  const ChunkWork* first;
  int count;
};
__device__ __forceinline__ SlotItems ItemsOf(const ChunkWork* items, const int32_t* slots) {
  const int begin = slots[blockIdx.x];
  return {items + begin, slots[blockIdx.x + 1] - begin};
}
__device__ __forceinline__ SlotItems StackedItems(const AttentionSchedule& schedule) {
  return ItemsOf(schedule.stacked_chunks, schedule.stacked_slots);
}

// One warp: keys and values, each lane its pages of a step. They are older than the kernel ahead.
template <typename E, int D>
__device__ void LoadKeys(const StackedParameters<E>& p, StackedShared<E, D>& s) {
  Ring<kStages> ring, oldest;  // oldest: of the loads on their way
  bool oldest_is_k = true;
  int in_flight = 0;
  const auto make_room = [&] {
    if (in_flight < kInFlight<D>) {
      ++in_flight;
      return;
    }
    (oldest_is_k ? s.k_full : s.v_full)[oldest.stage].Wait(oldest.phase);
    if (!oldest_is_k) oldest.Advance();
    oldest_is_k = !oldest_is_k;
  };
  const SlotItems items = StackedItems(p.common.schedule);
  const int lane = threadIdx.x % 32, kv_head = blockIdx.y, rows = kStepKeys / p.pieces;
  const auto load = [&](E* to, const CUtensorMap& map, int slot, Barrier& full) {
    if (lane == 0) full.ArriveExpecting(kStepKeys * D * 2);
    __syncwarp();
    if (lane >= p.pieces) return;
#pragma unroll
    for (int panel = 0; panel < D / kPanel; ++panel)
      LoadBox(to + (panel * kStepKeys + lane * rows) * kPanel, map, panel * kPanel, kv_head, slot,
              full);
  };
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = items.first[n];
    for (int key = item.key_begin; key < item.key_end; key += kStepKeys, ring.Advance()) {
      const int stage = ring.stage;
      const int slot = lane < p.pieces ? SlotOf(p.common, item, key + lane * rows) : 0;
      make_room();
      s.k_empty[stage].Wait(ring.phase ^ 1);
      load(s.k[stage], p.k, slot, s.k_full[stage]);
      make_room();
      s.v_empty[stage].Wait(ring.phase ^ 1);
      load(s.v[stage], p.v, slot, s.v_full[stage]);
    }
  }
}

// One of kLeafWarps: every so many of the slot's leaves.
template <typename E, int D>
__device__ void SumLeaves(const ChunkParameters<E>& p, LeafShared<E, D>& shared, int first) {
  const SlotItems items = ItemsOf(p.schedule.leaf_chunks, p.schedule.leaf_slots);
  const int lane = threadIdx.x % 32;
  WaitForPredecessor();
  for (int n = first; n < items.count; n += kLeafWarps) {
    const WarpWork<D, 1, LeafShared<E, D>> work{
        p, items.first[n], static_cast<int>(blockIdx.y), lane, 0, shared};
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
__device__ void StorePartial(const ChunkParameters<E>& p, const ChunkWork& item, int first,
                             const float (&o)[D / 2], const float (&m)[2], const float (&l)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int stacked = first + 8 * h, row = stacked / p.group_size;
    if (row >= item.num_rows) continue;
    const int head = blockIdx.y * p.group_size + stacked % p.group_size;
    const int64_t part = int64_t{item.partial + row} * p.q_heads + head;
    float* to = p.partial.out + part * D + column;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = {o[4 * j + 2 * h], o[4 * j + 2 * h + 1]};
    if (column == 0) p.partial.sums[part] = {m[h] * p.scale * kLog2e, l[h]};
  }
}

struct ConsumerRings {
  Ring<kStages> keys, values;
};

// The warpgroup's query rows of an item, from stacked row `first` on, into its tile, zeros behind
// the item's. Not by TMA, where they would queue up behind the keys.
template <int D, typename E>
__device__ __forceinline__ void GatherQueries(const ChunkParameters<E>& p, const ChunkWork& item,
                                              int first, int group, E* tile) {
  constexpr int kPieces = D / 8, kRowsAtOnce = 128 / kPieces;
  const int thread = threadIdx.x % 128, piece = thread % kPieces;
  const E* from[kGroupRows / kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kGroupRows / kRowsAtOnce; ++i) {
    const int stacked = first + thread / kPieces + i * kRowsAtOnce;
    const int row = min(stacked / p.group_size, item.num_rows - 1);
    const int head = blockIdx.y * p.group_size + stacked % p.group_size;
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

// The item's sums for the 64 stacked rows from `first` on.
template <typename E, int D>
__device__ void ConsumeItem(const ChunkParameters<E>& p, StackedShared<E, D>& s,
                            const ChunkWork& item, int first, int group, ConsumerRings& rings) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float scale_log2 = p.scale * kLog2e;
  const int count = Steps(item);
  const uint64_t q = ColumnsAreK(s.q[Uniform(group)]);
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, shrink[2];
  float o[D / 2], scores[kStepKeys / 2];
  uint32_t probabilities[kStepKeys / 4];
  Clear(o);

  const auto start_scores = [&] {
    s.k_full[rings.keys.stage].Wait(rings.keys.phase);
    MultiplyAbt<E, D, kGroupRows>(scores, q, ColumnsAreK(s.k[Uniform(rings.keys.stage)]));
  };
  const auto start_output = [&] {
    s.v_full[rings.values.stage].Wait(rings.values.phase);
    MultiplyAdd<E, kStepKeys>(o, probabilities,
                              RowsAreK(s.v[Uniform(rings.values.stage)], kStepKeys));
  };
  const auto finish_scores = [&] {
    Pin(scores);
    Release(s.k_empty[rings.keys.stage]);
    rings.keys.Advance();
    OnlineSoftmax(scores, m, l, shrink, scale_log2);
  };
  const auto finish_output = [&] {
    WgmmaWait<0>();
    Pin(o);
    Release(s.v_empty[rings.values.stage]);
    rings.values.Advance();
  };

  GatherQueries<D>(p, item, first, group, s.q[group]);
  start_scores();
  WgmmaWait<0>();
  finish_scores();
  PackOperand<E>(probabilities, scores);
  for (int i = 1; i < count; ++i) {
    start_scores();
    start_output();
    WgmmaWait<1>();
    finish_scores();
    finish_output();
    if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
      for (int j = 0; j < D / 2; ++j) o[j] *= shrink[j / 2 % 2];
    }
    PackOperand<E>(probabilities, scores);
  }
  start_output();
  finish_output();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    l[h] += __shfl_xor_sync(~0u, l[h], 1);
    l[h] += __shfl_xor_sync(~0u, l[h], 2);
  }
  StorePartial<D>(p, item, first + warp * 16 + lane / 4, o, m, l);
}

template <typename E, int D>
__device__ void Consume(const ChunkParameters<E>& p, StackedShared<E, D>& s, int group) {
  ConsumerRings rings;
  const SlotItems items = StackedItems(p.schedule);
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = items.first[n];
    const bool is_small = item.num_rows * p.group_size <= kGroupRows;
    if (is_small && n % 2 != group) {
      PassItem(s, Steps(item), rings);
    } else {
      ConsumeItem(p, s, item, is_small ? 0 : group * kGroupRows, group, rings);
    }
  }
}

template <typename E, int D>
__device__ void InitBarriers(StackedShared<E, D>& s) {
  for (int i = 0; i < kStages; ++i) {
    s.k_full[i].Init(1), s.k_empty[i].Init(kConsumerWarps);
    s.v_full[i].Init(1), s.v_empty[i].Init(kConsumerWarps);
  }
  FenceBarrierInit();
}

template <typename E, int D>
__global__ void __launch_bounds__(kThreads, 1)
    StackedAttentionKernel(const __grid_constant__ StackedParameters<E> p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<StackedShared<E, D>*>(raw);
  LetSuccessorStart();
  if (threadIdx.x == 0) InitBarriers(s);
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp >= 4) {
    Consume(p.common, s, warp / 4 - 1);
  } else if (warp == 0) {
    LoadKeys(p, s);
  } else if (warp == 1) {
    if (p.merges) LookUp(p.common, s.merges);
  } else {
    SumLeaves(p.common, s.leaves[warp - kFirstLeafWarp], warp - kFirstLeafWarp);
  }
  if (p.merges) {
    MergeWithAllBlocks<D>(p.common, s.merges);
  } else {
    WaitForPredecessor();
  }
}

template <typename E, int D>
cudaError_t Launch(const TreeAttentionArgs& a, const ChunkScratch& scratch, cudaStream_t stream) {
  StackedParameters<E> p{};
  const ContextPages& c = a.context;
  if (a.schedule.num_arrivals < a.shape.kv_heads) return cudaErrorInvalidValue;
  const int32_t kv_heads = a.shape.kv_heads;
  const int piece = c.block_tokens < kStepKeys ? c.block_tokens : kStepKeys;
  const int64_t slots = c.num_blocks * c.block_tokens, stride = int64_t{kv_heads} * D;
  p.common = ParametersOf<E>(a, scratch);
  p.pieces = kStepKeys / piece;
  if (auto e = MakeMap(p.k, {c.k, slots, stride, kv_heads, D}, piece)) return e;
  if (auto e = MakeMap(p.v, {c.v, slots, stride, kv_heads, D}, piece)) return e;
  const dim3 grid(a.schedule.num_stacked_slots, kv_heads);
  // Blocks may wait for each other only where the device holds them all.
  p.merges =
      int64_t{grid.x} * grid.y <= Multiprocessors() &&
      int64_t{a.schedule.num_merges} * p.common.group_size <= int64_t{BlockMerges::kCount} * grid.x;
  if (auto e = LaunchOverlapped<StackedAttentionKernel<E, D>>(
          {grid, kThreads, sizeof(StackedShared<E, D>)}, stream, p))
    return e;
  return p.merges ? cudaSuccess : LaunchMerges(a, scratch, stream);
}

}  // namespace

cudaError_t LaunchStackedChunks(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                                cudaStream_t stream) {
  return ForElement(args.shape.dtype, [&]<typename E>(E) {
    if (args.shape.head_dim == 64) return Launch<E, 64>(args, scratch, stream);
    if (args.shape.head_dim == 128) return Launch<E, 128>(args, scratch, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace coppice::cuda
