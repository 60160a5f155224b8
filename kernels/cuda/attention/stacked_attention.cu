// Decode over shared context on wgmma: all rows below a context node attend to a chunk of its keys
// at once.
//
//   out, maximum, sum of exponentials of softmax(scale Q K^T) V over one chunk, to be merged with
//   the row's other chunks
//
// An item is up to 128 stacked rows (row x query head of one KV head) and up to 1024 keys in pages,
// whole tiles of 128; no mask. Blocks are persistent and take every gridDim-th (KV head, item); a
// producer thread streams K and V by TMA, across items, and two consumer warpgroups gather 64
// stacked query rows each. Registers and pipeline as in the forward kernel. Traffic: each key once
// per item, 4 head_dim bytes; bound by it (4.3 TB/s) up to about 128 stacked rows, by the tensor
// cores beyond.
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"
#include "kernels/cuda/attention/softmax.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {
namespace {

constexpr int kStages = 2;

struct StackedParameters {
  CUtensorMap k, v;
  AttentionSchedule schedule;
  const Bf16* q;
  int64_t q_stride;
  ChunkScratch partial;
  int block_shift, pieces, q_heads, kv_heads, group_size;
  float scale;
};

template <int D>
struct StackedShared {
  alignas(1024) Bf16 q[kStackedRows * D];
  alignas(1024) Bf16 k[kStages][kKeyTile * D];
  alignas(1024) Bf16 v[kStages][kKeyTile * D];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

__device__ __forceinline__ int KeyTiles(const ChunkWork& item) {
  return (item.key_end - item.key_begin) / kKeyTile;
}

// The tile of keys that starts at path position `key`, block by block.
template <int D>
__device__ __forceinline__ void LoadPages(const StackedParameters& p, Bf16* to,
                                          const CUtensorMap& map, const ChunkWork& item,
                                          int kv_head, int key, Barrier& full) {
  const int rows = kKeyTile / p.pieces;
  for (int i = 0; i < p.pieces; ++i) {
    const int at = key + i * rows;
    const int block = p.schedule.chunk_blocks[item.first_block + (at >> p.block_shift) -
                                              (item.key_begin >> p.block_shift)];
    const int slot = (block << p.block_shift) + (at & ((1 << p.block_shift) - 1));
#pragma unroll
    for (int panel = 0; panel < D / kPanel; ++panel)
      LoadBox(to + (panel * kKeyTile + i * rows) * kPanel, map, panel * kPanel, kv_head, slot,
              full);
  }
}

template <int D>
__device__ void Produce(const StackedParameters& p, StackedShared<D>& s) {
  Ring<kStages> ring;
  const int num_items = p.schedule.num_stacked;
  for (int i = blockIdx.x; i < num_items * p.kv_heads; i += gridDim.x) {
    const ChunkWork item = p.schedule.stacked_chunks[i % num_items];
    const int kv_head = i / num_items;
    for (int key = item.key_begin; key < item.key_end; key += kKeyTile, ring.Advance()) {
      const int stage = ring.stage;
      s.k_empty[stage].Wait(ring.phase ^ 1);
      s.k_full[stage].ArriveExpecting(kKeyTile * D * 2);
      LoadPages<D>(p, s.k[stage], p.k, item, kv_head, key, s.k_full[stage]);
      s.v_empty[stage].Wait(ring.phase ^ 1);
      s.v_full[stage].ArriveExpecting(kKeyTile * D * 2);
      LoadPages<D>(p, s.v[stage], p.v, item, kv_head, key, s.v_full[stage]);
    }
  }
}

// Gathers this warpgroup's 64 stacked rows into its half of the Q tile; rows past the item's are
// zero.
template <int D>
__device__ void GatherQueries(const StackedParameters& p, StackedShared<D>& s,
                              const ChunkWork& item, int kv_head, int group) {
  constexpr int kPieces = D / 8;
  NamedSync(1 + group, 128);  // the item before is done with the tile
#pragma unroll 4
  for (int i = threadIdx.x % 128; i < 64 * kPieces; i += 128) {
    const int stacked = group * 64 + i / kPieces, piece = i % kPieces, row = stacked / p.group_size;
    uint4 x = {0, 0, 0, 0};
    if (row < item.num_rows) {
      const int64_t at = p.schedule.chunk_rows[item.rows_begin + row] * p.q_stride;
      const int head = kv_head * p.group_size + stacked % p.group_size;
      x = *reinterpret_cast<const uint4*>(p.q + at + head * D + piece * 8);
    }
    Bf16* line = s.q + (piece / 8 * kStackedRows + stacked) * kPanel;
    reinterpret_cast<uint4*>(line)[(piece % 8) ^ (stacked & 7)] = x;
  }
  FenceAsyncShared();
  NamedSync(1 + group, 128);
}

// Writes this thread's accumulators, not normalised, as partial results.
template <int D>
__device__ void StorePartial(const StackedParameters& p, const ChunkWork& item, int kv_head,
                             int first, const float (&o)[D / 2], const float (&m)[2],
                             const float (&l)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int stacked = first + 8 * h, row = stacked / p.group_size;
    if (row >= item.num_rows) continue;
    const int head = kv_head * p.group_size + stacked % p.group_size;
    const int64_t part = int64_t{item.partial + row} * p.q_heads + head;
    float* to = p.partial.out + part * D + column;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = {o[4 * j + 2 * h], o[4 * j + 2 * h + 1]};
    if (column == 0) p.partial.sums[part] = {m[h] * p.scale * kLog2e, l[h]};
  }
}

template <int D>
__device__ void Consume(const StackedParameters& p, StackedShared<D>& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t q = ColumnsAreK(s.q + group * 64 * kPanel);
  const int num_items = p.schedule.num_stacked;
  Ring<kStages> key_ring, value_ring;

  for (int index = blockIdx.x; index < num_items * p.kv_heads; index += gridDim.x) {
    const ChunkWork item = p.schedule.stacked_chunks[index % num_items];
    const int kv_head = index / num_items, count = KeyTiles(item);
    GatherQueries<D>(p, s, item, kv_head, group);
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, shrink[2];
    float o[D / 2], scores[kKeyTile / 2];
    uint32_t probabilities[kKeyTile / 4];
    Clear(o);

    const auto start_scores = [&] {
      s.k_full[key_ring.stage].Wait(key_ring.phase);
      MultiplyAbt<D, kStackedRows>(scores, q, ColumnsAreK(s.k[key_ring.stage]));
    };
    const auto start_output = [&] {
      s.v_full[value_ring.stage].Wait(value_ring.phase);
      MultiplyAdd<kKeyTile>(o, probabilities, RowsAreK(s.v[value_ring.stage], kKeyTile));
    };
    const auto finish_scores = [&] {
      Pin(scores);
      Release(s.k_empty[key_ring.stage]);
      key_ring.Advance();
      OnlineSoftmax(scores, m, l, shrink, scale_log2);
    };
    const auto finish_output = [&] {
      WgmmaWait<0>();
      Pin(o);
      Release(s.v_empty[value_ring.stage]);
      value_ring.Advance();
    };

    start_scores();
    WgmmaWait<0>();
    finish_scores();
    PackOperand(probabilities, scores);
    for (int i = 1; i < count; ++i) {
      start_scores();
      start_output();
      WgmmaWait<1>();
      finish_scores();
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
    StorePartial<D>(p, item, kv_head, group * 64 + warp * 16 + lane / 4, o, m, l);
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    StackedAttentionKernel(const __grid_constant__ StackedParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<StackedShared<D>*>(raw);
  LetSuccessorStart();
  if (threadIdx.x == 0) {
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
    WaitForPredecessor();  // the pages, which the producer reads, are older
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
  p.kv_heads = a.shape.kv_heads;
  p.group_size = p.q_heads / p.kv_heads;
  p.scale = a.shape.scale;
  const int items = a.schedule.num_stacked * p.kv_heads;
  const int grid = items < Multiprocessors() ? items : Multiprocessors();
  return LaunchOverlapped<StackedAttentionKernel<D>>(
      {dim3(grid), kThreads, sizeof(StackedShared<D>)}, stream, p);
}

}  // namespace

cudaError_t LaunchStackedChunks(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                                cudaStream_t stream) {
  if (args.shape.head_dim == 64) return Launch<64>(args, scratch, stream);
  if (args.shape.head_dim == 128) return Launch<128>(args, scratch, stream);
  return cudaErrorNotSupported;
}

}  // namespace coppice::cuda
