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
#include "kernels/cuda/attention/stacked_attention.cuh"

namespace coppice::cuda {
namespace {

constexpr int kFirstLeafWarp = 2;  // behind one for keys and one that looks ahead

template <typename E, int D>
struct StackedShared {
  static constexpr int kHeadDim = D;
  using Leaves = ChunkShared<E, D, 16, 4>;
  alignas(1024) E q[kConsumers][kGroupRows * D];
  alignas(1024) E k[kKeyStages][kStepKeys * D];
  alignas(1024) E v[kKeyStages][kStepKeys * D];
  Leaves leaves[kLeafWarps];
  BlockMerges merges;
  Barrier k_fulls[kKeyStages], k_empties[kKeyStages], v_fulls[kKeyStages], v_empties[kKeyStages];

  __device__ __forceinline__ E* queries(int group) { return q[group]; }
  __device__ __forceinline__ E* keys(int stage) { return k[stage]; }
  __device__ __forceinline__ E* values(int stage) { return v[stage]; }
  __device__ __forceinline__ Barrier& k_full(int stage) { return k_fulls[stage]; }
  __device__ __forceinline__ Barrier& k_empty(int stage) { return k_empties[stage]; }
  __device__ __forceinline__ Barrier& v_full(int stage) { return v_fulls[stage]; }
  __device__ __forceinline__ Barrier& v_empty(int stage) { return v_empties[stage]; }
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
    (oldest_is_k ? s.k_full(oldest.stage) : s.v_full(oldest.stage)).Wait(oldest.phase);
    if (!oldest_is_k) oldest.Advance();
    oldest_is_k = !oldest_is_k;
  };
  const KeyLoader<E, StackedShared<E, D>> loader{p, at.kv_head};
  const SlotItems items = StackedItems(p.common.schedule, at.slot);
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = items.first[n];
    for (int key = item.key_begin; key < item.key_end; key += kStepKeys, ring.Advance()) {
      const int stage = ring.stage, slot = loader.SlotAt(item, key);
      make_room();
      s.k_empty(stage).Wait(ring.phase ^ 1);
      loader.Load(s.keys(stage), p.k, slot, s.k_full(stage));
      make_room();
      s.v_empty(stage).Wait(ring.phase ^ 1);
      loader.Load(s.values(stage), p.v, slot, s.v_full(stage));
    }
  }
}

template <typename E, int D>
__device__ void InitBarriers(StackedShared<E, D>& s) {
  for (int i = 0; i < kKeyStages; ++i) {
    s.k_full(i).Init(1), s.k_empty(i).Init(kConsumerWarps);
    s.v_full(i).Init(1), s.v_empty(i).Init(kConsumerWarps);
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
  const DecodePlace at = {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
                          static_cast<int>(blockIdx.y)};
  const int warp = threadIdx.x / 32;
  if (warp >= 4) {
    ConsumerRings rings;
    Consume(p.common, s, at, warp / 4 - 1, rings);
  } else if (warp == 0) {
    LoadKeys(p, s, at);
  } else if (warp == 1) {
    if (p.merges) LookUp(p.common, at, s.merges);
  } else {
    SumLeaves<D>(p.common, at, s.leaves[warp - kFirstLeafWarp], warp - kFirstLeafWarp);
  }
  if (p.merges) {
    MergeWithAllBlocks<D>(p.common, at, s.merges);
  } else {
    WaitForPredecessor();
  }
}

template <typename E, int D>
cudaError_t Launch(const TreeAttentionArgs& a, const ChunkScratch& scratch, cudaStream_t stream) {
  StackedParameters<E> p{};
  if (auto e = MakeStackedParameters<E, D>(p, a, scratch)) return e;
  const dim3 grid(a.schedule.num_stacked_slots, a.shape.kv_heads);
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
