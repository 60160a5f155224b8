// PrefixIndex: which prompt blocks one replica is believed to hold. Approximate: it is told what
// was sent there, and keeps the most recently used blocks, as many as the replica's cache can hold.
//
// Not thread-safe. A chain is what BlockHashes returns. The blocks that are held of a chain are
// always its first ones, so a match is found by bisection.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "server/placement/lru_map.h"

namespace coppice {

class PrefixIndex {
 public:
  explicit PrefixIndex(int64_t capacity) : blocks_(capacity) {}

  // Leading blocks of the chain that were used at `since` or later. O(log blocks).
  int64_t Match(absl::Span<const uint64_t> chain, int64_t since) const {
    int64_t held = 0, limit = static_cast<int64_t>(chain.size());
    while (held < limit) {
      const int64_t middle = held + (limit - held) / 2;
      const int64_t* used = blocks_.Find(chain[middle]);
      if (used != nullptr && *used >= since) {
        held = middle + 1;
      } else {
        limit = middle;
      }
    }
    return held;
  }

  // The replica computes or reads the chain now. Deepest first, so that a block is forgotten after
  // those that need it. O(blocks).
  void Touch(absl::Span<const uint64_t> chain, int64_t tick) {
    for (auto block = chain.rbegin(); block != chain.rend(); ++block) blocks_.Put(*block, tick);
  }

  // The replica turned out to hold the first `held` blocks only. O(blocks).
  void Forget(absl::Span<const uint64_t> chain, int64_t held) {
    for (size_t i = held; i < chain.size(); ++i) blocks_.Erase(chain[i]);
  }

  void Clear() { blocks_.Clear(); }
  void SetCapacity(int64_t blocks) { blocks_.SetCapacity(blocks); }
  int64_t size() const { return blocks_.size(); }

 private:
  LruMap<int64_t> blocks_;  // tick of the last use
};

}  // namespace coppice
