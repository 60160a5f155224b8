// Backward pass, dQ = dS K from the dS^T that the dK/dV kernel stored. An item is 128 columns of
// one 128-row query tile of two heads that share a KV head; a consumer warpgroup owns one head,
// sums over the key tiles in list order, no atomics: per half of a key tile 2 x 4 x m64n128k16,
// both operands from shared memory, rows are k. Halves, because a step's buffer comes free only
// behind the next step's products: one of four waits for that, not one of two. Registers: dQ 128.
// Shared memory: 4 x (K 16 + dS 2 heads x 16) + staging 32 = 224 KB. Traffic: 32 KB of dS from
// memory (D = 256: its two items share them in L2) and 16 KB of K from L2 per 128 x 128 tile pair
// for 4.2 MFLOP. Where a KV head has an even number of pairs of heads, two pairs of a query tile
// make a cluster: each block copies half of the columns of K for both, 8 KB.
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace coppice::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kSteps = 2;  // of a key tile
constexpr int kStepKeys = kKeyTile / kSteps;
constexpr int kStepImage = kImage / kSteps;  // its keys' rows of an image lie together
constexpr int kColumns = kBackwardQueryTile;
constexpr int kHeads = kConsumers;
constexpr int kHalves = kQueryTile / kColumns;
template <int D>
constexpr int kWidth = D < 128 ? D : 128;
template <int D>
constexpr int kParts = D / kWidth<D>;

struct StoredParameters {
  CUtensorMap k, dq;
  CUtensorMap context_k;  // of the gathered context
  AttentionSchedule schedule;
  ItemOrder order;     // its heads are parts of the columns of pairs of heads
  const uint16_t* ds;  // images of E
  int* counter;
  int first_kv_head, group_size, pairs;  // pairs per KV head
  float scale;
};

struct StoredWork {
  int tile, head, heads, column, steps;  // steps < 0: no more work
};

template <typename E, int D>
struct StoredShared {
  alignas(1024) E k[kStages][kStepKeys * kWidth<D>];
  alignas(1024) E ds[kStages][kHalves][kHeads][kStepImage];
  alignas(1024) E staging[kHeads][kColumns * kWidth<D>];
  StoredWork work;
  ItemMail mail;
  Barrier work_full, work_empty, full[kStages], empty[kStages];
};

// kBlocks: of a cluster, each with a pair of heads of its own.
template <int kBlocks, typename E, int D>
__device__ void Produce(const StoredParameters& p, StoredShared<E, D>& s) {
  const int all_heads = p.order.kv_heads * p.group_size;  // of this pass
  Ring<1> items;
  Ring<kStages> ring;
  ItemSource<kBlocks> source(p.counter, s.mail);
  for (;; items.Advance()) {
    const int item = source.Take(p.order.items());
    if (item >= p.order.items()) break;
    const auto [tile_idx, pair_part] = p.order.at(item);
    const int rank = kBlocks > 1 ? ClusterRank() : 0;
    const int pair = pair_part / kParts<D> * kBlocks + rank,
              column = pair_part % kParts<D> * kWidth<D>;
    const QueryTileWork work = p.schedule.backward_tiles[tile_idx];
    const int tile = work.row_begin / kQueryTile;
    const int local_kv_head = pair / p.pairs, kv_head = p.first_kv_head + local_kv_head;
    const int in_group = pair % p.pairs * kHeads, heads = min(kHeads, p.group_size - in_group);
    const int local_head = local_kv_head * p.group_size + in_group;
    const int begin = work.list_begin, steps = (work.list_end - begin) * kSteps;
    s.work_empty.Wait(items.phase ^ 1);
    s.work = {tile, p.first_kv_head * p.group_size + local_head, heads, column, steps};
    s.work_full.Arrive();
    for (int i = 0; i < steps; ++i, ring.Advance()) {
      const KeyRun& run = p.schedule.key_runs[p.schedule.backward_entries[begin + i / kSteps]];
      const int step = i % kSteps, stage = ring.stage;
      s.empty[stage].Wait(ring.phase ^ 1);
      s.full[stage].ArriveExpecting(2 * (kStepKeys * kWidth<D> + kHalves * heads * kStepImage));
      for (int half = 0; half < kHalves; ++half) {
        const size_t image = size_t(run.image + tile * kHalves + half) * all_heads + local_head;
        for (int head = 0; head < heads; ++head)
          LoadBytes(s.ds[stage][half][head], p.ds + (image + head) * kImage + step * kStepImage,
                    kStepImage * 2, s.full[stage]);
      }
      const CUtensorMap& keys = run.tile < 0 ? p.context_k : p.k;
      const int row = FirstRow(run.tile) + step * kStepKeys;
      if constexpr (kBlocks > 1) {
        LoadTileForBoth<kWidth<D>, kStepKeys>(s.k[stage], keys, kv_head, row, s.full[stage],
                                              column);
      } else {
        LoadTile<kWidth<D>, kStepKeys>(s.k[stage], keys, kv_head, row, s.full[stage], column);
      }
    }
  }
  s.work_empty.Wait(items.phase ^ 1);
  s.work.steps = -1;
  s.work_full.Arrive();
}

