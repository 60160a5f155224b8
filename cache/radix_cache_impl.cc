#include "cache/radix_cache_impl.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace coppice {
namespace {

// Prefixes remembered to explain misses: several times what the pool can hold at once.
constexpr int64_t kHistoryPerBlock = 4;
constexpr int64_t kMinHistory = 4096;

}  // namespace

RadixCache::Impl::Impl(const RadixCache::Options& options)
    : block_tokens(options.block_tokens),
      pool(options.num_blocks),
      history(std::max(kMinHistory, kHistoryPerBlock * options.num_blocks)) {
  CHECK_GT(block_tokens, 0);
}

// ---- Trees

RadixTree* RadixCache::Impl::FindTree(const Namespace& ns) const {
  const auto it = trees.find(ns);
  return it == trees.end() ? nullptr : it->second.get();
}

RadixTree& RadixCache::Impl::FindOrMakeTree(const Namespace& ns) {
  std::unique_ptr<RadixTree>& tree = trees[ns];
  if (tree == nullptr) {
    tree = std::make_unique<RadixTree>();
    tree->ns = ns;
    tree->root = std::make_unique<RadixNode>();
    tree->root->tree = tree.get();
    tree->root->block_tokens = block_tokens;
  }
  return *tree;
}

void RadixCache::Impl::EraseIfEmpty(RadixTree* tree) {
  if (tree->root->is_leaf()) trees.erase(Namespace(tree->ns));
}

void RadixCache::Impl::Retire(RadixTree& tree) {
  const std::vector<RadixNode*> leaves = evictable.Leaves(&tree);
  for (RadixNode* leaf : leaves) evictable.Remove(leaf);
  tree.retired = true;
  for (RadixNode* leaf : leaves) evictable.Add(leaf);
}

RadixNode* RadixCache::Impl::Split(RadixNode* node, int64_t n) {
  ++stats.num_nodes;
  return node->Split(n, next_serial++);
}

// ---- Leases

void RadixCache::Impl::Open(Lease& lease, RadixCache* cache, RequestId owner) {
  lease.cache_ = cache;
  lease.owner_ = owner;
  lease.id_ = next_lease_id++;
}

void RadixCache::Impl::Attach(Lease& lease, RadixNode* node) {
  if (lease.node_ == nullptr) ++num_leases;
  lease.blocks_.resize(node->end_block());
  for (RadixNode* n = node; n != lease.node_ && !n->is_root(); n = n->parent) {
    std::copy(n->blocks.begin(), n->blocks.end(), lease.blocks_.begin() + n->first_block);
    if (n->num_leases == 0) {
      if (evictable.Contains(n)) evictable.Remove(n);
      n->next_use = 0;
      stats.cached_only_blocks -= n->num_blocks();
      leased_in_tree += n->num_blocks();
    }
    ++n->num_leases;
  }
  lease.node_ = node;
  lease.num_tokens_ = node->end_block() * block_tokens;
}

void RadixCache::Impl::Detach(Lease& lease) {
  ++tick;
  --num_leases;
  RadixTree* tree = lease.node_->tree;
  for (RadixNode* n = lease.node_; !n->is_root();) {
    RadixNode* parent = n->parent;
    if (n->producer == lease.id_) n->producer = 0;
    if (--n->num_leases == 0) Settle(n);
    n = parent;
  }
  EraseIfEmpty(tree);
  lease.node_ = nullptr;
  lease.blocks_.clear();
  lease.num_tokens_ = 0;
}

// ---- Match

void RadixCache::Impl::MatchPath(RadixTree& tree, absl::Span<const int32_t> tokens,
                                 MatchResult& result) {
  RadixNode* node = tree.root.get();
  absl::Span<const int32_t> rest = tokens;
  while (RadixNode* child = node->FindChild(rest)) {
    const int64_t n = child->MatchBlocks(rest);
    node = n < child->num_blocks() ? Split(child, n) : child;
    rest.remove_prefix(n * block_tokens);
  }
  if (!node->is_root()) Attach(result.lease, node);
  result.committed_tokens = result.lease.cache_->CommittedTokens(result.lease);
  const RadixNode::Partial partial = node->FindPartialChild(rest);
  if (partial.node == nullptr) return;
  result.partial_tokens = partial.tokens;
  result.partial_block = partial.node->blocks.front();
  Open(result.partial_lease, result.lease.cache_, result.lease.owner_);
  Attach(result.partial_lease, partial.node);
}

MissReason RadixCache::Impl::Explain(const RadixTree* tree, const Namespace& ns,
                                     absl::Span<const int32_t> tokens,
                                     const MatchResult& result) const {
  tokens.remove_prefix(result.lease.num_tokens());
  const int64_t left = static_cast<int64_t>(tokens.size());
  if (left == result.partial_tokens) return MissReason::kNone;
  if (left < block_tokens) return MissReason::kBelowBlock;
  if (tree != nullptr && tree->retired) return MissReason::kPolicyVersion;
  const uint64_t prefix = result.lease.empty() ? 0 : result.lease.node_->end_fingerprint();
  return history.Explain(ns, ExtendFingerprint(prefix, tokens.first(block_tokens)));
}

