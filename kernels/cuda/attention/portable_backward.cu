// Backward pass on mma.sync and cp.async: for every architecture since sm_80, and another way to
// the numbers of the tile kernels. Nothing goes through memory between the passes: dQ computes S
// and dP once more.
//
// Both kernels have one form. A block owns 64 rows of two tensors, 16 a warp, and streams tiles of
// two others past them; x = A B^T are scores of own rows by streamed rows, which leave the
// accumulators as A operands of the products that sum up gradients of the own rows:
//   dK/dV:  own K, V    streamed Q, dO    S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q
//   dQ:     own Q, dO   streamed K, V     S   = Q K^T   dP   = dO V^T                  dQ += dS K
//   P = exp2(scale' S - lse')   dS = P (dP - delta)
// Sums run in the order of the schedule's lists: no atomics, the same bits in every run. A copy of
// the next streamed tiles is on its way while a step multiplies; one barrier a step.
#include <climits>

#include "kernels/cuda/attention/async_copy.cuh"
#include "kernels/cuda/attention/backward_units.cuh"
#include "kernels/cuda/attention/chunk_attention.cuh"
#include "kernels/cuda/attention/device_math.cuh"
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/log2_units.cuh"

namespace coppice::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlockThreads = 32 * kWarps;
constexpr int kOwnRows = 16 * kWarps;
constexpr int kHalves = kKeyTile / kOwnRows;  // of a key tile, and of a query tile
static_assert(kOwnRows == kBackwardQueryTile && kKeyTile == kQueryTile);
// Streamed rows of a step: at head_dim 256 few, so that all fits in 99 KiB.
template <int D>
constexpr int kStepRows = D == 256 ? 16 : 64;
// Columns of dK and dV that a block sums up: two sums of 16 x 128 are 128 registers a thread. At
// head_dim 256 two blocks compute the same scores.
template <int D>
constexpr int kSumColumns = D == 256 ? 128 : D;

// Rows of one head: row r at data + r * stride; zeros from `end` on.
template <typename E>
struct HeadRows {
  const E* data;
  int64_t stride;
  int end;
};

template <typename E>
struct Parameters {
  AttentionSchedule schedule;
  const E *q, *k, *v, *d_out, *context_k, *context_v;
  E *d_q, *d_k, *d_v;
  int64_t q_stride, k_stride, v_stride, d_out_stride, d_q_stride, d_k_stride, d_v_stride;
  float *d_context_k, *d_context_v;  // pages, or null
  const float *lse, *delta;          // [q_heads, padded]
  int padded, kv_heads, group_size, run_slots;
  float scale;

  __device__ HeadRows<E> Queries(int head, int dim) const {
    return {q + head * dim, q_stride, schedule.rows};
  }
  __device__ HeadRows<E> OutGradients(int head, int dim) const {
    return {d_out + head * dim, d_out_stride, schedule.rows};
  }
  // Of the tensor that holds key tile `tile`, packed or ~context.
  __device__ HeadRows<E> Keys(int tile, int kv_head, int dim) const {
    if (tile >= 0) return {k + kv_head * dim, k_stride, schedule.rows};
    return {context_k + kv_head * dim, int64_t{kv_heads} * dim, INT_MAX};
  }
  __device__ HeadRows<E> Values(int tile, int kv_head, int dim) const {
    if (tile >= 0) return {v + kv_head * dim, v_stride, schedule.rows};
    return {context_v + kv_head * dim, int64_t{kv_heads} * dim, INT_MAX};
  }
};

template <typename E, int D>
struct Shared {
  E own[2][kOwnRows * D];
  E streamed[2][2][kStepRows<D> * D];  // by stage
};

// ---- Tiles in shared memory: rows of D elements in pieces of 8, swizzled by the row.

template <int D, typename E>
__device__ __forceinline__ uint32_t PieceAddress(const E* tile, int row, int piece) {
  return SharedAddress(tile + row * D + (piece ^ (row & 7)) * 8);
}

// Issues copies of rows [first, first + kRows) by all threads.
template <int D, int kRows, typename E>
__device__ __forceinline__ void CopyRows(E* to, const HeadRows<E>& from, int first) {
  constexpr int kPieces = D / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kPieces; i += kBlockThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool exists = first + row < from.end;
    const E* at = from.data + (exists ? first + row : 0) * from.stride + piece * 8;
    CopyAsync(PieceAddress<D>(to, row, piece), at, exists);
  }
}

