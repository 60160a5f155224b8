// Backward pass, second half: dQ. A CTA sums over the key tiles of its query tile in registers, in
// list order, no atomics.
//   recompute   S and dP once more: three products per tile pair, no scratch
//   stored      dS^T of the dK/dV kernel: one product per tile pair, 32 KB of scratch per tile pair
//               and query head
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace coppice::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kColumns = kBackwardQueryTile;

// Per key tile of 128 and warpgroup (64 queries):
//   S  = Q K^T      8 x m64n128k16      P  = exp2(scale' S - lse)
//   dP = dO V^T     8 x m64n128k16      dS = P * (dP - delta)
//   dQ += dS K      8 x m64n128k16, dS from registers
// Registers: dQ 64 + S 64 + dP 64 = 192. Shared memory: Q, dO 64 KB + 2 x (K 32 + V 32) = 192 KB.
// Traffic: 64 KB per 128 x 128 tile pair for 12.6 MFLOP, 192 FLOP per L2 byte.
struct RecomputeParameters {
  CUtensorMap q, dout, k, v, dq;
  AttentionSchedule schedule;
  ItemOrder order;
  const float *row_lse, *row_delta;
  int* counter;
  int padded, first_kv_head, group_size;
  float scale;
};

struct RecomputeWork {
  int tile, head, partial, count;  // count < 0: no more work
};

