// The end of a decode kernel: its blocks wait for each other, then fold the partial results of
// every row, their own and those of the kernels before.
#pragma once

#include "kernels/cuda/attention/chunk_attention.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {

// Which partial results a block's merges are made of, looked up while there is time.
struct BlockMerges {
  static constexpr int kCount = 24;  // merges, at most
  static constexpr int kParts = 18;  // their first results
  int2 rows[kCount];                 // row, query head
  int2 ends[kCount];                 // of its results in merge_parts
  int parts[kCount][kParts];
};

// What a block works on, read once: one of the slots of a KV head.
struct DecodePlace {
  int slot = blockIdx.x, slots = gridDim.x, kv_head = blockIdx.y;
};

// Rows and query heads that a block merges: of its KV head, one after every so many. REQUIRES: no
// more than BlockMerges::kCount.
struct MergeShare {
  int slot, slots, units;

  template <typename E>
  __device__ MergeShare(const ChunkParameters<E>& p, const DecodePlace& at)
      : slot(at.slot), slots(at.slots), units(p.schedule.num_merges * p.group_size) {}
  __device__ __forceinline__ int Unit(int i) const { return i * slots + slot; }
  __device__ __forceinline__ bool Has(int i) const { return Unit(i) < units; }
};

template <typename E>
__device__ __forceinline__ int PartAt(const ChunkParameters<E>& p, int i, int head) {
  return p.schedule.merge_parts[i] * p.q_heads + head;
}

// One warp. The schedule alone is read.
template <typename E>
__device__ __forceinline__ void LookUp(const ChunkParameters<E>& p, const DecodePlace& at,
                                       BlockMerges& merges) {
  const MergeShare share(p, at);
  const int lane = threadIdx.x % 32;
  int2 row = {}, ends = {};
  if (lane < BlockMerges::kCount && share.Has(lane)) {
    const int unit = share.Unit(lane);
    const MergeWork work = p.schedule.merges[unit / p.group_size];
    row = {work.row, at.kv_head * p.group_size + unit % p.group_size};
    ends = {work.parts_begin, work.parts_end};
    merges.rows[lane] = row, merges.ends[lane] = ends;
  }
#pragma unroll 8
  for (int i = 0; i < BlockMerges::kCount; ++i) {
    const int head = __shfl_sync(~0u, row.y, i);
    const int mine = __shfl_sync(~0u, ends.x, i) + lane, end = __shfl_sync(~0u, ends.y, i);
    if (lane < BlockMerges::kParts && mine < end) merges.parts[i][lane] = PartAt(p, mine, head);
  }
}

// Until all `blocks` of a KV head came here. One thread of each, behind a barrier of its block.
// `arrivals` counts on from launch to launch: zero before the first.
// All blocks are resident at once, or waiting would not end: no more than multiprocessors
// (DecodeSlots), kernels before end without them, kernels behind start when all of them have.
__device__ __forceinline__ void AwaitBlocks(int32_t* arrivals, unsigned blocks) {
  unsigned before, now;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(arrivals)
               : "memory");
  const unsigned last = (before / blocks + 1) * blocks;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
  } while (static_cast<int>(now - last) < 0);
}

// Folds the partial results of one row and query head; a warp, a lane has D / 32 columns. All of a
// block's first results are on their way at once; their factors come from their maxima, the sum
// goes in the order of the row's list.
template <int D>
struct RowSum {
  static constexpr int kColumns = D / 32;
  static constexpr int kHalf = BlockMerges::kParts / 2;
  float out[kColumns] = {}, max = -INFINITY, sum = 0.f;

  // Results [first, first + kHalf); beyond `count` the last one again, so that no load waits for
  // another's condition.
  __device__ __forceinline__ static void Read(float (&x)[kHalf][kColumns], const float* from,
                                              int part, int first, int count) {
    static_assert(kColumns == 2 || kColumns == 4);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int64_t at = __shfl_sync(~0u, part, min(first + i, count - 1));
      if constexpr (kColumns == 4) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(from + at * D));
        x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
      } else {
        const float2 two = __ldcg(reinterpret_cast<const float2*>(from + at * D));
        x[i][0] = two.x, x[i][1] = two.y;
      }
    }
  }

  // `factor` is 0 beyond the last result.
  __device__ __forceinline__ void AddHalf(const float (&x)[kHalf][kColumns], float factor,
                                          int first) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float scale = __shfl_sync(~0u, factor, first + i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] = __fmaf_rn(x[i][c], scale, out[c]);
    }
  }

  // `count` results, at least one; `part` the lane's.
  __device__ __forceinline__ void Add(const ChunkScratch& partial, int part, int count) {
    const int lane = threadIdx.x % 32;
    const float2 mine = lane < count ? __ldcg(partial.sums + part) : float2{-INFINITY, 0.f};
    const float* from = partial.out + lane * kColumns;
    float low[kHalf][kColumns], high[kHalf][kColumns];
    Read(low, from, part, 0, count);
    if (count > kHalf) Read(high, from, part, kHalf, count);
    float top = mine.x;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    const FoldFactors f = Factors(max, top);
    const float factor = f.max == -INFINITY ? 0.f : Exp2(mine.x - f.max);
    float added = factor * mine.y;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) added += __shfl_xor_sync(~0u, added, i);
    max = f.max, sum = __fmaf_rn(sum, f.a, added);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] *= f.a;
    AddHalf(low, factor, 0);
    if (count > kHalf) AddHalf(high, factor, kHalf);
  }

  template <typename E>
  __device__ __forceinline__ void Store(const ChunkParameters<E>& p, int2 row) const {
    const int lane = threadIdx.x % 32;
    const float inverse = 1.f / sum;
    auto* to = reinterpret_cast<uint32_t*>(p.out + row.x * p.out_stride + row.y * D) +
               lane * (kColumns / 2);
#pragma unroll
    for (int c = 0; c < kColumns; c += 2)
      to[c / 2] = PackPair<E>(out[c] * inverse, out[c + 1] * inverse);
    if (p.lse && lane == 0) p.lse[int64_t{row.x} * p.q_heads + row.y] = max * kLn2 + logf(sum);
  }
};

// Merge i of the block's share.
template <int D, typename E>
__device__ __forceinline__ void MergeRow(const ChunkParameters<E>& p, const BlockMerges& merges,
                                         int i) {
  const int lane = threadIdx.x % 32;
  const int2 row = merges.rows[i], ends = merges.ends[i];
  RowSum<D> total;
  for (int begin = ends.x; begin < ends.y; begin += BlockMerges::kParts) {
    const int count = min(ends.y - begin, BlockMerges::kParts);
    int part = 0;
    if (lane < count)
      part = begin == ends.x ? merges.parts[i][lane] : PartAt(p, begin + lane, row.y);
    total.Add(p.partial, part, count);
  }
  total.Store(p, row);
}

// All threads of all blocks. Traffic: 4 head_dim + 8 bytes a partial result, from L2; bound by
// latency.
template <int D, typename E>
__device__ __forceinline__ void MergeWithAllBlocks(const ChunkParameters<E>& p,
                                                   const DecodePlace& at,
                                                   const BlockMerges& merges) {
  const MergeShare share(p, at);
  WaitForPredecessor();
  __syncthreads();
  if (threadIdx.x == 0) AwaitBlocks(p.schedule.arrivals + at.kv_head * kArrivalWords, share.slots);
  __syncthreads();
  const int warps = blockDim.x / 32;
  for (int i = threadIdx.x / 32; share.Has(i); i += warps) MergeRow<D>(p, merges, i);
}

}  // namespace coppice::cuda