// x = a b^T for the warp's 16 rows of `a` and all kN rows of `b`. A lane has rows lane / 4 and the
// one 8 below, of each 8 columns the two from lane % 4 * 2 on.
template <int D, int kN, typename E>
__device__ __forceinline__ void MultiplyAbt(float (&x)[kN / 8][4], const E* a, const E* b) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) x[j][0] = x[j][1] = x[j][2] = x[j][3] = 0.f;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t left[4], right[4];
    LoadMatrices(left, PieceAddress<D>(a, warp * 16 + lane % 16, 2 * i + lane / 16));
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      LoadMatrices(right,
                   PieceAddress<D>(b, j * 16 + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
      Multiply<E>(x[2 * j], left, right[0], right[1]);
      Multiply<E>(x[2 * j + 1], left, right[2], right[3]);
    }
  }
}

// sums += x b for the columns of `b` from `column` on; x is rounded to E.
template <int D, int kN, int kColumns, typename E>
__device__ __forceinline__ void MultiplyAdd(float (&sums)[kColumns / 8][4],
                                            const float (&x)[kN / 8][4], const E* b, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) {
    const float(&low)[4] = x[2 * j], (&high)[4] = x[2 * j + 1];
    const uint32_t left[4] = {PackPair<E>(low[0], low[1]), PackPair<E>(low[2], low[3]),
                              PackPair<E>(high[0], high[1]), PackPair<E>(high[2], high[3])};
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t right[4];
      LoadMatricesTransposed(right, PieceAddress<D>(b, j * 16 + lane / 8 % 2 * 8 + lane % 8,
                                                    column / 8 + 2 * i + lane / 16));
      Multiply<E>(sums[2 * i], left, right[0], right[1]);
      Multiply<E>(sums[2 * i + 1], left, right[2], right[3]);
    }
  }
}

// ---- The mask

// Rows [begin, end) see a key.
struct Sight {
  int begin, end;
  __device__ __forceinline__ bool Sees(int row) const { return begin <= row && row < end; }
};

// Of key `key` of the run's tile.
__device__ __forceinline__ Sight SightOf(const AttentionSchedule& s, const KeyRun& run, int key) {
  if (run.tile >= 0) {
    const int row = run.tile * kKeyTile + key;
    return {row, s.subtree_end[row]};
  }
  if (s.context_ends[s.context_tiles[~run.tile].first_end + key] == 0) return {0, 0};
  return {run.row_begin, run.row_end};
}

// Whether all of a query tile's rows see all of the tile's keys.
__device__ __forceinline__ bool SeesAll(const KeyRun& run, int row) {
  const int tile = row / kBackwardQueryTile;
  return run.full_first <= tile && tile < run.full_last;
}

// ---- dK and dV

// The steps of a key tile: rows from the last to the first, for each the heads of the group.
template <int D>
struct RowCursor {
  const KeyRun *at, *runs_end;
  KeyRun run;
  int row, in_group = 0;

  __device__ RowCursor(const AttentionSchedule& s, const KeyWork& work)
      : at(s.key_runs + work.runs_begin), runs_end(at + work.num_runs) {
    Enter();
  }
  __device__ bool valid() const { return at != runs_end; }
  __device__ void Enter() {
    run = *at;
    row = run.last * kBackwardQueryTile - kStepRows<D>;
  }
  __device__ void Advance(int group_size) {
    if (++in_group < group_size) return;
    in_group = 0, row -= kStepRows<D>;
    if (row >= run.first * kBackwardQueryTile) return;
    if (++at != runs_end) Enter();
  }
};

// S^T and dP^T to P^T and dS^T. `key`: this lane's first key of the tile; `sums_at`: of the step's
// first row in lse and delta.
template <int kN, typename E>
__device__ __forceinline__ void ScoresByKeys(float (&s)[kN / 8][4], float (&dp)[kN / 8][4],
                                             const Parameters<E>& p, const KeyRun& run, int key,
                                             int row, int64_t sums_at) {
  const float scale_log2 = p.scale * kLog2e;
  const bool masked = !SeesAll(run, row);
  Sight sights[2] = {};
  if (masked) {
    sights[0] = SightOf(p.schedule, run, key);
    sights[1] = SightOf(p.schedule, run, key + 8);
  }
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int column = 8 * j + threadIdx.x % 4 * 2;
    const float2 lse = *reinterpret_cast<const float2*>(p.lse + sums_at + column);
    const float2 delta = *reinterpret_cast<const float2*>(p.delta + sums_at + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float probability = Exp2(s[j][i] * scale_log2 - (i % 2 ? lse.y : lse.x));
      if (masked && !sights[i / 2].Sees(row + column + i % 2)) probability = 0.f;
      s[j][i] = probability;
      dp[j][i] = probability * (dp[j][i] - (i % 2 ? delta.y : delta.x));
    }
  }
}

