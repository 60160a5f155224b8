// Backward pass, dK and dV at head_dim 256. A block owns 64 keys of one KV head and loops over row
// tiles of 64 and the group's heads, last rows first; no atomics. Its accumulators fill two
// warpgroups, so each holds one of them whole, and the probabilities go from one to the other:
//   values   S^T  = K Q^T     16 x m64n64k16     P^T  = exp2(scale' S^T - lse), to shared memory
//            dV  += P^T dO    4 x 2 x m64n128k16, P from registers
//   keys     dP^T = V dO^T    16 x m64n64k16     dS^T = P^T * (dP^T - delta)
//            dK  += dS^T Q    4 x 2 x m64n128k16, dS from registers
// Both multiply equally much, and each one's arithmetic runs under the other's products. Thread t
// of one hands its words to thread t of the other. Registers: dV or dK 128, S or dP 32, P 16,
// dS 16. Shared memory: K, V 64 KB + 2 x (Q 32 + dO 32 + P 8) = 208 KB. Traffic: 64 KB per 64 x 64
// tile pair for 8.4 MFLOP, 128 FLOP per L2 byte.
#include "kernels/cuda/attention/backward_tiles.cuh"

namespace coppice::cuda {
namespace {

constexpr int D = 256;
constexpr int kStages = 2;
constexpr int kKeys = kKeyTile / 2;
constexpr int kParts = 2, kPart = D / kParts;  // columns of a product
constexpr int kWords = kColumns / 4;           // of P or dS a thread
constexpr int kPackedP = kWords * 128;
constexpr int kBothWarps = 8;

template <typename E>
struct WideShared {
  alignas(1024) E k[kKeys * D];
  alignas(1024) E v[kKeys * D];
  alignas(1024) E q[kStages][kColumns * D];
  alignas(1024) E dout[kStages][kColumns * D];
  alignas(16) uint32_t p[kStages][kPackedP];  // word w of thread t at [w * 128 + t]
  alignas(16) float lse[kStages][kColumns];
  alignas(16) float delta[kStages][kColumns];
  KeysWork work;
  Barrier kv_full, kv_empty;
  Barrier q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
  Barrier p_full[kStages], p_empty[kStages];  // every thread arrives for itself
};

template <typename E>
__device__ void Produce(const KeysParameters& p, WideShared<E>& s) {
  Ring<1> items;
  Ring<kStages> ring;
  for (int item, next = atomicAdd(p.counter, 1);; items.Advance()) {
    item = next;
    if (item >= p.order.items()) break;
    next = atomicAdd(p.counter, 1);
    const auto [tile_idx, half_head] = p.order.at(item);
    s.kv_empty.Wait(items.phase ^ 1);
    s.work = WorkOf(p, tile_idx, p.first_kv_head + half_head / 2, half_head % 2);
    const KeysWork& work = s.work;
    const bool cached = work.tile < 0;
    const int row0 = FirstRow(work.tile) + work.half * kKeys;
    s.kv_full.ArriveExpecting(2 * kKeys * D * 2);
    LoadTile<D, kKeys>(s.k, cached ? p.context_k : p.k, work.head, row0, s.kv_full);
    LoadTile<D, kKeys>(s.v, cached ? p.context_v : p.v, work.head, row0, s.kv_full);
    ForEachStep(p, work, [&](int head, int row) {
      const int stage = ring.stage;
      const int at = head * p.padded + row;
      s.q_empty[stage].Wait(ring.phase ^ 1);
      s.q_full[stage].ArriveExpecting(kColumns * (D * 2 + 4));
      LoadTile<D, kColumns>(s.q[stage], p.q, head, row, s.q_full[stage]);
      LoadWords(s.lse[stage], p.lse, at, s.q_full[stage]);
      s.dout_empty[stage].Wait(ring.phase ^ 1);
      s.dout_full[stage].ArriveExpecting(kColumns * (D * 2 + 4));
      LoadTile<D, kColumns>(s.dout[stage], p.dout, head, row, s.dout_full[stage]);
      LoadWords(s.delta[stage], p.delta, at, s.dout_full[stage]);
      ring.Advance();
    });
  }
  s.kv_empty.Wait(items.phase ^ 1);
  s.work.steps = -1;
  s.kv_full.Arrive();
}

// dK is share 0 of a tile's sums, dV share 1, of either half.
__device__ __forceinline__ float* ShareOf(const KeysParameters& p, const KeysWork& work, int share,
                                          int part) {
  return SumsOf<D>(p, work, (work.half * 2 + share) * kParts + part, 4 * kParts);
}

// Stores the accumulators of an item: rows of `map` by way of `staged`, the tile that only this
// warpgroup read, or += into the pages.
template <typename E>
__device__ void Finish(const KeysParameters& p, WideShared<E>& s, const KeysWork& work, int key,
                       float (&d)[kParts][kPart / 2], float factor, const CUtensorMap& map,
                       E* staged, float* pages, int share) {
  const int barrier = 1 + share;
  if (work.tile < 0) {
    if (pages) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        AddToPages<D>(p, pages, work.tile, key, work.head, part * kPart, d[part], factor);
    }
    NamedSync(barrier, 128);
    s.kv_empty.Arrive();
    return;
  }
  if (s.work.part & kBegun) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      AddSums<128>(ShareOf(p, work, share, part), threadIdx.x % 128, d[part]);
  }
  if (s.work.part & kGoesOn) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      KeepSums<128>(ShareOf(p, work, share, part), threadIdx.x % 128, d[part]);
    s.kv_empty.Arrive();
    return;
  }
  NamedSync(barrier, 128);
