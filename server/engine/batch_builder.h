// Builds the TokenBatch of a step. The context of all segments is merged into one trie over their
// block tables: blocks that several segments have in common from the start (samples of a group,
// requests behind one system prompt) become one context node, so that an Ops can read them once for
// all. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/base/ids.h"
#include "kernels/ops/token_batch.h"

namespace coppice {

// Consecutive new tokens of one sequence behind its cached context.
struct SegmentSpec {
  std::vector<BlockId> blocks;  // block table of the sequence, from position 0; covers context and
                                // rows that are stored
  int64_t context_tokens = 0;   // = position of the first row
  std::vector<int32_t> tokens;  // at least one
  int64_t stored_tokens =
      0;  // rows at positions below this are not stored: their KV exists already
  bool wants_logits = false;  // of the last row
};

// Segments in the given order. REQUIRES: context blocks that two segments share hold the same
// tokens. Cost: O(total blocks * branching).
ops::TokenBatch BuildTokenBatch(const std::vector<SegmentSpec>& specs, int64_t block_tokens);

}  // namespace coppice
