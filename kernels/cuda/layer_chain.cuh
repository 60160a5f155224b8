// How the work of layer_chain.cu is dealt, and what the warps of a block share.
#pragma once

#include "kernels/cuda/layer_chain.h"
#include "kernels/cuda/skinny_tile.cuh"

namespace coppice::cuda {

constexpr int kTileRows = 128;  // of weights, two panels: one of each warpgroup
constexpr int kChainMultipliers = 256;
constexpr int kChainWarps = kChainMultipliers / 32;
constexpr int kChainThreads = kChainMultipliers + 96;  // copies of W, copies of x, scales
constexpr int kUnitBytes = kTileRows * kColumns * 2;
constexpr int kMaxPhases = 4;

// What becomes of a product's sums.
enum class ChainStep : int { kResidual, kSwiGlu, kProject, kRotate };

// One product. Its units, 128 weight rows by 64 columns, in the order of tiles and then of columns,
// are dealt to the blocks as equal runs; `rotation` says which block gets the first, so that the
// longer runs of the phases go to different blocks.
struct ChainPhase {
  CUtensorMap w, x;
  int tiles, k_blocks;
  int tile_rows, tile_groups, tile_heads;  // coordinates from one tile to the next (MakeWeightMap)
  int shortest, longer;                    // units of a run, runs with one more
  int rotation;
  int columns;  // of the result
  ChainStep step;
  const float* addend;  // kResidual: [rows, columns]
  // kResidual: the norm's weight, or null; kProject and kRotate: the bias, or null.
  const void* factor;
  void* out;
  void* normed;  // kResidual, optional: [rows, columns] out * factor
  int64_t addend_stride, out_stride, normed_stride;

  void Stores(void* to, int64_t stride) { out = to, out_stride = stride; }
  void Adds(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    addend = static_cast<const float*>(from), addend_stride = from_stride;
    Stores(to, to_stride);
  }
  void Norms(const void* weight, void* to, int64_t stride) {
    factor = weight;
    normed = to, normed_stride = stride;
  }

  __device__ __forceinline__ int Begin(int run) const {
    return run * shortest + (run < longer ? run : longer);
  }
  // The run that has `unit`.
  __device__ __forceinline__ int Holder(int unit) const {
    const int of_longer = longer * (shortest + 1);
    return unit < of_longer ? unit / (shortest + 1) : longer + (unit - of_longer) / shortest;
  }
};

struct ChainParameters {
  ChainPhase phases[kMaxPhases];
  int num_phases;
  int rows;
  float eps, inverse_hidden;
  int square_rows;         // of `squares`: warps' partial sums of squares
  float* squares;          // [square_rows, kTokens]
  float4* pieces;          // [2 * blocks, kTokens, 32]
  ChainRotation rotation;  // kRotate
  unsigned* counters;      // arrivals at each barrier of the grid, and blocks past the last
};

// This block's units of a phase.
struct Run {
  int index, begin, end;
  __device__ explicit Run(const ChainPhase& phase) {
    index = static_cast<int>(blockIdx.x) - phase.rotation;
    if (index < 0) index += static_cast<int>(gridDim.x);
    begin = phase.Begin(index), end = phase.Begin(index + 1);
  }
};

// A run's part of a tile. Runs that end inside a tile, or with it, wait for the sums of the tile's
// other runs and share the adding up; a run that goes on to the next tile only sends.
struct Piece {
  int tile, end;     // unit after the last
  int first, count;  // run that begins the tile, runs that have part of it
  int index;         // of this piece in the order of columns
  int adders;        // pieces [0, adders) add up

  __device__ Piece(const ChainPhase& phase, const Run& run, int unit) {
    tile = unit / phase.k_blocks;
    const int tile_begin = tile * phase.k_blocks, tile_end = tile_begin + phase.k_blocks;
    end = run.end < tile_end ? run.end : tile_end;
    first = phase.Holder(tile_begin);
    const int last = phase.Holder(tile_end - 1);
    count = last - first + 1;
    index = run.index - first;
    adders = count == 1 || phase.Begin(last + 1) == tile_end ? count : count - 1;
  }
  // Where piece i's sums lie: a run sends at most its first piece and its last.
  __device__ __forceinline__ int Place(int i) const { return (first + i) * 2 + (i > 0 ? 0 : 1); }
};

template <typename E, int kTokenCount, int kStageCount, int kXStageCount>
struct ChainShape {
  using Element = E;
  static constexpr int kTokens = kTokenCount;
  static constexpr int kStages = kStageCount, kXStages = kXStageCount;
  static constexpr int kXStageBytes = kTokens * kColumns * 2;
  // Units of W that a block has on their way at a time: enough to keep memory busy. Fewer of the
  // next phase before its x comes: all that a phase's end waits for, sums and x, queues behind
  // them, and there is time to fill the ring until then (README.md, decision 10).
  static constexpr int kInFlight = 4, kInFlightAhead = kTokens == 64 ? 1 : 2;
};

template <typename Shape>
struct ChainShared {
  alignas(1024) unsigned char w[Shape::kStages][kUnitBytes];
  alignas(1024) unsigned char x[Shape::kXStages][Shape::kXStageBytes];
  alignas(16) float scales[2][Shape::kTokens];  // of phases 1 and 3
  // kRotate: sums of squares of a warp's columns of a head.
  alignas(16) float squares[Shape::kTokens][kChainWarps];
  Barrier w_full[Shape::kStages], w_empty[Shape::kStages];
  Barrier x_full[Shape::kXStages], x_empty[Shape::kXStages];
  Barrier squares_there, scales_full[2];
  Barrier started[kMaxPhases];  // the phase's x comes; not of phase 0
};

}  // namespace coppice::cuda