template <int kBlocks, typename E, int D>
__device__ void Consume(const StoredParameters& p, StoredShared<E, D>& s, int group) {
  Ring<1> items;
  Ring<kStages> ring;
  for (;; items.Advance()) {
    s.work_full.Wait(items.phase);
    const StoredWork work = s.work;
    s.work_empty.Arrive();
    if (work.steps < 0) break;
    float dq[kHalves][kWidth<D> / 2];
    Clear(dq[0]), Clear(dq[1]);
    for (int i = 0; i < work.steps; ++i, ring.Advance()) {
      const int stage = ring.stage;
      s.full[stage].Wait(ring.phase);
      const uint64_t k = RowsAreK(s.k[stage], kStepKeys);
      WgmmaFence();
      MultiplyAddAtb<E, kStepKeys>(dq[0], CoreRowsAreK(s.ds[stage][0][group]), k);
      MultiplyAddAtb<E, kStepKeys>(dq[1], CoreRowsAreK(s.ds[stage][1][group]), k);
      WgmmaCommit();
      WgmmaWait<1>();  // the step before
      if (i > 0) Release<kBlocks>(s.empty[(stage + kStages - 1) % kStages]);
    }
    WgmmaWait<0>();
    Pin(dq[0]), Pin(dq[1]);
    Release<kBlocks>(s.empty[(ring.stage + kStages - 1) % kStages]);
    if (group >= work.heads) continue;

#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (threadIdx.x % 128 == 0) WaitStoresRead();
      NamedSync(1 + group, 128);
      StoreAccumulators<kColumns>(s.staging[group], 0, dq[half], p.scale * kBackwardUnit<E>,
                                  p.scale * kBackwardUnit<E>);
      FenceAsyncShared();
      NamedSync(1 + group, 128);
      if (threadIdx.x % 128 == 0) {
        StoreRows<kWidth<D>, kColumns>(p.dq, s.staging[group], 0, work.head + group,
                                       work.tile * kQueryTile + half * kColumns, work.column);
        CommitStores();
      }
    }
  }
  if (threadIdx.x % 128 == 0) WaitStoresRead();
}

template <typename E, int D, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionStoredQueriesKernel(const __grid_constant__ StoredParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<StoredShared<E, D>*>(raw);
  if (threadIdx.x == 0) {
    s.work_full.Init(1), s.work_empty.Init(kConsumerThreads);
    for (int i = 0; i < kStages; ++i) s.full[i].Init(1), s.empty[i].Init(kBlocks * kConsumerWarps);
    if (kBlocks > 1) s.mail.Init();
    FenceBarrierInit();
  }
  SyncBlocks<kBlocks>();
  const int group = Warpgroup();
  if (group == 0) {
    GiveRegisters<56>();
    if (threadIdx.x == 0) Produce<kBlocks>(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<56>>();
    Consume<kBlocks>(p, s, group - 1);
  }
  if constexpr (kBlocks > 1) SyncBlocks<kBlocks>();
}

template <typename E, int D>
cudaError_t LaunchStored(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const AttentionShape& shape = a.shape;
  StoredParameters p{};
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), kStepKeys)) return e;
  if (auto e = MakeMap(p.dq, MapOf(a.d_q, shape, shape.q_heads), kColumns)) return e;
  if (a.schedule.num_context_tiles > 0) {
    if (auto e = MakeMap(p.context_k, GatheredContext(b, b.context_k), kStepKeys)) return e;
  }
  p.schedule = a.schedule;
  p.ds = static_cast<const uint16_t*>(b.ds);
  p.counter = b.counters + 1;
  p.group_size = shape.q_heads / shape.kv_heads;
  p.pairs = (p.group_size + kHeads - 1) / kHeads;
  p.first_kv_head = b.first_kv_head;
  const int blocks = D > kPanel && p.pairs % 2 == 0 ? 2 : 1;
  p.order = BackwardOrder(a.schedule, b.num_kv_heads, p.pairs / blocks * kParts<D>, blocks);
  p.scale = shape.scale;
  const auto kernel = [&] {
    if constexpr (D > kPanel) {
      if (blocks == 2) return TreeAttentionStoredQueriesKernel<E, D, 2>;
    }
    return TreeAttentionStoredQueriesKernel<E, D, 1>;
  }();
  return LaunchPersistent<StoredShared<E, D>>(kernel, p, p.counter, stream, blocks);
}

}  // namespace

cudaError_t LaunchStoredQueries(const BackwardPass& pass, cudaStream_t stream) {
  const AttentionShape& shape = pass.args->shape;
  return ForElement(shape.dtype, [&](auto element) {
    using E = decltype(element);
    if (shape.head_dim == 64) return LaunchStored<E, 64>(pass, stream);
    if (shape.head_dim == 128) return LaunchStored<E, 128>(pass, stream);
    if (shape.head_dim == 256) return LaunchStored<E, 256>(pass, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace coppice::cuda
