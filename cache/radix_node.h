// RadixNode: one run of whole blocks, and the structure of the tree: finding, splitting, adding,
// cutting. Knows nothing of leases' accounting, eviction or block ownership; that is RadixCache.
// Thread: the engine's.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "cache/namespace.h"
#include "kernels/base/ids.h"

namespace coppice {

struct RadixNode;

// All prefixes of one namespace.
struct RadixTree {
  Namespace ns;
  bool retired = false;
  std::unique_ptr<RadixNode> root;  // empty run; where every path starts
};

// Orders siblings by their first block of tokens, so that the sibling that shares most tokens with
// any run is a neighbour.
struct ByFirstBlock {
  using is_transparent = void;
  bool operator()(const std::unique_ptr<RadixNode>& a, const std::unique_ptr<RadixNode>& b) const;
  bool operator()(const std::unique_ptr<RadixNode>& a, absl::Span<const int32_t> b) const;
  bool operator()(absl::Span<const int32_t> a, const std::unique_ptr<RadixNode>& b) const;
};

struct RadixNode {
  RadixTree* tree = nullptr;
  RadixNode* parent = nullptr;  // null for the root
  int64_t block_tokens = 0;
  int64_t first_block = 0;  // blocks on the path before this run
  uint64_t serial = 0;      // unique; breaks ties in orders

  std::vector<int32_t> tokens;  // [blocks.size() * block_tokens]
  std::vector<BlockId> blocks;
  std::vector<uint64_t> fingerprints;  // [blocks.size()], of the prefix that ends with each block
  absl::btree_set<std::unique_ptr<RadixNode>, ByFirstBlock> children;
  std::vector<std::unique_ptr<RadixNode>>
      private_children;  // twins of blocks in flight: leased, never matched

  int64_t committed = 0;   // leading blocks whose KV exists
  int64_t num_leases = 0;  // on this node and below
  uint64_t producer = 0;   // id of the lease that computes the uncommitted blocks; 0 = none
  RequestId producer_owner{0};
  bool is_private = false;  // itself or an ancestor is a private child

  int32_t priority = 0;
  int64_t next_use = 0;   // 0 = unknown
  uint64_t last_use = 0;  // tick at which the last lease ended
  absl::Duration expires_at = absl::InfiniteDuration();

  int64_t num_blocks() const { return static_cast<int64_t>(blocks.size()); }
  int64_t end_block() const { return first_block + num_blocks(); }
  bool all_committed() const { return committed == num_blocks(); }
  bool is_root() const { return parent == nullptr; }
  bool is_leaf() const { return children.empty() && private_children.empty(); }
  absl::Span<const int32_t> first_tokens() const {
    return {tokens.data(), static_cast<size_t>(block_tokens)};
  }
  uint64_t end_fingerprint() const { return fingerprints.empty() ? 0 : fingerprints.back(); }

  // The child whose first block is the first block of `run`, or null. O(log children).
  RadixNode* FindChild(absl::Span<const int32_t> run) const;
  // Leading blocks of this run that equal `run`'s.
  int64_t MatchBlocks(absl::Span<const int32_t> run) const;
  // The committed child that shares most leading tokens (fewer than a block) with `run`, and how
  // many; null and 0 if none.
  struct Partial {
    RadixNode* node = nullptr;
    int32_t tokens = 0;
  };
  Partial FindPartialChild(absl::Span<const int32_t> run) const;

  // Cuts the run after n blocks: a new upper node takes the head and this node's place, this node
  // keeps the tail, children and whatever points at its end. Returns the upper node. REQUIRES: 0 <
  // n < num_blocks().
  RadixNode* Split(int64_t n, uint64_t upper_serial);
  // Appends blocks to the run. REQUIRES: is_leaf(), and a parent (which need not hold this node
  // yet).
  void Append(absl::Span<const int32_t> run, const std::vector<BlockId>& ids);
  // Drops the last n blocks of the run. REQUIRES: n < num_blocks().
  void CutTail(int64_t n);
  // is_twin: of a block in flight, so it becomes a private child.
  void AddChild(std::unique_ptr<RadixNode> child, bool is_twin);
  // Destroys this leaf. REQUIRES: is_leaf() and not the root.
  void RemoveFromParent();
};

// Calls visit(node, depth) for every node below the root, parents first, siblings in order;
// children of the root have depth
// 1. No recursion: a path may have as many nodes as a prompt has blocks.
template <typename Visit>
void ForEachNode(RadixNode* root, Visit visit) {
  std::vector<std::pair<RadixNode*, int>> stack = {{root, 0}};
  while (!stack.empty()) {
    const auto [node, depth] = stack.back();
    stack.pop_back();
    if (depth > 0) visit(node, depth);
    auto& twins = node->private_children;
    for (auto it = twins.rbegin(); it != twins.rend(); ++it)
      stack.push_back({it->get(), depth + 1});
    for (auto it = node->children.rbegin(); it != node->children.rend(); ++it) {
      stack.push_back({it->get(), depth + 1});
    }
  }
}

}  // namespace coppice