#pragma unroll
  for (int part = 0; part < kParts; ++part)
    StoreAccumulators<kKeys>(staged + part * kPart * kKeys, 0, d[part], factor, factor);
  FenceAsyncShared();
  NamedSync(barrier, 128);
  if (threadIdx.x % 128 == 0) {
    StoreRows<D, kKeys>(map, staged, 0, work.head, work.tile * kKeyTile + work.half * kKeys);
    CommitStores();
    WaitStoresRead();
  }
  s.kv_empty.Arrive();
}

// P and dV.
template <typename E>
__device__ void ConsumeValues(const KeysParameters& p, WideShared<E>& s) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t k = ColumnsAreK(s.k);
  Ring<1> items;
  Ring<kStages> ring;
  for (;; items.Advance()) {
    s.kv_full.Wait(items.phase);
    const KeysWork work = s.work;
    if (work.steps < 0) break;
    const int key = work.half * kKeys + warp * 16 + lane / 4;
    StepCursor<true> at(p, work);
    KeySpans keys = SpansOf<true>(p, work.tile, key, at.run);
    float dv[kParts][kPart / 2];
    Clear(dv);
    for (; at.step < work.steps; ring.Advance()) {
      const int stage = ring.stage;
      float scores[kColumns / 2];
      s.q_full[stage].Wait(ring.phase);
      MultiplyAbt<E, D, kKeys>(scores, k, ColumnsAreK(s.q[stage]));
      WgmmaWait<1>();  // dV of the step before: frees its operand and its dO
      Pin(dv);
      if (at.step > 0) Release(s.dout_empty[(stage + kStages - 1) % kStages]);
      WgmmaWait<0>();  // S^T
      Pin(scores);
      ColumnProbabilities(scores, s.lse[stage], scale_log2);
      __syncwarp();
      Release(s.q_empty[stage]);
      if (at.partial()) MaskColumns(scores, at.query_tile * kColumns, keys);
      uint32_t p_operand[kWords];
      PackOperand<E>(p_operand, scores);
      s.p_empty[stage].Wait(ring.phase ^ 1);
#pragma unroll
      for (int i = 0; i < kWords; ++i) s.p[stage][i * 128 + thread] = p_operand[i];
      s.p_full[stage].Arrive();
      s.dout_full[stage].Wait(ring.phase);
      MultiplyAdd<E, kColumns>(dv, p_operand, RowsAreK(s.dout[stage], kColumns));
      if (at.Advance(p)) keys = SpansOf<true>(p, work.tile, key, at.run);
    }
    WgmmaWait<0>();
    Pin(dv);
    if (work.steps > 0) Release(s.dout_empty[(ring.stage + kStages - 1) % kStages]);
    Finish(p, s, work, key, dv, kBackwardUnit<E>, p.dv, s.k, p.d_context_v, 1);
  }
}

