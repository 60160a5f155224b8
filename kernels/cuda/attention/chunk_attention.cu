// Tree attention forward on mma.sync: decode, and the path for every head_dim and architecture
// since sm_80.
//
//   out = softmax(scale Q K^T) V over stacked rows: the query heads of one KV head of up to 64 rows
//
// A block takes one item and one KV head. Keys run in splits of 256 by absolute position, an online
// softmax over tiles of 32 (16 at head_dim 256); the splits of a chunk of 1024 are folded in order,
// then the chunks. That order is the same whether the splits run in blocks of their own (narrow:
// one warp, up to 16 stacked rows, one split), one after the other (wide: four warps of 16 stacked
// rows share the keys) or in other launches (partial results, merged by MergeChunksKernel), so a
// row's bits depend neither on the batch nor on where sharing ends. Traffic: each key once per
// item, 4 head_dim bytes; narrow items are bound by that (4.3 TB/s), wide ones by mma.sync.
#include "kernels/cuda/attention/chunk_attention.cuh"

namespace coppice::cuda {
namespace {

template <int D>
struct WideShared : ChunkShared<D> {
  SharedSums<D> chunk[kChunkWarps], total[kChunkWarps];
};

// One warp, up to 16 stacked rows, one split.
template <int D>
__global__ void __launch_bounds__(32) NarrowChunkKernel(const __grid_constant__ ChunkParameters p) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<ChunkShared<D>*>(raw);
  const WarpWork<D, 1> work{
      p,     p.items[blockIdx.x], static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x), 0,
      shared};
  if (work.item.num_rows == 0) return;
  uint32_t q[D / 16][4];
  int rows[2];
  work.LoadQueries(q, rows);
  RowSums<D> s;
  work.SumSplit(s, q, rows, work.item.key_begin, work.item.key_end);
  work.Write(InRegisters<D>{s});
}

// Four warps, 16 stacked rows each, all keys of the item.
template <int D>
__global__ void __launch_bounds__(kChunkThreads)
    WideChunkKernel(const __grid_constant__ ChunkParameters p) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto& shared = *reinterpret_cast<WideShared<D>*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpWork<D, kChunkWarps> work{
      p, p.items[blockIdx.x], static_cast<int>(blockIdx.y), lane, warp, shared};
  if (work.item.num_rows == 0) return;
  uint32_t q[D / 16][4];
  int rows[2];
  work.LoadQueries(q, rows);
  SharedSums<D>&chunk = shared.chunk[warp], &total = shared.total[warp];
  total.Clear(lane);
  const int key_end = work.item.key_end;
  for (int begin = work.item.key_begin; begin < key_end;) {
    const int chunk_end = min((begin / kChunkKeys + 1) * kChunkKeys, key_end);
    chunk.Clear(lane);
    for (; begin < chunk_end; begin += kSplitKeys) {
      RowSums<D> s;
      work.SumSplit(s, q, rows, begin, min(begin + kSplitKeys, chunk_end));
      chunk.FoldIn(InRegisters<D>{s}, lane);
    }
    total.FoldIn(InShared<D>{chunk, lane}, lane);
  }
  work.Write(InShared<D>{total, lane});
}

template <int kColumns>
struct ColumnSums {
  float out[kColumns], max, sum;

  __device__ ColumnSums() : max(-INFINITY), sum(0.f) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] = 0.f;
  }
  __device__ void FoldIn(const float (&x)[kColumns], float x_max, float x_sum) {
    const FoldFactors f = Factors(max, x_max);
    max = f.max;
    sum = Fold(f, sum, x_sum);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] = Fold(f, out[i], x[i]);
  }
};

