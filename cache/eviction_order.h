// EvictionOrder: the evictable leaves in the order in which they go, and in the order in which they
// expire. Kept up to date one leaf at a time; nothing is rebuilt. Does not own the nodes. Thread:
// the engine's.
//
// Who goes first: retired namespaces; then lower priority; then the later expected next use,
// unknown before known; then the longer unused. A node's fields must not change while it is listed:
// Remove, change, Add.
#pragma once

#include "absl/container/btree_set.h"
#include "absl/time/time.h"
#include "cache/radix_node.h"

namespace coppice {

class EvictionOrder {
 public:
  // O(log leaves).
  void Add(RadixNode* leaf);
  void Remove(RadixNode* leaf);
  bool Contains(const RadixNode* leaf) const { return by_value_.contains(leaf); }
  int64_t size() const { return static_cast<int64_t>(by_value_.size()); }

  // The next to go, or null.
  RadixNode* First() const { return by_value_.empty() ? nullptr : *by_value_.begin(); }
  // A leaf whose time has come, or null.
  RadixNode* FirstExpired(absl::Duration now) const;
  // Leaves of one tree, of all if null. O(leaves).
  std::vector<RadixNode*> Leaves(const RadixTree* tree) const;

 private:
  struct ByValue {
    using is_transparent = void;
    bool operator()(const RadixNode* a, const RadixNode* b) const;
  };
  struct ByExpiry {
    bool operator()(const RadixNode* a, const RadixNode* b) const;
  };
  absl::btree_set<RadixNode*, ByValue> by_value_;
  absl::btree_set<RadixNode*, ByExpiry> by_expiry_;  // only those that expire
};

}  // namespace coppice
