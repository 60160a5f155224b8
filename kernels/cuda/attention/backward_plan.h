// The lists of the backward kernels: which rows see a key tile, packed or cached, and which tiles a
// query tile sees. Host code, no CUDA; part of PlanAttention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/attention/attention_schedule.h"
#include "kernels/ops/token_batch.h"

namespace coppice::cuda {

inline int32_t CeilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }

inline void SortLongestFirst(std::vector<QueryTileWork>& tiles) {
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) {
    return a.list_end - a.list_begin > b.list_end - b.list_begin;
  });
}

// Least and greatest subtree_end of each packed key tile.
struct TileEnds {
  const std::vector<int32_t>&least, &greatest;
};

struct BackwardLists {
  // Empty for a batch without context in one round if forward has tiles: its lists say the same.
  std::vector<QueryTileWork> tiles;
  std::vector<int32_t> entries;  // indices into runs
  std::vector<KeyWork> work;
  std::vector<KeyRun> runs;
  std::vector<BackwardRound> rounds;  // none without rows
  int32_t num_images = 0;             // of the largest round
};

// See AttentionPlanOptions. A round has no more images unless it is one query tile of kQueryTile.
struct RoundLimits {
  int32_t images, tile_items, wave_items;
  bool forward_has_tiles;
};

// `first_tile`: [context nodes] the node's first context tile.
BackwardLists PlanBackward(const ops::TokenBatch& batch, const TileEnds& ends,
                           const std::vector<int32_t>& first_tile, const RoundLimits& limits);

}  // namespace coppice::cuda
