// State of RadixCache and the steps that its methods are made of. Included by radix_cache*.cc only.
#pragma once

#include <memory>

#include "absl/container/flat_hash_map.h"
#include "cache/block_pool.h"
#include "cache/eviction_order.h"
#include "cache/prefix_history.h"
#include "cache/radix_cache.h"
#include "cache/radix_node.h"

namespace coppice {

struct RadixCache::Impl {
  explicit Impl(const RadixCache::Options& options);

  // ---- Trees
  RadixTree* FindTree(const Namespace& ns) const;  // null if nothing is stored
  RadixTree& FindOrMakeTree(const Namespace& ns);
  void EraseIfEmpty(RadixTree* tree);
  void Retire(RadixTree& tree);
  RadixNode* Split(RadixNode* node, int64_t n);  // returns the upper part

  // ---- Leases
  void Open(Lease& lease, RadixCache* cache, RequestId owner);
  // Extends the lease from its node down to `node`.
  void Attach(Lease& lease, RadixNode* node);
  void Detach(Lease& lease);

  // ---- Match
  void MatchPath(RadixTree& tree, absl::Span<const int32_t> tokens, MatchResult& result);
  MissReason Explain(const RadixTree* tree, const Namespace& ns, absl::Span<const int32_t> tokens,
                     const MatchResult& result) const;

  // ---- Publish and commit
  // Moves down from `node` over committed twins of `run` and frees as many of `blocks`.
  struct Twins {
    RadixNode* node;  // where what is left of `blocks` continues
    bool in_flight;   // another lease computes the next block
  };
  Twins SkipTwins(RadixNode* node, absl::Span<const int32_t> run, BlockSet& blocks);
  // Puts `blocks` below `node` and extends the lease over them.
  void Enter(Lease& lease, const Twins& where, absl::Span<const int32_t> run, BlockSet blocks,
             const PublishOptions& options);
  std::unique_ptr<RadixNode> MakeChild(const Twins& where, int32_t priority,
                                       absl::Duration expires_at);  // empty, under one lease
  void Renew(RadixNode* node, const PublishOptions& options);
  // The KV of the first num_blocks blocks of the path to `node` exists.
  void Commit(RadixNode* node, int64_t num_blocks);

  // ---- What nobody leases
  // The node's last lease has ended: what is committed is cached, the rest becomes free.
  void Settle(RadixNode* node);
  void ListIfEvictable(RadixNode* node);
  // Frees n trailing blocks of an evictable leaf. An empty leaf vanishes; returns its parent if
  // that is evictable now.
  RadixNode* TrimLeaf(RadixNode* leaf, int64_t n);
  void FreeTail(RadixNode* node, int64_t n);  // n < num_blocks(): cut; all: the leaf is removed

  const int64_t block_tokens;
  BlockPool pool;
  absl::flat_hash_map<Namespace, std::unique_ptr<RadixTree>> trees;
  EvictionOrder evictable;
  PrefixHistory history;
  CacheStats stats;            // all but what Stats() fills in
  int64_t leased_in_tree = 0;  // blocks
  int64_t num_leases = 0;      // that are not empty
  uint64_t tick = 0;           // one for each lease that ends
  uint64_t next_serial = 1;
  uint64_t next_lease_id = 1;
};

}  // namespace coppice
