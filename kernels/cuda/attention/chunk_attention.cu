// Tree attention forward on mma.sync: decode, and the path for every head_dim and architecture
// since sm_80.
//
//   out = softmax(scale Q K^T) V over stacked rows: the query heads of one KV head of up to 64 rows
//
// A block takes one item and one KV head. Keys run in splits of 256 by absolute position, an online
// softmax over tiles of 32 (16 at head_dim 256); the splits of a chunk of 1024 are folded in order,
// then the chunks. That order is the same whether the splits run in blocks of their own (narrow:
// a warp for 16 stacked rows, up to two, one split), one after the other (wide: four warps of 16
// stacked rows share the keys) or in other launches (partial results, merged by MergeChunksKernel),
// so a row's bits depend neither on the batch nor on where sharing ends. Traffic: each key once per
// item, 4 head_dim bytes; narrow items are bound by that (4.3 TB/s), wide ones by mma.sync.
#include <algorithm>

#include "kernels/cuda/attention/chunk_attention.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {
namespace {

template <typename E, int D>
struct WideShared : ChunkShared<E, D> {
  SharedSums<D> chunk[kChunkWarps], total[kChunkWarps];
};

// One or two warps, 16 stacked rows each, one split. Keys in pages are on their way before the
// kernel ahead has ended: it wrote none of them.
template <typename E, int D, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    NarrowChunkKernel(const __grid_constant__ ChunkParameters<E> p) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<ChunkShared<E, D>*>(raw);
  LetSuccessorStart();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpWork<D, kWarps, ChunkShared<E, D>> work{
      p, p.items[blockIdx.x], static_cast<int>(blockIdx.y), lane, warp, shared};
  const int begin = work.item.key_begin, end = work.item.key_end;
  const bool is_cached = end <= work.item.context_tokens;
  if (is_cached) work.StartSplit(begin, end);
  WaitForPredecessor();
  if (!is_cached) work.StartSplit(begin, end);
  uint32_t q[D / 16][4];
  int rows[2];
  work.LoadQueries(q, rows);
  RowSums<D> s;
  work.SumSplit(s, q, rows, begin, end);
  work.Write(InRegisters<D>{s});
}

// Four warps, 16 stacked rows each, all keys of the item.
template <typename E, int D>
__global__ void __launch_bounds__(kChunkThreads)
    WideChunkKernel(const __grid_constant__ ChunkParameters<E> p) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<WideShared<E, D>*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpWork<D, kChunkWarps, WideShared<E, D>> work{
      p, p.items[blockIdx.x], static_cast<int>(blockIdx.y), lane, warp, shared};
  LetSuccessorStart();
  WaitForPredecessor();
  uint32_t q[D / 16][4];
  int rows[2];
  work.LoadQueries(q, rows);
  SharedSums<D>&chunk = shared.chunk[warp], &total = shared.total[warp];
  total.Clear(lane);
  const int key_end = work.item.key_end;
  for (int begin = work.item.key_begin; begin < key_end;) {
    const int chunk_end = min((begin / kChunkKeys + 1) * kChunkKeys, key_end);
    chunk.Clear(lane);
    while (begin < chunk_end) {
      RowSums<D> s;
      const int end = min(begin + kSplitKeys, chunk_end);
      work.StartSplit(begin, end);
      work.SumSplit(s, q, rows, begin, end);
      chunk.FoldIn(InRegisters<D>{s}, lane);
      begin = end;
    }
    total.FoldIn(InShared<D>{chunk, lane}, lane);
  }
  work.Write(InShared<D>{total, lane});
}

template <int kColumns>
struct ColumnSums {
  float out[kColumns], max = -INFINITY, sum = 0.f;

  __device__ ColumnSums() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] = 0.f;
  }
  __device__ __forceinline__ void FoldIn(const float (&x)[kColumns], float2 sums) {
    const FoldFactors f = Factors(max, sums.x);
    max = f.max;
    sum = Fold(f, sum, sums.y);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] = Fold(f, out[i], x[i]);
  }
};

// A lane's columns of the partial results of one chunk, all on their way at once.
template <int D>
struct ChunkPartials {
  static constexpr int kColumns = D / 32;
  float x[kChunkParts][kColumns];
  float2 sums[kChunkParts];
  int parts[kChunkParts], count = 0;

  // Which results those are; the schedule alone is read.
  __device__ __forceinline__ void Find(const AttentionSchedule& schedule, const int* ends) {
    const int first = ends[0];
    count = ends[1] - first;
#pragma unroll
    for (int i = 0; i < kChunkParts; ++i)
      if (i < count) parts[i] = schedule.merge_parts[first + i];
  }
  template <typename E>
  __device__ __forceinline__ void Read(const ChunkParameters<E>& p, int head) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kChunkParts; ++i) {
      if (i >= count) break;
      const int64_t part = int64_t{parts[i]} * p.q_heads + head;
      sums[i] = __ldcg(p.partial.sums + part);
      const auto* from = reinterpret_cast<const float2*>(p.partial.out + part * D) + lane;
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        const float2 pair = __ldcg(from + c * 16);
        x[i][c] = pair.x, x[i][c + 1] = pair.y;
      }
    }
  }
  __device__ __forceinline__ ColumnSums<kColumns> Folded() const {
    ColumnSums<kColumns> chunk;
#pragma unroll
    for (int i = 0; i < kChunkParts; ++i)
      if (i < count) chunk.FoldIn(x[i], sums[i]);
    return chunk;
  }
};

constexpr int kMaxMergeWarps = 16;

template <int D>
struct MergeShared {
  float out[2][kMaxMergeWarps][D];
  float2 sums[2][kMaxMergeWarps];
};

