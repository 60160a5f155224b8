// How a group that is too large for one pass is cut: its prompt runs alone, then its branches in
// micro-batches of whole samples that fit beside the prompt's state (depth-first; Design §8). Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "trainer/token_tree.h"

namespace coppice {

// Indices of `sequences` by micro-batch, each ascending, so that no micro-batch has more than
// `max_rows` rows behind the first `prompt_rows`. Neighbours in the tree stay together: what they
// share beyond the prompt is run once in each micro-batch. Nothing if one sequence alone is too
// long.
std::optional<std::vector<std::vector<int32_t>>> CutBranches(
    absl::Span<const TokenSequence> sequences, int64_t prompt_rows, int64_t max_rows);

}  // namespace coppice
