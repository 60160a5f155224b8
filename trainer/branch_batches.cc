#include "trainer/branch_batches.h"

#include <algorithm>

namespace coppice {

std::optional<std::vector<std::vector<int32_t>>> CutBranches(
    absl::Span<const TokenSequence> sequences, int64_t prompt_rows, int64_t max_rows) {
  std::vector<std::vector<int32_t>> batches;
  const TokenSequence* previous = nullptr;
  int64_t rows = 0;  // of the last micro-batch
  for (const int32_t i : DepthFirstOrder(sequences)) {
    const TokenSequence& sequence = sequences[i];
    const int64_t alone = sequence.num_rows() - prompt_rows;
    if (alone > max_rows) return std::nullopt;
    const int64_t shared =
        previous == nullptr ? prompt_rows : std::max(prompt_rows, SharedRows(*previous, sequence));
    const int64_t added = sequence.num_rows() - shared;
    if (batches.empty() || rows + added > max_rows) {
      batches.emplace_back();
      rows = alone;
    } else {
      rows += added;
    }
    batches.back().push_back(i);
    previous = &sequence;
  }
  for (std::vector<int32_t>& batch : batches) std::sort(batch.begin(), batch.end());
  return batches;
}

}  // namespace coppice
