// Backward pass, dQ from S and dP computed once more: no scratch. A block sums over the key tiles
// of its query tile in registers, in list order, no atomics.
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace coppice::cuda {
namespace {

// Per step and warpgroup (64 queries); a step is a key tile of 128, with D = 256 half of one:
//   S  = Q K^T      D / 16 x m64n128k16 (D = 256: n64)      P  = exp2(scale' S - lse)
//   dP = dO V^T     the same                                dS = P * (dP - delta)
//   dQ += dS K      8 x m64n128k16 (D = 256: 4 x 2, dQ in two parts), dS from registers
// Registers: dQ D / 2, S and dP 64 each (D = 256: 32). Shared memory: D = 128: Q, dO 64 KB + 2 x (K
// 32 + V 32) = 192 KB; D = 256: Q, dO 128 KB + 2 x K 32 + V 32 = 224 KB. Traffic: 512 D bytes per
// 128 x 128 tile pair for 98304 D FLOP, 192 FLOP per L2 byte.
constexpr int kStages = 2;
template <int D>
constexpr int kValueStages = D == 256 ? 1 : kStages;
template <int D>
constexpr int kStepKeys = D == 256 ? kKeyTile / 2 : kKeyTile;
template <int D>
constexpr int kSteps = kKeyTile / kStepKeys<D>;
template <int D>
constexpr int kWidth = D < 128 ? D : 128;  // columns of a product
template <int D>
constexpr int kParts = D / kWidth<D>;

struct RecomputeParameters {
  CUtensorMap q, dout, k, v, dq;
  CUtensorMap context_k, context_v;  // of the gathered context
  CUtensorMap lse, delta, ends, context_ends;
  AttentionSchedule schedule;
  ItemOrder order;
  int* counter;
  int padded, first_kv_head, group_size;
  float scale;
};

struct RecomputeWork {
  int tile, head, list_begin, partial, count;  // in steps; count < 0: no more work
};

// A step's keys. The mask: first_key + i <= query < end[i]; context comes before all rows and is
// seen by queries [row_begin, row_end) alone.
struct StepKeys {
  int first_key, row_begin, row_end;
};

template <typename E, int D>
struct RecomputeShared {
  alignas(1024) E q[kQueryTile * D];
  alignas(1024) E dout[kQueryTile * D];
  alignas(1024) E k[kStages][kStepKeys<D> * D];
  alignas(1024) E v[kValueStages<D>][kStepKeys<D> * D];
  alignas(16) float lse[kQueryTile];
  alignas(16) float delta[kQueryTile];
  alignas(16) int end[kStages][kStepKeys<D>];
  RecomputeWork work;
  Barrier q_full, q_empty;
  Barrier k_full[kStages], k_empty[kStages];
  Barrier v_full[kValueStages<D>], v_empty[kValueStages<D>];
};

template <typename E, int D>
__device__ void Produce(const RecomputeParameters& p, RecomputeShared<E, D>& s) {
  constexpr int kKeys = kStepKeys<D>;
  Ring<1> items;
  Ring<kStages> ring;
  Ring<kValueStages<D>> value_ring;
  for (int item, next = atomicAdd(p.counter, 1);; items.Advance()) {
    item = next;
    if (item >= p.order.items()) break;
    next = atomicAdd(p.counter, 1);
    const auto [tile_idx, local_head] = p.order.at(item);
    const QueryTileWork work = p.schedule.backward_tiles[tile_idx];
    const int tile = work.row_begin / kQueryTile;
    const int head = p.first_kv_head * p.group_size + local_head;
    const int begin = work.list_begin, count = (work.list_end - begin) * kSteps<D>;
    const int at = head * p.padded + tile * kQueryTile;
    s.q_empty.Wait(items.phase ^ 1);
    s.work = {tile, head, begin, work.partial * kSteps<D>, count};
    s.q_full.ArriveExpecting(2 * kQueryTile * (D * 2 + 4));
    LoadTile<D, kQueryTile>(s.q, p.q, head, tile * kQueryTile, s.q_full);
    LoadTile<D, kQueryTile>(s.dout, p.dout, head, tile * kQueryTile, s.q_full);
    LoadWords(s.lse, p.lse, at, s.q_full);
    LoadWords(s.delta, p.delta, at, s.q_full);
    for (int i = 0; i < count; ++i, ring.Advance(), value_ring.Advance()) {
      const KeyRun& run = p.schedule.key_runs[p.schedule.backward_entries[begin + i / kSteps<D>]];
      const int stage = ring.stage, first = i % kSteps<D> * kKeys, kv_head = head / p.group_size;
      const bool cached = run.tile < 0;
      const int row = FirstRow(run.tile) + first;
      s.k_empty[stage].Wait(ring.phase ^ 1);
      s.k_full[stage].ArriveExpecting(kKeys * (D * 2 + 4));
      LoadTile<D, kKeys>(s.k[stage], cached ? p.context_k : p.k, kv_head, row, s.k_full[stage]);
      const int end = cached ? p.schedule.context_tiles[~run.tile].first_end + first : row;
      LoadWords(s.end[stage], cached ? p.context_ends : p.ends, end, s.k_full[stage]);
      Barrier& v_full = s.v_full[value_ring.stage];
      s.v_empty[value_ring.stage].Wait(value_ring.phase ^ 1);
      v_full.ArriveExpecting(kKeys * D * 2);
      LoadTile<D, kKeys>(s.v[value_ring.stage], cached ? p.context_v : p.v, kv_head, row, v_full);
    }
  }
  s.q_empty.Wait(items.phase ^ 1);
  s.work.count = -1;
  s.q_full.Arrive();
}

// Of a step that needs the mask.
template <int D>
__device__ __forceinline__ StepKeys KeysOf(const RecomputeParameters& p, const RecomputeWork& work,
                                           int step) {
  if (step >= work.partial) return {};
  const int entry = p.schedule.backward_entries[work.list_begin + step / kSteps<D>];
  const KeyRun& run = p.schedule.key_runs[entry];
  if (run.tile < 0) return {-kKeyTile, run.row_begin, run.row_end};
  return {run.tile * kKeyTile + step % kSteps<D> * kStepKeys<D>, 0, p.schedule.rows};
}

// Probabilities of rows that do not see the step's keys become zero.
template <int kCount>
__device__ __forceinline__ void Mask(float (&x)[kCount], int row, const StepKeys& keys,
                                     const int* end) {
  MaskRows(x, row, keys.first_key, end, 0.f);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int query = row + j / 2 % 2 * 8;
    if (query < keys.row_begin || query >= keys.row_end) x[j] = 0.f;
  }
}

template <typename E, int D>
__device__ void Consume(const RecomputeParameters& p, RecomputeShared<E, D>& s, int group) {
  constexpr int kKeys = kStepKeys<D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int local_row = group * 64 + warp * 16 + lane / 4;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t q = ColumnsAreK(s.q + group * 64 * kPanel),
                 dout = ColumnsAreK(s.dout + group * 64 * kPanel);
  Ring<1> items;
  Ring<kStages> ring;
  Ring<kValueStages<D>> value_ring;

  for (;; items.Advance()) {
    s.q_full.Wait(items.phase);
    const RecomputeWork work = s.work;
    if (work.count < 0) break;
    const int row = work.tile * kQueryTile + local_row;
    float lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      lse[h] = s.lse[local_row + 8 * h], delta[h] = s.delta[local_row + 8 * h];
    float dq[kParts<D>][kWidth<D> / 2];
    Clear(dq);

    for (int i = 0; i < work.count; ++i, ring.Advance(), value_ring.Advance()) {
      const int stage = ring.stage, value_stage = value_ring.stage;
      float scores[kKeys / 2], dp[kKeys / 2];
      const StepKeys keys = KeysOf<D>(p, work, i);
      s.k_full[stage].Wait(ring.phase);
      MultiplyAbt<E, D, kQueryTile>(scores, q, ColumnsAreK(s.k[stage]));
      WgmmaWait<1>();  // dQ of the step before: frees its operand and its K
      Pin(dq);
      if (i > 0) Release(s.k_empty[(stage + kStages - 1) % kStages]);
      s.v_full[value_stage].Wait(value_ring.phase);
      MultiplyAbt<E, D, kQueryTile>(dp, dout, ColumnsAreK(s.v[value_stage]));
      WgmmaWait<1>();  // S
      Pin(scores);
#pragma unroll
      for (int j = 0; j < kKeys / 2; ++j) scores[j] = Exp2(scores[j] * scale_log2 - lse[j / 2 % 2]);
      if (i < work.partial) Mask(scores, row, keys, s.end[stage]);
      WgmmaWait<0>();  // dP
      Pin(dp);
      Release(s.v_empty[value_stage]);
#pragma unroll
      for (int j = 0; j < kKeys / 2; ++j) dp[j] = scores[j] * (dp[j] - delta[j / 2 % 2]);
      uint32_t ds_operand[kKeys / 4];
      PackOperand<E>(ds_operand, dp);
      MultiplyAdd<E, kKeys>(dq, ds_operand, RowsAreK(s.k[stage], kKeys));
    }
    WgmmaWait<0>();
    Pin(dq);
    Release(s.k_empty[(ring.stage + kStages - 1) % kStages]);

    // Each warpgroup read only its own rows of Q, so it may overwrite them.
    NamedSync(1 + group, 128);
#pragma unroll
    for (int part = 0; part < kParts<D>; ++part)
      StoreAccumulators<kQueryTile>(s.q + part * kWidth<D> * kQueryTile, group * 64, dq[part],
                                    p.scale * kBackwardUnit<E>, p.scale * kBackwardUnit<E>);
    FenceAsyncShared();
    NamedSync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      StoreRows<D, kQueryTile>(p.dq, s.q, group * 64, work.head,
                               work.tile * kQueryTile + group * 64);
      CommitStores();
      WaitStoresRead();
    }
    s.q_empty.Arrive();
  }
}