// This lane's sums to rows of 16 bits or, added, to pages in f32.
template <int kColumns, typename E>
__device__ __forceinline__ void WriteRow(E* to, const float (&sums)[kColumns / 8][4], int half,
                                         float factor) {
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i)
    *reinterpret_cast<uint32_t*>(to + 8 * i) =
        PackPair<E>(sums[i][2 * half] * factor, sums[i][2 * half + 1] * factor);
}
template <int kColumns>
__device__ __forceinline__ void AddToRow(float* to, const float (&sums)[kColumns / 8][4], int half,
                                         float factor) {
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    float2& pair = *reinterpret_cast<float2*>(to + 8 * i);
    pair = {pair.x + sums[i][2 * half] * factor, pair.y + sums[i][2 * half + 1] * factor};
  }
}

// Slot of key `key` of context tile `tile`, or -1: there is none.
template <typename E>
__device__ __forceinline__ int64_t SlotOf(const Parameters<E>& p, int tile, int key) {
  const ContextTile context = p.schedule.context_tiles[tile];
  if (p.schedule.context_ends[context.first_end + key] == 0) return -1;
  return p.schedule.context_slots[context.first_piece + key / p.run_slots] + key % p.run_slots;
}

// A block: half a key tile (64 keys) of one KV head, over the rows that see it and the heads of the
// group. Traffic: 256 D bytes a step of 64 rows, from L2, for 32,768 D FLOP; bound by ldmatrix, 20
// of them for 32 mma.
template <typename E, int D>
__global__ void __launch_bounds__(kBlockThreads)
    PortableKeysKernel(const __grid_constant__ Parameters<E> p) {
  constexpr int kN = kStepRows<D>, kColumns = kSumColumns<D>;
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<E, D>*>(raw);
  const KeyWork work = p.schedule.key_work[blockIdx.x / kHalves];
  const int first_key = blockIdx.x % kHalves * kOwnRows, kv_head = blockIdx.y;
  const int first_column = blockIdx.z * kColumns;
  const auto copy_step = [&](const RowCursor<D>& at, int stage) {
    const int head = kv_head * p.group_size + at.in_group;
    CopyRows<D, kN>(shared.streamed[stage][0], p.Queries(head, D), at.row);
    CopyRows<D, kN>(shared.streamed[stage][1], p.OutGradients(head, D), at.row);
    CommitCopies();
  };
  CopyRows<D, kOwnRows>(shared.own[0], p.Keys(work.tile, kv_head, D),
                        FirstRow(work.tile) + first_key);
  CopyRows<D, kOwnRows>(shared.own[1], p.Values(work.tile, kv_head, D),
                        FirstRow(work.tile) + first_key);
  RowCursor<D> at(p.schedule, work);
  copy_step(at, 0);

  const int lane = threadIdx.x % 32, key = first_key + threadIdx.x / 32 * 16 + lane / 4;
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  for (int stage = 0; at.valid(); stage ^= 1) {
    RowCursor<D> next = at;
    next.Advance(p.group_size);
    WaitCopies<0>();
    __syncthreads();  // this step's tiles are here, and all have read the last one's
    if (next.valid()) copy_step(next, stage ^ 1);
    const E *q = shared.streamed[stage][0], *d_out = shared.streamed[stage][1];
    float s[kN / 8][4], dp[kN / 8][4];
    MultiplyAbt<D, kN>(s, shared.own[0], q);
    MultiplyAbt<D, kN>(dp, shared.own[1], d_out);
    const int64_t sums_at = int64_t{kv_head * p.group_size + at.in_group} * p.padded + at.row;
    ScoresByKeys<kN>(s, dp, p, at.run, key, at.row, sums_at);
    MultiplyAdd<D, kN, kColumns>(dv, s, d_out, first_column);
    MultiplyAdd<D, kN, kColumns>(dk, dp, q, first_column);
    at = next;
  }

  const int column = kv_head * D + first_column + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (work.tile >= 0) {
      const int64_t row = work.tile * kKeyTile + key + 8 * half;
      if (row >= p.schedule.rows) continue;
      WriteRow<kColumns>(p.d_k + row * p.d_k_stride + column, dk, half, p.scale * kBackwardUnit<E>);
      WriteRow<kColumns>(p.d_v + row * p.d_v_stride + column, dv, half, kBackwardUnit<E>);
    } else if (p.d_context_k) {
      const int64_t slot = SlotOf(p, ~work.tile, key + 8 * half);
      if (slot < 0) continue;
      const int64_t to = slot * p.kv_heads * D + column;
      AddToRow<kColumns>(p.d_context_k + to, dk, half, p.scale * kBackwardUnit<E>);
      AddToRow<kColumns>(p.d_context_v + to, dv, half, kBackwardUnit<E>);
    }
  }
}

