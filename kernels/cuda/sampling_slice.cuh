// A row of logits as its blocks hold it, slice by slice, and what the blocks tell each other. A
// Team is how they do: kBlocks, this block's Rank(), Sync() of all, At(p, rank): another block's
// copy of what lies at p in shared memory.
#pragma once

#include "kernels/cuda/common.cuh"

namespace coppice::cuda {

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
template <typename Team>
struct Told {
  Best best[2][Team::kBlocks];
  double sum[2][Team::kBlocks];
  int32_t count[2][Team::kBlocks];
  Mass histogram[2][kDigits];
};

// One block's ids [begin, begin + size) of a row, and its team.
template <typename Team>
struct Slice {
  float* scores;  // of its ids
  int32_t begin, size, vocab;
  int32_t run;  // ids of a warp
  Told<Team>& told;
  Team team;
  int rank;
  int turn = 0;

  __device__ bool Has(int32_t id) const { return id >= begin && id < begin + size; }

  // What any block has written is visible to all.
  __device__ void Sync() const { team.Sync(); }

  // The values of all blocks, by rank. `mine` is the same in every thread of the block.
  template <typename T>
  __device__ const T* Tell(T (&places)[2][Team::kBlocks], T mine) {
    turn ^= 1;
    if (threadIdx.x < Team::kBlocks)
      *team.At(&places[turn][rank], static_cast<int>(threadIdx.x)) = mine;
    Sync();
    return places[turn];
  }
  __device__ Best RowBest(Best x) {
    const Best* all = Tell(told.best, BlockBest(x));
    Best best = all[0];
    for (int r = 1; r < Team::kBlocks; ++r) best = Better(best, all[r]);
    return best;
  }
  __device__ double RowSum(double x) {
    __shared__ double shared[33];
    const double* all = Tell(told.sum, BlockSum(x, shared));
    double sum = 0;
    for (int r = 0; r < Team::kBlocks; ++r) sum += all[r];
    return sum;
  }
};

}  // namespace coppice::cuda