// Folds the partial results of one row and query head. Each warp folds one chunk and reads its next
// one meanwhile; then each of the first D threads folds a column of the chunks in order. Reads
// 4 head_dim + 8 bytes a part, mostly from L2; bound by latency.
template <typename E, int D>
__global__ void __launch_bounds__(kMaxMergeWarps * 32)
    MergeChunksKernel(const __grid_constant__ ChunkParameters<E> p) {
  constexpr int kColumns = D / 32;
  __shared__ MergeShared<D> shared;
  LetSuccessorStart();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int head = blockIdx.y, column = threadIdx.x;
  const MergeWork work = p.schedule.merges[blockIdx.x];
  const int* chunks = p.schedule.merge_chunks + work.chunks_begin;
  ChunkPartials<D> partials;
  if (warp < work.num_chunks) partials.Find(p.schedule, chunks + warp);
  WaitForPredecessor();
  if (warp < work.num_chunks) partials.Read(p, head);
  ColumnSums<1> total;
  for (int first = 0, half = 0; first < work.num_chunks; first += warps, half ^= 1) {
    const int mine = first + warp;
    if (mine < work.num_chunks) {
      const ColumnSums<kColumns> chunk = partials.Folded();
#pragma unroll
      for (int c = 0; c < kColumns; c += 2)
        *reinterpret_cast<float2*>(&shared.out[half][warp][c * 32 + lane * 2]) = {chunk.out[c],
                                                                                  chunk.out[c + 1]};
      if (lane == 0) shared.sums[half][warp] = {chunk.max, chunk.sum};
    }
    if (mine + warps < work.num_chunks) {
      partials.Find(p.schedule, chunks + mine + warps);
      partials.Read(p, head);
    }
    __syncthreads();
    if (column < D) {
      for (int i = 0; i < min(warps, work.num_chunks - first); ++i) {
        const float x[1] = {shared.out[half][i][column]};
        total.FoldIn(x, shared.sums[half][i]);
      }
    }
  }
  if (column >= D) return;
  const float inverse = 1.f / total.sum;  // as WarpWork::Write: the same bits before rounding
  p.out[work.row * p.out_stride + head * D + column] = FromFloat<E>(total.out[0] * inverse);
  if (p.lse && column == 0)
    p.lse[int64_t{work.row} * p.q_heads + head] = total.max * kLn2 + logf(total.sum);
}

// Warps of a merging block: every column has a thread, and blocks fill the device once.
int MergeWarps(int head_dim, int blocks, int most_chunks) {
  constexpr int kResidentWarps = 8192;
  const int wanted = std::min({most_chunks, kResidentWarps / std::max(blocks, 1), kMaxMergeWarps});
  return std::max(wanted, head_dim / 32);
}

template <auto kKernel, typename Shared, typename E>
cudaError_t LaunchItems(const ChunkParameters<E>& p, int items, int threads, cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  return LaunchOverlapped<kKernel>({dim3(items, p.kv_heads), threads, sizeof(Shared)}, stream, p);
}

template <typename E, int D>
cudaError_t LaunchBoth(ChunkParameters<E> p, cudaStream_t stream) {
  const AttentionSchedule& s = p.schedule;
  p.items = s.wide_chunks;
  if (auto e = LaunchItems<WideChunkKernel<E, D>, WideShared<E, D>>(p, s.num_wide, kChunkThreads,
                                                                    stream))
    return e;
  p.items = s.narrow_chunks;
  if (s.narrow_rows <= 16)
    return LaunchItems<NarrowChunkKernel<E, D, 1>, ChunkShared<E, D>>(p, s.num_narrow, 32, stream);
  return LaunchItems<NarrowChunkKernel<E, D, 2>, ChunkShared<E, D>>(p, s.num_narrow, 64, stream);
}

template <typename E, int D>
cudaError_t LaunchMerge(const ChunkParameters<E>& p, cudaStream_t stream) {
  const AttentionSchedule& s = p.schedule;
  const int warps = MergeWarps(D, s.num_merges * p.q_heads, s.most_chunks);
  return LaunchOverlapped<MergeChunksKernel<E, D>>({dim3(s.num_merges, p.q_heads), warps * 32},
                                                   stream, p);
}

// launch(E, head_dim as a constant) for the dtype and head_dim of `shape`.
template <typename Run>
cudaError_t ForShape(const AttentionShape& shape, const Run& launch) {
  return ForElement(shape.dtype, [&]<typename E>(E) {
    switch (shape.head_dim) {
      case 64:
        return launch.template operator()<E, 64>();
      case 128:
        return launch.template operator()<E, 128>();
      case 256:
        return launch.template operator()<E, 256>();
      default:
        return cudaErrorNotSupported;
    }
  });
}

}  // namespace

cudaError_t LaunchChunks(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                         cudaStream_t stream) {
  return ForShape(args.shape, [&]<typename E, int D>() {
    return LaunchBoth<E, D>(ParametersOf<E>(args, scratch), stream);
  });
}

int32_t ChunkSharedBytes(int32_t head_dim) {
  if (head_dim == 64) return sizeof(WideShared<Bf16, 64>);
  if (head_dim == 128) return sizeof(WideShared<Bf16, 128>);
  if (head_dim == 256) return sizeof(WideShared<Bf16, 256>);
  return 0;
}

cudaError_t LaunchMerges(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                         cudaStream_t stream) {
  return ForShape(args.shape, [&]<typename E, int D>() {
    return LaunchMerge<E, D>(ParametersOf<E>(args, scratch), stream);
  });
}

}  // namespace coppice::cuda
