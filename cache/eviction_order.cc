#include "cache/eviction_order.h"

#include <limits>
#include <tuple>

#include "kernels/base/check.h"

namespace coppice {
namespace {

bool Expires(const RadixNode* node) { return node->expires_at < absl::InfiniteDuration(); }

// Smaller goes earlier.
auto Value(const RadixNode* node) {
  const int64_t until_use =
      node->next_use == 0 ? std::numeric_limits<int64_t>::max() : node->next_use;
  return std::make_tuple(!node->tree->retired, node->priority, -until_use, node->last_use,
                         node->serial);
}

}  // namespace

bool EvictionOrder::ByValue::operator()(const RadixNode* a, const RadixNode* b) const {
  return Value(a) < Value(b);
}

bool EvictionOrder::ByExpiry::operator()(const RadixNode* a, const RadixNode* b) const {
  return std::tie(a->expires_at, a->serial) < std::tie(b->expires_at, b->serial);
}

void EvictionOrder::Add(RadixNode* leaf) {
  const bool added = by_value_.insert(leaf).second;
  CHECK(added);
  if (Expires(leaf)) by_expiry_.insert(leaf);
}

void EvictionOrder::Remove(RadixNode* leaf) {
  CHECK_EQ(by_value_.erase(leaf), 1u);
  if (Expires(leaf)) by_expiry_.erase(leaf);
}

RadixNode* EvictionOrder::FirstExpired(absl::Duration now) const {
  if (by_expiry_.empty() || (*by_expiry_.begin())->expires_at > now) return nullptr;
  return *by_expiry_.begin();
}

std::vector<RadixNode*> EvictionOrder::Leaves(const RadixTree* tree) const {
  std::vector<RadixNode*> leaves;
  for (RadixNode* leaf : by_value_) {
    if (tree == nullptr || leaf->tree == tree) leaves.push_back(leaf);
  }
  return leaves;
}

}  // namespace coppice
