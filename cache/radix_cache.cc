#include "cache/radix_cache.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "cache/radix_cache_impl.h"
#include "kernels/base/check.h"

namespace coppice {
namespace {

// The topmost node of the path to `node` that is not wholly committed, or null.
const RadixNode* FirstUncommitted(const RadixNode* node) {
  const RadixNode* first = nullptr;
  for (; node != nullptr && !node->all_committed(); node = node->parent) first = node;
  return first;
}

}  // namespace

Lease::Lease(Lease&& other) noexcept { *this = std::move(other); }

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    Release();
    cache_ = std::exchange(other.cache_, nullptr);
    node_ = std::exchange(other.node_, nullptr);
    blocks_ = std::exchange(other.blocks_, {});
    num_tokens_ = std::exchange(other.num_tokens_, 0);
    id_ = std::exchange(other.id_, 0);
    owner_ = std::exchange(other.owner_, RequestId{0});
  }
  return *this;
}

Lease::~Lease() { Release(); }

void Lease::Release() {
  if (node_ != nullptr) cache_->impl_->Detach(*this);
}

RadixCache::RadixCache(const Options& options)
    : options_(options), impl_(std::make_unique<Impl>(options)) {}

RadixCache::~RadixCache() {
  CHECK_EQ(impl_->num_leases, 0) << "a Lease outlives its cache";
  Flush();  // leaf by leaf: destroying a long chain of nodes would recurse
}

MatchResult RadixCache::Match(const Namespace& ns, absl::Span<const int32_t> tokens,
                              const MatchOptions& options) {
  Expire(options.now);
  if (options.max_tokens >= 0) tokens = tokens.subspan(0, options.max_tokens);
  impl_->stats.queried_tokens += tokens.size();
  MatchResult result;
  impl_->Open(result.lease, this, options.owner);
  if (options.skip_read) {
    if (!tokens.empty()) result.miss_reason = MissReason::kOptedOut;
    return result;
  }
  RadixTree* tree = impl_->FindTree(ns);
  if (tree != nullptr && !tree->retired) impl_->MatchPath(*tree, tokens, result);
  result.miss_reason = impl_->Explain(tree, ns, tokens, result);
  impl_->stats.hit_tokens += result.committed_tokens + result.partial_tokens;
  return result;
}

PeekResult RadixCache::Peek(const Namespace& ns, absl::Span<const int32_t> tokens,
                            absl::Duration now) const {
  PeekResult result;
  const RadixTree* tree = impl_->FindTree(ns);
  if (tree == nullptr || tree->retired) return result;
  const RadixNode* node = tree->root.get();
  while (const RadixNode* child = node->FindChild(tokens)) {
    if (child->num_leases == 0 && child->expires_at <= now) break;  // what Match would expire first
    const int64_t matched = child->MatchBlocks(tokens);
    result.matched_tokens += matched * block_tokens();
    if (child->num_leases > 0) result.leased_tokens += matched * block_tokens();
    if (matched < child->num_blocks()) break;
    tokens.remove_prefix(matched * block_tokens());
    node = child;
  }
  return result;
}

Lease RadixCache::Share(const Lease& lease) {
  Lease shared;
  impl_->Open(shared, this, lease.owner_);
  if (lease.node_ != nullptr) impl_->Attach(shared, lease.node_);
  return shared;
}

absl::StatusOr<BlockSet> RadixCache::Allocate(int64_t n) {
  CHECK_GE(n, 0);
  if (n > AvailableBlocks()) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "allocate kv blocks: need %d, have %d free and %d evictable of %d; wait for leases to end "
        "or enlarge the pool",
        n, impl_->pool.num_free(), impl_->stats.cached_only_blocks, impl_->pool.num_blocks()));
  }
  while (impl_->pool.num_free() < n) {
    RadixNode* leaf = impl_->evictable.First();
    const int64_t count = std::min(n - impl_->pool.num_free(), leaf->num_blocks());
    impl_->stats.evicted_blocks += count;
    impl_->TrimLeaf(leaf, count);
  }
  return impl_->pool.Take(n);
}

