#include "cache/block_pool.h"

#include <utility>

#include "kernels/base/check.h"

namespace coppice {

BlockSet::BlockSet(BlockSet&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), ids_(std::exchange(other.ids_, {})) {}

BlockSet& BlockSet::operator=(BlockSet&& other) noexcept {
  if (this != &other) {
    ReturnAll();
    pool_ = std::exchange(other.pool_, nullptr);
    ids_ = std::exchange(other.ids_, {});
  }
  return *this;
}

BlockSet::~BlockSet() { ReturnAll(); }

void BlockSet::ReturnAll() {
  for (BlockId id : ids_) {
    pool_->Move(id, BlockPool::Place::kOwned, BlockPool::Place::kFree);
    pool_->free_.push_back(id);
  }
  if (pool_ != nullptr) pool_->num_owned_ -= size();
  ids_.clear();
}

void BlockSet::Append(BlockSet other) {
  if (other.ids_.empty()) return;
  CHECK(pool_ == nullptr || pool_ == other.pool_);
  pool_ = other.pool_;
  ids_.insert(ids_.end(), other.ids_.begin(), other.ids_.end());
  other.ids_.clear();
}

BlockSet BlockSet::TakeFront(int64_t n) {
  CHECK_LE(n, size());
  BlockSet front;
  front.pool_ = pool_;
  front.ids_.assign(ids_.begin(), ids_.begin() + n);
  ids_.erase(ids_.begin(), ids_.begin() + n);
  return front;
}

BlockPool::BlockPool(int64_t num_blocks) : places_(num_blocks, Place::kFree) {
  free_.reserve(num_blocks);
  for (int64_t i = num_blocks - 1; i >= 0; --i) {
    free_.push_back(static_cast<BlockId>(i));
  }
}

BlockPool::~BlockPool() { CHECK_EQ(num_owned_, 0) << "a BlockSet outlives its pool"; }

BlockSet BlockPool::Take(int64_t n) {
  CHECK_LE(n, num_free());
  BlockSet set;
  set.pool_ = this;
  set.ids_.assign(free_.rbegin(), free_.rbegin() + n);
  free_.resize(free_.size() - n);
  for (BlockId id : set.ids_) Move(id, Place::kFree, Place::kOwned);
  num_owned_ += n;
  return set;
}

std::vector<BlockId> BlockPool::Adopt(BlockSet blocks) {
  for (BlockId id : blocks.ids_) Move(id, Place::kOwned, Place::kTree);
  num_owned_ -= blocks.size();
  return std::exchange(blocks.ids_, {});
}

void BlockPool::Free(const BlockId* blocks, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Move(blocks[i], Place::kTree, Place::kFree);
    free_.push_back(blocks[i]);
  }
}

void BlockPool::Move(BlockId id, Place from, Place to) {
  CHECK(places_[Raw(id)] == from) << "block " << Raw(id);
  places_[Raw(id)] = to;
}

}  // namespace coppice