// ---- dQ

// The steps of a query tile: its list of key tiles, each from the first key to the last.
template <int D>
struct KeyCursor {
  const KeyRun* runs;
  const int32_t *at, *list_end;
  KeyRun run;
  int key = 0;

  __device__ KeyCursor(const AttentionSchedule& s, const QueryTileWork& work)
      : runs(s.key_runs),
        at(s.backward_entries + work.list_begin),
        list_end(s.backward_entries + work.list_end) {
    run = runs[*at];
  }
  __device__ bool valid() const { return at != list_end; }
  __device__ void Advance() {
    key += kStepRows<D>;
    if (key < kKeyTile) return;
    key = 0;
    if (++at != list_end) run = runs[*at];
  }
};

// S and dP to dS, in dP.
template <int kN, typename E>
__device__ __forceinline__ void ScoresByRows(const float (&s)[kN / 8][4], float (&dp)[kN / 8][4],
                                             const Parameters<E>& p, const KeyRun& run, int key,
                                             int row, const float (&lse)[2],
                                             const float (&delta)[2]) {
  const float scale_log2 = p.scale * kLog2e;
  const bool masked = !SeesAll(run, row);
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const int column = 8 * j + threadIdx.x % 4 * 2;
    Sight sights[2] = {};
    if (masked) {
      sights[0] = SightOf(p.schedule, run, key + column);
      sights[1] = SightOf(p.schedule, run, key + column + 1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2;
      float probability = Exp2(s[j][i] * scale_log2 - lse[half]);
      if (masked && !sights[i % 2].Sees(row + 8 * half)) probability = 0.f;
      dp[j][i] = probability * (dp[j][i] - delta[half]);
    }
  }
}

// A block: 64 rows of one query head, over the keys that they see. Traffic and bound as above, with
// three products for four.
template <typename E, int D>
__global__ void __launch_bounds__(kBlockThreads)
    PortableQueriesKernel(const __grid_constant__ Parameters<E> p) {
  constexpr int kN = kStepRows<D>;
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<E, D>*>(raw);
  const QueryTileWork work = p.schedule.backward_tiles[blockIdx.x / kHalves];
  const int first_row = work.row_begin + blockIdx.x % kHalves * kOwnRows, head = blockIdx.y;
  if (first_row >= p.schedule.rows) return;
  const auto copy_step = [&](const KeyCursor<D>& at, int stage) {
    const int kv_head = head / p.group_size, row = FirstRow(at.run.tile) + at.key;
    CopyRows<D, kN>(shared.streamed[stage][0], p.Keys(at.run.tile, kv_head, D), row);
    CopyRows<D, kN>(shared.streamed[stage][1], p.Values(at.run.tile, kv_head, D), row);
    CommitCopies();
  };
  CopyRows<D, kOwnRows>(shared.own[0], p.Queries(head, D), first_row);
  CopyRows<D, kOwnRows>(shared.own[1], p.OutGradients(head, D), first_row);
  KeyCursor<D> at(p.schedule, work);
  copy_step(at, 0);

  const int lane = threadIdx.x % 32, row = first_row + threadIdx.x / 32 * 16 + lane / 4;
  const int64_t sums_at = int64_t{head} * p.padded + row;
  const float lse[2] = {p.lse[sums_at], p.lse[sums_at + 8]};
  const float delta[2] = {p.delta[sums_at], p.delta[sums_at + 8]};
  float dq[D / 8][4] = {};
  for (int stage = 0; at.valid(); stage ^= 1) {
    KeyCursor<D> next = at;
    next.Advance();
    WaitCopies<0>();
    __syncthreads();  // as above
    if (next.valid()) copy_step(next, stage ^ 1);
    const E *k = shared.streamed[stage][0], *v = shared.streamed[stage][1];
    float s[kN / 8][4], dp[kN / 8][4];
    MultiplyAbt<D, kN>(s, shared.own[0], k);
    MultiplyAbt<D, kN>(dp, shared.own[1], v);
    ScoresByRows<kN>(s, dp, p, at.run, at.key, row, lse, delta);
    MultiplyAdd<D, kN, D>(dq, dp, k, 0);
    at = next;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= p.schedule.rows) continue;
    E* to = p.d_q + (row + 8 * half) * p.d_q_stride + head * D + lane % 4 * 2;
    WriteRow<D>(to, dq, half, p.scale * kBackwardUnit<E>);
  }
}

