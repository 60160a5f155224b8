// The invariants of one node and the sums over all of them: the parts of
// RadixCache::CheckInvariants. For tests and debugging.
#pragma once

#include "absl/status/status.h"
#include "cache/block_pool.h"
#include "cache/eviction_order.h"
#include "cache/radix_node.h"

namespace coppice {

// INTERNAL naming the node and the first promise that it breaks, alone or towards its parent and
// children. O(run).
absl::Status CheckNode(const RadixNode& node, const BlockPool& pool,
                       const EvictionOrder& evictable);

// What the trees add up to.
struct TreeTotals {
  int64_t namespaces = 0;  // with at least one node
  int64_t nodes = 0;
  int64_t evictable_leaves = 0;
  int64_t blocks = 0;
  int64_t leased_blocks = 0;
  int64_t cached_only_blocks = 0;

  void Add(const RadixNode& node);
};

// INTERNAL naming the first total that differs.
absl::Status CheckTotals(const TreeTotals& want, const TreeTotals& have);

}  // namespace coppice
