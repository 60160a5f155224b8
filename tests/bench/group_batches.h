// TokenBatches of the model benchmarks: a chunk of a prompt, and a group of samples that continue
// one prompt.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/ops/token_batch.h"
#include "tests/bench/options.h"

namespace coppice::bench {

// Rows [begin, end) of a prompt whose first `begin` tokens are in `blocks` already; stores the rows
// there. The last row has logits if `with_logits`.
ops::TokenBatch PromptChunk(absl::Span<const int32_t> tokens, int64_t begin, int64_t end,
                            absl::Span<const int32_t> blocks, int64_t block_tokens,
                            bool with_logits);

// Where the keys and values of a group lie. Whole blocks of the prompt are shared (mode shared) or
// stored once for each sample (mode flat), or stored once and read for each sample as if its own
// (mode ungrouped, as paged attention without grouping does); the rest of the prompt and the
// response are each sample's own.
struct GroupLayout {
  explicit GroupLayout(const Options& options);

  int64_t group, block_tokens;
  int64_t shared_tokens;  // whole blocks of the prompt
  int64_t own_tokens;     // of each sample, before the token that decode adds
  std::vector<std::vector<int32_t>> prompt_blocks;  // [1] or [group]; ungrouped: all the same
  std::vector<std::vector<int32_t>> own_blocks;     // [group]
  int64_t num_blocks = 0;

  // The samples' own rows [begin, end), one segment a sample, behind what is stored of each: all
  // own rows fill the pool (0, own_tokens), one more is a decode step. tokens: [group * (end -
  // begin)].
  ops::TokenBatch Rows(int64_t begin, int64_t end, std::vector<int32_t> tokens,
                       bool with_logits) const;
  // Tokens whose stored keys and values a decode step reads, each counted once.
  int64_t ContextTokens() const;
};

}  // namespace coppice::bench
