// Backward pass, dK and dV. A block owns 128 keys of one KV head and loops over row tiles of 64 and
// the group's heads; every sum runs in registers in list order, no atomics. Query tiles go from the
// last to the first: key tiles of one KV head that start together then read the same rows at the
// same time.
#include "kernels/cuda/attention/backward_tiles.cuh"

namespace coppice::cuda {
namespace {

// Per query tile of 64 and warpgroup (64 keys), transposed so that P and dS leave the accumulators
// as A operands:
//   S^T  = K Q^T      8 x m64n64k16      P^T  = exp2(scale' S^T - lse)
//   dP^T = V dO^T     8 x m64n64k16      dS^T = P^T * (dP^T - delta)
//   dV  += P^T dO     4 x m64n128k16     dK  += dS^T Q    4 x m64n128k16
// Registers: dK 64 + dV 64 + S 32 + dP 32 + P or dS 16 = 208. Shared memory: K, V 64 KB + 4 x (Q 16
// + dO 16) = 192 KB. Traffic: 32 KB per 64 x 128 tile pair for 8.4 MFLOP, 256 FLOP per L2 byte.
constexpr int kKeyStages = 4;

template <typename E, int D>
struct KeysShared {
  alignas(1024) E k[kKeyTile * D];
  alignas(1024) E v[kKeyTile * D];
  alignas(1024) E q[kKeyStages][kColumns * D];
  alignas(1024) E dout[kKeyStages][kColumns * D];
  alignas(16) float lse[kKeyStages][kColumns];
  alignas(16) float delta[kKeyStages][kColumns];
  KeysWork work;
  Barrier kv_full, kv_empty, full[kKeyStages], empty[kKeyStages];
};

template <typename E, int D>
__device__ void Produce(const KeysParameters& p, KeysShared<E, D>& s) {
  Ring<1> items;
  Ring<kKeyStages> ring;
  for (int item, next = atomicAdd(p.counter, 1);; items.Advance()) {
    item = next;
    if (item >= p.order.items()) break;
    next = atomicAdd(p.counter, 1);
    const auto [tile_idx, local_head] = p.order.at(item);
    s.kv_empty.Wait(items.phase ^ 1);
    s.work = WorkOf(p, tile_idx, p.first_kv_head + local_head, 0);
    const KeysWork& work = s.work;  // not in registers: there are 24
    const int kv_head = work.head;
    const bool cached = work.tile < 0;
    s.kv_full.ArriveExpecting(2 * kKeyTile * D * 2);
    LoadTile<D, kKeyTile>(s.k, cached ? p.context_k : p.k, kv_head, FirstRow(work.tile), s.kv_full);
    LoadTile<D, kKeyTile>(s.v, cached ? p.context_v : p.v, kv_head, FirstRow(work.tile), s.kv_full);
    ForEachStep(p, work, [&](int head, int row) {
      const int stage = ring.stage;
      const int at = head * p.padded + row;
      s.empty[stage].Wait(ring.phase ^ 1);
      s.full[stage].ArriveExpecting(2 * kColumns * (D * 2 + 4));
      LoadTile<D, kColumns>(s.q[stage], p.q, head, row, s.full[stage]);
      LoadWords(s.lse[stage], p.lse, at, s.full[stage]);
      LoadTile<D, kColumns>(s.dout[stage], p.dout, head, row, s.full[stage]);
      LoadWords(s.delta[stage], p.delta, at, s.full[stage]);
      ring.Advance();
    });
  }
  s.kv_empty.Wait(items.phase ^ 1);
  s.work.steps = -1;
  s.kv_full.Arrive();
}

template <bool kStore, bool kContext, typename E, int D>
__device__ void Consume(const KeysParameters& p, KeysShared<E, D>& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int thread = threadIdx.x - 128;  // of the consumers
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t k = ColumnsAreK(s.k + group * 64 * kPanel),
                 v = ColumnsAreK(s.v + group * 64 * kPanel);
  Ring<1> items;
  Ring<kKeyStages> ring;
  Turns turns(group);

  for (;; items.Advance()) {
    s.kv_full.Wait(items.phase);
    const KeysWork work = s.work;
    if (work.steps < 0) break;
    const int key = group * 64 + warp * 16 + lane / 4;  // in the tile, and the one 8 below
    StepCursor<kContext> at(p, work);
    KeySpans keys = SpansOf<kContext>(p, work.tile, key, at.run);
    float dk[D / 2], dv[D / 2];
    Clear(dk), Clear(dv);

    turns.Take();  // for dK of one step, S^T and dP^T of the next
    for (; at.step < work.steps; ring.Advance()) {
      const int stage = ring.stage;
      s.full[stage].Wait(ring.phase);
      float scores[kColumns / 2], dp[kColumns / 2];
      MultiplyAbt<E, D, kKeyTile>(scores, k, ColumnsAreK(s.q[stage]));
      WgmmaWait<1>();  // dV and dK of the step before: frees their operands and their stage
      Pin(dk), Pin(dv);
      if (at.step > 0) Release(s.empty[(stage + kKeyStages - 1) % kKeyStages]);
      MultiplyAbt<E, D, kKeyTile>(dp, v, ColumnsAreK(s.dout[stage]));
      turns.Pass();
      WgmmaWait<1>();  // S^T
      Pin(scores);
      ColumnProbabilities(scores, s.lse[stage], scale_log2);
      if (at.partial()) MaskColumns(scores, at.query_tile * kColumns, keys);
      uint32_t p_operand[kColumns / 4], ds_operand[kColumns / 4];
      PackOperand<E>(p_operand, scores);
      MultiplyAdd<E, kColumns>(dv, p_operand, RowsAreK(s.dout[stage], kColumns));
      WgmmaWait<1>();  // dP^T
      Pin(dp);
      ColumnGradients(dp, scores, s.delta[stage]);
      PackOperand<E>(ds_operand, dp);
      if constexpr (kStore) {
        const int heads = p.order.kv_heads * p.group_size;  // of this pass
        const int head = (work.head - p.first_kv_head) * p.group_size + at.in_group;
        const size_t image = size_t(at.run.image + at.query_tile) * heads + head;
        StoreImage(static_cast<E*>(p.ds) + image * kImage, group, ds_operand);
      }
      turns.Take();
      MultiplyAdd<E, kColumns>(dk, ds_operand, RowsAreK(s.q[stage], kColumns));
      if (at.Advance(p)) keys = SpansOf<kContext>(p, work.tile, key, at.run);
    }
    turns.Pass();
    WgmmaWait<0>();
    Pin(dk), Pin(dv);
    if (work.steps > 0) Release(s.empty[(ring.stage + kKeyStages - 1) % kKeyStages]);

    if (kContext && work.tile < 0) {
      if (p.d_context_k) {
        AddToPages<D>(p, p.d_context_k, work.tile, key, work.head, 0, dk,
                      p.scale * kBackwardUnit<E>);
        AddToPages<D>(p, p.d_context_v, work.tile, key, work.head, 0, dv, kBackwardUnit<E>);
      }
      NamedSync(1 + group, 128);
      s.kv_empty.Arrive();
      continue;
    }
    if (s.work.part & kBegun) {
      AddSums<kConsumerThreads>(SumsOf<D>(p, work, 0, 2), thread, dk);
      AddSums<kConsumerThreads>(SumsOf<D>(p, work, 1, 2), thread, dv);
    }
    if (s.work.part & kGoesOn) {
      KeepSums<kConsumerThreads>(SumsOf<D>(p, work, 0, 2), thread, dk);
      KeepSums<kConsumerThreads>(SumsOf<D>(p, work, 1, 2), thread, dv);
      s.kv_empty.Arrive();
      continue;
    }
    // Each warpgroup read only its own rows of K and V, so it may overwrite them.
    const int row0 = work.tile * kKeyTile + group * 64;
    NamedSync(1 + group, 128);
    StoreAccumulators<kKeyTile>(s.k, group * 64, dk, p.scale * kBackwardUnit<E>,
                                p.scale * kBackwardUnit<E>);
    StoreAccumulators<kKeyTile>(s.v, group * 64, dv, kBackwardUnit<E>, kBackwardUnit<E>);
    FenceAsyncShared();
    NamedSync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      StoreRows<D, kKeyTile>(p.dk, s.k, group * 64, work.head, row0);
      StoreRows<D, kKeyTile>(p.dv, s.v, group * 64, work.head, row0);
      CommitStores();
      WaitStoresRead();
    }
    s.kv_empty.Arrive();
  }
  turns.End();
}

template <typename E, int D, bool kStore, bool kContext>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionKeysKernel(const __grid_constant__ KeysParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<KeysShared<E, D>*>(raw);
  if (threadIdx.x == 0) {
    s.kv_full.Init(1), s.kv_empty.Init(kConsumerThreads);
    for (int i = 0; i < kKeyStages; ++i) s.full[i].Init(1), s.empty[i].Init(kConsumerWarps);
    FenceBarrierInit();
  }
  __syncthreads();
  const int group = Warpgroup();
  if (group == 0) {
    GiveRegisters<24>();
    if (threadIdx.x == 0) Produce(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<24>>();
    Consume<kStore, kContext>(p, s, group - 1);
  }
}

template <typename E, int D>
cudaError_t LaunchKeys(const BackwardPass& b, cudaStream_t stream) {
  KeysParameters p{};
  if (auto e = MakeKeysParameters(p, b, kKeyTile)) return e;
  p.order = {b.args->schedule.num_key_work, b.num_kv_heads, 1, 0};
  const bool context = b.args->schedule.num_context_tiles > 0;
  const auto kernel = b.ds      ? context ? TreeAttentionKeysKernel<E, D, true, true>
                                          : TreeAttentionKeysKernel<E, D, true, false>
                           : context ? TreeAttentionKeysKernel<E, D, false, true>
                                : TreeAttentionKeysKernel<E, D, false, false>;
  return LaunchPersistent<KeysShared<E, D>>(kernel, p, b.counters, stream);
}

}  // namespace

cudaError_t LaunchBackwardKeys(const BackwardPass& pass, cudaStream_t stream) {
  const AttentionShape& shape = pass.args->shape;
  if (shape.head_dim == 256) return LaunchWideBackwardKeys(pass, stream);
  return ForElement(shape.dtype, [&](auto element) {
    using E = decltype(element);
    if (shape.head_dim == 64) return LaunchKeys<E, 64>(pass, stream);
    if (shape.head_dim == 128) return LaunchKeys<E, 128>(pass, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace coppice::cuda