// dS and dK.
template <bool kStore, typename E>
__device__ void ConsumeKeys(const KeysParameters& p, WideShared<E>& s) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const uint64_t v = ColumnsAreK(s.v);
  Ring<1> items;
  Ring<kStages> ring;
  for (;; items.Advance()) {
    s.kv_full.Wait(items.phase);
    const KeysWork work = s.work;
    if (work.steps < 0) break;
    StepCursor<true> at(p, work);
    float dk[kParts][kPart / 2];
    Clear(dk);
    for (; at.step < work.steps; at.Advance(p), ring.Advance()) {
      const int stage = ring.stage;
      float dp[kColumns / 2];
      s.dout_full[stage].Wait(ring.phase);
      MultiplyAbt<E, D, kKeys>(dp, v, ColumnsAreK(s.dout[stage]));
      WgmmaWait<1>();  // dK of the step before: frees its operand and its Q
      Pin(dk);
      if (at.step > 0) Release(s.q_empty[(stage + kStages - 1) % kStages]);
      s.p_full[stage].Wait(ring.phase);
      float probability[kColumns / 2];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float2 pair = Pair<E>(s.p[stage][i * 128 + thread]);
        probability[2 * i] = pair.x, probability[2 * i + 1] = pair.y;
      }
      s.p_empty[stage].Arrive();
      WgmmaWait<0>();  // dP^T
      Pin(dp);
      ColumnGradients(dp, probability, s.delta[stage]);
      __syncwarp();
      Release(s.dout_empty[stage]);
      uint32_t ds_operand[kWords];
      PackOperand<E>(ds_operand, dp);
      s.q_full[stage].Wait(ring.phase);
      MultiplyAdd<E, kColumns>(dk, ds_operand, RowsAreK(s.q[stage], kColumns));
      if constexpr (kStore) {
        const int heads = p.order.kv_heads * p.group_size;  // of this pass
        const int head = (work.head - p.first_kv_head) * p.group_size + at.in_group;
        const size_t image = size_t(at.run.image + at.query_tile) * heads + head;
        StoreImage(static_cast<E*>(p.ds) + image * kImage, work.half, ds_operand);
      }
    }
    WgmmaWait<0>();
    Pin(dk);
    if (work.steps > 0) Release(s.q_empty[(ring.stage + kStages - 1) % kStages]);
    const int key = work.half * kKeys + warp * 16 + lane / 4;
    Finish(p, s, work, key, dk, p.scale * kBackwardUnit<E>, p.dk, s.v, p.d_context_k, 0);
  }
}

template <typename E, bool kStore>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionWideKeysKernel(const __grid_constant__ KeysParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<WideShared<E>*>(raw);
  if (threadIdx.x == 0) {
    s.kv_full.Init(1), s.kv_empty.Init(kConsumerThreads);
    for (int i = 0; i < kStages; ++i) {
      s.q_full[i].Init(1), s.q_empty[i].Init(kBothWarps);
      s.dout_full[i].Init(1), s.dout_empty[i].Init(kBothWarps);
      s.p_full[i].Init(128), s.p_empty[i].Init(128);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  const int group = Warpgroup();
  if (group == 0) {
    GiveRegisters<40>();
    if (threadIdx.x == 0) Produce(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<40>>();
    if (group == 1) {
      ConsumeValues(p, s);
    } else {
      ConsumeKeys<kStore>(p, s);
    }
  }
}

}  // namespace

cudaError_t LaunchWideBackwardKeys(const BackwardPass& pass, cudaStream_t stream) {
  KeysParameters p{};
  if (auto e = MakeKeysParameters(p, pass, kKeys)) return e;
  p.order = {pass.args->schedule.num_key_work, pass.num_kv_heads, 2, 0};  // halves of a tile
  return ForElement(pass.args->shape.dtype, [&](auto element) {
    using E = decltype(element);
    const auto kernel =
        pass.ds ? TreeAttentionWideKeysKernel<E, true> : TreeAttentionWideKeysKernel<E, false>;
    return LaunchPersistent<WideShared<E>>(kernel, p, pass.counters, stream);
  });
}

}  // namespace coppice::cuda
