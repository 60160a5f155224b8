// The end of a decode kernel: its blocks wait for each other, then fold the partial results of
// every row. Where other kernels have partial results of this batch, too, LaunchMerges does it.
#pragma once

#include "kernels/cuda/attention/packed_parts.cuh"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {

// Which partial results a block's merges are made of, looked up while there is time.
struct BlockMerges {
  static constexpr int kCount = 24;  // merges, at most
  static constexpr int kParts = 20;  // their first results
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

// Folds the partial results of one row and query head: by a team of D / 8 lanes, 8 columns each,
// or by all teams of a warp, every so many results each.
template <int D>
struct RowSum {
  static constexpr int kTeam = D / 8, kTeams = 32 / kTeam;
  static constexpr int kLoads = BlockMerges::kParts / kTeams;  // on their way at a time
  float out[8] = {}, max = -INFINITY, sum = 0.f;

  // Results `first`, first + stride .. of merge i, kLoads of them; behind its last that one again,
  // times 0, so that no load waits for another's condition. kListed: none is beyond the lists.
  template <bool kListed, typename E>
  __device__ __forceinline__ void Add(const ChunkParameters<E>& p, const BlockMerges& merges, int i,
                                      int first, int stride) {
    const int2 ends = merges.ends[i];
    const int last = ends.y - ends.x - 1;
    const uint4* from = reinterpret_cast<const uint4*>(p.partial.out) + threadIdx.x % kTeam;
    asm volatile("" : "+l"(from));  // one addition for an address
    uint4 x[kLoads];
    float2 sums[kLoads];
    int parts[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int at = min(first + k * stride, last);
      parts[k] = kListed ? merges.parts[i][at] : PartAt(p, ends.x + at, merges.rows[i].y);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) x[k] = __ldcg(from + int64_t{parts[k]} * kTeam);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) sums[k] = __ldcg(p.partial.sums + parts[k]);
    __syncwarp();  // or ptxas lets loads wait for what is made of others
    float top = max;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (first + k * stride > last) sums[k] = {-INFINITY, 0.f};
      top = fmaxf(top, sums[k].x);
    }
    const float base = top == -INFINITY ? 0.f : top;
    Shrink(Exp2(max - base));
    max = top;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) AddOne(x[k], sums[k].y, Exp2(sums[k].x - base));
  }

  __device__ __forceinline__ void AddOne(const uint4& x, float total, float factor) {
    sum = __fmaf_rn(total, factor, sum);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float2 pair = Pair<F16>(words[c]);
      out[2 * c] = __fmaf_rn(pair.x, factor, out[2 * c]);
      out[2 * c + 1] = __fmaf_rn(pair.y, factor, out[2 * c + 1]);
    }
  }

  __device__ __forceinline__ void Shrink(float factor) {
    sum *= factor;
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] *= factor;
  }

  // What the warp's teams have of one row.
  __device__ __forceinline__ void AddTeams() {
    float top = max;
#pragma unroll
    for (int i = kTeam; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    Shrink(Exp2(max - top));
    max = top;
#pragma unroll
    for (int i = kTeam; i < 32; i *= 2) {
      sum += __shfl_xor_sync(~0u, sum, i);
#pragma unroll
      for (int c = 0; c < 8; ++c) out[c] += __shfl_xor_sync(~0u, out[c], i);
    }
  }

  template <typename E>
  __device__ __forceinline__ void Store(const ChunkParameters<E>& p, int2 row) const {
    const int piece = threadIdx.x % kTeam;
    const float inverse = 1.f / sum;
    auto* to = reinterpret_cast<uint32_t*>(p.out + row.x * p.out_stride + row.y * D) +
               piece / 4 * 16 + piece % 4;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      to[4 * c] = PackPair<E>(out[2 * c] * inverse, out[2 * c + 1] * inverse);
    if (p.lse && piece == 0) p.lse[int64_t{row.x} * p.q_heads + row.y] = max * kLn2 + logf(sum);
  }
};

// The block's share. A warp takes a merge, or where these are more than warps each of its teams.
template <int D, typename E>
__device__ __forceinline__ void MergeShareOf(const ChunkParameters<E>& p, const MergeShare& share,
                                             const BlockMerges& merges) {
  using Sum = RowSum<D>;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = threadIdx.x % 32 / Sum::kTeam;
  const bool together = !share.Has(warps);
  const int first = together ? team : 0, stride = together ? Sum::kTeams : 1;
  const int apart = together ? 0 : team * warps;  // from the warp's first merge to the team's
  for (int i = warp; share.Has(i); i += warps * (together ? 1 : Sum::kTeams)) {
    const bool has = share.Has(i + apart);
    const int mine = has ? i + apart : i, count = merges.ends[mine].y - merges.ends[mine].x;
    Sum total;
    int done = 0;
    for (; done < BlockMerges::kParts && __any_sync(~0u, done < count);
         done += Sum::kLoads * stride)
      total.template Add<true>(p, merges, mine, done + first, stride);
    for (; __any_sync(~0u, done < count); done += Sum::kLoads * stride)
      total.template Add<false>(p, merges, mine, done + first, stride);
    if (together) total.AddTeams();
    if (has && first == 0) total.Store(p, merges.rows[mine]);
  }
}

// All threads of all blocks. Traffic: 2 head_dim + 8 bytes a partial result, from L2; bound by
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
  MergeShareOf<D>(p, share, merges);
}

}  // namespace coppice::cuda
