// Decode in one launch, mostly on wgmma: all rows below a context node attend to its keys at once.
//
//   out = softmax(scale Q K^T) V, from sums over runs of keys that are folded at the end
//
// An item is up to 128 stacked rows (row x query head of one KV head) and a run of whole key tiles
// of 128, in pages; no mask. Block (slot, KV head) takes the slot's items in turn; slots hold equal
// work and all blocks run at once. One warp streams K and V by TMA in steps of 64 keys, across
// items; two consumer warpgroups take 64 stacked rows each, or, of items of up to 64 rows, every
// second one; two warps take the slot's leaves, short runs of keys of few rows, on mma.sync
// (leaf_sums.cuh). Then, where nothing else has results for them, the blocks wait for each other
// and fold all partial results. Traffic: each key once per item, 4 head_dim bytes; bound by it (4.3
// TB/s) up to about 128 stacked rows, by the tensor cores beyond.
#include "kernels/cuda/attention/stacked_attention.cuh"

namespace coppice::cuda {
namespace {

constexpr int kFirstLeafWarp = 2;  // behind one for keys and one that looks ahead

// Loads of keys or of values that a block has on their way at a time, 48 KiB: enough to keep memory
// busy. With more, what others wait for, queries and partial results, queues behind them.
template <int D>
constexpr int kKeyLoads = 3 * 128 / D;

template <typename E>
struct StackedParameters {
  CUtensorMap k, v;
  ChunkParameters<E> common;
  int pieces;  // boxes of a step: pages, or one
};

template <typename E>
__device__ __forceinline__ int SlotOf(const ChunkParameters<E>& p, const ChunkWork& item, int key) {
  const int block = p.schedule.chunk_blocks[item.first_block + (key >> p.block_shift) -
                                            (item.key_begin >> p.block_shift)];
  return (block << p.block_shift) + (key & ((1 << p.block_shift) - 1));
}

// Keys or values of a step into their stage. One warp: each lane its pages.
template <typename E, int D>
struct KeyLoader {
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

// One warp: keys and values of all steps. They are older than the kernel ahead.
template <typename E, int D>
__device__ void LoadKeys(const StackedParameters<E>& p, StackedShared<E, D>& s,
                         const DecodePlace& at) {
  Ring<kKeyStages> ring, oldest;  // oldest: of the loads on their way
  bool oldest_is_k = true;
  int in_flight = 0;
  const auto make_room = [&] {
    if (in_flight < kKeyLoads<D>) {
      ++in_flight;
      return;
    }
    (oldest_is_k ? s.k_full[oldest.stage] : s.v_full[oldest.stage]).Wait(oldest.phase);
    if (!oldest_is_k) oldest.Advance();
    oldest_is_k = !oldest_is_k;
  };
  const KeyLoader<E, D> loader{p, at.kv_head};
  const SlotItems items = StackedItems(p.common.schedule, at.slot);
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = items.first[n];
    for (int key = item.key_begin; key < item.key_end; key += kStepKeys, ring.Advance()) {
      const int stage = ring.stage, slot = loader.SlotAt(item, key);
      make_room();
      s.k_empty[stage].Wait(ring.phase ^ 1);
      loader.Load(s.k[stage], p.k, slot, s.k_full[stage]);
      make_room();
      s.v_empty[stage].Wait(ring.phase ^ 1);
      loader.Load(s.v[stage], p.v, slot, s.v_full[stage]);
    }
  }
}

// One of kLeafWarps: every so many of the slot's leaves.
template <typename E, int D, bool kPacked>
__device__ void SumLeaves(const ChunkParameters<E>& p, const DecodePlace& at,
                          LeafShared<E, D>& shared, int first) {
  const SlotItems items(p.schedule.leaf_chunks, p.schedule.leaf_slots, at.slot);
  const int lane = threadIdx.x % 32;
  WaitForPredecessor();
  for (int n = first; n < items.count; n += kLeafWarps) {
    const WarpWork<D, 1, LeafShared<E, D>> keys{p, items.first[n], at.kv_head, lane, 0, shared};
    LeafWork<E, D, kPacked>{p, keys}.Run();
  }
}

template <typename E, int D>
__device__ void InitBarriers(StackedShared<E, D>& s) {
  for (int i = 0; i < kKeyStages; ++i) {
    s.k_full[i].Init(1), s.k_empty[i].Init(kConsumerWarps);
    s.v_full[i].Init(1), s.v_empty[i].Init(kConsumerWarps);
  }
  FenceBarrierInit();
}

// kMerges: the last step is the kernel's own.
template <typename E, int D, bool kMerges>
__global__ void __launch_bounds__(kThreads, 1)
    StackedAttentionKernel(const __grid_constant__ StackedParameters<E> p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<StackedShared<E, D>*>(raw);
  LetSuccessorStart();
  if (threadIdx.x == 0) InitBarriers(s);
  __syncthreads();
  const DecodePlace at;
  const int warp = threadIdx.x / 32;
  if (warp >= 4) {
    Consume<E, D, kMerges>(p.common, s, at, warp / 4 - 1);
  } else if (warp == 0) {
    LoadKeys(p, s, at);
  } else if (warp == 1) {
    if constexpr (kMerges) LookUp(p.common, at, s.merges);
  } else {
    const int first = warp - kFirstLeafWarp;
    SumLeaves<E, D, kMerges>(p.common, at, s.leaves[first], first);
  }
  if constexpr (kMerges) {
    MergeWithAllBlocks<D>(p.common, at, s.merges);
  } else {
    WaitForPredecessor();
  }
}

template <typename E, int D>
cudaError_t Launch(const TreeAttentionArgs& a, const ChunkScratch& scratch, cudaStream_t stream) {
  const ContextPages& c = a.context;
  const int32_t kv_heads = a.shape.kv_heads;
  if (a.schedule.num_arrivals < kv_heads) return cudaErrorInvalidValue;
  const int piece = c.block_tokens < kStepKeys ? c.block_tokens : kStepKeys;
  const int64_t slots = c.num_blocks * c.block_tokens, stride = int64_t{kv_heads} * D;
  StackedParameters<E> p{};
  p.common = ParametersOf<E>(a, scratch);
  p.pieces = kStepKeys / piece;
  if (auto e = MakeMap(p.k, {c.k, slots, stride, kv_heads, D}, piece)) return e;
  if (auto e = MakeMap(p.v, {c.v, slots, stride, kv_heads, D}, piece)) return e;
  const dim3 grid(a.schedule.num_stacked_slots, kv_heads);
  // Blocks may wait for each other only where the device holds them all; and they read no results
  // but their own, which have a form of their own.
  const bool merges =
      int64_t{grid.x} * grid.y <= Multiprocessors() &&
      a.schedule.num_wide + a.schedule.num_narrow == 0 &&
      int64_t{a.schedule.num_merges} * p.common.group_size <= int64_t{BlockMerges::kCount} * grid.x;
  const OverlappedGrid blocks{grid, kThreads, sizeof(StackedShared<E, D>)};
  if (merges) return LaunchOverlapped<StackedAttentionKernel<E, D, true>>(blocks, stream, p);
  if (auto e = LaunchOverlapped<StackedAttentionKernel<E, D, false>>(blocks, stream, p)) return e;
  return LaunchMerges(a, scratch, stream);
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
