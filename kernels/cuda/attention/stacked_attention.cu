// Decode over shared context on wgmma: all rows below a context node attend to its keys at once.
//
//   out, maximum, sum of exponentials of softmax(scale Q K^T) V over a run of keys, to be merged
//   with the row's other runs
//
// An item is up to 128 stacked rows (row x query head of one KV head) and a run of whole key tiles
// of 128, in pages; no mask. Block (slot, KV head) takes the slot's items in turn; slots hold equal
// work and all blocks run at once. One warp streams K and V by TMA, across items; three warps
// gather the next item's queries meanwhile; two consumer warpgroups take 64 stacked rows each, or,
// of items of up to 64 rows, every second one. Registers and pipeline as in the forward kernel.
// Traffic: each key once per item, 4 head_dim bytes; bound by it (4.3 TB/s) up to about 128 stacked
// rows, by the tensor cores beyond.
#include "kernels/cuda/attention/async_copy.cuh"
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"
#include "kernels/cuda/attention/softmax.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kQueryStages = 2;
constexpr int kLoaders = 96;  // threads of the producer warpgroup behind its first warp
constexpr int kProducerRegisters = 40;

struct StackedParameters {
  CUtensorMap k, v;
  AttentionSchedule schedule;
  const Bf16* q;
  int64_t q_stride;
  ChunkScratch partial;
  int block_shift, pieces, q_heads, group_size;
  float scale;
};