int64_t RadixCache::AvailableBlocks() const {
  return impl_->pool.num_free() + impl_->stats.cached_only_blocks;
}

int64_t RadixCache::Publish(const Namespace& ns, absl::Span<const int32_t> tokens, Lease& lease,
                            BlockSet blocks, const PublishOptions& options) {
  CHECK_EQ(static_cast<int64_t>(tokens.size()),
           lease.num_tokens() + blocks.size() * block_tokens());
  if (tokens.empty()) return 0;
  if (lease.cache_ == nullptr) impl_->Open(lease, this, lease.owner_);
  CHECK(lease.cache_ == this);
  CHECK(lease.empty() || lease.node_->tree->ns == ns);
  RadixNode* start = lease.empty() ? impl_->FindOrMakeTree(ns).root.get() : lease.node_;
  const Impl::Twins where = impl_->SkipTwins(start, tokens.subspan(lease.num_tokens()), blocks);
  if (where.node != start) impl_->Attach(lease, where.node);
  const int64_t entered = where.in_flight || where.node->is_private ? 0 : blocks.size();
  if (blocks.size() > 0) {
    impl_->Enter(lease, where, tokens.subspan(lease.num_tokens()), std::move(blocks), options);
  }
  impl_->Renew(lease.node_, options);
  impl_->Commit(lease.node_, options.committed_tokens / block_tokens());
  impl_->stats.published_blocks += entered;
  return entered;
}

void RadixCache::Commit(Lease& lease, int64_t num_tokens) {
  if (!lease.empty()) impl_->Commit(lease.node_, num_tokens / block_tokens());
}

int64_t RadixCache::CommittedTokens(const Lease& lease) const {
  if (lease.empty()) return 0;
  const RadixNode* n = lease.node_;
  while (!n->is_root() && n->committed == 0) n = n->parent;
  return (n->first_block + n->committed) * block_tokens();
}

bool RadixCache::HasProducer(const Lease& lease) const {
  const RadixNode* first = FirstUncommitted(lease.node_);
  return first != nullptr && first->producer != 0;
}

bool RadixCache::Produces(const Lease& lease) const {
  const RadixNode* first = FirstUncommitted(lease.node_);
  return first != nullptr && first->producer == lease.id_;
}

bool RadixCache::TakeOver(Lease& lease) {
  bool taken = false;
  for (RadixNode* n = lease.node_; n != nullptr && !n->all_committed(); n = n->parent) {
    if (n->producer != 0) continue;
    n->producer = lease.id_;
    n->producer_owner = lease.owner_;
    taken = true;
  }
  return taken;
}

int64_t RadixCache::Flush(const Namespace* ns) {
  const RadixTree* tree = ns == nullptr ? nullptr : impl_->FindTree(*ns);
  if (ns != nullptr && tree == nullptr) return 0;
  const int64_t before = impl_->stats.cached_only_blocks;
  for (RadixNode* leaf : impl_->evictable.Leaves(tree)) {
    while (leaf != nullptr) leaf = impl_->TrimLeaf(leaf, leaf->num_blocks());
  }
  return before - impl_->stats.cached_only_blocks;
}

int64_t RadixCache::Expire(absl::Duration now) {
  int64_t freed = 0;
  while (RadixNode* leaf = impl_->evictable.FirstExpired(now)) {
    freed += leaf->num_blocks();
    impl_->TrimLeaf(leaf, leaf->num_blocks());
  }
  return freed;
}

void RadixCache::Retire(const Namespace& ns) {
  if (RadixTree* tree = impl_->FindTree(ns); tree != nullptr) impl_->Retire(*tree);
}

void RadixCache::RetireAll() {
  for (auto& [ns, tree] : impl_->trees) impl_->Retire(*tree);
}

CacheStats RadixCache::Stats() const {
  CacheStats stats = impl_->stats;
  stats.total_blocks = impl_->pool.num_blocks();
  stats.free_blocks = impl_->pool.num_free();
  stats.leased_blocks = impl_->leased_in_tree + impl_->pool.num_owned();
  stats.num_namespaces = static_cast<int64_t>(impl_->trees.size());
  return stats;
}

}  // namespace coppice
