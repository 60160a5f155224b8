// BlockPool: ids of KV blocks and who holds them; knows no bytes and no tokens. Owned by
// RadixCache.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/base/ids.h"

namespace coppice {

class BlockPool;

// Owns blocks that are in no tree yet (a sample's own blocks). Move-only; what it still holds
// becomes free in the destructor.
class BlockSet {
 public:
  BlockSet() = default;
  BlockSet(BlockSet&& other) noexcept;
  BlockSet& operator=(BlockSet&& other) noexcept;
  ~BlockSet();

  const std::vector<BlockId>& ids() const { return ids_; }
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  // Appends the blocks of `other`.
  void Append(BlockSet other);
  // Splits off the first n blocks. REQUIRES: n <= size().
  BlockSet TakeFront(int64_t n);

 private:
  friend class BlockPool;
  friend class RadixCache;
  BlockPool* pool_ = nullptr;
  std::vector<BlockId> ids_;
};

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);
  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_owned() const { return num_owned_; }  // in BlockSets

  // REQUIRES: n <= num_free().
  BlockSet Take(int64_t n);
  // Ownership moves from the set to the tree, and back to free.
  std::vector<BlockId> Adopt(BlockSet blocks);
  void Free(const std::vector<BlockId>& blocks);

 private:
  friend class BlockSet;
  int64_t num_blocks_;
  int64_t num_owned_ = 0;
  std::vector<BlockId> free_;
};

}  // namespace coppice
