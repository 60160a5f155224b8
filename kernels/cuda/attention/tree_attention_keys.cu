// Backward pass, first half: row sums, dK and dV. Every sum runs in registers in list order, no
// atomics. Query tiles go from the last to the first: key tiles of one KV head that start together
// then read the same rows at the same time.
//   row sums  delta = rowsum(out * d_out); lse in log2 units; both head-major, a tile's rows
//   together dK, dV    a block owns 128 keys of one KV head, loops over row tiles of 64 and the
//   group's heads
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace coppice::cuda {
namespace {

constexpr int kRowsPerBlock = 16;

// D / 8 threads a row, 16 bytes each; a block takes 16 rows of one head. Reads 4 D bytes, writes 8
// per row and head.
struct RowsParameters {
  const Bf16 *out, *d_out;
  const float* lse;
  float *row_lse, *row_delta;
  int64_t out_stride, d_out_stride;
  int rows, padded;
};

template <int D>
__global__ void AttentionRowSumsKernel(const RowsParameters p) {
  constexpr int kLanes = D / 8;
  const int row = blockIdx.x * kRowsPerBlock + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int head = blockIdx.y, heads = gridDim.y;
  float sum = 0.f;
  if (row < p.rows) {
    const int column = head * D + lane * 8;
    const uint4 a = *reinterpret_cast<const uint4*>(p.out + row * p.out_stride + column);
    const uint4 b = *reinterpret_cast<const uint4*>(p.d_out + row * p.d_out_stride + column);
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x[i]));
      const float2 v = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(y[i]));
      sum += u.x * v.x + u.y * v.y;
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) {
    const int64_t at = int64_t{head} * p.padded + row;
    p.row_lse[at] = row < p.rows ? p.lse[int64_t{row} * heads + head] * kLog2e : INFINITY;
    p.row_delta[at] = sum;
  }
}

// Per query tile of 64 and warpgroup (64 keys), transposed so that P and dS leave the accumulators
// as A operands:
//   S^T  = K Q^T      8 x m64n64k16      P^T  = exp2(scale' S^T - lse)
//   dP^T = V dO^T     8 x m64n64k16      dS^T = P^T * (dP^T - delta)
//   dV  += P^T dO     4 x m64n128k16     dK  += dS^T Q    4 x m64n128k16
// Registers: dK 64 + dV 64 + S 32 + dP 32 + P or dS 16 = 208. Shared memory: K, V 64 KB + 4 x (Q 16
// + dO 16) = 192 KB. Traffic: 32 KB per 64 x 128 tile pair for 8.4 MFLOP, 256 FLOP per L2 byte.
constexpr int kKeyStages = 4;
constexpr int kColumns = kBackwardQueryTile;

struct KeysParameters {
  CUtensorMap q, dout, k, v, dk, dv;
  AttentionSchedule schedule;
  ItemOrder order;
  const float *row_lse, *row_delta;
  Bf16* ds;
  int* counter;
  int padded, first_kv_head, group_size;
  float scale;
};

struct KeysWork {
  int tile, head;  // tile < 0: no more work
  QueryRange range;
};

template <int D>
struct KeysShared {
  alignas(1024) Bf16 k[kKeyTile * D];
  alignas(1024) Bf16 v[kKeyTile * D];
  alignas(1024) Bf16 q[kKeyStages][kColumns * D];
  alignas(1024) Bf16 dout[kKeyStages][kColumns * D];
  alignas(16) float lse[kKeyStages][kColumns];
  alignas(16) float delta[kKeyStages][kColumns];
  KeysWork work;
  Barrier kv_full, kv_empty, full[kKeyStages], empty[kKeyStages];
};

template <int D>
__device__ void Produce(const KeysParameters& p, KeysShared<D>& s) {
  Ring<1> items;
  Ring<kKeyStages> ring;
  for (int item, next = atomicAdd(p.counter, 1);; items.Advance()) {
    item = next;
    if (item >= p.order.items()) break;
    next = atomicAdd(p.counter, 1);
    const auto [tile_idx, local_head] = p.order.at(item);
    const int tile = p.schedule.key_order[tile_idx];
    const int kv_head = p.first_kv_head + local_head;
    const QueryRange range = p.schedule.key_ranges[tile];
    s.kv_empty.Wait(items.phase ^ 1);
    s.work = {tile, kv_head, range};
    s.kv_full.ArriveExpecting(2 * kKeyTile * D * 2);
    LoadTile<D, kKeyTile>(s.k, p.k, kv_head, tile * kKeyTile, s.kv_full);
    LoadTile<D, kKeyTile>(s.v, p.v, kv_head, tile * kKeyTile, s.kv_full);
    for (int query_tile = range.last - 1; query_tile >= range.first; --query_tile) {
      for (int i = 0; i < p.group_size; ++i, ring.Advance()) {
        const int head = kv_head * p.group_size + i, row = query_tile * kColumns,
                  stage = ring.stage;
        const size_t at = size_t(head) * p.padded + row;
        s.empty[stage].Wait(ring.phase ^ 1);
        s.full[stage].ArriveExpecting(2 * kColumns * (D * 2 + 4));
        LoadTile<D, kColumns>(s.q[stage], p.q, head, row, s.full[stage]);
        LoadBytes(s.lse[stage], p.row_lse + at, kColumns * 4, s.full[stage]);
        LoadTile<D, kColumns>(s.dout[stage], p.dout, head, row, s.full[stage]);
        LoadBytes(s.delta[stage], p.row_delta + at, kColumns * 4, s.full[stage]);
      }
    }
  }
  s.kv_empty.Wait(items.phase ^ 1);
  s.work.tile = -1;
  s.kv_full.Arrive();
}

