// TokenBatch: the one description of "what runs now" for prefill, decode, scoring and training.
//
// Rows are the packed unique tokens of one or more prefix trees in depth-first order. Key row k is
// visible to query row q iff  k <= q < subtree_end[k].  A segment is a contiguous row range that
// hangs below one context node: keys that were computed before and live in KV blocks. Row q of a
// segment sees, besides its packed ancestors, all tokens on the path from the segment's context
// node to the context root. Segments that share context nodes (samples of one prompt) let an
// implementation read each shared node once for all of them.
//
//   context nodes                          segments (decode: one row each)
//   [0: 1000 prompt tokens] -+- [1: 5 own]   row 0, position 1005
//                            +- [2: 7 own]   row 1, position 1007
//
// Invariants, checked by Validate(): subtree_end[r] in (r, end of its segment]; subtrees nest;
// segments are disjoint, ascending and cover all rows; parents of context nodes come before
// children; a context node that is not a leaf of its chain (has a child node) holds whole blocks;
// positions of a segment's root rows equal the length of its context.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace coppice::ops {

// A run of cached tokens. The chain parent -> child lists a path's KV blocks from position 0 on.
struct ContextNode {
  int32_t parent = -1;  // index into context_nodes, < own index; -1 = root
  // > 0; the last block may be partly filled only if no other node has this one as parent.
  int32_t num_tokens = 0;
  // Its blocks: context_blocks[block_begin, block_begin + ceil(num_tokens / block_tokens)).
  int32_t block_begin = 0;
};

struct Segment {
  int32_t row_begin = 0;
  int32_t row_end = 0;
  int32_t context_node = -1;  // -1 = no context
};

struct TokenBatch {
  std::vector<int32_t> tokens;       // [rows] token ids
  std::vector<int32_t> positions;    // [rows] absolute positions
  std::vector<int32_t> subtree_end;  // [rows] see above
  // [rows] where K and V are stored, or -1; empty = store nothing (training).
  std::vector<int32_t> kv_slots;
  std::vector<Segment> segments;
  std::vector<ContextNode> context_nodes;
  std::vector<int32_t> context_blocks;  // block ids, see ContextNode
  int32_t block_tokens = 0;             // > 0 if there are context nodes or kv_slots
  std::vector<int32_t> logit_rows;      // [head_rows] rows that feed the head, ascending

  int64_t num_rows() const { return static_cast<int64_t>(tokens.size()); }
  // Tokens on the path of `node` from its root, inclusive; 0 for -1.
  int64_t ContextLength(int32_t node) const;
  // INVALID_ARGUMENT naming the first broken invariant. `vocab` and `num_blocks` bound ids.
  absl::Status Validate(int64_t vocab, int64_t num_blocks) const;
};

}  // namespace coppice::ops