// ---- Publish and commit

RadixCache::Impl::Twins RadixCache::Impl::SkipTwins(RadixNode* node, absl::Span<const int32_t> run,
                                                    BlockSet& blocks) {
  while (RadixNode* child = node->FindChild(run)) {
    const int64_t n = std::min(child->MatchBlocks(run), child->committed);
    if (n == 0) return {node, true};
    blocks.TakeFront(n);  // the duplicates become free
    node = n < child->num_blocks() ? Split(child, n) : child;
    run.remove_prefix(n * block_tokens);
  }
  return {node, false};
}

std::unique_ptr<RadixNode> RadixCache::Impl::MakeChild(const Twins& where, int32_t priority,
                                                       absl::Duration expires_at) {
  auto child = std::make_unique<RadixNode>();
  child->tree = where.node->tree;
  child->parent = where.node;
  child->block_tokens = block_tokens;
  child->first_block = where.node->end_block();
  child->serial = next_serial++;
  child->is_private = where.in_flight || where.node->is_private;
  child->num_leases = 1;
  child->priority = priority;
  child->expires_at = expires_at;
  ++stats.num_nodes;
  return child;
}

void RadixCache::Impl::Enter(Lease& lease, const Twins& where, absl::Span<const int32_t> run,
                             BlockSet blocks, const PublishOptions& options) {
  RadixNode* node = where.node;
  const absl::Duration expires_at = options.expires_at.value_or(absl::InfiniteDuration());
  // A run that only this lease holds simply grows: a path published block by block stays one node.
  const bool grows = node == lease.node_ && node->is_leaf() && node->num_leases == 1 &&
                     (node->all_committed() || node->producer == lease.id_) &&
                     node->priority == options.priority && node->expires_at == expires_at;
  std::unique_ptr<RadixNode> child;
  if (!grows) {
    child = MakeChild(where, options.priority, expires_at);
    node = child.get();
  }
  leased_in_tree += blocks.size();
  node->Append(run, pool.Adopt(std::move(blocks)));
  if (child != nullptr) where.node->AddChild(std::move(child), where.in_flight);
  node->producer = lease.id_;
  node->producer_owner = lease.owner_;
  if (lease.empty()) ++num_leases;
  lease.node_ = node;
  lease.blocks_.insert(lease.blocks_.end(), node->blocks.end() - run.size() / block_tokens,
                       node->blocks.end());
  lease.num_tokens_ = node->end_block() * block_tokens;
}

void RadixCache::Impl::Renew(RadixNode* node, const PublishOptions& options) {
  const absl::Duration expires_at = options.expires_at.value_or(absl::InfiniteDuration());
  const int64_t next_use = options.next_use_tick;
  for (RadixNode* n = node; !n->is_root(); n = n->parent) {
    n->priority = std::max(n->priority, options.priority);
    n->expires_at = std::max(n->expires_at, expires_at);
    if (next_use != 0 && (n->next_use == 0 || next_use < n->next_use)) n->next_use = next_use;
  }
}

void RadixCache::Impl::Commit(RadixNode* node, int64_t num_blocks) {
  for (RadixNode* n = node; !n->is_root(); n = n->parent) {
    const int64_t had = n->committed;
    n->committed = std::clamp(num_blocks - n->first_block, had, n->num_blocks());
    for (int64_t i = had; i < n->committed && !n->is_private; ++i) {
      history.Remember(n->tree->ns, n->fingerprints[i]);
    }
    if (n->all_committed()) n->producer = 0;
    if (had > 0) break;  // then all above is committed already
  }
}

// ---- What nobody leases

void RadixCache::Impl::Settle(RadixNode* node) {
  node->last_use = tick;
  leased_in_tree -= node->num_blocks();
  stats.cached_only_blocks += node->num_blocks();
  const int64_t kept = node->is_private ? 0 : node->committed;
  if (kept < node->num_blocks()) FreeTail(node, node->num_blocks() - kept);
  if (kept > 0) ListIfEvictable(node);
}

void RadixCache::Impl::ListIfEvictable(RadixNode* node) {
  if (!node->is_root() && node->num_leases == 0 && node->is_leaf()) evictable.Add(node);
}

RadixNode* RadixCache::Impl::TrimLeaf(RadixNode* leaf, int64_t n) {
  if (n < leaf->num_blocks()) {  // its place in the order stays
    FreeTail(leaf, n);
    return nullptr;
  }
  RadixNode* parent = leaf->parent;
  evictable.Remove(leaf);
  FreeTail(leaf, n);
  ListIfEvictable(parent);
  if (!parent->is_root()) return evictable.Contains(parent) ? parent : nullptr;
  EraseIfEmpty(parent->tree);
  return nullptr;
}

void RadixCache::Impl::FreeTail(RadixNode* node, int64_t n) {
  pool.Free(node->blocks.data() + node->num_blocks() - n, n);
  stats.cached_only_blocks -= n;
  if (n < node->num_blocks()) {
    node->CutTail(n);
  } else {
    node->RemoveFromParent();
    --stats.num_nodes;
  }
}

}  // namespace coppice
