#include "cache/radix_node.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "cache/prefix_history.h"
#include "kernels/base/check.h"

namespace coppice {
namespace {

bool Less(absl::Span<const int32_t> a, absl::Span<const int32_t> b) {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

int64_t CommonPrefix(absl::Span<const int32_t> a, absl::Span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

template <typename T>
std::vector<T> TakeHead(std::vector<T>& v, int64_t n) {
  std::vector<T> head(v.begin(), v.begin() + n);
  v.erase(v.begin(), v.begin() + n);
  return head;
}

}  // namespace

bool ByFirstBlock::operator()(const std::unique_ptr<RadixNode>& a,
                              const std::unique_ptr<RadixNode>& b) const {
  return Less(a->first_tokens(), b->first_tokens());
}
bool ByFirstBlock::operator()(const std::unique_ptr<RadixNode>& a,
                              absl::Span<const int32_t> b) const {
  return Less(a->first_tokens(), b);
}
bool ByFirstBlock::operator()(absl::Span<const int32_t> a,
                              const std::unique_ptr<RadixNode>& b) const {
  return Less(a, b->first_tokens());
}

RadixNode* RadixNode::FindChild(absl::Span<const int32_t> run) const {
  if (static_cast<int64_t>(run.size()) < block_tokens) return nullptr;
  const auto it = children.find(run.first(block_tokens));
  return it == children.end() ? nullptr : it->get();
}

int64_t RadixNode::MatchBlocks(absl::Span<const int32_t> run) const {
  const int64_t limit = std::min(num_blocks(), static_cast<int64_t>(run.size()) / block_tokens);
  const size_t block_bytes = block_tokens * sizeof(int32_t);
  int64_t n = 0;
  while (n < limit &&
         std::memcmp(&tokens[n * block_tokens], &run[n * block_tokens], block_bytes) == 0) {
    ++n;
  }
  return n;
}

RadixNode::Partial RadixNode::FindPartialChild(absl::Span<const int32_t> run) const {
  run = run.subspan(0, block_tokens);
  // Siblings are sorted, so what they share with `run` only shrinks with the distance from where
  // `run` would stand: on either side the first committed one is the best.
  Partial best;
  const auto consider = [&](const RadixNode& child) {  // false = no use to look further
    const int64_t shared = CommonPrefix(child.first_tokens(), run);
    if (shared <= best.tokens) return false;
    if (child.committed == 0) return true;
    best = {const_cast<RadixNode*>(&child), static_cast<int32_t>(shared)};
    return false;
  };
  const auto middle = children.lower_bound(run);
  for (auto it = middle; it != children.end() && consider(**it); ++it) {
  }
  for (auto it = middle; it != children.begin() && consider(**std::prev(it)); --it) {
  }
  return best;
}

RadixNode* RadixNode::Split(int64_t n, uint64_t upper_serial) {
  CHECK_GT(n, 0);
  CHECK_LT(n, num_blocks());
  // Out of the parent's order while the key changes.
  auto handle = parent->children.extract(parent->children.find(first_tokens()));
  std::unique_ptr<RadixNode> self = std::move(handle.value());
  auto owned = std::make_unique<RadixNode>();
  RadixNode* upper = owned.get();
  upper->tree = tree;
  upper->block_tokens = block_tokens;
  upper->first_block = first_block;
  upper->serial = upper_serial;
  upper->tokens = TakeHead(tokens, n * block_tokens);
  upper->blocks = TakeHead(blocks, n);
  upper->fingerprints = TakeHead(fingerprints, n);
  upper->committed = std::min(committed, n);
  upper->num_leases = num_leases;
  upper->producer = producer;
  upper->producer_owner = producer_owner;
  upper->is_private = is_private;
  upper->priority = priority;
  upper->next_use = next_use;
  upper->last_use = last_use;
  upper->expires_at = expires_at;
  first_block += n;
  committed -= upper->committed;
  parent->AddChild(std::move(owned), false);
  upper->AddChild(std::move(self), false);
  return upper;
}

void RadixNode::Append(absl::Span<const int32_t> run, const std::vector<BlockId>& ids) {
  CHECK(is_leaf());
  uint64_t prefix = blocks.empty() ? parent->end_fingerprint() : end_fingerprint();
  tokens.insert(tokens.end(), run.begin(), run.end());
  blocks.insert(blocks.end(), ids.begin(), ids.end());
  fingerprints.reserve(blocks.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    prefix = ExtendFingerprint(prefix, run.subspan(i * block_tokens, block_tokens));
    fingerprints.push_back(prefix);
  }
}

void RadixNode::CutTail(int64_t n) {
  CHECK_LT(n, num_blocks());
  blocks.resize(blocks.size() - n);
  fingerprints.resize(blocks.size());
  tokens.resize(blocks.size() * block_tokens);
  committed = std::min(committed, num_blocks());
}

void RadixNode::AddChild(std::unique_ptr<RadixNode> child, bool is_twin) {
  child->parent = this;
  if (is_twin) {
    private_children.push_back(std::move(child));
  } else {
    const bool entered = children.insert(std::move(child)).second;
    CHECK(entered) << "two children start with the same block";
  }
}

void RadixNode::RemoveFromParent() {
  CHECK(is_leaf() && !is_root());
  auto& twins = parent->private_children;
  const auto it = std::find_if(twins.begin(), twins.end(),
                               [this](const auto& twin) { return twin.get() == this; });
  if (it != twins.end()) {
    twins.erase(it);
  } else {
    parent->children.erase(parent->children.find(first_tokens()));
  }
}

}  // namespace coppice
