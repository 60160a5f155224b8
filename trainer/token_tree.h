// TokenTree: the sequences of a request merged by common prefix into one TokenBatch, each unique
// token once.
//
// Sequences are sorted by their tokens; neighbours then share the longest prefixes, so rows in
// sorted order are the rows of the trie in depth-first order and no tree of nodes is ever built. A
// sequence of n tokens needs the rows of its first n - 1: the last token predicts nothing. Equal
// (row, next token) pairs of several samples are one target.
//
//   [7 8 | 1 2]     rows: 7 8 1        targets of row "8": 1, 3    (one softmax, two targets)
//   [7 8 | 3 4]           └── 3
//
// Host only; deterministic; independent of the order of the sequences but for `samples`, which
// keeps it. Cost: O(tokens log sequences) comparisons, O(tokens) memory.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/types/span.h"
#include "kernels/ops/token_batch.h"

namespace coppice {

// One prompt with one response. Borrows the tokens. REQUIRES: neither is empty.
struct TokenSequence {
  absl::Span<const int32_t> prompt;
  absl::Span<const int32_t> response;
  // Response tokens that need a log-prob: those with a non-zero entry. Empty = all.
  absl::Span<const float> wanted;

  int64_t num_tokens() const { return static_cast<int64_t>(prompt.size() + response.size()); }
  int64_t num_rows() const { return num_tokens() - 1; }  // when alone
  int32_t token(int64_t i) const {
    const int64_t p = static_cast<int64_t>(prompt.size());
    return i < p ? prompt[i] : response[i - p];
  }
};

// Where the log-prob of one response token is found; -1 if it was not wanted.
struct TargetRef {
  int32_t target = -1;    // index into TokenTree::targets
  int32_t head_row = -1;  // index into batch.logit_rows
};

struct TokenTree {
  ops::TokenBatch batch;                        // rows; logit_rows = rows with targets
  std::vector<int32_t> target_indptr;           // [head_rows + 1]
  std::vector<int32_t> targets;                 // [targets] token ids
  std::vector<std::vector<TargetRef>> samples;  // [sequences][response tokens]

  int64_t num_rows() const { return batch.num_rows(); }
  int64_t num_head_rows() const { return static_cast<int64_t>(batch.logit_rows.size()); }
};

// Positions [begin, end) of every sequence; what lies before is context, what lies behind runs
// elsewhere.
struct PositionRange {
  int64_t begin = 0;
  int64_t end = std::numeric_limits<int64_t>::max();
};

// share = false packs every sequence on its own, as an engine without prefix sharing does: the
// baseline. With `range` only the rows at these positions, and the targets that they predict.
// REQUIRES: the sequences are equal before range.begin.
TokenTree BuildTokenTree(absl::Span<const TokenSequence> sequences, bool share = true,
                         const PositionRange& range = {});

// Rows of BuildTokenTree(sequences) without building it.
int64_t CountTreeRows(absl::Span<const TokenSequence> sequences);

// Tokens that the two sequences have in common from the start.
int64_t CommonPrefix(const TokenSequence& a, const TokenSequence& b);

// Sequences in the order in which their rows appear.
std::vector<int32_t> DepthFirstOrder(absl::Span<const TokenSequence> sequences);

// Rows of `b` that exist already when `a` is its neighbour in that order.
int64_t SharedRows(const TokenSequence& a, const TokenSequence& b);

}  // namespace coppice
