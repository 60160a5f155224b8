#include "trainer/stem.h"

#include <numeric>

#include "trainer/prompt_state.h"

namespace coppice {
namespace {

constexpr int64_t kPage = PromptState::kBlockTokens;

}  // namespace

int64_t StemRows(const ops::TokenBatch& batch) {
  if (batch.segments.size() != 1 || batch.segments[0].context_node >= 0) return 0;
  if (batch.logit_rows.empty()) return 0;
  const int64_t limit = batch.logit_rows[0];
  int64_t rows = 0;
  while (rows < limit && batch.subtree_end[rows] == batch.num_rows()) ++rows;
  return rows / kPage * kPage;
}

ops::TokenBatch BehindStem(const ops::TokenBatch& batch, int64_t stem_rows) {
  const int32_t stem = static_cast<int32_t>(stem_rows);
  ops::TokenBatch behind{.tokens = {batch.tokens.begin() + stem, batch.tokens.end()},
                         .positions = {batch.positions.begin() + stem, batch.positions.end()},
                         .subtree_end = {batch.subtree_end.begin() + stem, batch.subtree_end.end()},
                         .segments = {{.row_begin = 0,
                                       .row_end = static_cast<int32_t>(batch.num_rows()) - stem,
                                       .context_node = 0}},
                         .context_nodes = {{.num_tokens = stem}},
                         .context_blocks = std::vector<int32_t>(stem_rows / kPage),
                         .block_tokens = static_cast<int32_t>(kPage)};
  for (int32_t& end : behind.subtree_end) end -= stem;
  std::iota(behind.context_blocks.begin(), behind.context_blocks.end(), 0);
  return behind;
}

int64_t StemPages::SizeBytes(const ModelConfig& config, const ops::ActivationTypes& types,
                             int64_t rows) {
  Arena arena(nullptr);
  PlacePages(config, types.compute, rows, arena);
  PlacePages(config, DType::kF32, rows, arena);
  return arena.size_bytes();
}

StemPages StemPages::Place(const ModelConfig& config, const ops::ActivationTypes& types,
                           int64_t rows, void* base) {
  Arena arena(base);
  return {.kv = PlacePages(config, types.compute, rows, arena),
          .gradients = PlacePages(config, DType::kF32, rows, arena)};
}

}  // namespace coppice
