// What the warps of a block of skinny_matmul.cu share: sizes, parameters, shared memory, the
// smaller matrix products.
#pragma once

#include "kernels/cuda/attention/tensor_map.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/skinny_matmul.h"

namespace coppice::cuda {

constexpr int kColumns = 64;       // of W and x in one step
constexpr int kPanelRows = 64;     // weight rows of one product; a tile has one or two panels
constexpr int kMultipliers = 128;  // threads
constexpr int kSquareLanes = kMultipliers / 8;
constexpr int kMaxRanks = 8;  // blocks of a cluster

// x * norm, an operand before rstd brings its size down, is stored times this, and rstd gives it
// back: f16 then holds rows 16 times as large. A power of two: it rounds nothing
// but what it makes subnormal, below 1e-3, where f16 still has steps of 6e-8.
template <typename E>
inline constexpr float kNormedUnit = kIsF16<E> ? 0x1p-4f : 1.f;

struct SkinnyParameters {
  CUtensorMap w, x;
  SkinnyArgs args;
  int k_blocks;
  int panel_stride;  // weight rows from a tile's gate to its up
  int out_columns;   // columns of c
};

// A tile is added up in units: what a warp holds of 8 tokens, 16 bytes a lane and panel. Unit
// 4 j + warp belongs to rank unit * ranks / kCount of the cluster.
template <int kTokens>
struct Units {
  static constexpr int kCount = kTokens / 2;
  static __device__ int Owner(int unit, int ranks) { return unit * ranks / kCount; }
  static __device__ int Begin(int rank, int ranks) { return (kCount * rank + ranks - 1) / ranks; }
  // Places a block needs for its units from every rank.
  static constexpr int MaxPlaces() {
    int most = 0;
    for (int ranks = 1; ranks <= kMaxRanks; ++ranks) {
      const int places = (kCount + ranks - 1) / ranks * ranks;
      most = places > most ? places : most;
    }
    return most;
  }
};

// Threads and shared memory of a block. Several blocks fit a multiprocessor, so that the next
// kernel's are at work before this one's have ended.
template <typename E, bool kIsNormed, bool kIsSwiGlu, int kTokenCount>
struct SkinnyShape {
  using Element = E;
  static constexpr bool kNormed = kIsNormed, kSwiGlu = kIsSwiGlu;
  static constexpr int kTokens = kTokenCount, kPanels = kSwiGlu ? 2 : 1;
  // The multipliers, a warp that issues the copies of W, and one that issues those of x.
  static constexpr int kThreads = kMultipliers + (kNormed ? 32 : 64);
  static constexpr int kResident = 3;  // blocks that fit a multiprocessor
  static constexpr int kBudgetBytes = 73 << 10;
  static constexpr int kXStages = kNormed         ? 160 / kTokens
                                  : kTokens == 8  ? 6
                                  : kTokens == 32 ? 5
                                                  : 3;
  static constexpr int kEarlyUnits = kTokens >= 32 ? 2 : 1;  // whose addend is read ahead
  static constexpr int kXStageBytes = kTokens * kColumns * 2;
  static constexpr int kStageBytes = kPanels * kPanelRows * kColumns * 2;
  static constexpr int kSumBytes = Units<kTokens>::MaxPlaces() * kPanels * 512;
  // Whether sums have a place of their own, or take that of W and x afterwards.
  static constexpr bool kOwnSums = kTokens <= 16 && kPanels == 1;
  static constexpr int kStages =
      (kBudgetBytes - kXStages * kXStageBytes - (kOwnSums ? kSumBytes : 0)) / kStageBytes;
};

template <typename Shape>
struct SkinnyShared {
  alignas(1024) unsigned char w[Shape::kStages][Shape::kStageBytes];
  alignas(1024) unsigned char x[Shape::kXStages][Shape::kXStageBytes];
  alignas(16) unsigned char own_sums[Shape::kOwnSums ? Shape::kSumBytes : 16];
  float squares[kMaxRanks][Shape::kNormed ? kSquareLanes : 1];  // of x, from every rank
  Barrier w_full[Shape::kStages], w_empty[Shape::kStages];
  Barrier x_full[Shape::kXStages], x_empty[Shape::kXStages];
  Barrier sums_full;

  // Sums of this block's units from every rank: [unit][rank][panel][lane].
  __device__ __forceinline__ float4* sums() {
    return reinterpret_cast<float4*>(Shape::kOwnSums ? own_sums : w[0]);
  }
  static_assert(Shape::kOwnSums || Shape::kSumBytes <= sizeof(w) + sizeof(x));
};

// This block's share of a tile's column blocks.
struct ColumnBlocks {
  int begin, end;
  __device__ explicit ColumnBlocks(const SkinnyParameters& p)
      : begin(p.k_blocks * ClusterRank() / ClusterSize()),
        end(p.k_blocks * (ClusterRank() + 1) / ClusterSize()) {}
};

// To the block that adds up: another's shared memory, or this one's where it is alone, which
// nothing counts.
template <typename T>
__device__ __forceinline__ void Send(int rank, T* to, const T& x, const Barrier& full) {
  if (ClusterSize() == 1) {
    *to = x;
  } else {
    SendTo(rank, to, x, full);
  }
}

// One k16 step of 64 weight rows by 8, 16 or 32 tokens.
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[4], uint64_t a, uint64_t b, bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n8k16",
             "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, "
             "0;\n}"
             : HOPPER_ACC4(d, 0)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[8], uint64_t a, uint64_t b, bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n16k16",
             "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, "
             "%9, p, 1, 1, 0, 0;\n}"
             : HOPPER_ACC8(d, 0)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[16], uint64_t a, uint64_t b, bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n32k16",
             "{%0, %1, %2, %3, %4, %5, %6, %7, %8, "
             "%9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
             : HOPPER_ACC8(d, 0), HOPPER_ACC8(d, 8)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

}  // namespace coppice::cuda
