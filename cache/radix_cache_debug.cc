// Looking at the tree: CheckInvariants and ToString.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cache/radix_cache_impl.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

absl::Status Broken(const RadixNode& node, absl::string_view what) {
  return absl::InternalError(absl::StrFormat("radix cache: node at block %d with %d blocks: %s",
                                             node.first_block, node.num_blocks(), what));
}

// What one node promises about itself and its parent.
absl::Status CheckNode(const RadixNode& node, int64_t block_tokens, const BlockPool& pool) {
  const RadixNode& parent = *node.parent;
  if (node.num_blocks() == 0) return Broken(node, "empty run");
  if (static_cast<int64_t>(node.tokens.size()) != node.num_blocks() * block_tokens) {
    return Broken(node, "tokens and blocks differ in length");
  }
  if (node.first_block != parent.end_block())
    return Broken(node, "does not start where its parent ends");
  if (node.tree != parent.tree) return Broken(node, "is in another tree than its parent");
  if (node.committed > 0 && !parent.all_committed()) {
    return Broken(node, "committed below a parent that is not");
  }
  if (!node.all_committed() && node.num_leases == 0)
    return Broken(node, "in flight without a lease");
  if (node.is_private && node.num_leases == 0) return Broken(node, "private without a lease");
  if (parent.is_private && !node.is_private) return Broken(node, "shared below a private parent");
  if (node.expires_at > parent.expires_at && !parent.is_root()) {
    return Broken(node, "outlives its parent");
  }
  uint64_t prefix = parent.end_fingerprint();
  for (int64_t i = 0; i < node.num_blocks(); ++i) {
    prefix = ExtendFingerprint(prefix,
                               {&node.tokens[i * block_tokens], static_cast<size_t>(block_tokens)});
    if (node.fingerprints[i] != prefix) return Broken(node, "wrong fingerprint");
    if (!pool.InTree(node.blocks[i])) return Broken(node, "holds a block that is not the tree's");
  }
  return absl::OkStatus();
}

// Leases of the children cannot exceed the node's.
absl::Status CheckChildren(const RadixNode& node) {
  int64_t below = 0;
  for (const auto& child : node.private_children) below += child->num_leases;
  for (const auto& child : node.children) {
    below += child->num_leases;
    if (child->parent != &node) return Broken(*child, "has lost its parent");
  }
  if (!node.is_root() && below > node.num_leases) return Broken(node, "fewer leases than below it");
  return absl::OkStatus();
}

// What a tree adds up to.
struct Totals {
  int64_t nodes = 0, leased_blocks = 0, cached_only_blocks = 0, evictable_leaves = 0;
};

absl::Status Want(absl::string_view what, int64_t want, int64_t got) {
  if (want == got) return absl::OkStatus();
  return absl::InternalError(absl::StrFormat("radix cache: %s: want %d, have %d", what, want, got));
}

std::string Line(const RadixNode& node, int depth) {
  constexpr size_t kShown = 4;
  const absl::Span<const int32_t> shown = absl::MakeConstSpan(node.tokens).subspan(0, kShown);
  std::string line =
      absl::StrFormat("%*s[%d,%d) %s%s", 2 * depth, "", node.first_block * node.block_tokens,
                      node.end_block() * node.block_tokens, absl::StrJoin(shown, " "),
                      node.tokens.size() > kShown ? " .." : "");
  if (node.is_private) line += " private";
  if (!node.all_committed()) {
    absl::StrAppend(&line, " committed=", node.committed * node.block_tokens, " producer=");
    line += node.producer == 0 ? "none" : absl::StrCat(Raw(node.producer_owner));
  }
  if (node.num_leases > 0) absl::StrAppend(&line, " leases=", node.num_leases);
  return line + "\n";
}

}  // namespace

absl::Status RadixCache::CheckInvariants() const {
  Totals sum;
  for (const auto& [ns, tree] : impl_->trees) {
    if (tree->root->is_leaf()) return absl::InternalError("radix cache: a namespace is empty");
    absl::Status status;
    ForEachNode(tree->root.get(), [&](RadixNode* node, int) {
      if (status.ok()) status = CheckNode(*node, block_tokens(), impl_->pool);
      if (status.ok()) status = CheckChildren(*node);
      const bool free_to_go = node->num_leases == 0;
      (free_to_go ? sum.cached_only_blocks : sum.leased_blocks) += node->num_blocks();
      sum.nodes += 1;
      if (free_to_go && node->is_leaf()) {
        sum.evictable_leaves += 1;
        if (status.ok() && !impl_->evictable.Contains(node)) {
          status = Broken(*node, "evictable but not listed");
        }
      }
    });
    RETURN_IF_ERROR(status);
  }
  const CacheStats stats = Stats();
  const int64_t owned = impl_->pool.num_owned();
  RETURN_IF_ERROR(Want("nodes", sum.nodes, stats.num_nodes));
  RETURN_IF_ERROR(Want("evictable leaves", sum.evictable_leaves, impl_->evictable.size()));
  RETURN_IF_ERROR(Want("leased blocks", sum.leased_blocks + owned, stats.leased_blocks));
  RETURN_IF_ERROR(Want("cached-only blocks", sum.cached_only_blocks, stats.cached_only_blocks));
  RETURN_IF_ERROR(Want("blocks in the tree", sum.leased_blocks + sum.cached_only_blocks,
                       impl_->pool.num_in_tree()));
  return Want("free + leased + cached only", stats.total_blocks,
              stats.free_blocks + stats.leased_blocks + stats.cached_only_blocks);
}

std::string RadixCache::ToString() const {
  const CacheStats s = Stats();
  std::string text =
      absl::StrFormat("blocks: %d free, %d leased, %d cached only, %d total\n", s.free_blocks,
                      s.leased_blocks, s.cached_only_blocks, s.total_blocks);
  std::vector<const RadixTree*> trees;
  for (const auto& [ns, tree] : impl_->trees) trees.push_back(tree.get());
  std::sort(trees.begin(), trees.end(),
            [](const RadixTree* a, const RadixTree* b) { return a->ns.digest < b->ns.digest; });
  for (const RadixTree* tree : trees) {
    absl::StrAppend(&text, "namespace ", ShortHex(tree->ns.digest),
                    tree->retired ? " retired\n" : "\n");
    ForEachNode(tree->root.get(),
                [&text](const RadixNode* node, int depth) { text += Line(*node, depth); });
  }
  return text;
}

}  // namespace coppice
