// Random token batches for tests: several segments, each a random prefix tree, some below chains of
// cached context that other segments share.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/ops/token_batch.h"

namespace coppice {

struct RandomBatchOptions {
  int max_segments = 3;
  int max_nodes = 5;  // packed nodes of one segment
  int max_node_rows = 5;
  int max_context_nodes = 0;
  int max_context_blocks = 3;  // of one context node
  int32_t block_tokens = 4;
  int32_t num_blocks = 32;  // of the pool
  int32_t vocab = 50;
};

namespace random_batch_internal {

inline int Uniform(std::mt19937_64& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

// Appends a node of 1..max rows and then its children; `budget` nodes are left for the segment.
inline void AppendSubtree(std::mt19937_64& random, const RandomBatchOptions& o, int32_t position,
                          int depth, int& budget, ops::TokenBatch& b) {
  --budget;
  const int32_t begin = static_cast<int32_t>(b.tokens.size());
  const int32_t rows = Uniform(random, 1, o.max_node_rows);
  for (int32_t i = 0; i < rows; ++i) {
    b.tokens.push_back(Uniform(random, 0, o.vocab - 1));
    b.positions.push_back(position + i);
    b.subtree_end.push_back(0);
  }
  const int children = depth < 5 ? Uniform(random, 0, 3) : 0;
  for (int c = 0; c < children && budget > 0; ++c) {
    AppendSubtree(random, o, position + rows, depth + 1, budget, b);
  }
  std::fill_n(b.subtree_end.begin() + begin, rows, static_cast<int32_t>(b.tokens.size()));
}

// Context nodes with distinct blocks; inner nodes hold whole blocks.
inline void AppendContext(std::mt19937_64& random, const RandomBatchOptions& o,
                          ops::TokenBatch& b) {
  std::vector<int32_t> blocks(o.num_blocks);
  for (int32_t i = 0; i < o.num_blocks; ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  const int count = Uniform(random, 0, o.max_context_nodes);
  for (int i = 0; i < count; ++i) {
    const int node_blocks = Uniform(random, 1, o.max_context_blocks);
    if (b.context_blocks.size() + node_blocks > blocks.size()) break;
    ops::ContextNode node;
    node.parent = Uniform(random, -1, i - 1);
    node.num_tokens = node_blocks * o.block_tokens - Uniform(random, 0, o.block_tokens - 1);
    node.block_begin = static_cast<int32_t>(b.context_blocks.size());
    for (int j = 0; j < node_blocks; ++j) b.context_blocks.push_back(blocks[node.block_begin + j]);
    b.context_nodes.push_back(node);
  }
  for (const ops::ContextNode& node : b.context_nodes) {
    if (node.parent < 0) continue;
    int32_t& tokens = b.context_nodes[node.parent].num_tokens;
    tokens = (tokens + o.block_tokens - 1) / o.block_tokens * o.block_tokens;
  }
}

}  // namespace random_batch_internal

inline ops::TokenBatch RandomBatch(std::mt19937_64& random, const RandomBatchOptions& o) {
  using random_batch_internal::Uniform;
  ops::TokenBatch b;
  b.block_tokens = o.block_tokens;
  random_batch_internal::AppendContext(random, o, b);
  const int num_segments = Uniform(random, 1, o.max_segments);
  for (int i = 0; i < num_segments; ++i) {
    ops::Segment s;
    s.context_node = Uniform(random, -1, static_cast<int>(b.context_nodes.size()) - 1);
    s.row_begin = static_cast<int32_t>(b.tokens.size());
    int budget = Uniform(random, 1, o.max_nodes);
    const int32_t position = static_cast<int32_t>(b.ContextLength(s.context_node));
    // A segment may hold several trees below the same context.
    while (budget > 0) random_batch_internal::AppendSubtree(random, o, position, 0, budget, b);
    s.row_end = static_cast<int32_t>(b.tokens.size());
    b.segments.push_back(s);
  }
  return b;
}

}  // namespace coppice