template <typename E>
Parameters<E> ParametersOf(const BackwardPass& b) {
  const TreeAttentionBackwardArgs& a = *b.args;
  Parameters<E> p{};
  p.schedule = a.schedule;
  p.q = static_cast<const E*>(a.q.data), p.q_stride = a.q.row_stride;
  p.k = static_cast<const E*>(a.k.data), p.k_stride = a.k.row_stride;
  p.v = static_cast<const E*>(a.v.data), p.v_stride = a.v.row_stride;
  p.d_out = static_cast<const E*>(a.d_out.data), p.d_out_stride = a.d_out.row_stride;
  p.d_q = static_cast<E*>(a.d_q.data), p.d_q_stride = a.d_q.row_stride;
  p.d_k = static_cast<E*>(a.d_k.data), p.d_k_stride = a.d_k.row_stride;
  p.d_v = static_cast<E*>(a.d_v.data), p.d_v_stride = a.d_v.row_stride;
  p.context_k = static_cast<const E*>(b.context_k);
  p.context_v = static_cast<const E*>(b.context_v);
  p.d_context_k = a.d_context.k, p.d_context_v = a.d_context.v;
  p.lse = b.row_lse, p.delta = b.row_delta;
  p.padded = static_cast<int>(PaddedRows(a.shape.rows));
  p.kv_heads = a.shape.kv_heads;
  p.group_size = a.shape.q_heads / a.shape.kv_heads;
  p.run_slots = RunSlots(a.context);
  p.scale = a.shape.scale;
  return p;
}

template <typename E, int D>
cudaError_t Launch(const BackwardPass& b, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<E, D>);
  const auto keys = PortableKeysKernel<E, D>, queries = PortableQueriesKernel<E, D>;
  for (const auto kernel : {keys, queries}) {
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
      return e;
  }
  const AttentionShape& shape = b.args->shape;
  const AttentionSchedule& s = b.args->schedule;
  const Parameters<E> p = ParametersOf<E>(b);
  const dim3 key_tiles(s.num_key_work * kHalves, shape.kv_heads, D / kSumColumns<D>);
  keys<<<key_tiles, kBlockThreads, kBytes, stream>>>(p);
  if (auto e = cudaGetLastError()) return e;
  const dim3 query_tiles(s.num_backward_tiles * kHalves, shape.q_heads);
  queries<<<query_tiles, kBlockThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int32_t PortableBackwardSharedBytes(int32_t head_dim) {
  if (head_dim == 64) return sizeof(Shared<Bf16, 64>);
  if (head_dim == 128) return sizeof(Shared<Bf16, 128>);
  if (head_dim == 256) return sizeof(Shared<Bf16, 256>);
  return 0;
}

cudaError_t LaunchPortableBackward(const BackwardPass& pass, cudaStream_t stream) {
  const AttentionShape& shape = pass.args->shape;
  return ForElement(shape.dtype, [&](auto element) {
    using E = decltype(element);
    if (shape.head_dim == 64) return Launch<E, 64>(pass, stream);
    if (shape.head_dim == 128) return Launch<E, 128>(pass, stream);
    if (shape.head_dim == 256) return Launch<E, 256>(pass, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace coppice::cuda