template <int D>
struct StackedShared {
  alignas(1024) Bf16 q[kQueryStages][kStackedRows * D];
  alignas(1024) Bf16 k[kStages][kKeyTile * D];
  alignas(1024) Bf16 v[kStages][kKeyTile * D];
  Barrier q_full[kQueryStages], q_empty[kQueryStages];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

__device__ __forceinline__ int KeyTiles(const ChunkWork& item) {
  return (item.key_end - item.key_begin) / kKeyTile;
}

__device__ __forceinline__ int SlotOf(const StackedParameters& p, const ChunkWork& item, int key) {
  const int block = p.schedule.chunk_blocks[item.first_block + (key >> p.block_shift) -
                                            (item.key_begin >> p.block_shift)];
  return (block << p.block_shift) + (key & ((1 << p.block_shift) - 1));
}

// The items of this block.
struct SlotItems {
  int begin, count;
};
__device__ __forceinline__ SlotItems ItemsOf(const AttentionSchedule& schedule) {
  const int begin = schedule.stacked_slots[blockIdx.x];
  return {begin, schedule.stacked_slots[blockIdx.x + 1] - begin};
}

// One warp: keys and values, each lane its pages of a tile.
template <int D>
__device__ void Produce(const StackedParameters& p, StackedShared<D>& s) {
  Ring<kStages> ring;
  const SlotItems items = ItemsOf(p.schedule);
  const int lane = threadIdx.x, kv_head = blockIdx.y, rows = kKeyTile / p.pieces;
  const auto load = [&](Bf16* to, const CUtensorMap& map, int slot, Barrier& full) {
    if (lane == 0) full.ArriveExpecting(kKeyTile * D * 2);
    __syncwarp();
    if (lane >= p.pieces) return;
#pragma unroll
    for (int panel = 0; panel < D / kPanel; ++panel)
      LoadBox(to + (panel * kKeyTile + lane * rows) * kPanel, map, panel * kPanel, kv_head, slot,
              full);
  };
  for (int n = 0; n < items.count; ++n) {
    const ChunkWork item = p.schedule.stacked_chunks[items.begin + n];
    for (int key = item.key_begin; key < item.key_end; key += kKeyTile, ring.Advance()) {
      const int stage = ring.stage;
      const int slot = lane < p.pieces ? SlotOf(p, item, key + lane * rows) : 0;
      s.k_empty[stage].Wait(ring.phase ^ 1);
      load(s.k[stage], p.k, slot, s.k_full[stage]);
      s.v_empty[stage].Wait(ring.phase ^ 1);
      load(s.v[stage], p.v, slot, s.v_full[stage]);
    }
  }
}

// Copies of the item's query rows into a Q tile, all loaders. Rows past them are left as they are:
// what comes of them is not stored.
template <int D>
__device__ void CopyQueries(const StackedParameters& p, const ChunkWork& item, int kv_head,
                            Bf16* to) {
  constexpr int kPieces = D / 8;
  const int used = item.num_rows * p.group_size * kPieces;
#pragma unroll 2
  for (int i = threadIdx.x - 32; i < used; i += kLoaders) {
    const int stacked = i / kPieces, piece = i % kPieces;
    const int row = p.schedule.chunk_rows[item.rows_begin + stacked / p.group_size];
    const int head = kv_head * p.group_size + stacked % p.group_size;
    Bf16* line = to + (piece / 8 * kStackedRows + stacked) * kPanel;
    CopyAsync(SharedAddress(line + ((piece % 8) ^ (stacked & 7)) * 8),
              p.q + row * p.q_stride + head * D + piece * 8, true);
  }
}

// The loaders: queries of this block's items.
template <int D>
__device__ void LoadQueries(const StackedParameters& p, StackedShared<D>& s) {
  Ring<kQueryStages> queries;
  const SlotItems items = ItemsOf(p.schedule);
  WaitForPredecessor();  // the pages that the producer reads are older
  for (int n = 0; n < items.count; ++n, queries.Advance()) {
    const ChunkWork item = p.schedule.stacked_chunks[items.begin + n];
    s.q_empty[queries.stage].Wait(queries.phase ^ 1);
    CopyQueries<D>(p, item, blockIdx.y, s.q[queries.stage]);
    s.q_full[queries.stage].ArriveAfterCopies();
  }
}

// Writes this thread's accumulators, not normalised, as partial results.
template <int D>
__device__ void StorePartial(const StackedParameters& p, const ChunkWork& item, int first,
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
  Ring<kQueryStages> queries;
};

// Lets an item pass that the other warpgroup works on.
template <int D>
__device__ void PassItem(StackedShared<D>& s, int count, ConsumerRings& rings) {
  s.q_empty[rings.queries.stage].Arrive();
  for (int i = 0; i < count; ++i, rings.keys.Advance(), rings.values.Advance()) {
    s.k_full[rings.keys.stage].Wait(rings.keys.phase);
    Release(s.k_empty[rings.keys.stage]);
    s.v_full[rings.values.stage].Wait(rings.values.phase);
    Release(s.v_empty[rings.values.stage]);
  }
}

// The item's sums for the 64 stacked rows from `first` on.
template <int D>
__device__ void ConsumeItem(const StackedParameters& p, StackedShared<D>& s, const ChunkWork& item,
                            int first, ConsumerRings& rings) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float scale_log2 = p.scale * kLog2e;
  const int count = KeyTiles(item), buffer = rings.queries.stage;
  const uint64_t q = ColumnsAreK(s.q[buffer] + first * kPanel);
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, shrink[2];
  float o[D / 2], scores[kKeyTile / 2];
  uint32_t probabilities[kKeyTile / 4];
  Clear(o);

  const auto start_scores = [&] {
    s.k_full[rings.keys.stage].Wait(rings.keys.phase);
    MultiplyAbt<D, kStackedRows>(scores, q, ColumnsAreK(s.k[rings.keys.stage]));
  };
  const auto start_output = [&] {
    s.v_full[rings.values.stage].Wait(rings.values.phase);
    MultiplyAdd<kKeyTile>(o, probabilities, RowsAreK(s.v[rings.values.stage], kKeyTile));
  };
  const auto finish_scores = [&](int i) {
    Pin(scores);
    Release(s.k_empty[rings.keys.stage]);
    rings.keys.Advance();
    if (i == count - 1) s.q_empty[buffer].Arrive();
    OnlineSoftmax(scores, m, l, shrink, scale_log2);
  };
  const auto finish_output = [&] {
    WgmmaWait<0>();
    Pin(o);
    Release(s.v_empty[rings.values.stage]);
    rings.values.Advance();
  };

