// A row of logits as a cluster of blocks holds it, slice by slice, and what the blocks tell each
// other.
#pragma once

#include <cooperative_groups.h>

#include "kernels/cuda/common.cuh"

namespace coppice::cuda {

constexpr int kBlocks = 8;  // of a row, a cluster
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;

struct Best {
  float value;
  int32_t id;
};
__device__ inline Best Better(Best a, Best b) {  // the larger; lower id first
  if (a.id < 0 || (b.id >= 0 && (b.value > a.value || (b.value == a.value && b.id < a.id))))
    return b;
  return a;
}
__device__ inline Best WarpBest(Best x) {
  for (int d = 16; d > 0; d /= 2) {
    x = Better(x, {__shfl_xor_sync(~0u, x.value, d), __shfl_xor_sync(~0u, x.id, d)});
  }
  return x;
}
__device__ inline Best BlockBest(Best x) {
  __shared__ Best shared[kWarps];
  x = WarpBest(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return WarpBest(shared[threadIdx.x % kWarps]);
}

using Mass = unsigned long long;

// What the blocks of a row tell each other. Two of everything: a block may still read the last
// turn's values while another one writes its next.
struct Told {
  Best best[2][kBlocks];
  double sum[2][kBlocks];
  int32_t count[2][kBlocks];
  Mass histogram[2][kDigits];
};

// One block's ids [begin, begin + size) of a row, and the cluster.
struct Slice {
  float* scores;  // of its ids
  int32_t begin, size, vocab;
  int32_t run;  // ids of a warp
  Told& told;
  cooperative_groups::cluster_group cluster;
  int rank;
  int turn = 0;

  __device__ bool Has(int32_t id) const { return id >= begin && id < begin + size; }

  // What any block has written is visible to all.
  __device__ void Sync() const {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }

  // The values of all blocks, by rank. `mine` is the same in every thread of the block.
  template <typename T>
  __device__ const T* Tell(T (&places)[2][kBlocks], T mine) {
    turn ^= 1;
    if (threadIdx.x < kBlocks)
      *cluster.map_shared_rank(&places[turn][rank], static_cast<int>(threadIdx.x)) = mine;
    Sync();
    return places[turn];
  }
  __device__ Best RowBest(Best x) {
    const Best* all = Tell(told.best, BlockBest(x));
    Best best = all[0];
    for (int r = 1; r < kBlocks; ++r) best = Better(best, all[r]);
    return best;
  }
  __device__ double RowSum(double x) {
    __shared__ double shared[33];
    const double* all = Tell(told.sum, BlockSum(x, shared));
    double sum = 0;
    for (int r = 0; r < kBlocks; ++r) sum += all[r];
    return sum;
  }
};

}  // namespace coppice::cuda
