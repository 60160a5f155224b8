// Looking at the tree: CheckInvariants and ToString.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cache/radix_cache_impl.h"
#include "cache/radix_check.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

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
  TreeTotals sum;
  absl::Status status;
  for (const auto& [ns, tree] : impl_->trees) {
    sum.namespaces += tree->root->is_leaf() ? 0 : 1;
    ForEachNode(tree->root.get(), [&](RadixNode* node, int) {
      sum.Add(*node);
      status.Update(CheckNode(*node, impl_->pool, impl_->evictable));
    });
  }
  RETURN_IF_ERROR(status);
  const CacheStats stats = Stats();
  return CheckTotals(sum, {.namespaces = stats.num_namespaces,
                           .nodes = stats.num_nodes,
                           .evictable_leaves = impl_->evictable.size(),
                           .blocks = impl_->pool.num_in_tree(),
                           .leased_blocks = stats.leased_blocks - impl_->pool.num_owned(),
                           .cached_only_blocks = stats.cached_only_blocks});
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