  FenceAsyncShared();  // the loaders' copies of the queries come before
  start_scores();
  WgmmaWait<0>();
  finish_scores(0);
  PackOperand(probabilities, scores);
  for (int i = 1; i < count; ++i) {
    start_scores();
    start_output();
    WgmmaWait<1>();
    finish_scores(i);
    finish_output();
    if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
      for (int j = 0; j < D / 2; ++j) o[j] *= shrink[j / 2 % 2];
    }
    PackOperand(probabilities, scores);
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

template <int D>
__device__ void Consume(const StackedParameters& p, StackedShared<D>& s, int group) {
  ConsumerRings rings;
  const SlotItems items = ItemsOf(p.schedule);
  for (int n = 0; n < items.count; ++n, rings.queries.Advance()) {
    const ChunkWork item = p.schedule.stacked_chunks[items.begin + n];
    const bool is_small = item.num_rows * p.group_size <= 64;
    s.q_full[rings.queries.stage].Wait(rings.queries.phase);
    if (is_small && n % 2 != group) {
      PassItem(s, KeyTiles(item), rings);
    } else {
      ConsumeItem(p, s, item, is_small ? 0 : group * 64, rings);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    StackedAttentionKernel(const __grid_constant__ StackedParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<StackedShared<D>*>(raw);
  LetSuccessorStart();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQueryStages; ++i)
      s.q_full[i].Init(kLoaders), s.q_empty[i].Init(kConsumerThreads);
    for (int i = 0; i < kStages; ++i) {
      s.k_full[i].Init(1), s.k_empty[i].Init(kConsumerWarps);
      s.v_full[i].Init(1), s.v_empty[i].Init(kConsumerWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    GiveRegisters<kProducerRegisters>();
    if (threadIdx.x < 32) {
      Produce(p, s);
    } else {
      LoadQueries(p, s);
    }
  } else {
    TakeRegisters<kConsumerRegisters<kProducerRegisters>>();
    Consume(p, s, group - 1);
  }
}

template <int D>
cudaError_t Launch(const TreeAttentionArgs& a, const ChunkScratch& scratch, cudaStream_t stream) {
  StackedParameters p{};
  const ContextPages& c = a.context;
  const int piece = c.block_tokens < kKeyTile ? c.block_tokens : kKeyTile;
  const int64_t slots = c.num_blocks * c.block_tokens, stride = int64_t{a.shape.kv_heads} * D;
  if (auto e = MakeMap(p.k, {c.k, slots, stride, a.shape.kv_heads, D}, piece)) return e;
  if (auto e = MakeMap(p.v, {c.v, slots, stride, a.shape.kv_heads, D}, piece)) return e;
  p.schedule = a.schedule;
  p.q = static_cast<const Bf16*>(a.q.data);
  p.q_stride = a.q.row_stride;
  p.partial = scratch;
  while ((1 << p.block_shift) < c.block_tokens) ++p.block_shift;
  p.pieces = kKeyTile / piece;
  p.q_heads = a.shape.q_heads;
  p.group_size = p.q_heads / a.shape.kv_heads;
  p.scale = a.shape.scale;
  return LaunchOverlapped<StackedAttentionKernel<D>>(
      {dim3(a.schedule.num_stacked_slots, a.shape.kv_heads), kThreads, sizeof(StackedShared<D>)},
      stream, p);
}

}  // namespace

cudaError_t LaunchStackedChunks(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                                cudaStream_t stream) {
  if (args.shape.head_dim == 64) return Launch<64>(args, scratch, stream);
  if (args.shape.head_dim == 128) return Launch<128>(args, scratch, stream);
  return cudaErrorNotSupported;
}

}  // namespace coppice::cuda
