#include "cache/radix_check.h"

#include <string>

#include "absl/strings/str_format.h"
#include "cache/prefix_history.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

// The first promise that the node itself breaks, or null.
const char* BrokenAlone(const RadixNode& node) {
  const bool leased = node.num_leases > 0;
  if (node.num_blocks() == 0) return "has no blocks";
  if (static_cast<int64_t>(node.tokens.size()) != node.num_blocks() * node.block_tokens) {
    return "tokens and blocks differ in length";
  }
  if (node.fingerprints.size() != node.blocks.size())
    return "fingerprints and blocks differ in number";
  if (!node.all_committed() && !leased) return "in flight without a lease";
  if (node.is_private && !leased) return "private without a lease";
  return nullptr;
}

const char* BrokenTowardsParent(const RadixNode& node) {
  const RadixNode& parent = *node.parent;
  if (node.tree != parent.tree) return "is in another tree than its parent";
  if (node.first_block != parent.end_block()) return "does not start where its parent ends";
  if (node.committed > 0 && !parent.all_committed()) return "committed below a parent that is not";
  if (parent.is_private && !node.is_private) return "shared below a private parent";
  if (node.expires_at > parent.expires_at) return "outlives its parent";
  uint64_t prefix = parent.end_fingerprint();
  const absl::Span<const int32_t> tokens(node.tokens);
  for (int64_t i = 0; i < node.num_blocks(); ++i) {
    prefix = ExtendFingerprint(prefix, tokens.subspan(i * node.block_tokens, node.block_tokens));
    if (node.fingerprints[i] != prefix) return "has a wrong fingerprint";
  }
  return nullptr;
}

const char* BrokenTowardsChildren(const RadixNode& node) {
  int64_t leases_below = 0;
  for (const auto& child : node.private_children) leases_below += child->num_leases;
  for (const auto& child : node.children) leases_below += child->num_leases;
  return leases_below > node.num_leases ? "has fewer leases than its children" : nullptr;
}

bool IsEvictable(const RadixNode& node) { return node.num_leases == 0 && node.is_leaf(); }

}  // namespace

absl::Status CheckNode(const RadixNode& node, const BlockPool& pool,
                       const EvictionOrder& evictable) {
  const char* broken = BrokenAlone(node);
  if (broken == nullptr) broken = BrokenTowardsParent(node);
  if (broken == nullptr) broken = BrokenTowardsChildren(node);
  if (broken == nullptr && IsEvictable(node) != evictable.Contains(&node)) {
    broken = "evictable and listed as such differ";
  }
  for (BlockId id : node.blocks) {
    if (broken == nullptr && !pool.InTree(id)) broken = "holds a block that is not the tree's";
  }
  if (broken == nullptr) return absl::OkStatus();
  return absl::InternalError(absl::StrFormat("radix cache: node at block %d with %d blocks: %s",
                                             node.first_block, node.num_blocks(), broken));
}

void TreeTotals::Add(const RadixNode& node) {
  nodes += 1;
  evictable_leaves += IsEvictable(node) ? 1 : 0;
  blocks += node.num_blocks();
  (node.num_leases > 0 ? leased_blocks : cached_only_blocks) += node.num_blocks();
}

absl::Status CheckTotals(const TreeTotals& want, const TreeTotals& have) {
  const auto check = [](const char* what, int64_t w, int64_t h) {
    if (w == h) return absl::OkStatus();
    return absl::InternalError(absl::StrFormat("radix cache: %s: want %d, have %d", what, w, h));
  };
  RETURN_IF_ERROR(check("namespaces", want.namespaces, have.namespaces));
  RETURN_IF_ERROR(check("nodes", want.nodes, have.nodes));
  RETURN_IF_ERROR(check("evictable leaves", want.evictable_leaves, have.evictable_leaves));
  RETURN_IF_ERROR(check("blocks in the tree", want.blocks, have.blocks));
  RETURN_IF_ERROR(check("leased blocks", want.leased_blocks, have.leased_blocks));
  return check("cached-only blocks", want.cached_only_blocks, have.cached_only_blocks);
}

}  // namespace coppice
