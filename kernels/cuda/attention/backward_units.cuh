// What all backward kernels of attention agree on: the unit of P and dS in 16 bits, and how rows
// and gathered context lie in memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/attention_schedule.h"
#include "kernels/cuda/attention/tree_attention.h"
#include "kernels/cuda/element.cuh"

namespace coppice::cuda {

// P and dS of backward are rounded, multiplied and kept times 2^kBackwardShift: f16 is no finer
// than 2^-24, and a row of many keys has small probabilities. Gradients are written times
// kBackwardUnit.
template <typename E>
inline constexpr int kBackwardShift = kIsF16<E> ? 6 : 0;
template <typename E>
inline constexpr float kBackwardUnit = 1.f / (1 << kBackwardShift<E>);

// Row of a key tile, packed or ~context, in its tensor.
__device__ __forceinline__ int FirstRow(int tile) { return (tile < 0 ? ~tile : tile) * kKeyTile; }

inline int64_t PaddedRows(int64_t rows) { return (rows + kKeyTile - 1) / kKeyTile * kKeyTile; }

// Slots of a run of a context tile (ContextTile::first_piece).
inline int RunSlots(const ContextPages& pages) {
  return pages.block_tokens < kKeyTile ? pages.block_tokens : kKeyTile;
}

}  // namespace coppice::cuda