// S^T to P^T; `lse` holds the columns' values.
__device__ __forceinline__ void ColumnProbabilities(float (&x)[kColumns / 2], const float* lse,
                                                    float scale_log2) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float2 base = *reinterpret_cast<const float2*>(lse + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[4 * j + 2 * h] = Exp2(x[4 * j + 2 * h] * scale_log2 - base.x);
      x[4 * j + 2 * h + 1] = Exp2(x[4 * j + 2 * h + 1] * scale_log2 - base.y);
    }
  }
}

// Clears P^T where the query does not see the key: query - key must lie in [0, span of the key).
__device__ __forceinline__ void MaskColumns(float (&x)[kColumns / 2], int first_query,
                                            const int (&key)[2], const int (&span)[2]) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = first_query + 8 * j + threadIdx.x % 4 * 2 + e;
        if (unsigned(query - key[h]) >= unsigned(span[h])) x[4 * j + 2 * h + e] = 0.f;
      }
}

// dP^T to dS^T (without the scale).
__device__ __forceinline__ void ColumnGradients(float (&dp)[kColumns / 2],
                                                const float (&probability)[kColumns / 2],
                                                const float* delta) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float2 base = *reinterpret_cast<const float2*>(delta + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * j + 2 * h;
      dp[i] = probability[i] * (dp[i] - base.x);
      dp[i + 1] = probability[i + 1] * (dp[i + 1] - base.y);
    }
  }
}

// Stores this warpgroup's half of a dS^T tile [128 keys, 64 queries] straight from the A operand
// registers: a warp's words of an 8 x 8 block are 128 contiguous bytes, a core matrix of the
// unswizzled layout that the dQ kernel multiplies from. Streaming stores: 16 KB per step, read
// once, by another kernel.
__device__ __forceinline__ void StoreImage(Bf16* image, int group,
                                           const uint32_t (&ds)[kColumns / 4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  constexpr int kRowOfBlocks = kColumns / 8 * 32;  // words
  uint32_t* to = reinterpret_cast<uint32_t*>(image) + (8 * group + 2 * warp) * kRowOfBlocks + lane;
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) __stcs(to + i % 2 * kRowOfBlocks + i / 2 * 32, ds[i]);
}

template <int D, bool kStore>
__device__ void Consume(const KeysParameters& p, KeysShared<D>& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t k = ColumnsAreK(s.k + group * 64 * kPanel),
                 v = ColumnsAreK(s.v + group * 64 * kPanel);
  Ring<1> items;
  Ring<kKeyStages> ring;

  for (;; items.Advance()) {
    s.kv_full.Wait(items.phase);
    const KeysWork work = s.work;
    if (work.tile < 0) break;
    const int row0 = work.tile * kKeyTile + group * 64;
    int key[2], span[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      key[h] = row0 + warp * 16 + lane / 4 + 8 * h;
      span[h] = max(p.schedule.subtree_end[key[h]] - key[h], 0);
    }
    float dk[D / 2], dv[D / 2];
    Clear(dk), Clear(dv);

    const int steps = (work.range.last - work.range.first) * p.group_size;
    int query_tile = work.range.last - 1, in_group = 0;
    for (int i = 0; i < steps; ++i, ring.Advance()) {
      const int stage = ring.stage;
      s.full[stage].Wait(ring.phase);
      float scores[kColumns / 2], dp[kColumns / 2];
      MultiplyAbt<D, kKeyTile>(scores, k, ColumnsAreK(s.q[stage]));
      WgmmaWait<1>();  // dV and dK of the step before: frees their operands and their stage
      Pin(dk), Pin(dv);
      if (i > 0) Release(s.empty[(stage + kKeyStages - 1) % kKeyStages]);
      MultiplyAbt<D, kKeyTile>(dp, v, ColumnsAreK(s.dout[stage]));
      WgmmaWait<1>();  // S^T
      Pin(scores);
      ColumnProbabilities(scores, s.lse[stage], scale_log2);
      if (query_tile < work.range.full_first || query_tile >= work.range.full_last)
        MaskColumns(scores, query_tile * kColumns, key, span);
      uint32_t p_operand[kColumns / 4], ds_operand[kColumns / 4];
      PackOperand(p_operand, scores);
      MultiplyAdd<kColumns>(dv, p_operand, RowsAreK(s.dout[stage], kColumns));
      WgmmaWait<1>();  // dP^T
      Pin(dp);
      ColumnGradients(dp, scores, s.delta[stage]);
      PackOperand(ds_operand, dp);
      MultiplyAdd<kColumns>(dk, ds_operand, RowsAreK(s.q[stage], kColumns));
      if constexpr (kStore) {
        const int heads = p.order.kv_heads * p.group_size;  // of this pass
        const int head = (work.head - p.first_kv_head) * p.group_size + in_group;
        const size_t image = size_t(work.range.image + query_tile) * heads + head;
        StoreImage(p.ds + image * kImage, group, ds_operand);
      }
      if (++in_group == p.group_size) in_group = 0, --query_tile;
    }
    WgmmaWait<0>();
    Pin(dk), Pin(dv);
    if (steps > 0) Release(s.empty[(ring.stage + kKeyStages - 1) % kKeyStages]);

    // Each warpgroup read only its own rows of K and V, so it may overwrite them.
    NamedSync(1 + group, 128);
    StoreAccumulators<kKeyTile>(s.k, group * 64, dk, p.scale, p.scale);
    StoreAccumulators<kKeyTile>(s.v, group * 64, dv, 1.f, 1.f);
    FenceAsyncShared();
    NamedSync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      StoreRows<D, kKeyTile>(p.dk, s.k, group * 64, work.head, row0);
      StoreRows<D, kKeyTile>(p.dv, s.v, group * 64, work.head, row0);
      CommitStores();
      WaitStoresRead();
      s.kv_empty.Arrive();
    }
  }
}

