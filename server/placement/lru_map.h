// LruMap: a map from hashes to values that holds the `capacity` most recently used.
//
// Not thread-safe. All operations O(1). Memory: about 40 bytes an entry beyond its value.
#pragma once

#include <cstdint>
#include <list>
#include <utility>

#include "absl/container/flat_hash_map.h"

namespace coppice {

template <typename Value>
class LruMap {
 public:
  explicit LruMap(int64_t capacity) : capacity_(capacity) {}
  // Copies would share list nodes.
  LruMap(LruMap&&) noexcept = default;
  LruMap& operator=(LruMap&&) noexcept = default;

  // The value, or null. Does not count as use.
  Value* Find(uint64_t key) {
    const auto found = index_.find(key);
    return found == index_.end() ? nullptr : &found->second->second;
  }
  const Value* Find(uint64_t key) const {
    const auto found = index_.find(key);
    return found == index_.end() ? nullptr : &found->second->second;
  }
  // Inserts or replaces; the entry is now the most recently used one.
  void Put(uint64_t key, Value value) {
    const auto [at, inserted] = index_.try_emplace(key);
    if (!inserted) {
      at->second->second = std::move(value);
      order_.splice(order_.begin(), order_, at->second);
      return;
    }
    order_.emplace_front(key, std::move(value));
    at->second = order_.begin();
    Shrink();
  }
  void Erase(uint64_t key) {
    const auto found = index_.find(key);
    if (found == index_.end()) return;
    order_.erase(found->second);
    index_.erase(found);
  }
  void Clear() {
    index_.clear();
    order_.clear();
  }
  // The least recently used beyond it are dropped.
  void SetCapacity(int64_t capacity) {
    capacity_ = capacity;
    Shrink();
  }
  int64_t size() const { return static_cast<int64_t>(index_.size()); }

 private:
  using Order = std::list<std::pair<uint64_t, Value>>;  // most recently used first

  void Shrink() {
    while (size() > capacity_) {
      index_.erase(order_.back().first);
      order_.pop_back();
    }
  }

  int64_t capacity_;
  Order order_;
  absl::flat_hash_map<uint64_t, typename Order::iterator> index_;
};

}  // namespace coppice