template <typename E, int D>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionQueriesKernel(const __grid_constant__ RecomputeParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<RecomputeShared<E, D>*>(raw);
  if (threadIdx.x == 0) {
    s.q_full.Init(1), s.q_empty.Init(kConsumerThreads);
    for (int i = 0; i < kStages; ++i) {
      s.k_full[i].Init(1), s.k_empty[i].Init(kConsumerWarps);
      if (i < kValueStages<D>) s.v_full[i].Init(1), s.v_empty[i].Init(kConsumerWarps);
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
    Consume(p, s, group - 1);
  }
}

template <typename E, int D>
cudaError_t LaunchRecompute(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const AttentionShape& shape = a.shape;
  RecomputeParameters p{};
  if (auto e = MakeMap(p.q, MapOf(a.q, shape, shape.q_heads), kQueryTile)) return e;
  if (auto e = MakeMap(p.dout, MapOf(a.d_out, shape, shape.q_heads), kQueryTile)) return e;
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), kStepKeys<D>)) return e;
  if (auto e = MakeMap(p.v, MapOf(a.v, shape, shape.kv_heads), kStepKeys<D>)) return e;
  if (auto e = MakeMap(p.dq, MapOf(a.d_q, shape, shape.q_heads), 64)) return e;
  if (a.schedule.num_context_tiles > 0) {
    if (auto e = MakeMap(p.context_k, GatheredContext(b, b.context_k), kStepKeys<D>)) return e;
    if (auto e = MakeMap(p.context_v, GatheredContext(b, b.context_v), kStepKeys<D>)) return e;
  }
  const int64_t sums = shape.q_heads * PaddedRows(shape.rows);
  if (auto e = MakeWordMap(p.lse, b.row_lse, sums, kQueryTile)) return e;
  if (auto e = MakeWordMap(p.delta, b.row_delta, sums, kQueryTile)) return e;
  if (auto e = MakeEndMaps(p.ends, p.context_ends, a.schedule, kStepKeys<D>)) return e;
  p.schedule = a.schedule;
  p.counter = b.counters + 1;
  p.padded = static_cast<int>(PaddedRows(shape.rows));
  p.group_size = shape.q_heads / shape.kv_heads;
  p.first_kv_head = b.first_kv_head;
  p.order = BackwardOrder(a.schedule, b.num_kv_heads, p.group_size);
  p.scale = shape.scale;
  return LaunchPersistent<RecomputeShared<E, D>>(TreeAttentionQueriesKernel<E, D>, p, p.counter,
                                                 stream);
}

}  // namespace

cudaError_t LaunchBackwardQueries(const BackwardPass& pass, cudaStream_t stream) {
  if (pass.ds) return LaunchStoredQueries(pass, stream);
  const AttentionShape& shape = pass.args->shape;
  return ForElement(shape.dtype, [&](auto element) {
    using E = decltype(element);
    if (shape.head_dim == 64) return LaunchRecompute<E, 64>(pass, stream);
    if (shape.head_dim == 128) return LaunchRecompute<E, 128>(pass, stream);
    if (shape.head_dim == 256) return LaunchRecompute<E, 256>(pass, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace coppice::cuda