template <int D, bool kStore>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionKeysKernel(const __grid_constant__ KeysParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<KeysShared<D>*>(raw);
  if (threadIdx.x == 0) {
    s.kv_full.Init(1), s.kv_empty.Init(kConsumers);
    for (int i = 0; i < kKeyStages; ++i) s.full[i].Init(1), s.empty[i].Init(kConsumerWarps);
    FenceBarrierInit();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    GiveRegisters<24>();
    if (threadIdx.x == 0) Produce(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<24>>();
    Consume<D, kStore>(p, s, group - 1);
  }
}

template <int D>
cudaError_t LaunchRowSums(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const int padded = static_cast<int>(PaddedRows(a.shape.rows));
  const RowsParameters p = {static_cast<const Bf16*>(a.out.data),
                            static_cast<const Bf16*>(a.d_out.data),
                            a.lse,
                            b.row_lse,
                            b.row_delta,
                            a.out.row_stride,
                            a.d_out.row_stride,
                            static_cast<int>(a.shape.rows),
                            padded};
  const dim3 grid(padded / kRowsPerBlock, a.shape.q_heads);
  AttentionRowSumsKernel<D><<<grid, kRowsPerBlock * D / 8, 0, stream>>>(p);
  return cudaGetLastError();
}

template <int D>
cudaError_t LaunchKeys(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const AttentionShape& shape = a.shape;
  KeysParameters p{};
  if (auto e = MakeMap(p.q, MapOf(a.q, shape, shape.q_heads), kColumns)) return e;
  if (auto e = MakeMap(p.dout, MapOf(a.d_out, shape, shape.q_heads), kColumns)) return e;
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), kKeyTile)) return e;
  if (auto e = MakeMap(p.v, MapOf(a.v, shape, shape.kv_heads), kKeyTile)) return e;
  if (auto e = MakeMap(p.dk, MapOf(a.d_k, shape, shape.kv_heads), 64)) return e;
  if (auto e = MakeMap(p.dv, MapOf(a.d_v, shape, shape.kv_heads), 64)) return e;
  p.schedule = a.schedule;
  p.row_lse = b.row_lse;
  p.row_delta = b.row_delta;
  p.ds = static_cast<Bf16*>(b.ds);
  p.counter = b.counters;
  p.padded = static_cast<int>(PaddedRows(shape.rows));
  p.first_kv_head = b.first_kv_head;
  p.group_size = shape.q_heads / shape.kv_heads;
  p.order = {a.schedule.num_key_tiles, b.num_kv_heads, 1, 0};
  p.scale = shape.scale;
  const auto kernel = b.ds ? TreeAttentionKeysKernel<D, true> : TreeAttentionKeysKernel<D, false>;
  return LaunchPersistent<KeysShared<D>>(kernel, p, b.counters, stream);
}

}  // namespace

cudaError_t LaunchBackwardRowSums(const BackwardPass& pass, cudaStream_t stream) {
  if (pass.args->shape.head_dim == 64) return LaunchRowSums<64>(pass, stream);
  if (pass.args->shape.head_dim == 128) return LaunchRowSums<128>(pass, stream);
  return cudaErrorNotSupported;
}

cudaError_t LaunchBackwardKeys(const BackwardPass& pass, cudaStream_t stream) {
  if (pass.args->shape.head_dim == 64) return LaunchKeys<64>(pass, stream);
  if (pass.args->shape.head_dim == 128) return LaunchKeys<128>(pass, stream);
  return cudaErrorNotSupported;
}

}  // namespace coppice::cuda