// Folds a row's partial results: a warp takes one row and query head, and reads kBatch parts at a
// time before it folds them in order: latency is the bound. Reads 4 head_dim + 8 bytes a part.
template <int D>
__global__ void __launch_bounds__(kChunkThreads)
    MergeChunksKernel(const __grid_constant__ ChunkParameters p) {
  constexpr int kColumns = D / 32, kBatch = 8;
  const int lane = threadIdx.x % 32, head = blockIdx.y * kChunkWarps + threadIdx.x / 32;
  if (head >= p.q_heads) return;
  const MergeWork work = p.schedule.merges[blockIdx.x];
  const int* parts = p.schedule.merge_parts + work.parts_begin;
  ColumnSums<kColumns> chunk, total;
  for (int first = 0; first < work.num_parts; first += kBatch) {
    int index[kBatch];
    float2 sums[kBatch];
    float x[kBatch][kColumns];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) index[i] = parts[min(first + i, work.num_parts - 1)];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t part = int64_t{index[i] < 0 ? ~index[i] : index[i]} * p.q_heads + head;
      sums[i] = p.partial.sums[part];
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        const float* from = p.partial.out + part * D + lane * kColumns + c;
        const float2 pair = *reinterpret_cast<const float2*>(from);
        x[i][c] = pair.x, x[i][c + 1] = pair.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= work.num_parts) break;
      if (index[i] < 0) {
        total.FoldIn(chunk.out, chunk.max, chunk.sum);
        chunk = ColumnSums<kColumns>();
      }
      chunk.FoldIn(x[i], sums[i].x, sums[i].y);
    }
  }
  total.FoldIn(chunk.out, chunk.max, chunk.sum);
  const float inverse = 1.f / total.sum;
  Bf16* to = p.out + work.row * p.out_stride + head * D + lane * kColumns;
#pragma unroll
  for (int c = 0; c < kColumns; c += 2)
    *reinterpret_cast<uint32_t*>(to + c) = Pack(total.out[c] * inverse, total.out[c + 1] * inverse);
  if (p.lse && lane == 0)
    p.lse[int64_t{work.row} * p.q_heads + head] = total.max * kLn2 + logf(total.sum);
}

int Log2(int x) {
  int shift = 0;
  while ((1 << shift) < x) ++shift;
  return shift;
}

template <typename Shared>
cudaError_t LaunchChunks(void (*kernel)(ChunkParameters), const ChunkParameters& p, int items,
                         int threads, cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  const int shared_bytes = sizeof(Shared);
  if (auto e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return e;
  kernel<<<dim3(items, p.kv_heads), threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

template <int D>
cudaError_t Launch(const TreeAttentionArgs& a, const ChunkScratch& scratch, cudaStream_t stream) {
  ChunkParameters p{};
  p.schedule = a.schedule;
  p.q = static_cast<const Bf16*>(a.q.data);
  p.k = static_cast<const Bf16*>(a.k.data);
  p.v = static_cast<const Bf16*>(a.v.data);
  p.context_k = static_cast<const Bf16*>(a.context.k);
  p.context_v = static_cast<const Bf16*>(a.context.v);
  p.q_stride = a.q.row_stride, p.k_stride = a.k.row_stride, p.v_stride = a.v.row_stride;
  p.out_stride = a.out.row_stride;
  p.out = static_cast<Bf16*>(a.out.data);
  p.lse = a.lse;
  p.partial = scratch;
  p.block_shift = Log2(a.context.block_tokens);
  p.q_heads = a.shape.q_heads, p.kv_heads = a.shape.kv_heads;
  p.group_size = p.q_heads / p.kv_heads;
  p.scale = a.shape.scale;
  const AttentionSchedule& s = a.schedule;
  p.items = s.wide_chunks;
  if (auto e =
          LaunchChunks<WideShared<D>>(WideChunkKernel<D>, p, s.num_wide, kChunkThreads, stream))
    return e;
  p.items = s.narrow_chunks;
  if (auto e = LaunchChunks<ChunkShared<D>>(NarrowChunkKernel<D>, p, s.num_narrow, 32, stream))
    return e;
  if (a.schedule.num_merges == 0) return cudaSuccess;
  const dim3 grid(a.schedule.num_merges, (p.q_heads + kChunkWarps - 1) / kChunkWarps);
  MergeChunksKernel<D><<<grid, kChunkThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchChunkForward(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                               cudaStream_t stream) {
  switch (args.shape.head_dim) {
    case 64:
      return Launch<64>(args, scratch, stream);
    case 128:
      return Launch<128>(args, scratch, stream);
    case 256:
      return Launch<256>(args, scratch, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace coppice::cuda