template <int D>
struct RecomputeShared {
  alignas(1024) Bf16 q[kQueryTile * D];
  alignas(1024) Bf16 dout[kQueryTile * D];
  alignas(1024) Bf16 k[kStages][kKeyTile * D];
  alignas(1024) Bf16 v[kStages][kKeyTile * D];
  alignas(16) float lse[kQueryTile];
  alignas(16) float delta[kQueryTile];
  alignas(16) int end[kStages][kKeyTile];
  int key_tile[kStages];
  RecomputeWork work;
  Barrier q_full, q_empty;
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <int D>
__device__ void Produce(const RecomputeParameters& p, RecomputeShared<D>& s) {
  Ring<1> items;
  Ring<kStages> ring;
  for (int item, next = atomicAdd(p.counter, 1);; items.Advance()) {
    item = next;
    if (item >= p.order.items()) break;
    next = atomicAdd(p.counter, 1);
    const auto [tile_idx, local_head] = p.order.at(item);
    const QueryTileWork work = p.schedule.query_tiles[tile_idx];
    const int tile = work.row_begin / kQueryTile;
    const int head = p.first_kv_head * p.group_size + local_head;
    const int begin = work.list_begin, count = work.list_end - begin;
    const size_t at = size_t(head) * p.padded + tile * kQueryTile;
    s.q_empty.Wait(items.phase ^ 1);
    s.work = {tile, head, work.partial, count};
    s.q_full.ArriveExpecting(2 * kQueryTile * (D * 2 + 4));
    LoadTile<D, kQueryTile>(s.q, p.q, head, tile * kQueryTile, s.q_full);
    LoadTile<D, kQueryTile>(s.dout, p.dout, head, tile * kQueryTile, s.q_full);
    LoadBytes(s.lse, p.row_lse + at, kQueryTile * 4, s.q_full);
    LoadBytes(s.delta, p.row_delta + at, kQueryTile * 4, s.q_full);
    for (int i = 0; i < count; ++i, ring.Advance()) {
      const int key_tile = p.schedule.key_tiles[begin + i], row = key_tile * kKeyTile,
                stage = ring.stage;
      s.k_empty[stage].Wait(ring.phase ^ 1);
      s.key_tile[stage] = key_tile;
      s.k_full[stage].ArriveExpecting(kKeyTile * (D * 2 + 4));
      LoadTile<D, kKeyTile>(s.k[stage], p.k, head / p.group_size, row, s.k_full[stage]);
      LoadBytes(s.end[stage], p.schedule.subtree_end + row, kKeyTile * 4, s.k_full[stage]);
      s.v_empty[stage].Wait(ring.phase ^ 1);
      s.v_full[stage].ArriveExpecting(kKeyTile * D * 2);
      LoadTile<D, kKeyTile>(s.v[stage], p.v, head / p.group_size, row, s.v_full[stage]);
    }
  }
  s.q_empty.Wait(items.phase ^ 1);
  s.work.count = -1;
  s.q_full.Arrive();
}

template <int D>
__device__ void Consume(const RecomputeParameters& p, RecomputeShared<D>& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int local_row = group * 64 + warp * 16 + lane / 4;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t q = ColumnsAreK(s.q + group * 64 * kPanel),
                 dout = ColumnsAreK(s.dout + group * 64 * kPanel);
  Ring<1> items;
  Ring<kStages> ring;

  for (;; items.Advance()) {
    s.q_full.Wait(items.phase);
    const RecomputeWork work = s.work;
    if (work.count < 0) break;
    const int row = work.tile * kQueryTile + local_row;
    float lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      lse[h] = s.lse[local_row + 8 * h], delta[h] = s.delta[local_row + 8 * h];
    float dq[D / 2];
    Clear(dq);

    for (int i = 0; i < work.count; ++i, ring.Advance()) {
      const int stage = ring.stage;
      float scores[kKeyTile / 2], dp[kKeyTile / 2];
      s.k_full[stage].Wait(ring.phase);
      MultiplyAbt<D, kQueryTile>(scores, q, ColumnsAreK(s.k[stage]));
      WgmmaWait<1>();  // dQ of the step before: frees its operand and its K
      Pin(dq);
      if (i > 0) Release(s.k_empty[(stage + kStages - 1) % kStages]);
      s.v_full[stage].Wait(ring.phase);
      MultiplyAbt<D, kQueryTile>(dp, dout, ColumnsAreK(s.v[stage]));
      WgmmaWait<1>();  // S
      Pin(scores);
#pragma unroll
      for (int j = 0; j < kKeyTile / 2; ++j)
        scores[j] = Exp2(scores[j] * scale_log2 - lse[j / 2 % 2]);
      if (i < work.partial) MaskRows(scores, row, s.key_tile[stage] * kKeyTile, s.end[stage], 0.f);
      WgmmaWait<0>();  // dP
      Pin(dp);
      Release(s.v_empty[stage]);
#pragma unroll
      for (int j = 0; j < kKeyTile / 2; ++j) dp[j] = scores[j] * (dp[j] - delta[j / 2 % 2]);
      uint32_t ds_operand[kKeyTile / 4];
      PackOperand(ds_operand, dp);
      MultiplyAdd<kKeyTile>(dq, ds_operand, RowsAreK(s.k[stage], kKeyTile));
    }
    WgmmaWait<0>();
    Pin(dq);
    Release(s.k_empty[(ring.stage + kStages - 1) % kStages]);

    // Each warpgroup read only its own rows of Q, so it may overwrite them.
    NamedSync(1 + group, 128);
    StoreAccumulators<kQueryTile>(s.q, group * 64, dq, p.scale, p.scale);
    FenceAsyncShared();
    NamedSync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      StoreRows<D, kQueryTile>(p.dq, s.q, group * 64, work.head,
                               work.tile * kQueryTile + group * 64);
      CommitStores();
      WaitStoresRead();
      s.q_empty.Arrive();
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionQueriesKernel(const __grid_constant__ RecomputeParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<RecomputeShared<D>*>(raw);
  if (threadIdx.x == 0) {
    s.q_full.Init(1), s.q_empty.Init(kConsumers);
    for (int i = 0; i < kStages; ++i) {
      s.k_full[i].Init(1), s.k_empty[i].Init(kConsumerWarps);
      s.v_full[i].Init(1), s.v_empty[i].Init(kConsumerWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    GiveRegisters<40>();
    if (threadIdx.x == 0) Produce(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<40>>();
    Consume(p, s, group - 1);
  }
}

template <int D>
cudaError_t LaunchRecompute(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const AttentionShape& shape = a.shape;
  RecomputeParameters p{};
  if (auto e = MakeMap(p.q, MapOf(a.q, shape, shape.q_heads), kQueryTile)) return e;
  if (auto e = MakeMap(p.dout, MapOf(a.d_out, shape, shape.q_heads), kQueryTile)) return e;
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), kKeyTile)) return e;
  if (auto e = MakeMap(p.v, MapOf(a.v, shape, shape.kv_heads), kKeyTile)) return e;
  if (auto e = MakeMap(p.dq, MapOf(a.d_q, shape, shape.q_heads), 64)) return e;
  p.schedule = a.schedule;
  p.row_lse = b.row_lse;
  p.row_delta = b.row_delta;
  p.counter = b.counters + 1;
  p.padded = static_cast<int>(PaddedRows(shape.rows));
  p.group_size = shape.q_heads / shape.kv_heads;
  p.first_kv_head = b.first_kv_head;
  p.order = MakeItemOrder(a.schedule, b.num_kv_heads, p.group_size);
  p.scale = shape.scale;
  return LaunchPersistent<RecomputeShared<D>>(TreeAttentionQueriesKernel<D>, p, p.counter, stream);
}

// dQ = dS K, dS^T as the dK/dV kernel stored it. An item is one 128-row query tile of two heads
// that share a KV head; a consumer warpgroup owns one head: per key tile 2 x 8 x m64n128k16, both
// operands from shared memory, rows are k. Registers: dQ 128. Shared memory: 2 x (K 32 + dS 2 heads
// x 32) + staging 32 = 224 KB. Traffic: 32 KB of dS from memory and 16 KB of K from L2 per 128 x
// 128 tile pair for 4.2 MFLOP.
constexpr int kHeads = kConsumers;
constexpr int kHalves = kQueryTile / kColumns;

struct StoredParameters {
  CUtensorMap k, dq;
  AttentionSchedule schedule;
  ItemOrder order;  // its heads are pairs of heads
  const Bf16* ds;
  int* counter;
  int first_kv_head, group_size, pairs;  // pairs per KV head
  float scale;
};

struct StoredWork {
  int tile, head, heads, count;  // count < 0: no more work
};

template <int D>
struct StoredShared {
  alignas(1024) Bf16 k[kStages][kKeyTile * D];
  alignas(1024) Bf16 ds[kStages][kHalves][kHeads][kImage];
  alignas(1024) Bf16 staging[kHeads][kColumns * D];
  StoredWork work;
  Barrier work_full, work_empty, full[kStages], empty[kStages];
};

template <int D>
__device__ void Produce(const StoredParameters& p, StoredShared<D>& s) {
  Ring<1> items;
  Ring<kStages> ring;
  for (int item, next = atomicAdd(p.counter, 1);; items.Advance()) {
    item = next;
    if (item >= p.order.items()) break;
    next = atomicAdd(p.counter, 1);
    const auto [tile_idx, pair] = p.order.at(item);
    const QueryTileWork work = p.schedule.query_tiles[tile_idx];
    const int tile = work.row_begin / kQueryTile;
    const int local_kv_head = pair / p.pairs, kv_head = p.first_kv_head + local_kv_head;
    const int in_group = pair % p.pairs * kHeads, heads = min(kHeads, p.group_size - in_group);
    const int local_head = local_kv_head * p.group_size + in_group;
    const int begin = work.list_begin, count = work.list_end - begin;
    s.work_empty.Wait(items.phase ^ 1);
    s.work = {tile, p.first_kv_head * p.group_size + local_head, heads, count};
    s.work_full.Arrive();
    for (int i = 0; i < count; ++i, ring.Advance()) {
      const int key_tile = p.schedule.key_tiles[begin + i], stage = ring.stage;
      const int image = p.schedule.key_ranges[key_tile].image + tile * kHalves;
      s.empty[stage].Wait(ring.phase ^ 1);
      s.full[stage].ArriveExpecting(kKeyTile * D * 2 + kHalves * heads * kImage * 2);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        LoadBytes(
            s.ds[stage][half],
            p.ds + (size_t(image + half) * p.order.kv_heads * p.group_size + local_head) * kImage,
            heads * kImage * 2, s.full[stage]);
      LoadTile<D, kKeyTile>(s.k[stage], p.k, kv_head, key_tile * kKeyTile, s.full[stage]);
    }
  }
  s.work_empty.Wait(items.phase ^ 1);
  s.work.count = -1;
  s.work_full.Arrive();
}

template <int D>
__device__ void Consume(const StoredParameters& p, StoredShared<D>& s, int group) {
  Ring<1> items;
  Ring<kStages> ring;
  for (;; items.Advance()) {
    s.work_full.Wait(items.phase);
    const StoredWork work = s.work;
    __syncwarp();
    Release(s.work_empty);
    if (work.count < 0) break;
    float dq[kHalves][D / 2];
    Clear(dq[0]), Clear(dq[1]);
    for (int i = 0; i < work.count; ++i, ring.Advance()) {
      const int stage = ring.stage;
      s.full[stage].Wait(ring.phase);
      const uint64_t k = RowsAreK(s.k[stage], kKeyTile);
      WgmmaFence();
      MultiplyAddAtb<kKeyTile>(dq[0], CoreRowsAreK(s.ds[stage][0][group]), k);
      MultiplyAddAtb<kKeyTile>(dq[1], CoreRowsAreK(s.ds[stage][1][group]), k);
      WgmmaCommit();
      WgmmaWait<1>();  // the step before
      if (i > 0) Release(s.empty[(stage + kStages - 1) % kStages]);
    }
    WgmmaWait<0>();
    Pin(dq[0]), Pin(dq[1]);
    Release(s.empty[(ring.stage + kStages - 1) % kStages]);
    if (group >= work.heads) continue;

#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (threadIdx.x % 128 == 0) WaitStoresRead();
      NamedSync(1 + group, 128);
      StoreAccumulators<kColumns>(s.staging[group], 0, dq[half], p.scale, p.scale);
      FenceAsyncShared();
      NamedSync(1 + group, 128);
      if (threadIdx.x % 128 == 0) {
        StoreRows<D, kColumns>(p.dq, s.staging[group], 0, work.head + group,
                               work.tile * kQueryTile + half * kColumns);
        CommitStores();
      }
    }
  }
  if (threadIdx.x % 128 == 0) WaitStoresRead();
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionStoredQueriesKernel(const __grid_constant__ StoredParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<StoredShared<D>*>(raw);
  if (threadIdx.x == 0) {
    s.work_full.Init(1), s.work_empty.Init(kConsumerWarps);
    for (int i = 0; i < kStages; ++i) s.full[i].Init(1), s.empty[i].Init(kConsumerWarps);
    FenceBarrierInit();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    GiveRegisters<56>();
    if (threadIdx.x == 0) Produce(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<56>>();
    Consume(p, s, group - 1);
  }
}

template <int D>
cudaError_t LaunchStored(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const AttentionShape& shape = a.shape;
  StoredParameters p{};
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), kKeyTile)) return e;
  if (auto e = MakeMap(p.dq, MapOf(a.d_q, shape, shape.q_heads), kColumns)) return e;
  p.schedule = a.schedule;
  p.ds = static_cast<const Bf16*>(b.ds);
  p.counter = b.counters + 1;
  p.group_size = shape.q_heads / shape.kv_heads;
  p.pairs = (p.group_size + kHeads - 1) / kHeads;
  p.first_kv_head = b.first_kv_head;
  p.order = MakeItemOrder(a.schedule, b.num_kv_heads, p.pairs);
  p.scale = shape.scale;
  return LaunchPersistent<StoredShared<D>>(TreeAttentionStoredQueriesKernel<D>, p, p.counter,
                                           stream);
}

}  // namespace

cudaError_t LaunchBackwardQueries(const BackwardPass& pass, cudaStream_t stream) {
  if (pass.args->shape.head_dim == 64) {
    return pass.ds ? LaunchStored<64>(pass, stream) : LaunchRecompute<64>(pass, stream);
  }
  if (pass.args->shape.head_dim == 128) {
    return pass.ds ? LaunchStored<128>(pass, stream) : LaunchRecompute<128>(pass, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace coppice::cuda
