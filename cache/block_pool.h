// BlockPool: ids of KV blocks and who holds them; knows no bytes and no tokens. Owned by
// RadixCache, used by the engine thread alone. Every block is in exactly one place: free, owned by
// a BlockSet, or in the tree. Moving a block from a place where it is not is a broken invariant
// (CHECK), so a double free cannot go unnoticed.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/base/ids.h"

namespace coppice {

class BlockPool;

// Owns blocks that are in no tree yet (a sample's own blocks). Move-only; what it still holds
// becomes free in the destructor. Must not outlive its pool.
class BlockSet {
 public:
  BlockSet() = default;
  BlockSet(BlockSet&& other) noexcept;
  BlockSet& operator=(BlockSet&& other) noexcept;
  ~BlockSet();

  const std::vector<BlockId>& ids() const { return ids_; }
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  // Appends the blocks of `other`. REQUIRES: the same pool.
  void Append(BlockSet other);
  // Splits off the first n blocks. REQUIRES: n <= size().
  BlockSet TakeFront(int64_t n);

 private:
  friend class BlockPool;
  void ReturnAll();

  BlockPool* pool_ = nullptr;
  std::vector<BlockId> ids_;
};

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);
  ~BlockPool();  // CHECKs that no BlockSet is left
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  int64_t num_blocks() const { return static_cast<int64_t>(places_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_owned() const { return num_owned_; }  // in BlockSets
  int64_t num_in_tree() const { return num_blocks() - num_free() - num_owned(); }
  bool InTree(BlockId id) const { return places_[Raw(id)] == Place::kTree; }

  // The block freed last is taken first. REQUIRES: n <= num_free().
  BlockSet Take(int64_t n);
  // Ownership moves from the set to the tree, and back to free.
  std::vector<BlockId> Adopt(BlockSet blocks);
  void Free(const BlockId* blocks, int64_t n);

 private:
  friend class BlockSet;
  enum class Place : uint8_t { kFree, kOwned, kTree };
  void Move(BlockId id, Place from, Place to);

  std::vector<Place> places_;  // [num_blocks]
  std::vector<BlockId> free_;  // a stack
  int64_t num_owned_ = 0;
};

}  // namespace coppice
