#include "tests/bench/group_batches.h"

#include <utility>

namespace coppice::bench {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A chain of one more node; returns its index.
int32_t AddContext(ops::TokenBatch& batch, int32_t parent, int64_t num_tokens,
                   absl::Span<const int32_t> blocks) {
  batch.context_nodes.push_back({.parent = parent,
                                 .num_tokens = static_cast<int32_t>(num_tokens),
                                 .block_begin = static_cast<int32_t>(batch.context_blocks.size())});
  const auto used = blocks.first(CeilDiv(num_tokens, batch.block_tokens));
  batch.context_blocks.insert(batch.context_blocks.end(), used.begin(), used.end());
  return static_cast<int32_t>(batch.context_nodes.size()) - 1;
}

// Rows of one segment at positions first_position + [begin, end), stored at [begin, end) of
// `blocks`.
void AddSegment(ops::TokenBatch& batch, int32_t context, int64_t first_position, int64_t begin,
                int64_t end, absl::Span<const int32_t> blocks) {
  const int32_t row = static_cast<int32_t>(batch.positions.size());
  const int32_t row_end = row + static_cast<int32_t>(end - begin);
  batch.segments.push_back({row, row_end, context});
  for (int64_t i = begin; i < end; ++i) {
    batch.positions.push_back(static_cast<int32_t>(first_position + i));
    batch.subtree_end.push_back(row_end);
    batch.kv_slots.push_back(static_cast<int32_t>(
        blocks[i / batch.block_tokens] * batch.block_tokens + i % batch.block_tokens));
  }
}

std::vector<int32_t> NextBlocks(int64_t n, int64_t& next) {
  std::vector<int32_t> blocks(n);
  for (int32_t& block : blocks) block = static_cast<int32_t>(next++);
  return blocks;
}

}  // namespace

ops::TokenBatch PromptChunk(absl::Span<const int32_t> tokens, int64_t begin, int64_t end,
                            absl::Span<const int32_t> blocks, int64_t block_tokens,
                            bool with_logits) {
  ops::TokenBatch batch;
  batch.block_tokens = static_cast<int32_t>(block_tokens);
  batch.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
  const int32_t context = begin > 0 ? AddContext(batch, -1, begin, blocks) : -1;
  AddSegment(batch, context, 0, begin, end, blocks);
  if (with_logits) batch.logit_rows = {static_cast<int32_t>(end - begin) - 1};
  return batch;
}

GroupLayout::GroupLayout(const Options& options)
    : group(options.group), block_tokens(options.block_tokens) {
  shared_tokens = options.prompt / block_tokens * block_tokens;
  own_tokens = options.prompt - shared_tokens + options.response;
  const int64_t prompts = options.mode == Mode::kShared ? 1 : group;
  for (int64_t i = 0; i < prompts; ++i) {
    const bool stored = i > 0 && options.mode == Mode::kUngrouped;
    prompt_blocks.push_back(stored ? prompt_blocks[0]
                                   : NextBlocks(shared_tokens / block_tokens, num_blocks));
  }
  for (int64_t i = 0; i < group; ++i) {
    own_blocks.push_back(NextBlocks(CeilDiv(own_tokens + 1, block_tokens), num_blocks));
  }
}

ops::TokenBatch GroupLayout::Rows(int64_t begin, int64_t end, std::vector<int32_t> tokens,
                                  bool with_logits) const {
  ops::TokenBatch batch;
  batch.block_tokens = static_cast<int32_t>(block_tokens);
  batch.tokens = std::move(tokens);
  std::vector<int32_t> prompts;  // context nodes; -1 for a prompt below one block
  for (const auto& blocks : prompt_blocks) {
    prompts.push_back(shared_tokens > 0 ? AddContext(batch, -1, shared_tokens, blocks) : -1);
  }
  for (int64_t i = 0; i < group; ++i) {
    const int32_t prompt = prompts[prompts.size() > 1 ? i : 0];
    const int32_t context = begin > 0 ? AddContext(batch, prompt, begin, own_blocks[i]) : prompt;
    AddSegment(batch, context, shared_tokens, begin, end, own_blocks[i]);
    if (with_logits) batch.logit_rows.push_back(static_cast<int32_t>(batch.positions.size()) - 1);
  }
  return batch;
}

int64_t GroupLayout::ContextTokens() const {
  const bool stored_once = prompt_blocks.front() == prompt_blocks.back();
  const int64_t prompts = stored_once ? 1 : static_cast<int64_t>(prompt_blocks.size());
  return prompts * shared_tokens + group * own_tokens;
}

}  // namespace coppice::bench
